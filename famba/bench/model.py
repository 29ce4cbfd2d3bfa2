"""A training step of a whole model: its time beside its matrix products alone, its memory, and bf16 beside fp32.

The products are those of one step of the fastest backend, forward and backward, recorded with their shapes and strides
and repeated alone. Operands of equal layout are one tensor there and stay in cache more often than in the step, so the
products alone are, if anything, slightly too fast. The native backend projects dt inside its scan, so that this
product, 1% of all, is not among its own.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from famba import config, data
from famba.bench.timing import interleaved, ratio, summary
from famba.data import augment
from famba.fusion import strategies
from famba.kernels import dispatch, precision, scan
from famba.models.vim import VisionMamba, create_model
from famba.profiling import flops, memory
from famba.training import optim

_POINTS = 20  # of a loss curve
_MIB = 2**20


@dataclass(frozen=True)
class Setting:
    """The sizes of a benchmark."""

    scans: tuple[tuple[int, int, int, int], ...]  # (b, e, t, n) of the scans that are timed alone
    model: str  # as for `create_model`, and so are depth and d_model
    batch: int  # images of a training step
    img_sizes: tuple[int, ...]  # pixels; the largest is the model's, the others give fewer tokens
    removed: Mapping[str, int]  # tokens removed by each fusing layer, by strategy
    uniform: tuple[int, ...]  # tokens removed by every layer, near the break-even
    rounds: int  # measurements of each contestant, after one for warm-up
    curve_steps: int  # training steps of a loss curve, a multiple of 20
    loads: Mapping[int, tuple[str, int]]  # model and batch by pixels; the first set lies in memory, the second streams
    loaded: int  # images that stream in one turn
    slow_s: float  # seconds after which a slow contestant is measured no further than twice
    depth: int | None = None
    d_model: int | None = None
    device: str = "cpu"
    precision: str = "fp32"  # of the training steps: fp32, or bf16 for autocast
    turn_s: float = 0.0  # a shorter call is repeated for this long
    # Of a GPU alone.
    models: tuple[str, ...] = ()  # those whose training steps are compared
    small: tuple[str, int, int] = ("", 0, 0)  # model, batch and pixels of a step that is shorter than Python's calls
    copy_mib: int = 0  # size of the copy
    compile_s: float = 0.0  # time limit of torch.compile, seconds; 0 leaves it out

    def create(self, backend: str = "auto", *, img_size: int | None = None) -> VisionMamba:
        """The model on its device, without fusion."""
        size = img_size or max(self.img_sizes)
        sizes: dict[str, Any] = {"img_size": size, "depth": self.depth, "d_model": self.d_model}
        return create_model(self.model, num_classes=100, backend=backend, **sizes).to(self.device)

    def times(
        self, calls: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1, budget_s: float = math.inf
    ) -> dict[str, dict[str, float | int]]:
        """Summaries of `interleaved` calls on this device."""
        finish = torch.cuda.synchronize if torch.device(self.device).type == "cuda" else None
        found = interleaved(calls, rounds=rounds, warmup=warmup, turn_s=self.turn_s, budget_s=budget_s, finish=finish)
        return {name: summary(x) for name, x in found.items()}

    def schedules(self, depth: int) -> dict[str, list[int]]:
        """The schedule of each strategy."""
        return {name: strategies.schedule(name, depth=depth, r=r) for name, r in self.removed.items()}


# A small scan, where overhead rules, two larger ones and Vim-Ti's at 224 px; Vim-Ti with the schedules of Famba-V's
# Table 1.
FULL = Setting(
    scans=((32, 384, 197, 16), (64, 192, 65, 16), (64, 128, 65, 16), (16, 96, 50, 8)), model="vim_tiny", batch=16,
    img_sizes=(224, 192, 160, 128, 96, 80), removed={"all": 7, "interleaved": 14, "lower": 9, "upper": 9},
    uniform=(1, 2, 3, 5), rounds=5, curve_steps=200, loads={32: ("vim_micro", 64), 224: ("vim_tiny", 8)}, loaded=256,
    slow_s=10.0,
)  # fmt: skip
# Seconds, to see that it works.
QUICK = Setting(
    scans=((2, 32, 19, 8),), model="vim_nano", depth=4, batch=4, img_sizes=(8, 6, 5),
    removed={"all": 6, "interleaved": 10, "lower": 8, "upper": 8}, uniform=(1, 6), rounds=2, curve_steps=20,
    loads={16: ("vim_nano", 4), 40: ("vim_nano", 4)}, loaded=8, slow_s=1.0,
)  # fmt: skip


class Training:
    """A model in training on one random batch.

    Args:
        img_size: pixels; None is the setting's.
        precision: fp32 or bf16; None is the setting's.

    Attributes:
        forward: gives the logits; the model unless it is replaced.
    """

    def __init__(
        self, setting: Setting, backend: str = "auto", *, img_size: int | None = None, precision: str | None = None
    ) -> None:
        torch.manual_seed(0)
        self.model = setting.create(backend, img_size=img_size)
        self.forward: Callable[[Tensor], Tensor] = self.model
        side, device = self.model.img_size, setting.device
        self.images = torch.randn(setting.batch, 3, side, side).to(device)
        self.precision = precision or setting.precision
        self.labels = torch.arange(setting.batch, device=device) % self.model.head.out_features
        groups = optim.parameter_groups(self.model, 0.05)
        self.optimiser = torch.optim.AdamW(groups, lr=1e-4, fused=True, capturable=self.images.is_cuda)

    def step(self, schedule: Sequence[int] | None = None) -> None:
        """Forward, loss, backward, optimiser; no fusion without a schedule."""
        self.model.set_fusion([0] * self.model.depth if schedule is None else schedule, self.model.options)
        with precision.autocast(self.images.device, self.precision):
            logits = self.forward(self.images).float()
        functional.cross_entropy(logits, self.labels).backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def resident(self) -> list[Tensor]:
        """Tensors that live between steps."""
        moments = [x for state in self.optimiser.state.values() for x in state.values() if isinstance(x, Tensor)]
        return [self.images, self.labels, *self.model.parameters(), *moments]


def available(device: str = "cpu") -> list[str]:
    """The scan's backends that "auto" tries on a device and that can run here, the fastest first; torch is the last."""
    reasons = scan.backends()
    return [name for name in dispatch._FASTEST[torch.device(device).type] if not reasons[name]]


def bench_model(setting: Setting) -> list[dict[str, Any]]:
    """One row per backend, and one for the matrix products alone, the unit of `products`."""
    trainings = {backend: Training(setting, backend) for backend in available()}
    products = products_of(next(iter(trainings.values())).step)
    calls: dict[str, Callable[[], object]] = {f"step, {name}": x.step for name, x in trainings.items()}
    calls["matrix products"] = lambda: repeat(products)
    found = setting.times(calls, rounds=setting.rounds, budget_s=setting.slow_s)
    gflops = flops_of(products) / 1e9
    return [
        {"what": name, **row, **ratio(row, found["matrix products"], "products")}
        | {"product_gflops": gflops, "product_gflops_per_s": 1e3 * gflops / row["median_ms"]}
        for name, row in found.items()
    ]


# A matrix product, or a convolution that is one for each patch: operation and arguments.
Product = tuple[Callable[..., Any], list[Any]]
_aten = torch.ops.aten
# The position of the argument `groups`: a depthwise convolution is no matrix product.
PRODUCT_OPS = {
    _aten.mm.default: None,
    _aten.addmm.default: None,
    _aten.bmm.default: None,
    _aten.baddbmm_.default: None,
    _aten.convolution.default: 8,
    _aten.convolution_backward.default: 9,
}


class _Recorder(TorchDispatchMode):
    """Products with random numbers for their operands, one tensor for all of the same layout."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Product] = []
        self._tensors: dict[tuple[Any, ...], Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in PRODUCT_OPS and (PRODUCT_OPS[func] is None or args[PRODUCT_OPS[func]] == 1):
            self.found.append((func, [self._operand(x) if isinstance(x, Tensor) else x for x in args]))
        return func(*args, **(kwargs or {}))

    def _operand(self, x: Tensor) -> Tensor:
        layout = x.shape, x.stride(), x.dtype
        if layout not in self._tensors:
            length = 1 + sum((n - 1) * s for n, s in zip(*layout[:2], strict=True))
            self._tensors[layout] = torch.randn(length, dtype=x.dtype).as_strided(*layout[:2])
        return self._tensors[layout]


def products_of(step: Callable[[], object]) -> list[Product]:
    """The products of linear layers and of the patch embedding in a step, which runs once, of random numbers."""
    with _Recorder() as recorder:
        step()
    return recorder.found


@torch.no_grad()
def repeat(products: Iterable[Product]) -> None:
    """Compute these products, in their order."""
    for op, arguments in products:
        op(*arguments)


def flops_of(products: Iterable[Product]) -> int:
    """A multiplication and an addition are two, as in torch's counter."""
    with FlopCounterMode(display=False) as counter:
        repeat(products)
    return counter.get_total_flops()


def bench_memory(setting: Setting) -> list[dict[str, Any]]:
    """Peak memory of a step: one row per backend without fusion, and one per strategy with the fastest backend.

    `of_torch` is relative to the torch backend, `of_predicted` to the formula of `flops.analyse`.
    """
    rows: list[dict[str, Any]] = []
    backends = available()[::-1]
    for backend in backends:
        training = Training(setting, backend)
        depth = training.model.depth
        training.step()  # creates the optimiser's moments
        schedules = {"none": [0] * depth} | (setting.schedules(depth) if backend == backends[-1] else {})
        for strategy, schedule in schedules.items():
            peak = memory.peak_memory(lambda x=training, s=schedule: x.step(s), training.resident(), "cpu")
            predicted = flops.analyse(training.model.config, schedule, batch=setting.batch, backend=backend).peak_bytes
            sizes = {"peak_mib": peak / _MIB, "predicted_mib": predicted / _MIB, "of_predicted": peak / predicted}
            rows.append({"backend": backend, "strategy": strategy, **sizes})
    return [{**row, "of_torch": row["peak_mib"] / rows[0]["peak_mib"]} for row in rows]


def bench_precision(setting: Setting) -> list[dict[str, Any]]:
    """A training step in fp32 and in bf16; `faster` is the time in fp32 over the row's."""
    calls = {name: Training(setting, precision=name).step for name in ("fp32", "bf16")}
    found = setting.times(calls, rounds=setting.rounds)
    return [{"precision": name, **row, **ratio(found["fp32"], row, "faster")} for name, row in found.items()]


def bench_curves(setting: Setting) -> list[dict[str, Any]]:
    """The training loss of vim_nano on digits in fp32 and bf16, in 20 means.

    fp32 with the images in another order shows how far apart two curves lie without any difference in precision.
    """
    runs = {"fp32": ("fp32", 0), "bf16": ("bf16", 0), "fp32, other order": ("fp32", 1)}
    losses = {}
    for name, (kind, order) in runs.items():
        curve = loss_curve(kind, steps=setting.curve_steps, depth=setting.depth, order=order)
        losses[name] = np.reshape(curve, (_POINTS, -1)).mean(1)
    each = setting.curve_steps // _POINTS
    return [{"step": (i + 1) * each, **{name: float(x[i]) for name, x in losses.items()}} for i in range(_POINTS)]


def loss_curve(precision_name: str, *, steps: int, depth: int | None = None, order: int = 0) -> list[float]:
    """The loss of every training step of vim_nano on digits, always from the same weights.

    Args:
        depth: of the model; None is its own.
        order: seed of the order and the shifts of the images.
    """
    torch.manual_seed(0)
    p = config.load("default", strategy="none").data
    images = data.load(p)
    classes = len(images.classes)
    model = create_model("vim_nano", num_classes=classes, depth=depth)
    optimiser = torch.optim.AdamW(optim.parameter_groups(model, 0.05), lr=1e-3, fused=True)
    generator = torch.Generator().manual_seed(order)
    losses: list[float] = []
    while True:
        for batch, labels in data.batches(images.train, 32, generator=generator, drop_last=True):
            if len(losses) == steps:
                return losses
            draws = augment.draw(p, len(batch), generator, classes=classes)
            shown, _ = augment.apply(batch, labels, draws, images.mean, images.std, 0.0)
            with precision.autocast(batch.device, precision_name):
                logits = model(shown).float()
            loss = functional.cross_entropy(logits, labels)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            losses.append(loss.item())

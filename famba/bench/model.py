"""One training step of a whole model: against its matrix products alone, and where its time goes.

The products are those that one step of the fastest backend makes, forward and both of backward, written down with
their shapes and strides and made again by themselves. Operands of the same shape are one tensor there, so that they are
in a cache more often than in the step: the products alone are, if anything, a little too fast. The native backend
projects dt inside its scan, so that this product, 1% of all, is not among its own.
"""

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from famba.bench.setting import Setting
from famba.bench.timing import ratio
from famba.fusion import matching, merge
from famba.kernels import ops, precision, scan
from famba.models import vim
from famba.profiling import memory
from famba.training import optim

PARTS = ("matrix products", "scan", "convolution", "norm", "gate", "fusion", "elementwise", "optimiser", "Python")


class Training:
    """A model in training on one random batch.

    Args:
        img_size: pixels; the setting's own if not given.
        precision: fp32, or bf16 for autocast; the setting's own if not given.

    Attributes:
        forward: what gives the logits, the model itself if nothing else is put there.
    """

    def __init__(
        self, setting: Setting, backend: str = "auto", *, img_size: int | None = None, precision: str | None = None
    ) -> None:
        torch.manual_seed(0)
        self.model = setting.create(backend, img_size=img_size)
        self.forward: Callable[[Tensor], Tensor] = self.model
        side, device = self.model.img_size, setting.device
        self.images = torch.randn(setting.batch, 3, side, side).to(device)
        self.precision = setting.precision if precision is None else precision
        self.labels = torch.arange(setting.batch, device=device) % self.model.head.out_features
        groups, on_device = optim.parameter_groups(self.model, 0.05), self.images.is_cuda
        self.optimiser = torch.optim.AdamW(groups, lr=1e-4, fused=True, capturable=on_device)

    def step(self, schedule: Sequence[int] | None = None) -> None:
        """Forward, loss, backward, optimiser; without a schedule nothing is fused."""
        self.model.set_fusion([0] * self.model.depth if schedule is None else schedule, self.model.options)
        with precision.autocast(self.images.device, self.precision):
            logits = self.forward(self.images).float()
        functional.cross_entropy(logits, self.labels).backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def resident(self) -> list[Tensor]:
        """What is alive between steps."""
        moments = [x for state in self.optimiser.state.values() for x in state.values() if isinstance(x, Tensor)]
        return [self.images, self.labels, *self.model.parameters(), *moments]


def able(*names: str) -> list[str]:
    """Those of the scan's backends that can run here."""
    found = scan.backends()
    return [name for name in names if found.get(name, "absent") == ""]


def bench_model(setting: Setting) -> list[dict[str, Any]]:
    """One row per backend, and one for the matrix products alone, which is the unit of `products`."""
    trainings = {backend: Training(setting, backend) for backend in able("native", "torch")}
    products = products_of(next(iter(trainings.values())).step)
    calls: dict[str, Callable[[], object]] = {f"step, {name}": x.step for name, x in trainings.items()}
    calls["matrix products"] = replay(products)
    found = setting.times(calls, rounds=setting.rounds, budget_s=setting.slow_s)
    flops = flops_of(products)
    return [
        {
            "what": name,
            **row,
            **ratio(row, found["matrix products"], "products"),
            "product_gflops": flops / 1e9,
            "product_gflops_per_s": flops / row["median_ms"] / 1e6,
        }
        for name, row in found.items()
    ]


class Like(NamedTuple):
    """A tensor but for its numbers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Any) -> Any:
        """A tensor's description; anything else as it is."""
        return cls(tuple(x.shape), x.stride(), x.dtype) if isinstance(x, Tensor) else x


class Product(NamedTuple):
    """A matrix product, or a convolution that is one for each patch, as it was called."""

    op: Callable[..., Any]
    arguments: tuple[Any, ...]


_aten = torch.ops.aten
# With the place of the argument that says how many groups there are: a depthwise convolution is no matrix product.
_OPS = {
    _aten.mm.default: None,
    _aten.addmm.default: None,
    _aten.bmm.default: None,
    _aten.baddbmm_.default: None,
    _aten.convolution.default: 8,
    _aten.convolution_backward.default: 9,
}


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Product] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _OPS and (_OPS[func] is None or args[_OPS[func]] == 1):
            self.found.append(Product(func, tuple(map(Like.of, args))))
        return func(*args, **(kwargs or {}))


def products_of(step: Callable[[], object]) -> list[Product]:
    """The products of linear layers and of the patch embedding that a step makes; runs it once."""
    with _Recorder() as recorder:
        step()
    return recorder.found


def replay(products: Iterable[Product]) -> Callable[[], None]:
    """A call that makes these products, in their order, of random numbers."""
    operands: dict[Like, Tensor] = {}

    def operand(x: Any) -> Any:
        if not isinstance(x, Like):
            return x
        if x not in operands:
            length = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride, strict=True))
            operands[x] = torch.randn(length, dtype=x.dtype).as_strided(x.shape, x.stride)
        return operands[x]

    calls = [(op, [operand(x) for x in arguments]) for op, arguments in products]

    @torch.no_grad()
    def call() -> None:
        for op, arguments in calls:
            op(*arguments)

    return call


def flops_of(products: Iterable[Product]) -> int:
    """As torch's counter has it: a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter:
        replay(products)()
    return counter.get_total_flops()


def bench_profile(setting: Setting) -> list[dict[str, Any]]:
    """Where the time of a step goes: torch's backend, the native one, with tokens fused in every layer, and in bf16."""
    steps: dict[str, Callable[[], None]] = {}
    for backend in able("torch", "native"):
        training = Training(setting, backend)
        steps[backend] = training.step
        schedule = setting.schedules(training.model.depth)["all"]
        if backend == "native":
            steps["native, fused in all layers"] = lambda training=training, schedule=schedule: training.step(schedule)
            steps["native, bf16"] = Training(setting, backend, precision="bf16").step
    rows = []
    for name, step in steps.items():
        step()
        times = parts_of(step)
        whole = math.fsum(times.values())
        rows += [{"step": name, "part": part, "ms": times[part], "share": times[part] / whole} for part in PARTS]
    return rows


def parts_of(step: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of one step by part, `PARTS`; runs it once, a little slower than without being watched.

    Each operation's own time counts for the innermost part that it belongs to; in backward for that of the operation
    whose gradient it makes. Activation functions, sums, copies and the loss that belong to no other part are
    `elementwise`; `Python` is what no operation took.
    """
    with (
        memory._without_profiler_lines(),
        _named_parts(),
        profile(activities=[ProfilerActivity.CPU], acc_events=False) as recorded,
        record_function(_NAMED + "Python"),
    ):
        step()
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = [
        _Event(x.name(), x.start_ns(), x.duration_ns(), x.sequence_nr(), x.start_thread_id())
        for x in recorded.profiler.kineto_results.events()
    ]
    return {part: own_ns / 1e6 for part, own_ns in _own_times(events).items()}


_NAMED = "part: "
_BACKWARD = "autograd::engine::evaluate_function: "
_PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm_",
    "aten::convolution",
    "aten::convolution_backward",
)
# Operators of the native mixer, whose scans include the projection of dt and the gate
_NATIVE = {"famba::scans": "scan", "famba::convs": "convolution"}
# The functions that a block calls, by the names that it calls them by.
_FUNCTIONS = (
    ("scan", ops, "projected_scan"),
    ("convolution", ops, "causal_conv1d_silu"),
    ("gate", ops, "gated_sum"),
    ("norm", vim, "add_rms_norm"),
    ("fusion", matching, "match_tokens"),
    ("fusion", merge, "plan"),
    ("fusion", merge, "apply_both"),
)


class _Event(NamedTuple):
    name: str
    start_ns: int
    duration_ns: int
    node: int  # of autograd's graph: the same number in forward and backward; -1 without one
    thread: int


class _Open(NamedTuple):
    """An event that others may lie within."""

    end_ns: int
    part: str
    in_backward: bool


@contextlib.contextmanager
def _named_parts() -> Iterator[None]:
    """Have the profiler see the functions of a block by the part they belong to."""

    def named(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(_NAMED + part):
                return function(*args, **kwargs)

        return call

    kept = [(module, name, getattr(module, name)) for _, module, name in _FUNCTIONS]
    for part, module, name in _FUNCTIONS:
        setattr(module, name, named(part, getattr(module, name)))
    try:
        yield
    finally:
        for module, name, function in kept:
            setattr(module, name, function)


def _own_times(events: Iterable[_Event]) -> dict[str, int]:
    """Nanoseconds by part, of all that lies within the event named for the step."""
    ordered = sorted(events, key=lambda x: (x.start_ns, -x.duration_ns))
    whole = next(x for x in ordered if x.name == _NAMED + "Python")
    own: dict[str, int] = defaultdict(int)
    part_of_node: dict[int, str] = {}
    above = [_Open(whole.start_ns + whole.duration_ns, "Python", False)]
    own["Python"] = whole.duration_ns
    for event in ordered[ordered.index(whole) + 1 :]:
        if event.thread != whole.thread or event.start_ns >= above[0].end_ns:
            continue
        while event.start_ns >= above[-1].end_ns:
            above.pop()
        around = above[-1]
        begins_backward = event.name.startswith(_BACKWARD)
        part = around.part
        native = _NATIVE.get(event.name.removesuffix("_backward"))
        if native is not None:
            part = native
        elif part in ("Python", "elementwise"):
            part = part_of_node.get(event.node, "elementwise") if begins_backward else _part(event.name)
        if not (around.in_backward or begins_backward) and event.node >= 0:
            # The last event with a node's number is the one that makes it. Products are told by their own names in
            # backward too, where gradients are summed beside them.
            part_of_node[event.node] = "elementwise" if part == "matrix products" else part
        own[around.part] -= event.duration_ns
        own[part] += event.duration_ns
        above.append(_Open(event.start_ns + event.duration_ns, part, around.in_backward or begins_backward))
    return {part: own[part] for part in PARTS}


def _part(name: str) -> str:
    if name.startswith(_NAMED):
        return name.removeprefix(_NAMED)
    if name.startswith("Optimizer."):
        return "optimiser"
    return "matrix products" if name.removeprefix("aten::") in _PRODUCTS else "elementwise"

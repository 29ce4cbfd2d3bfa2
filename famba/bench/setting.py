"""What is measured: the sizes of the benchmark, and small ones that show within seconds that it works."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from famba.bench.timing import interleaved, summary
from famba.fusion import strategies
from famba.models.vim import VisionMamba, create_model


@dataclass(frozen=True)
class Setting:
    """One benchmark.

    Attributes:
        scans: (b, e, t, n) of the scans that are timed alone.
        model, depth: of what is trained, as for `create_model`.
        batch: images of a training step.
        img_sizes: pixels; the largest is the model's, the others give it fewer tokens.
        removed: by strategy, the tokens that each of its fusing layers removes.
        uniform: tokens removed by every layer alike, where fusing might begin to win.
        rounds: times that each thing is measured, after one for warming up.
        curve_steps: training steps of a loss curve; 20 points are made of them.
        loads: by pixels, the model whose training step takes the images, and its batch; the first size is of images
            that lie in memory, the second of some that stream.
        loaded: images that stream in one turn.
        slow_s: seconds after which something slow is measured no further, two times apart.
        device: that all of it runs on.
        precision: of the training steps, if nothing else is said: fp32, or bf16 for autocast.
        turn_s: seconds that a turn lasts at least; what is over sooner is made again.
    """

    scans: tuple[tuple[int, int, int, int], ...]
    model: str
    batch: int
    img_sizes: tuple[int, ...]
    removed: Mapping[str, int]
    uniform: tuple[int, ...]
    rounds: int
    curve_steps: int
    loads: Mapping[int, tuple[str, int]]
    loaded: int
    slow_s: float
    depth: int | None = None
    device: str = "cpu"
    precision: str = "fp32"
    turn_s: float = 0.0

    def create(self, backend: str = "auto", *, img_size: int | None = None) -> VisionMamba:
        """The model, on its device; it fuses nothing yet."""
        size = max(self.img_sizes) if img_size is None else img_size
        model = create_model(self.model, num_classes=100, img_size=size, backend=backend, depth=self.depth)
        return model.to(self.device)

    def times(
        self, calls: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1, budget_s: float = math.inf
    ) -> dict[str, dict[str, float | int]]:
        """Summaries of the times of calls that take turns on this device; arguments as of `interleaved`."""
        finish = torch.cuda.synchronize if torch.device(self.device).type == "cuda" else None
        found = interleaved(calls, rounds=rounds, warmup=warmup, turn_s=self.turn_s, budget_s=budget_s, finish=finish)
        return {name: summary(x) for name, x in found.items()}

    def schedules(self, depth: int) -> dict[str, list[int]]:
        """Tokens removed by each layer, by strategy."""
        return {name: strategies.schedule(name, depth=depth, r=r) for name, r in self.removed.items()}


# Vim-Ti's scan at 224 px, and two small ones; Vim-Ti and the four schedules of Famba-V's Table 1.
FULL = Setting(
    scans=((32, 384, 197, 16), (64, 192, 65, 16), (64, 128, 65, 16)),
    model="vim_tiny",
    batch=16,
    img_sizes=(224, 192, 160, 128, 96, 80),
    removed={"all": 7, "interleaved": 14, "lower": 9, "upper": 9},
    uniform=(1, 2, 3, 5),
    rounds=5,
    curve_steps=200,
    loads={32: ("vim_micro", 64), 224: ("vim_tiny", 8)},
    loaded=256,
    slow_s=10.0,
)
QUICK = Setting(
    scans=((2, 32, 19, 8),),
    model="vim_nano",
    depth=4,
    batch=4,
    img_sizes=(8, 6, 5),
    removed={"all": 6, "interleaved": 10, "lower": 8, "upper": 8},
    uniform=(1, 6),
    rounds=2,
    curve_steps=20,
    loads={16: ("vim_nano", 4), 40: ("vim_nano", 4)},
    loaded=8,
    slow_s=1.0,
)

"""How long a sweep would take on this device, from a few training steps of each strategy: `python -m famba hours`.

The steps are those of training itself (famba.training.trainer), on images of noise. Loading and varying images,
validation and the test come on top.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from famba import config
from famba.bench.table import table
from famba.config import Params
from famba.data import Dataset, Split
from famba.errors import InputError
from famba.kernels import precision
from famba.profiling import environment, timing
from famba.training import fit
from famba.training.distributed import Processes
from famba.training.trainer import Session

MODELS = ("vim_tiny", "vim_small")  # of the paper's Table 1, each with the same strategies
IMAGES = 45_000  # of CIFAR's 50,000, were a tenth held out
_CLASSES = 100
_WARMUP = 3  # steps: kernels are compiled, the optimiser's moments made, memory found
_WAYS_TO_VARY = {
    "augment": "tensor", "rand_augment": None, "color_jitter": 0.0, "mixup": 0.0, "cutmix": 0.0, "erase": 0.0,
}  # fmt: skip


def hours(
    profile: str | None = None, *, steps: int = 20, images: int = IMAGES, device: str | None = None
) -> list[dict[str, Any]]:
    """One row for each model and strategy of the sweep, trained with one seed, in one process.

    A profile of one of the models of Table 1 stands for both of them; another for its own model alone.

    Args:
        profile: one of params.yaml's; None is the one that it names itself.
        steps: that are timed, after a few for warming up.
        images: that an epoch trains on.
        device: instead of the profile's.

    Raises:
        InputError: a device that is not here, a profile that trains nothing, fewer images than a step takes.
    """
    if steps < 1:
        raise InputError(f"steps: {steps}: must be at least 1")
    rows = []
    for strategy in config.load_sweep().strategies:
        p = config.load(profile, strategy=strategy)
        names = MODELS if p.model.name in MODELS else (p.model.name,)
        rows += [_row(_alone(p, name, device), steps, images) for name in names]
    return sorted(rows, key=lambda row: row["model"], reverse=True)  # stable: strategies stay in their order


def text(rows: Sequence[Mapping[str, Any]], profile: str, device: torch.device) -> str:
    """The rows to be read in a terminal, each model's hours below them, and those of all."""
    at = environment.environment(device)
    versions = ", ".join(f"{name} {version}" for name, version in at["versions"].items())
    models = list(dict.fromkeys(row["model"] for row in rows))
    sums = {name: math.fsum(row["hours"] for row in rows if row["model"] == name) for name in models}
    setting = "{epochs} epochs, {batch} images a step, {precision}".format_map(rows[0])
    shown = [key for key in _SHOWN if rows[0][key] is not None]
    lines = [
        f"profile {profile}: {setting}; {at['device']}; {versions}",
        "",
        table([{key: row[key] for key in shown} for row in rows]),
        "",
        *(f"{name}, {sum(row['model'] == name for row in rows)} strategies: {_hours(sums[name])}" for name in models),
        f"the whole table, one seed: {_hours(math.fsum(sums.values()))}; loading images and validation come on top",
    ]
    return "\n".join(lines)


_SHOWN = ("model", "strategy", "step_ms", "least_ms", "peak_mib", "epoch_s", "hours")


def place(profile: str | None = None, device: str | None = None) -> torch.device:
    """The device that a profile names, or the one given instead of it.

    Raises:
        InputError: it is not here.
    """
    t = config.load(profile, strategy="none").train
    try:
        return fit._device(t if device is None else dataclasses.replace(t, device=device))
    except InputError as error:
        hint = "" if (device or t.device) == "cpu" else "; to try it here: --device cpu"
        raise InputError(f"{error}{hint}") from None


def _alone(p: Params, name: str, device: str | None) -> Params:
    """The parameters of that model on one device, from weights of its own."""
    if p.train.epochs == 0:
        raise InputError(f"train.epochs: 0: profile {p.profile!r} trains nothing")
    own = {} if device is None else {"device": device}
    return dataclasses.replace(
        p,
        model=dataclasses.replace(p.model, name=name),
        train=dataclasses.replace(p.train, init_from=None, processes=1, **own),
    )


def _row(p: Params, steps: int, images: int) -> dict[str, Any]:
    t = p.train
    if images < t.batch_size:
        raise InputError(f"images: {images}: must be at least train.batch_size, {t.batch_size}")
    device = place(p.profile, t.device)
    if t.threads is not None:
        torch.set_num_threads(t.threads)
    precision.configure()
    session, parts = _session(p, device)
    clock = timing.StepClock(device, warmup_steps=_WARMUP)
    session.model.train()
    for step in range(_WARMUP + steps):
        if step == 1 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with clock.step():
            session._step(parts, t.lr, step)
    step_ms = statistics.median(clock.step_time_ms)
    epoch_s = images // t.batch_size * step_ms / 1000
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    return {
        "model": p.model.name,
        "strategy": p.strategy,
        "step_ms": step_ms,
        "least_ms": min(clock.step_time_ms),
        "peak_mib": peak,
        "epoch_s": epoch_s,
        "hours": t.epochs * epoch_s / 3600,
        "epochs": t.epochs,
        "batch": t.batch_size,
        "precision": t.precision,
    }


def _session(p: Params, device: torch.device) -> tuple[Session, list[Any]]:
    """A run that could begin, and the images of its steps; they need not be varied, being noise."""
    size, side = p.train.batch_size, p.data.img_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (size, 3, side, side), dtype=torch.uint8, generator=generator)
    split = Split(pixels.to(device), torch.arange(size, device=device) % _CLASSES)
    noise = Dataset(split, split, split, tuple(map(str, range(_CLASSES))), (0.5,) * 3, (0.25,) * 3)
    unvaried = dataclasses.replace(p, data=dataclasses.replace(p.data, **_WAYS_TO_VARY))
    model = fit.build(p, classes=_CLASSES, seed=0).to(device)
    session = Session(unvaried, 0, model, noise, Processes(device), config.root() / "build" / "hours")
    images, labels = session._blank(size), split.labels
    if p.data.mixup or p.data.cutmix:
        labels = functional.one_hot(labels, _CLASSES).float()
    return session, list(zip(images.chunk(session.parts), labels.chunk(session.parts), strict=True))


def _hours(x: float) -> str:
    return f"{x:.1f} hours" if x >= 1 else f"{60 * x:.1f} minutes"

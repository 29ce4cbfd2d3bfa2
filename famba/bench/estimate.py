"""Estimate how long a sweep takes on this device, from a few training steps of each strategy: `famba estimate`.

The steps are the trainer's own, on images of noise. Loading and augmenting, validation and test are not included.
"""

import dataclasses
import math
import statistics
from typing import Any

import pandas as pd
import torch
from torch.nn import functional

from famba import config
from famba.bench.timing import table
from famba.data import Dataset, Split
from famba.errors import InputError
from famba.kernels import precision
from famba.params import Params
from famba.profiling import environment, timing
from famba.training import fit
from famba.training.distributed import Processes
from famba.training.trainer import Trainer

MODELS = ("vim_tiny", "vim_small")  # of the paper's Table 1, each with the same strategies
IMAGES = 45_000  # of CIFAR's 50,000, with a tenth held out
_CLASSES = 100
_WARMUP = 3  # steps, which compile kernels and allocate memory
_NO_AUGMENTATION = {
    "augment": "tensor", "rand_augment": None, "color_jitter": 0.0, "mixup": 0.0, "cutmix": 0.0, "erase": 0.0,
}  # fmt: skip


def estimate(
    profile: str | None = None, *, steps: int = 20, images: int = IMAGES, device: str | None = None
) -> list[dict[str, Any]]:
    """One row for each model and strategy of the sweep, trained with one seed, in one process.

    A profile of one model of Table 1 gives rows for both; another for its own model alone.

    Args:
        profile: one of params.yaml's; None is the one named there.
        steps: timed, after a few for warm-up.
        images: of an epoch.
        device: instead of the profile's.

    Raises:
        InputError: a device that is not here, a profile without epochs, fewer images than a batch, too little memory.
    """
    if steps < 1:
        raise InputError(f"steps: {steps}: must be at least 1")
    place(profile, device)
    rows = []
    for strategy in config.load_sweep().strategies:
        p = config.load(profile, strategy=strategy)
        names = MODELS if p.model.name in MODELS else (p.model.name,)
        for name in names:
            try:
                rows.append(_row(_single(p, name, device), steps, images))
            except torch.OutOfMemoryError:
                size = p.train.device_batch or p.train.batch_size
                raise InputError(f"{name}, {strategy}: {size} images at once need more memory than there is") from None
    return sorted(rows, key=lambda row: row["model"], reverse=True)  # stable: strategies stay in their order


def text(rows: list[dict[str, Any]], profile: str, device: torch.device) -> str:
    """The rows for a terminal, with the hours of each model and of all."""
    at, first = environment.environment(device), rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in at["versions"].items())
    shown = ("model", "strategy", "step_ms", "least_ms", "peak_mib", "epoch_s", "hours")
    sums = pd.DataFrame(rows).groupby("model", sort=False)["hours"].agg(["size", "sum"])
    total = math.fsum(row["hours"] for row in rows)
    return "\n".join(
        [
            f"profile {profile}: {first['epochs']} epochs, {first['batch']} images a step, {first['precision']}; "
            f"{at['device']}; {versions}",
            "",
            table([{key: row[key] for key in shown if row[key] is not None} for row in rows]),
            "",
            *(f"{name}, {n} strategies: {_duration(hours)}" for name, n, hours in sums.itertuples()),
            f"total for one seed: {_duration(total)}, without loading images and validation",
        ]
    )


def place(profile: str | None = None, device: str | None = None) -> torch.device:
    """The device of a profile, or the one given instead.

    Raises:
        InputError: it is not here.
    """
    t = config.load(profile, strategy="none").train
    hint = "" if (device or t.device) == "cpu" else "; to try it here: --device cpu"
    try:
        return fit._device(t if device is None else dataclasses.replace(t, device=device))
    except InputError as error:
        raise InputError(f"{error}{hint}") from None


def _single(p: Params, name: str, device: str | None) -> Params:
    """The parameters with this model, on one device, from initial weights."""
    if p.train.epochs == 0:
        raise InputError(f"train.epochs: 0: profile {p.profile!r} trains nothing")
    train = dataclasses.replace(p.train, init_from=None, processes=1, device=device or p.train.device)
    return dataclasses.replace(p, model=dataclasses.replace(p.model, name=name), train=train)


def _row(p: Params, steps: int, images: int) -> dict[str, Any]:
    t = p.train
    if images < t.batch_size:
        raise InputError(f"images: {images}: must be at least train.batch_size, {t.batch_size}")
    device = place(p.profile, t.device)
    if t.threads is not None:
        torch.set_num_threads(t.threads)
    precision.configure()
    trainer, parts = _trainer(p, device)
    clock = timing.StepClock(device, warmup_steps=_WARMUP)
    trainer.model.train()
    for step in range(_WARMUP + steps):
        if step == 1 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with clock.step():
            trainer._step(parts, t.lr, step)
    step_ms = statistics.median(clock.step_time_ms)
    epoch_s = images // t.batch_size * step_ms / 1000
    return {
        "model": p.model.name,
        "strategy": p.strategy,
        "step_ms": step_ms,
        "least_ms": min(clock.step_time_ms),
        "peak_mib": torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None,
        "epoch_s": epoch_s,
        "hours": t.epochs * epoch_s / 3600,
        "epochs": t.epochs,
        "batch": t.batch_size,
        "precision": t.precision,
    }


def _trainer(p: Params, device: torch.device) -> tuple[Trainer, list[Any]]:
    """A trainer and the batch of its steps, noise that needs no augmentation."""
    size, side = p.train.batch_size, p.data.img_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (size, 3, side, side), dtype=torch.uint8, generator=generator)
    split = Split(pixels.to(device), torch.arange(size, device=device) % _CLASSES)
    noise = Dataset(split, split, split, tuple(map(str, range(_CLASSES))), (0.5,) * 3, (0.25,) * 3)
    plain = dataclasses.replace(p, data=dataclasses.replace(p.data, **_NO_AUGMENTATION))
    model = fit.build(p, classes=_CLASSES, seed=0).to(device)
    trainer = Trainer(plain, 0, model, noise, Processes(device), config.root() / "build" / "estimate")
    images, labels = trainer._noise(size), split.labels
    if p.data.mixup or p.data.cutmix:
        labels = functional.one_hot(labels, _CLASSES).float()
    return trainer, list(zip(images.chunk(trainer.parts), labels.chunk(trainer.parts), strict=True))


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"

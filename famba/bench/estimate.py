"""Estimate how long a sweep takes on this device, from a few training steps of each strategy: `famba estimate`.

The steps are those of `training.cost`, on images of noise. Loading and augmenting, validation and test are not
included.
"""

import dataclasses
import math
from typing import Any

import pandas as pd
import torch

from famba import config
from famba.bench.timing import table
from famba.data import Dataset, Split
from famba.errors import InputError
from famba.params import Params
from famba.training import cost, fit

MODELS = ("vim_tiny", "vim_small")  # of the paper's Table 1, each with the same strategies
IMAGES = 45_000  # of CIFAR's 50,000, with a tenth held out
_CLASSES = 100


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
    if steps < 2:
        raise InputError(f"steps: {steps}: must be at least 2")
    t = config.load(profile, strategy="none").train
    device = device or t.device
    try:
        fit._device(dataclasses.replace(t, device=device))
    except InputError as error:
        hint = "" if device == "cpu" else "; to try it here: --device cpu"
        raise InputError(f"{error}{hint}") from None
    rows = []
    for strategy in config.load_sweep().strategies:
        p = config.load(profile, strategy=strategy)
        p = dataclasses.replace(p, train=dataclasses.replace(p.train, device=device))
        for name in MODELS if p.model.name in MODELS else (p.model.name,):
            try:
                rows.append(_row(dataclasses.replace(p, model=dataclasses.replace(p.model, name=name)), steps, images))
            except torch.OutOfMemoryError:
                size = p.train.device_batch or p.train.batch_size
                raise InputError(f"{name}, {strategy}: {size} images at once need more memory than there is") from None
    return sorted(rows, key=lambda row: row["model"], reverse=True)  # stable: strategies stay in their order


def text(rows: list[dict[str, Any]]) -> str:
    """The rows for a terminal, with the hours of each model and of all."""
    first = rows[0]
    shown = ("model", "strategy", "step_ms", "least_ms", "peak_mib", "epoch_s", "hours")
    sums = pd.DataFrame(rows).groupby("model", sort=False)["hours"].agg(["size", "sum"])
    total = math.fsum(row["hours"] for row in rows)
    return "\n".join(
        [
            f"profile {first['profile']}: {first['epochs']} epochs, {first['batch_size']} images a step, "
            f"{first['precision']}; {first['device']}; {first['versions']}",
            "",
            table([{key: row[key] for key in shown} for row in rows]),
            "",
            *(f"{name}, {n} strategies: {_duration(hours)}" for name, n, hours in sums.itertuples()),
            f"total for one seed: {_duration(total)}, without loading images and validation",
        ]
    )


def _row(p: Params, steps: int, images: int) -> dict[str, Any]:
    t = p.train
    if t.epochs == 0:
        raise InputError(f"train.epochs: 0: profile {p.profile!r} trains nothing")
    if images < t.batch_size:
        raise InputError(f"images: {images}: must be at least train.batch_size, {t.batch_size}")
    plain = dataclasses.replace(p.data, augment="tensor", rand_augment=None, color_jitter=0.0)
    noise = _noise(t.batch_size, p.data.img_size)
    measured = cost.measure({p.strategy: dataclasses.replace(p, data=plain)}, rounds=steps, images=noise)
    step_ms, first = measured["step_time_ms"].median(), measured.iloc[0]
    epoch_s = images // t.batch_size * step_ms / 1000
    return {
        "model": p.model.name,
        "strategy": p.strategy,
        "step_ms": step_ms,
        "least_ms": measured["step_time_ms"].min(),
        "peak_mib": first["peak_memory_mib"],
        "epoch_s": epoch_s,
        "hours": t.epochs * epoch_s / 3600,
        "precision": t.precision,
        **first[["profile", "epochs", "batch_size", "device", "versions"]].to_dict(),
    }


def _noise(count: int, img_size: int) -> Dataset:
    """One batch as a data set."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, img_size, img_size), dtype=torch.uint8, generator=generator)
    split = Split(pixels, torch.arange(count) % _CLASSES)
    return Dataset(split, split, split, tuple(map(str, range(_CLASSES))), (0.5,) * 3, (0.25,) * 3)


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"

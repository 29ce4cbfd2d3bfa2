"""Which option of fusion matters? The runs that tell, trained side by side.

A cell is one strategy with one value for each option of `FusionOptions`; it is trained once with each seed. One
strategy is trained with every combination of the values that are compared (the grid), the others with the profile's
own options and with one of them changed at a time. famba.analysis.ablation makes differences with
intervals of the runs.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from famba import config
from famba.config import AblationParams, Params
from famba.errors import InputError
from famba.experiments import launcher, sweep
from famba.experiments.sweep import Cell
from famba.fusion.options import FusionOptions, levels
from famba.storage import runs

COMMAND = "make ablation"


def run(asked: AblationParams, *, profile: str, runs_dir: str | Path) -> pd.DataFrame:
    """Train what is missing, several runs at a time, and gather all of it.

    A run is kept as soon as it is finished, and is trained again only if its parameters, its seed or the code have
    changed; so an ablation that was interrupted goes on where it was.

    Args:
        runs_dir: folder of the runs; if relative, from the repository root.

    Returns:
        One row per run: profile, dataset, img_size, model, strategy, the options, seed, epochs, top1_percent, loss,
        flops_per_image, device, versions, and profile_epochs, which epochs may have replaced. Nothing that two runs
        at a time would disturb: no times.

    Raises:
        FambaError: a run that cannot be trained; its message starts with the run's name.
    """
    folder = config.root() / runs_dir
    wanted = cells(asked, profile=profile)
    task = functools.partial(sweep.ensure_cell, folder=folder, train_missing=True, command=COMMAND)
    launcher.run(task, {cell.name: cell for cell in wanted}, jobs=asked.jobs)
    table = pd.DataFrame([_row(cell, runs.read(folder / cell.name)) for cell in wanted])
    return table.assign(profile_epochs=config.load(profile, strategy=asked.strategy).train.epochs)


def cells(asked: AblationParams, *, profile: str) -> list[Cell]:
    """The runs of an ablation under a profile, the strategy of the grid first.

    Raises:
        InputError: fewer epochs than the profile's warm-up takes.
    """
    found = []
    for strategy in (asked.strategy, *asked.strategies):
        p = _shortened(config.load(profile, strategy=strategy), asked)
        combined = grid(asked, p.options) if strategy == asked.strategy else []
        for options in dict.fromkeys([*combined, *one_at_a_time(asked, p.options)]):
            values = "-".join(dataclasses.asdict(options).values())
            found += [
                Cell(f"{strategy}-{values}-{seed}", dataclasses.replace(p, options=options), seed)
                for seed in asked.seeds
            ]
    return found


def grid(asked: AblationParams, reference: FusionOptions) -> list[FusionOptions]:
    """Every combination of the factors' values; an option that is no factor stays as in the reference."""
    combinations = itertools.product(*(levels(factor) for factor in asked.factors))
    return [dataclasses.replace(reference, **dict(zip(asked.factors, values, strict=True))) for values in combinations]


def one_at_a_time(asked: AblationParams, reference: FusionOptions) -> list[FusionOptions]:
    """The reference, and everything that differs from it in one factor."""
    changed = [
        dataclasses.replace(reference, **{factor: level})
        for factor in (*asked.factors, *asked.controls)
        for level in levels(factor)
        if level != getattr(reference, factor)
    ]
    return [reference, *changed]


def _shortened(p: Params, asked: AblationParams) -> Params:
    epochs = p.train.epochs if asked.epochs is None else asked.epochs
    if epochs < p.train.warmup_epochs:
        raise InputError(
            f"params.yaml: ablation.epochs: {epochs}: must be at least train.warmup_epochs of the profile "
            f"{p.profile}, {p.train.warmup_epochs}"
        )
    return dataclasses.replace(p, train=dataclasses.replace(p.train, epochs=epochs, threads=1))


def _row(cell: Cell, record: runs.RunRecord) -> Mapping[str, object]:
    p = cell.params
    return {
        "profile": p.profile,
        "dataset": p.data.dataset,
        "img_size": p.data.img_size,
        "model": p.model.name,
        "strategy": p.strategy,
        **dataclasses.asdict(p.options),
        "seed": cell.seed,
        "epochs": p.train.epochs,
        "top1_percent": record.metrics["top1_percent"],
        "loss": record.metrics["loss"],
        "correct": record.correct,
        "flops_per_image": record.cost["flops_per_image"],
        "device": record.cost["device"],
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(record.cost["versions"].items())),
    }

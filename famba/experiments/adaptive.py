"""The adaptive schedules beside the sweep: trained with its seeds at their budget, compared, written down.

A frame's `strategy` is one of `STRATEGIES`, or `adaptive-` and the measure of costs that the schedule was made from.
Intervals are those of `summary.accuracy_difference`; each is for one comparison.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from famba import config
from famba.analysis import calibration, intervals, summary
from famba.analysis.calibration import Plan
from famba.config import FusionRule, Params, SweepParams
from famba.errors import InputError
from famba.experiments import sweep
from famba.fusion.strategies import ADAPTIVE, STRATEGIES
from famba.storage import runs
from famba.storage.files import json_bytes, write_atomic

_COMMAND = "make adaptive"
_COLUMNS = ["strategy", "seed", "top1_percent", "correct", "peak_memory_mib", "flops_per_image", "tokens_removed"]


def plans(
    asked: SweepParams,
    *,
    profile: str,
    runs_dir: str | Path,
    kinds: Sequence[str] = ("logits", "similarity"),
    images: int = 256,
) -> list[Plan]:
    """A schedule for each measure of costs, by the budget of `fusion.adaptive` and the sweep's runs of `none`.

    Args:
        runs_dir: folder of the sweep's runs; if relative, from the repository root.
        kinds: as `calibration.plan` takes one.
        images: of the validation split that are looked at.

    Raises:
        InputError: as from `calibrate.plan`.
    """
    rule = config.load_adaptive(profile)
    folders = [Path(runs_dir) / runs.run_name(summary.BASELINE, seed) for seed in asked.seeds]
    return [calibration.plan(folders, rule, kind=kind, count=images) for kind in kinds]


def name(plan: Plan) -> str:
    """The strategy's name in frames."""
    return f"{ADAPTIVE}-{plan.kind}"


def params(plans: Sequence[Plan], *, profile: str) -> dict[str, Params]:
    """The parameters of each plan's runs, by its strategy's name in frames."""
    base = config.load(profile, strategy=summary.BASELINE)
    return {
        name(plan): dataclasses.replace(base, strategy=ADAPTIVE, fusion=FusionRule(schedule=tuple(plan.schedule)))
        for plan in plans
    }


def run_plans(
    plans: Sequence[Plan], asked: SweepParams, *, profile: str, runs_dir: str | Path, trained_dir: str | Path
) -> pd.DataFrame:
    """One row for every run of the sweep and of the plans, which are trained unless they have been, with its seeds.

    Args:
        runs_dir: folder of the sweep's runs, which must be there.
        trained_dir: folder of the plans' runs; one is trained again if its parameters or the code have changed.

    Raises:
        InputError: as from `summary.load_runs`; or a sweep in which no named strategy fuses.
    """
    if set(asked.strategies) <= {summary.BASELINE}:
        raise InputError(f"sweep.strategies: {list(asked.strategies)}: none that fuses, so nothing to compare with")
    rows = summary.load_runs(asked, runs_dir).filter(_COLUMNS).to_dict("records")
    for variant, p in params(plans, profile=profile).items():
        for seed in asked.seeds:
            folder = Path(trained_dir) / runs.run_name(variant, seed)
            run = runs.read(sweep.ensure(folder, p, seed=seed, train_missing=True, command=_COMMAND))
            measured = {key: run.cost[key] for key in ("peak_memory_mib", "flops_per_image")} | {"correct": run.correct}
            score = {"top1_percent": run.metrics["top1_percent"], "tokens_removed": sum(run.schedule)}
            rows.append({"strategy": variant, "seed": run.seed, **score, **measured})
    return pd.DataFrame(rows, columns=_COLUMNS)


def schedules(plans: Sequence[Plan], asked: SweepParams, *, runs_dir: str | Path) -> pd.DataFrame:
    """One row per layer of every strategy: strategy, layer, removed; the named ones as their runs fused."""
    named = summary.load_schedules(asked, runs_dir)
    rows = named.loc[named["layer"] > 0, ["strategy", "layer", "removed"]].to_dict("records")
    rows += [
        {"strategy": name(plan), "layer": layer, "removed": removed}
        for plan in plans
        for layer, removed in enumerate(plan.schedule, start=1)
    ]
    return pd.DataFrame(rows, columns=["strategy", "layer", "removed"])


def table(runs: pd.DataFrame, schedules: pd.DataFrame, plans: Sequence[Plan]) -> pd.DataFrame:
    """One row per strategy: what it removes and costs, its accuracy, and how far each plan's is above it.

    Columns: strategy, n, schedule, tokens_removed; top1_percent, peak_memory_mib and flops_per_image as `_mean` and
    `_sd` over seeds; for each plan the cost of the row's schedule by that plan's table (`cost_<kind>`), and the mean
    of its differences to the row in points of top-1 with its interval (`<kind>_ahead`, `_ahead_low`, `_ahead_high`;
    NaN where there is none).

    Args:
        runs, schedules: as from the functions of that name.
    """
    rows = []
    for strategy in runs["strategy"].unique():
        own = runs[runs["strategy"] == strategy].set_index("seed")
        removed = schedules.loc[schedules["strategy"] == strategy, "removed"].tolist()
        row: dict[str, Any] = {"strategy": strategy, "n": len(own), "schedule": " ".join(map(str, removed))}
        row["tokens_removed"] = sum(removed)
        for key in ("top1_percent", "peak_memory_mib", "flops_per_image"):
            values = own[key].to_list()
            row[f"{key}_mean"] = float(np.mean(values))
            row[f"{key}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        for plan in plans:
            theirs = runs[runs["strategy"] == name(plan)].set_index("seed")
            itself = name(plan) == strategy
            ahead = (math.nan,) * 3 if itself else summary.accuracy_difference(theirs, own)
            row[f"cost_{plan.kind}"] = sum(costs[r] for costs, r in zip(plan.costs, removed, strict=True))
            columns = [f"{plan.kind}_ahead{end}" for end in ("", "_low", "_high")]
            row |= dict(zip(columns, ahead, strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


def verdict(table: pd.DataFrame, kind: str) -> str:
    """In a sentence: which of the named strategies that fuse a plan is above or below, and which are too close to call.

    Args:
        table: as from `table`.
        kind: of a plan in it.

    Raises:
        InputError: a kind that is not in the table.
    """
    if f"{kind}_ahead" not in table:
        raise InputError(f"kind: {kind!r} is not in the table")
    named = [row for row in table.to_dict("records") if row["strategy"] in STRATEGIES and row["tokens_removed"]]
    above = [row["strategy"] for row in named if row[f"{kind}_ahead_low"] > 0]
    below = [row["strategy"] for row in named if row[f"{kind}_ahead_high"] < 0]
    open_ = [row["strategy"] for row in named if row["strategy"] not in (*above, *below)]
    (own,) = table.loc[table["strategy"] == f"{ADAPTIVE}-{kind}"].to_dict("records")
    best = max(named, key=lambda row: row["top1_percent_mean"])
    groups = {"above": above, "below": below, "too close to call against": open_}
    parts = [f"{word} {_listed(names)}" for word, names in groups.items() if names]
    return (
        f"`{own['strategy']}` reaches {own['top1_percent_mean']:.1f}% with {own['tokens_removed']} tokens removed, the "
        f"best of the named strategies, `{best['strategy']}`, {best['top1_percent_mean']:.1f}% with "
        f"{best['tokens_removed']}; over {own['n']} seeds it is {', '.join(parts)}."
    )


def markdown(table: pd.DataFrame, plans: Sequence[Plan]) -> str:
    """The table as a reader wants it, and a sentence on each plan."""
    kinds = [plan.kind for plan in plans]
    head = ["strategy", "tokens removed by each layer", "in all", "top-1 (%)", "peak memory (MiB)", "FLOPs (M)"]
    rows = [
        [
            row["strategy"],
            row["schedule"],
            str(row["tokens_removed"]),
            f"{row['top1_percent_mean']:.1f}" + _signed(row["top1_percent_sd"], " ± {:.1f}"),
            f"{row['peak_memory_mib_mean']:.1f}",
            f"{row['flops_per_image_mean'] / 1e6:.2f}",
            *(f"{row[f'cost_{kind}']:.3f}" for kind in kinds),
        ]
        for row in table.to_dict("records")
    ]
    lines = _table([*head, *(f"cost by {kind}" for kind in kinds)], rows)
    lines += [
        "",
        "How many points of top-1 each schedule is above each strategy, paired by seed, with its 95% interval:",
    ]
    ahead = [
        [row["strategy"], *(_ahead(row, kind) for kind in kinds)]
        for row in table.to_dict("records")
        if row["strategy"] in STRATEGIES
    ]
    lines += ["", *_table(["strategy", *(name(plan) for plan in plans)], ahead), ""]
    lines += [verdict(table, kind) for kind in kinds]
    first = plans[0]
    given = {key: value for key, value in dataclasses.asdict(first.rule).items() if value is not None}
    budget = ", ".join(f"`{key}: {value}`" for key, value in given.items())
    lines += [
        "",
        f"Mean ± 1 standard deviation over {table['n'].max()} seeds. Budget: {budget}. Costs were measured on "
        f"{first.images} validation images with {', '.join(first.runs)}.",
    ]
    return "\n".join(lines) + "\n"


def write(table: pd.DataFrame, plans: Sequence[Plan], folder: str | Path) -> None:
    """Write adaptive.csv, adaptive.md and adaptive.json (the plans with their costs, and the verdicts).

    Args:
        folder: if relative, from the repository root.
    """
    folder = config.root() / folder
    content = {plan.kind: dataclasses.asdict(plan) | {"verdict": verdict(table, plan.kind)} for plan in plans}
    write_atomic(folder / "adaptive.csv", table.to_csv(index=False, lineterminator="\n").encode())
    write_atomic(folder / "adaptive.md", markdown(table, plans).encode())
    write_atomic(folder / "adaptive.json", json_bytes(content))


def _listed(names: Sequence[str]) -> str:
    quoted = [f"`{each}`" for each in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def _signed(value: float, form: str) -> str:
    return "" if math.isnan(value) else form.format(value)


def _ahead(row: dict[Any, Any], kind: str) -> str:
    return intervals.with_interval(intervals.signed, *(row[f"{kind}_ahead{end}"] for end in ("", "_low", "_high")))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---", *["---:"] * (len(head) - 1)], *rows)]

"""From the runs of an ablation to what each option of fusion is worth, in points of accuracy, and how sure that is.

An effect is the top-1 accuracy of the runs with the profile's own value of one option, minus that of the runs with
another value. A pair is two runs that differ in that option alone: same strategy, same other options, same seed.

Pairs of one seed are not independent: they share initial weights, the order of images and the test images. So the
pairs of a seed become one difference for each test image, their mean, and the interval is over seeds and images
(`intervals.two_level`). Over the grid a seed has many pairs, which takes noise out of its mean; it does not make n
larger.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from famba import config
from famba.analysis import intervals
from famba.errors import InputError
from famba.fusion.options import FusionOptions
from famba.fusion.strategies import ordered
from famba.storage.files import write_atomic

FACTORS: tuple[str, ...] = tuple(asdict(FusionOptions()))
# What is in the file for others to work with; the rest of a run's row is the setting, which all runs share.
_WRITTEN = ("profile", "strategy", *FACTORS, "seed", "epochs", "top1_percent", "loss", "flops_per_image")
_SETTING = ("profile", "dataset", "img_size", "model", "epochs", "profile_epochs", "device", "versions")
_DOING = {
    "order": {"scan": "keeping scan order", "append": "putting even tokens first, then odd ones"},
    "weighting": {"size": "weighting tokens by size", "mean": "weighting all tokens alike"},
    "feature": {
        "normed": "comparing the normed tokens",
        "residual": "comparing the residual stream",
        "delta": "comparing the scan's step",
        "B": "comparing the scan's B",
        "C": "comparing the scan's C",
    },
    "position": {"before_mixer": "fusing before the mixer", "after_scan": "fusing after the scan"},
    "matching": {
        "similarity": "pairing similar tokens",
        "random": "pairing tokens at random",
        "adjacent": "pairing adjacent tokens",
    },
    "reduction": {"mean": "averaging a pair", "drop": "dropping one token of a pair"},
}


def effects(runs: pd.DataFrame, *, grid: str, reference: FusionOptions, controls: Sequence[str] = ()) -> pd.DataFrame:
    """What the reference's value of each option is worth against every other value.

    Args:
        runs: as from `ablation.run`.
        grid: the strategy whose effects are means over every combination of the other options, too.
        reference: the options that the others are compared with.
        controls: options that are not combined with the others in the grid, but changed alone there, too.

    Returns:
        One row per effect: strategy, over (`grid`: every combination of the other options; `reference`: the others as
        in the reference), factor, kept (the reference's value), instead (the other value), mean, low and high (points,
        95%), n (seeds), pairs (of runs, of each seed). Without a spread over seeds, low and high are NaN.

    Raises:
        InputError: a run that comes twice; a pair that lacks one of its runs; no runs of the grid's strategy.
    """
    if grid not in set(runs["strategy"]):
        raise InputError(f"strategy: {grid!r} has no runs; there are runs of {', '.join(runs['strategy'].unique())}")
    runs = runs.assign(answers=list(100 * intervals.answers(runs["correct"])))
    rows = []
    for strategy in [grid, *(name for name in ordered(list(runs["strategy"])) if name != grid)]:
        own = runs.loc[runs["strategy"] == strategy]
        for over in ("grid", "reference") if strategy == grid else ("reference",):
            for factor in FACTORS if over == "reference" else [x for x in FACTORS if x not in controls]:
                kept = getattr(reference, factor)
                fixed = controls if over == "grid" else [x for x in FACTORS if x != factor]
                compared = own.loc[(own[list(fixed)] == [getattr(reference, x) for x in fixed]).all(axis=1)]
                for instead in [level for level in _DOING[factor] if level in set(own[factor]) and level != kept]:
                    by_seed = list(_paired(compared, factor, kept, instead).values())
                    mean, low, high = intervals.two_level(np.stack([np.mean(pairs, axis=0) for pairs in by_seed]))
                    rows.append(
                        {"strategy": strategy, "over": over, "factor": factor, "kept": kept, "instead": instead}
                        | {"mean": mean, "low": low, "high": high, "n": len(by_seed), "pairs": len(by_seed[0])}
                    )
    return pd.DataFrame(rows)


def sentence(effect: Mapping[Any, Any]) -> str:
    """One effect in words: what was done instead of what, the difference with its interval, and whether it counts."""
    doing = _DOING[effect["factor"]]
    claim = f"{doing[effect['kept']]} instead of {doing[effect['instead']]}"
    claim = claim[0].upper() + claim[1:]
    pairs = f"{effect['pairs']} pairs" if effect["pairs"] > 1 else "a pair"
    if math.isnan(effect["low"]):
        said = f"{intervals.signed(effect['mean'])} points, n = 1 seed with {pairs} of runs"
        return f"{claim}: {said}: one seed has no confidence interval."
    interval = f"95% interval {intervals.signed(effect['low'])} to {intervals.signed(effect['high'])}"
    said = f"{intervals.signed(effect['mean'])} points, {interval}, n = {effect['n']} seeds with {pairs} of runs each"
    return f"{claim}: {said}." if is_significant(effect) else f"{claim}: no significant difference ({said})."


def is_significant(effect: Mapping[Any, Any]) -> bool:
    """Whether there is an interval and it excludes zero."""
    return bool(effect["low"] > 0 or effect["high"] < 0)


def markdown(table: pd.DataFrame, runs: pd.DataFrame) -> str:
    """The ablation as a reader wants it: a sentence per effect, a table over the strategies, what was run and where.

    Args:
        table: as from `effects`.
        runs: what it was made from.
    """
    rows = table.to_dict("records")
    of_grid = [row for row in rows if row["over"] == "grid"]
    combined = {row["factor"] for row in of_grid}
    alone = [row for row in rows if row["strategy"] == of_grid[0]["strategy"] and row["factor"] not in combined]
    strategy = of_grid[0]["strategy"]
    cells = runs[runs["strategy"] == strategy].groupby(list(FACTORS)).ngroups
    lines = [
        "# What each option of fusion is worth",
        "",
        f"In points of top-1 accuracy, strategy `{strategy}`, over every combination of the other options ({cells} "
        "cells):",
        "",
        *(f"- {sentence(row)}" for row in of_grid),
        *(f"- {sentence(row)} The other options are the profile's." for row in alone),
        "",
        "One option changed at a time, the others as in the profile; bold where the interval excludes zero:",
        "",
        _table(rows),
        "",
        _caption(table, runs),
    ]
    return "\n".join(lines) + "\n"


def write(table: pd.DataFrame, runs: pd.DataFrame, folder: str | Path) -> None:
    """Write ablation.csv (one line per run) and ablation.md (the effects, for readers).

    Args:
        table: as from `effects`.
        runs: what it was made from.
        folder: if relative, from the repository root.
    """
    folder = config.root() / folder
    content = runs[list(_WRITTEN)].to_csv(index=False, lineterminator="\n")
    write_atomic(folder / "ablation.csv", content.encode())
    write_atomic(folder / "ablation.md", markdown(table, runs).encode())


def _paired(runs: pd.DataFrame, factor: str, kept: str, instead: str) -> dict[int, list[np.ndarray]]:
    """The differences of each seed's pairs, image by image (points)."""
    others = [other for other in FACTORS if other != factor]
    sides: dict[str, dict[tuple, np.ndarray]] = {kept: {}, instead: {}}
    for run in runs.to_dict("records"):
        side, key = sides.get(run[factor], {}), (run["seed"], *(run[other] for other in others))
        if key in side:
            raise InputError(f"{factor} {run[factor]}: the run {_named(key)} comes twice")
        side[key] = run["answers"]
    alone = sides[kept].keys() ^ sides[instead].keys()
    if alone:
        raise InputError(f"{factor}: {kept} against {instead}: the run {_named(min(alone))} has no counterpart")
    differences: dict[int, list[np.ndarray]] = {}
    for key, answers in sides[kept].items():
        differences.setdefault(key[0], []).append(answers - sides[instead][key])
    counts = {seed: len(pairs) for seed, pairs in differences.items()}
    if len(set(counts.values())) != 1:
        raise InputError(f"{factor}: {kept} against {instead}: another number of pairs from seed to seed: {counts}")
    return differences


def _named(key: tuple) -> str:
    return f"{'-'.join(key[1:])} of seed {key[0]}"


def _table(rows: Sequence[Mapping[Any, Any]]) -> str:
    def column(strategy: str, over: str) -> str:
        return f"{strategy}, over the grid" if over == "grid" else strategy

    cells = [
        {
            "option": f"{row['factor']}: {row['kept']} − {row['instead']}",
            "column": column(row["strategy"], row["over"]),
            "entry": _entry(row),
        }
        for row in rows
    ]
    options, columns = ([*dict.fromkeys(cell[key] for cell in cells)] for key in ("option", "column"))
    table = pd.DataFrame(cells).pivot(index="option", columns="column", values="entry").loc[options, columns].fillna("")
    return table.to_markdown(disable_numparse=True, colalign=["left", *["right"] * len(columns)])


def _entry(effect: Mapping[Any, Any]) -> str:
    text = intervals.with_interval(intervals.signed, effect["mean"], effect["low"], effect["high"])
    return f"**{text}**" if is_significant(effect) else text


def _caption(table: pd.DataFrame, runs: pd.DataFrame) -> str:
    at = {key: "; ".join(str(value) for value in runs[key].unique()) for key in _SETTING}
    instead = "" if at["epochs"] == at["profile_epochs"] else f" (the profile's own are {at['profile_epochs']})"
    with_interval = [row for row in table.to_dict("records") if not math.isnan(row["low"])]
    clear = sum(map(is_significant, with_interval))
    counted = (
        f"Of {len(with_interval)} intervals, {clear} {'excludes' if clear == 1 else 'exclude'} zero; "
        f"{len(with_interval) / 20:.1f} would by chance alone if no option mattered."
    )
    return (
        f"{len(runs)} runs of {at['epochs']} epochs{instead} with the seeds "
        f"{', '.join(map(str, runs['seed'].unique()))}, by `make ablation`. Profile `{at['profile']}`: `{at['model']}` "
        f"on {at['dataset']} at {at['img_size']} px. {at['device']}, 1 thread; {at['versions']}. A pair is two runs "
        "that differ in one option alone. Pairs of one seed share its initial weights, so they are averaged first; the "
        "interval is over the n seeds and the test images (two-level bootstrap). "
        f"{counted if with_interval else 'One seed has no interval.'} Every run is a line of ablation.csv."
    )

"""From training steps that took turns to what each strategy, or variant of one, costs in units of `none`.

The interval of a time ratio is over rounds: it says how exact this measurement is, not what another machine would give.
Memory, FLOPs and tokens follow from the model and have none.
"""

import math
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from famba.analysis import records
from famba.errors import InputError
from famba.fusion.strategies import ordered

BASELINE = "none"


def table(steps: pd.DataFrame) -> pd.DataFrame:
    """One row per strategy: its median step and throughput, and time and memory in units of those of `none`.

    Args:
        steps: as from `training.cost.measure`.

    Returns:
        The columns of `steps` but for the round, and rounds, throughput_img_s, time_ratio (of training: median over
        rounds of the step's time over that of `none` in the same round, times the ratio of their epochs), its 95%
        percentile bootstrap interval over rounds (time_ratio_low and time_ratio_high; NaN for `none`), memory_ratio.

    Raises:
        InputError: no steps of `none`.
    """
    times = steps.pivot(index="round", columns="strategy", values="step_time_ms")
    if BASELINE not in times:
        raise InputError(f"steps: of {', '.join(times)}; those of {BASELINE!r} are needed")
    rows = steps.drop(columns="round").groupby("strategy", sort=False).first()
    rows = rows.loc[ordered(list(rows.index))]
    for name in rows.index:
        epochs = rows.loc[name, "epochs"] / rows.loc[BASELINE, "epochs"]
        ratios = epochs * (times[name] / times[BASELINE]).to_numpy()
        low = high = math.nan
        if name != BASELINE:
            found = stats.bootstrap((ratios,), np.median, method="percentile", rng=np.random.default_rng(0))
            low, high = found.confidence_interval
        columns = ["step_time_ms", "rounds", "time_ratio", "time_ratio_low", "time_ratio_high"]
        rows.loc[name, columns] = [times[name].median(), len(ratios), np.median(ratios), low, high]
    rows["throughput_img_s"] = 1000 * rows["batch_size"] / rows["step_time_ms"]
    rows["memory_ratio"] = rows["peak_memory_mib"] / rows.loc[BASELINE, "peak_memory_mib"]
    return rows.reset_index().astype({"rounds": int})


def write(steps: pd.DataFrame, folder: str | Path) -> None:
    """Write cost.csv, the table, and step_times.csv, each round's times in ms, of which the table's intervals are.

    Args:
        folder: if relative, from the repository root.
    """
    times = steps.pivot(index="round", columns="strategy", values="step_time_ms").round(4).reset_index()
    for name, frame in {"step_times": times, "cost": table(steps)}.items():
        records.write(frame, folder, f"{name}.csv")


def load(folder: str | Path) -> pd.DataFrame:
    """The table that `write` wrote; InputError if there is none."""
    return records.load(Path(folder) / "cost.csv")


def caption(table: pd.DataFrame) -> str:
    """How the times were measured, and whether the machine was busy meanwhile."""
    first = table.iloc[0]
    text = (
        f"Step times: medians of {first['rounds']} training steps of {first['batch_size']} images in turn, on "
        f"{first['device']}, threads: {first['threads']}. Ratios: medians within rounds, with 95% intervals over "
        "rounds of this measurement."
    )
    return text + (f" **The machine was busy meanwhile: {first['disturbed']}.**" if first["disturbed"] else "")


def break_even(table: pd.DataFrame) -> float:
    """The r from which on training takes less time than without fusion, by linear interpolation.

    Args:
        table: variants with their r and time_ratio.

    Returns:
        0 if even the smallest r saves time; NaN if the largest does not.
    """
    rows = table.sort_values("r")
    r, ratio = rows["r"].to_numpy(float), rows["time_ratio"].to_numpy(float)
    last = int(np.flatnonzero(ratio >= 1).max(initial=-1))
    if last in (-1, len(r) - 1):
        return 0.0 if last < 0 else math.nan
    return float(np.interp(1, ratio[[last + 1, last]], r[[last + 1, last]]))

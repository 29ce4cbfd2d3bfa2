"""How time and memory of a training step grow with its sizes, as from `bench.growth.bench_growth`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator

from famba.plots.style import PALETTE, Figure, caption, styled

_LABELS = {"time_ms": "training step (ms)", "memory_mib": "peak memory (MiB)"}
_UNITS = {"d_model": "d_model (channels)", "depth": "depth (layers)", "batch": "batch (images)"}


@styled
def growth(frame: pd.DataFrame, setting: Mapping[str, Any]) -> Figure:
    """Measured points (filled: fitted, open: left out) and the law as a line, for each axis and backend.

    Args:
        setting: the device and threads that `frame` was measured with, as from `profiling.environment`.
    """
    axes, colours = list(frame["axis"].unique()), dict(zip(frame["backend"].unique(), PALETTE, strict=False))
    figure = Figure(figsize=(3.4 * len(axes), 6.2), layout="constrained")
    panels = figure.subplots(2, len(axes), squeeze=False)
    for _, rows in frame.groupby(["axis", "backend"], sort=False):
        axis, backend = rows[["axis", "backend"]].iloc[0]
        colour = colours[backend]
        x = np.geomspace(rows[axis].min(), rows[axis].max())
        for panel, (name, label) in zip(panels[:, axes.index(axis)], _LABELS.items(), strict=True):
            law = np.polynomial.Polynomial(rows[f"{name}_coefficients"].iloc[0])
            off = ", ".join(f"{round(100 * ratio) - 100:+d}%" for ratio in rows.loc[~rows["fitted"], f"{name}_off"])
            written = f"{backend}: {_formula(law.coef)}  ({off})".replace("-", "\N{MINUS SIGN}")
            panel.plot(x, law(x), color=colour, linewidth=1.2, label=written)
            for fitted, part in rows.groupby("fitted"):
                face = colour if fitted else "white"
                panel.scatter(part[axis], part[name], s=26, color=colour, facecolor=face, zorder=3)
            panel.set(xscale="log", yscale="log", xlabel=_UNITS.get(axis, axis), ylabel=label)
            panel.set_xticks(rows[axis], rows[axis])
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.minorticks_off()
            panel.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize=7)
    base = ", ".join(
        f"{name} {frame.loc[frame['axis'] != name, name].iloc[0]}" for name in axes if (frame["axis"] != name).any()
    )
    text = (
        f"Sizes that do not grow: {base}. Lines: laws fitted to the filled points. Open: measured, not fitted; the "
        "percentages are their distance from the law. Times: medians of "
        f"{frame['rounds'].iloc[0]} steps taken in turn, on {setting['device']}, threads: {setting['threads']}."
    )
    return caption(figure, text)


def _formula(coefficients: np.ndarray) -> str:
    """A polynomial in x, constant first, with three digits."""
    powers = ["", " x", " x²"]
    terms = [f"{value:+.3g}{power}" for value, power in zip(coefficients, powers[: len(coefficients)], strict=True)]
    return " ".join(terms).removeprefix("+").replace(" +", " + ").replace(" -", " - ")

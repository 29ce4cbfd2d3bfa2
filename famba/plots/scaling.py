"""How time and memory of a training step grow with its sizes."""

import pandas as pd
import seaborn

from famba.plots.style import Figure, caption, styled

_LABELS = {"time_ms": "training step (ms)", "memory_mib": "peak memory (MiB)"}


@styled
def growth(frame: pd.DataFrame) -> Figure:
    """Measured points (filled: fitted, open: predicted) and the law as a line, for each axis and backend.

    Args:
        frame: as from `bench.growth.bench_growth`.
    """
    axes, backends = frame["axis"].unique(), frame["backend"].unique()
    figure = Figure(figsize=(3.2 * len(axes), 5.6), layout="constrained")
    panels = figure.subplots(2, len(axes), squeeze=False)
    colours = dict(zip(backends, seaborn.color_palette("colorblind"), strict=False))
    for _, rows in frame.groupby(["axis", "backend"], sort=False):
        axis, backend = rows["axis"].iloc[0], rows["backend"].iloc[0]
        for panel, (name, label) in zip(panels[:, list(axes).index(axis)], _LABELS.items(), strict=True):
            panel.plot(rows["x"], rows[f"{name}_law"], color=colours[backend], linewidth=1.2, label=f"{backend}, law")
            for fitted, part in rows.groupby("fitted"):
                face = colours[backend] if fitted else "white"
                panel.scatter(part["x"], part[name], s=26, color=colours[backend], facecolor=face, zorder=3)
            panel.set(xscale="log", yscale="log", xlabel=axis, ylabel=label)
    panels[0, 0].legend(fontsize=8)
    caption(figure, "Medians of steps taken in turn; filled: fitted, open: predicted.")
    return figure

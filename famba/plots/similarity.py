"""Figures of how similar tokens are and of what fuses. Tidy frame or arrays in, Figure out.

Source: the heat-map of token similarity is the picture of Famba-V (arXiv:2409.09808). Each `frame` is as from
`tokens.similarity_in_runs`.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from famba.analysis import intervals, similarity, summary
from famba.plots import style
from famba.plots.style import PALETTE, Figure, caption, label_rows, looks_in, rows_of, styled

# Beside each other in one panel; no strategy's.
_WEIGHTS_COLOURS = {"trained": "0.2", "untrained": PALETTE[9]}


@styled
def similarity_heatmaps(matrices: Sequence[Float[np.ndarray, "_ _"]]) -> Figure:
    """Cosine similarity of every token with every other, one heat-map per layer on one scale of colours.

    Args:
        matrices: of the tokens that enter each layer, as from `tokens.similarities`; fewer where layers fuse.
    """
    low = max(-1.0, math.floor(10 * min(float(matrix.min()) for matrix in matrices)) / 10)
    figure, panels = style.grid_of_panels(len(matrices), 4, (2.1, 2.25), margin=(0.9, 0.1))
    for axes, (layer, matrix) in zip(panels.flat, enumerate(matrices, start=1), strict=False):
        every = max(1, int(np.diff(MaxNLocator(4, integer=True).tick_values(0, len(matrix)))[0]))
        look = {"cmap": "viridis", "square": True, "cbar": False, "xticklabels": every, "yticklabels": every}
        seaborn.heatmap(matrix, vmin=low, vmax=1, **look, ax=axes)
        axes.set_title(f"into layer {layer}: {len(matrix)} tokens", fontsize=9.5)
        axes.tick_params(rotation=0, labelsize=8)
    figure.supxlabel("token", fontsize=10)
    figure.supylabel("token", fontsize=10)
    bar = {"label": "cosine similarity", "shrink": 0.9, "aspect": 12 * len(panels)}
    figure.colorbar(panels.flat[0].collections[0], ax=panels, **bar)
    return figure


@styled
def token_similarity(frame: pd.DataFrame) -> Figure:
    """How similar each token is to its best match, by layer, trained and untrained, and how that changes upwards."""
    table = similarity.quantiles(frame.loc[frame["quantity"] == "similarity"])
    figure = Figure(figsize=(9.6, 3.9), layout="constrained")
    axes, right = figure.subplots(1, 2, width_ratios=[3, 2])
    _bands(axes, rows_of(table, summary.BASELINE))
    axes.set(xlabel="layer", ylabel="cosine similarity with the best match", title="unfused tokens (none)")
    axes.legend(loc="best")
    rises = similarity.rise(frame)
    for row, weights in enumerate(similarity.WEIGHTS):
        values = rises[weights].to_numpy()
        mean, low, high = intervals.student(values.tolist())
        right.plot(values, np.full(len(values), row), "o", color=_WEIGHTS_COLOURS[weights], alpha=0.6, markersize=5)
        xerr = style.error_bar(mean, low, high)
        right.errorbar(mean, row + 0.2, xerr=xerr, fmt="o", color=PALETTE[3], capsize=4, markersize=5)
    right.axvline(0, color="0.6", linewidth=0.9)
    label_rows(right, similarity.WEIGHTS)
    right.set(xlabel="difference in cosine similarity", title="upper third minus lower third of the layers")
    right.xaxis.set_major_locator(MaxNLocator(nbins=5))
    return caption(
        figure,
        f"Left: median, middle half and 5 to 95% of the tokens of images (n = {frame['image'].nunique()}) in models "
        f"(n = {len(rises)}). Right: each model's difference of medians, mean over the images; in orange the mean with "
        "its 95% interval over models. Right of zero, tokens are more similar in the upper layers.",
    )


@styled
def fused_distance(frame: pd.DataFrame) -> Figure:
    """How far apart in the image the tokens lie that each layer fuses, one panel for each strategy.

    Raises:
        InputError: no strategy that fuses.
    """
    table = similarity.quantiles(frame.loc[frame["quantity"] == "distance"])
    looks, chance = looks_in(table), similarity.chance_distance(frame)
    figure = Figure(figsize=(max(5.0, 2.5 * len(looks) + 1.0), 3.6), layout="constrained")
    panels = figure.subplots(1, len(looks), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (name, (colour, _)) in zip(panels, looks.items(), strict=True):
        _bands(axes, rows_of(table, name))
        axes.axhline(chance, color=style.GREY, linestyle="--", linewidth=1, label="two patches at random")
        axes.set_title(name, color=colour)
        axes.set(xlabel="layer", ylim=(0, None))
    panels[0].set_ylabel("distance of fused tokens (patches)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    n = frame["image"].nunique()
    text = f"Median, middle half and 5 to 95% over the pairs of {n} images; between the centres of the patches of each."
    return caption(figure, text)


@styled
def token_size(frame: pd.DataFrame) -> Figure:
    """How many patches a token stands for at the end, by strategy, trained and untrained.

    Raises:
        InputError: no strategy that fuses.
    """
    sizes = frame.loc[(frame["quantity"] == "size") & (frame["strategy"] != summary.BASELINE)]
    names = list(looks_in(sizes))
    figure = Figure(figsize=(7.2, 1.2 + 0.75 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    look: dict[str, Any] = {"widths": 0.3, "whis": (5, 95), "showfliers": False, "orientation": "horizontal"}
    look |= {"manage_ticks": False, "medianprops": {"color": PALETTE[3], "linewidth": 2}}  # seen at the box's edge, too
    for offset, weights in zip((-0.19, 0.19), similarity.WEIGHTS, strict=True):
        own, places = sizes.loc[sizes["weights"] == weights], np.arange(len(names)) + offset
        values = [rows_of(own, name)["value"] for name in names]
        box = {"facecolor": _WEIGHTS_COLOURS[weights], "alpha": 0.6, "linewidth": 0}
        axes.boxplot(values, positions=places, boxprops=box, patch_artist=True, label=weights, **look)
    label_rows(axes, names)
    axes.set(xlim=(0, None), xlabel="patches of a token, after the last layer")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    figure.legend(loc="outside upper center", ncols=2)
    n = sizes["image"].nunique()
    return caption(figure, f"Tokens of {n} images, class token apart: median (orange), middle half, whiskers 5 to 95%.")


def _bands(axes: Axes, table: pd.DataFrame) -> None:
    """Median, middle half and 5 to 95% by layer, for both kinds of weights."""
    for weights in similarity.WEIGHTS:
        own, colour = table.loc[table["weights"] == weights], _WEIGHTS_COLOURS[weights]
        for low, high, alpha in (("q05", "q95", 0.13), ("q25", "q75", 0.25)):
            axes.fill_between(own["layer"], own[low], own[high], color=colour, alpha=alpha, linewidth=0)
        axes.plot(own["layer"], own["median"], color=colour, marker=".", label=weights)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))

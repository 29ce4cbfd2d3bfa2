"""Tidy frame or arrays in, Figure out: no reading, no show, no global state, no torch.

A strategy has one colour and one marker everywhere, and always the same place in the order. Spread is +-1 standard
deviation over seeds, and the caption says over how many. Here `b` images, `h` by `w` pixels, `t` tokens.

Sources: the colours are Okabe and Ito's, told apart by colour-blind readers; the heat-map of token similarity is the
picture of Famba-V (arXiv:2409.09808); a fusion map colours patches as ToMe (arXiv:2210.09461) does.
"""

import colorsys
import functools
import io
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import matplotlib.style
import numpy as np
import pandas as pd
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure as _MatplotlibFigure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from famba import metrics, params
from famba.errors import InputError
from famba.files import write_atomic
from famba.params import STRATEGIES

STRATEGY_COLOURS = {
    "none": "#4D4D4D",
    "all": "#0072B2",
    "interleaved": "#E69F00",
    "lower": "#CC79A7",
    "upper": "#009E73",
}
_MARKERS = {"none": "o", "all": "s", "interleaved": "D", "lower": "v", "upper": "^"}
_LABELS = {
    "top1_percent": "top-1 accuracy (%)",
    "train_time_s": "training time (s)",
    "step_time_ms": "time of a training step (ms)",
    "peak_memory_mib": "peak memory of training (MiB)",
    "flops_per_image": "forward FLOPs of an image",
}
_MODELS = {"vim_tiny": "Vim-Ti", "vim_small": "Vim-S"}
_DATASETS = {"cifar100": "CIFAR-100", "cifar10": "CIFAR-10", "digits": "digits"}
_GREY = "#6E6E6E"
_STYLE: dict[str, Any] = {
    "figure.dpi": 100,
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "axes.edgecolor": "#9A9A9A",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "xtick.color": "#9A9A9A",
    "ytick.color": "#9A9A9A",
    "xtick.labelcolor": "#333333",
    "ytick.labelcolor": "#333333",
    "legend.frameon": False,
    "svg.hashsalt": "famba",
}

P = ParamSpec("P")


class Figure(_MatplotlibFigure):
    """A figure that a notebook shows without pyplot, and that is the same bytes whenever it is drawn."""

    def _repr_png_(self) -> bytes:
        return _rendered(self, "png", dpi=100)


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw in the package's own style, whatever the session has set."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.style.context(["default", _STYLE]):
            return draw(*args, **kwargs)

    return drawn


def save(figure: _MatplotlibFigure, path: str | Path) -> Path:
    """Write a figure as PNG or SVG, the same bytes for the same figure: no date, no version inside.

    Args:
        path: if relative, from the repository root; its folder is made if need be.

    Raises:
        InputError: another suffix than .png or .svg, or a folder that cannot be written to.
    """
    path = params.root() / path
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"{path}: figures are saved as .png or .svg")
    write_atomic(path, _rendered(figure, path.suffix[1:]))
    return path


@_styled
def accuracy_against(frame: pd.DataFrame, cost: str = "train_time_s") -> Figure:
    """Top-1 accuracy against a cost: each strategy's mean with its spread, its runs, and the Pareto front.

    Args:
        frame: as from `metrics.load_runs`.
        cost: one of `metrics.COSTS`; less is better.

    Raises:
        InputError: a column that is not a cost.
    """
    front = metrics.pareto(frame, cost)
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    means = {}
    for strategy in _strategies(frame):
        runs = _of(frame, strategy)
        x, y = np.array(runs[cost], float), np.array(runs["top1_percent"], float)
        means[strategy] = (x.mean(), y.mean())
        colour, marker = STRATEGY_COLOURS[strategy], _MARKERS[strategy]
        axes.errorbar(
            *means[strategy],
            xerr=_sd(x),
            yerr=_sd(y),
            color=colour,
            linestyle="none",
            elinewidth=1.4,
            capsize=3,
            zorder=2,
        )
        axes.scatter(x, y, s=20, color=colour, marker=marker, alpha=0.5, edgecolors="white", linewidths=0.5, zorder=3)
        axes.plot(
            *means[strategy],
            color=colour,
            marker=marker,
            markersize=10,
            markeredgecolor="white",
            linestyle="none",
            zorder=4,
            label=strategy,
        )
    corners = zip(*(means[name] for name in front), strict=True)
    axes.plot(*corners, color="#B0B0B0", drawstyle="steps-post", zorder=1, label="Pareto front")
    axes.set(xlabel=_LABELS[cost], ylabel=_LABELS["top1_percent"])
    axes.margins(0.08)
    figure.legend(loc="outside right upper", handlelength=1.6)
    spread = "one run each, so without spread" if _seeds(frame) == "n = 1 seed" else f"mean ± 1 sd over {_seeds(frame)}"
    _caption(
        figure,
        f"Large: {spread}. Small: single runs. Up and left is better; no strategy beats one on the Pareto front in "
        "both means.",
    )
    return figure


@_styled
def tokens_per_layer(schedules: pd.DataFrame) -> Figure:
    """Tokens that each layer passes on, by strategy; what all strategies compute less of.

    Args:
        schedules: as from `metrics.load_schedules` or `metrics.schedule_frame`.
    """
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for strategy in _strategies(schedules):
        layers = _of(schedules, strategy).sort_values("layer")
        axes.plot(
            layers["layer"],
            layers["tokens"],
            color=STRATEGY_COLOURS[strategy],
            marker=_MARKERS[strategy],
            markersize=5,
            markeredgewidth=0,
            linewidth=1.8,
            label=f"{strategy} ({layers['tokens'].iloc[-1]} left)",
        )
    axes.set(
        xlabel="after layer (0 is the input)",
        ylabel="tokens in the sequence",
        ylim=(0, max(schedules["tokens"]) * 1.06),
    )
    axes.xaxis.set_major_locator(MaxNLocator(nbins=13, integer=True))
    figure.legend(loc="outside right upper")
    return figure


@_styled
def training_curves(history: pd.DataFrame) -> Figure:
    """Training loss, validation loss and validation accuracy by epoch: mean over seeds with its spread.

    Args:
        history: as from `metrics.load_history`.
    """
    columns = {
        "train_loss": "training loss",
        "val_loss": "validation loss",
        "val_top1_percent": "validation top-1 accuracy (%)",
    }
    figure = Figure(figsize=(9.6, 3.7), layout="constrained")
    panels = figure.subplots(1, len(columns))
    for axes, (column, label) in zip(panels, columns.items(), strict=True):
        for strategy in _strategies(history):
            grid = _of(history, strategy).pivot(index="epoch", columns="seed", values=column)
            mean, sd = grid.mean(axis=1), grid.std(axis=1, ddof=1)
            colour = STRATEGY_COLOURS[strategy]
            axes.plot(grid.index, mean, color=colour, linewidth=1.8, label=strategy)
            if grid.shape[1] > 1:
                axes.fill_between(grid.index, mean - sd, mean + sd, color=colour, alpha=0.18, linewidth=0)
        axes.set(xlabel="epoch", title=label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(STRATEGIES))
    _caption(figure, f"Mean over {_seeds(history)}; the band is ± 1 sd.", width=130)
    return figure


@_styled
def paper_beside_ours(table: pd.DataFrame) -> Figure:
    """The paper's Table 1 and what was measured here, each as a change from its own `none`, with its value beside it.

    Other models, images and machines have other scales, so that only changes compare. A column whose runs were not
    made here stays empty and says so.

    Args:
        table: as from `metrics.beside_paper`.
    """
    rows = {
        "top1_percent": ("top-1 accuracy\n(points from none)", "%"),
        "train_time_s": ("training time\n(% from none)", " s"),
        "peak_memory_mib": ("peak memory\n(% from none)", " MiB"),
    }
    columns = list(table[["model", "dataset", "source"]].drop_duplicates().itertuples(index=False, name=None))
    changes = {metric: _changes(table, metric, columns) for metric in rows}
    widths = [1.0 if entries else 0.55 for entries in changes["top1_percent"]]
    figure = Figure(figsize=(2.1 * sum(widths) + 1.4, 6.6), layout="constrained")
    panels = figure.subplots(len(rows), len(columns), sharex="row", sharey=True, squeeze=False, width_ratios=widths)
    for down, (metric, (label, unit)) in enumerate(rows.items()):
        low, high = _limits([entry for column in changes[metric] for entry in column.values()])
        for across, (axes, entries) in enumerate(zip(panels[down], changes[metric], strict=True)):
            model, dataset, source = columns[across]
            _bars(axes, entries, unit, low, high)
            if down == 0:
                axes.set_title(f"{_MODELS.get(model, model)}\n{_DATASETS.get(dataset, dataset)}\n{source}")
        panels[down][0].set_ylabel(label)
    n = sorted(set(table.loc[table["source"] == "here", "n"]) - {0})
    ours = f"mean ± 1 sd over n = {', '.join(map(str, n))} seeds" if n else "nothing yet"
    _caption(
        figure,
        "Bars: change from `none`; numbers: the value itself. Paper: Famba-V, Table 1, single runs on another machine. "
        f"Here: {ours}. Only changes compare across columns, and columns of different images only in direction.",
        width=round(25 * sum(widths)) + 22,
    )
    return figure


@_styled
def strategies_overview(schedules: pd.DataFrame) -> Figure:
    """Which layers fuse how much: one row per strategy, one cell per layer, the tokens it removes written in.

    Args:
        schedules: as from `metrics.load_schedules` or `metrics.schedule_frame`.
    """
    names, depth, most = _strategies(schedules), max(schedules["layer"]), max(schedules["removed"])
    figure = Figure(figsize=(min(12.0, 3.0 + 0.36 * depth), 0.8 + 0.46 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    for row, strategy in enumerate(names):
        layers = _of(schedules, strategy).sort_values("layer")
        for layer, removed in zip(layers["layer"], layers["removed"], strict=True):
            if layer == 0:
                continue
            strength = 0.25 + 0.75 * removed / most if removed else 0.0
            colour = 1 - strength * (1 - np.array(to_rgb(STRATEGY_COLOURS[strategy]))) if removed else "#F2F2F2"
            axes.add_patch(Rectangle((layer - 0.46, row - 0.42), 0.92, 0.84, facecolor=colour, edgecolor="none"))
            if removed:
                ink = "white" if np.dot(colour, (0.30, 0.59, 0.11)) < 0.5 else "#222222"
                axes.text(layer, row, str(removed), ha="center", va="center", color=ink, fontsize=9)
        first, last = layers["tokens"].iloc[0], layers["tokens"].iloc[-1]
        axes.text(depth + 0.8, row, f"{first} → {last} tokens", va="center", fontsize=9.5)
    axes.set(xlim=(0.4, depth + 0.6), ylim=(len(names) - 0.5, -0.5), xlabel="layer", yticks=range(len(names)))
    axes.set_yticklabels(names)
    axes.set_xticks([layer for layer in range(1, depth + 1) if depth <= 12 or layer % 4 == 0 or layer == 1])
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_title("tokens removed by each layer", loc="left")
    return figure


@_styled
def fusion_map(
    images: UInt8[np.ndarray, "b h w 3"],
    groups_by_layer: Sequence[Int[np.ndarray, "b t"]],
    *,
    patch_size: int,
    stride: int,
    cls_index: int | None = None,
    layers: Sequence[int] | None = None,
) -> Figure:
    """Where fusion happened: patches that became one token share a colour and an outline, all others stay bare.

    One row per image, one picture per layer after the image itself. A token keeps the colour of its first patch. The
    class token is not counted.

    Args:
        groups_by_layer: for each layer, layer 1 first, the token that each input token has ended in
            (`Trace.groups`).
        patch_size, stride: pixels; where patches overlap, each is drawn as the stride-sized cell in its middle.
        cls_index: the class token's position at the input, which is no patch; None without one.
        layers: those to draw, counted from 1; None is all.

    Raises:
        InputError: groups that do not fit the images' patches, or a layer that is not there.
    """
    chosen = list(range(1, len(groups_by_layer) + 1)) if layers is None else list(layers)
    wrong = [layer for layer in chosen if not 1 <= layer <= len(groups_by_layer)]
    if wrong:
        raise InputError(f"layers: {wrong[0]} is not within 1..{len(groups_by_layer)}")
    b, h, w, _ = images.shape
    grid_shape = ((h - patch_size) // stride + 1, (w - patch_size) // stride + 1)
    maps = {layer: _patch_groups(groups_by_layer[layer - 1], b, grid_shape, cls_index, layer) for layer in chosen}

    across = min(1 + len(chosen), 9)
    down = math.ceil((1 + len(chosen)) / across)
    size = 1.35 if across > 5 else 1.9
    figure = Figure(
        figsize=(size * across, (size + (0.38 if down > 1 else 0.12)) * b * down + 0.4), layout="constrained"
    )
    panels = figure.subplots(b * down, across, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for row, image in enumerate(images):
        places = panels[row * down : (row + 1) * down].flat
        axes = next(places)
        _show(axes, image)
        if row == 0 or down > 1:
            axes.set_title(f"image\n{grid_shape[0] * grid_shape[1]} patches", fontsize=9)
        for layer, axes in zip(chosen, places, strict=False):
            groups = maps[layer][row]
            _show(axes, image)
            _colour_groups(axes, groups, patch_size, stride)
            if row == 0 or down > 1:
                axes.set_title(f"layer {layer}\n{len(np.unique(groups))} tokens", fontsize=9)
    return figure


@_styled
def patch_grid(image: UInt8[np.ndarray, "h w 3"], *, patch_size: int, stride: int) -> Figure:
    """An image and its patches in scan order: the sequence that the two scans read, forwards and backwards.

    Where patches overlap (a stride below the patch size), each is drawn as the stride-sized cell in its middle.
    """
    h, w, _ = image.shape
    down, across = (h - patch_size) // stride + 1, (w - patch_size) // stride + 1
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes in panels:
        _show(axes, image)
    panels[0].set_title(f"image, {h} × {w} px", fontsize=10)
    panels[1].set_title(f"{down * across} patches in scan order", fontsize=10)
    if patch_size > stride:
        first = Rectangle((-0.5, -0.5), patch_size, patch_size, facecolor="none", edgecolor="#56B4E9", zorder=3)
        first.set(linestyle="--", linewidth=2, clip_on=False)
        panels[1].add_patch(first)
        panels[1].set_title(
            f"{down * across} patches in scan order\n(dashed: all of patch 0, {patch_size} × {patch_size} px)",
            fontsize=10,
        )
    margin = (patch_size - stride) / 2 - 0.5
    for index in range(down * across):
        x, y = margin + index % across * stride, margin + index // across * stride
        panels[1].add_patch(Rectangle((x, y), stride, stride, facecolor="none", edgecolor="#E69F00", linewidth=0.9))
        panels[1].text(
            x + stride / 2,
            y + stride / 2,
            str(index),
            ha="center",
            va="center",
            fontsize=min(9, 70 / max(down, across)),
            color="#222222",
            bbox={"boxstyle": "round,pad=0.12", "facecolor": "white", "alpha": 0.75, "linewidth": 0},
        )
    return figure


@_styled
def similarity_heatmaps(matrices: Sequence[Float[np.ndarray, "_ _"]], *, layers: Sequence[int] | None = None) -> Figure:
    """Cosine similarity of every token with every other, one heat-map per layer on one scale of colours.

    Args:
        matrices: one per layer, as from `metrics.cosine_similarity`; sizes may differ, since layers fuse.
        layers: the number of each matrix's layer; None counts from 1.

    Raises:
        InputError: another number of layers than of matrices, or a matrix that is not square.
    """
    numbers = list(range(1, len(matrices) + 1)) if layers is None else list(layers)
    if len(numbers) != len(matrices) or not matrices:
        raise InputError(f"layers: {len(numbers)} numbers for {len(matrices)} matrices")
    for layer, matrix in zip(numbers, matrices, strict=True):
        if matrix.shape[0] != matrix.shape[1]:
            raise InputError(f"matrices: layer {layer} has the shape {matrix.shape}, which is not square")
    low = max(-1.0, math.floor(10 * min(float(matrix.min()) for matrix in matrices)) / 10)
    across = min(len(matrices), 4)
    down = math.ceil(len(matrices) / across)
    figure = Figure(figsize=(2.1 * across + 0.9, 2.25 * down + 0.1), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    drawn = None
    for axes in panels.flat[len(matrices) :]:
        axes.set_axis_off()
    for axes, layer, matrix in zip(panels.flat, numbers, matrices, strict=False):
        drawn = axes.imshow(matrix, vmin=low, vmax=1, cmap="viridis", interpolation="nearest")
        axes.set_title(f"layer {layer}: {len(matrix)} tokens", fontsize=9.5)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        ticks = MaxNLocator(nbins=4, integer=True, min_n_ticks=1)
        axes.set(xticks=(at := [tick for tick in ticks.tick_values(0, len(matrix) - 1) if 0 <= tick < len(matrix)]))
        axes.set(yticks=at)
        axes.tick_params(labelsize=8, length=2)
    figure.supxlabel("token", fontsize=10)
    figure.supylabel("token", fontsize=10)
    assert drawn is not None
    figure.colorbar(drawn, ax=panels, label="cosine similarity", shrink=0.9 if down > 1 else 0.75, aspect=12 * down)
    return figure


@_styled
def image_grid(images: UInt8[np.ndarray, "b h w 3"], labels: Sequence[str], *, columns: int = 10) -> Figure:
    """Images with their labels above, row by row.

    Raises:
        InputError: another number of labels than of images, or no images.
    """
    if len(labels) != len(images) or not len(images):
        raise InputError(f"labels: {len(labels)} for {len(images)} images")
    across = min(columns, len(images))
    down = math.ceil(len(images) / across)
    figure = Figure(figsize=(0.95 * across, 1.15 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for axes, image, label in zip(panels.flat, images, labels, strict=False):
        _show(axes, image)
        axes.set_title(textwrap.shorten(str(label), 14, placeholder="…"), fontsize=9, pad=3)
    return figure


def _rendered(figure: _MatplotlibFigure, kind: str, dpi: int = 150) -> bytes:
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[kind]
    target = io.BytesIO()
    with matplotlib.style.context(["default", _STYLE]):
        figure.savefig(target, format=kind, metadata=metadata, dpi=dpi, facecolor="white")
    return target.getvalue()


def _strategies(frame: pd.DataFrame) -> list[str]:
    """Those present, in the fixed order; one that has no colour is an error, not left out."""
    present = list(dict.fromkeys(frame["strategy"]))
    unknown = [name for name in present if name not in STRATEGY_COLOURS]
    if unknown or not present:
        raise InputError(f"strategy: {unknown or 'none at all'}; allowed: {', '.join(STRATEGY_COLOURS)}")
    return [name for name in STRATEGY_COLOURS if name in present]


def _of(frame: pd.DataFrame, strategy: str) -> pd.DataFrame:
    return frame.loc[frame["strategy"] == strategy]


def _seeds(frame: pd.DataFrame) -> str:
    counts = sorted({len(set(frame.loc[frame["strategy"] == name, "seed"])) for name in _strategies(frame)})
    return f"n = {' or '.join(map(str, counts))} seed{'' if counts == [1] else 's'}"


def _sd(values: np.ndarray) -> float | None:
    """Standard deviation for an error bar; None, no bar, for a single run."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _caption(figure: _MatplotlibFigure, text: str, width: int = 100) -> None:
    figure.supxlabel("\n".join(textwrap.wrap(text, width)), x=0.01, ha="left", fontsize=8.5, color=_GREY)


def _changes(
    table: pd.DataFrame, metric: str, columns: Iterable[tuple[str, str, str]]
) -> list[dict[str, tuple[float, float, float]]]:
    """For each column its strategies' (change from `none`, sd of it, value); empty where nothing was measured."""
    found = []
    for model, dataset, source in columns:
        rows = [
            row
            for row in table.to_dict("records")
            if (row["model"], row["dataset"], row["source"]) == (model, dataset, source) and not math.isnan(row[metric])
        ]
        base = {row["strategy"]: row[metric] for row in rows}.get("none")
        if base is None:
            found.append({})
            continue
        scale, shift = (1.0, base) if metric.endswith("_percent") else (100 / base, base)
        found.append(
            {row["strategy"]: ((row[metric] - shift) * scale, row[f"{metric}_sd"] * scale, row[metric]) for row in rows}
        )
    return found


def _limits(entries: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """The range of the bars and their spread, 0 included."""
    reach = [0.0]
    for change, sd, _ in entries:
        spread = 0.0 if math.isnan(sd) else sd
        reach += [change - spread, change + spread]
    return min(reach), max(reach)


def _bars(axes: Axes, entries: dict[str, tuple[float, float, float]], unit: str, low: float, high: float) -> None:
    span = high - low or 1.0
    axes.set(xlim=(low - 0.05 * span, high + 0.75 * span), ylim=(len(STRATEGIES) - 0.4, -0.6))
    axes.set_yticks(range(len(STRATEGIES)), STRATEGIES)
    axes.set_xticks([tick for tick in MaxNLocator(nbins=3).tick_values(low, high) if low <= tick <= high])
    axes.tick_params(length=0)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    if not entries:
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(labelbottom=False)
        axes.set_facecolor("#F5F5F5")
        axes.annotate(
            "not\nmeasured\nhere", (0.5, 0.5), xycoords="axes fraction", ha="center", va="center", color=_GREY
        )
        return
    for row, strategy in enumerate(STRATEGIES):
        if strategy not in entries:
            axes.text(high + 0.06 * span, row, "not measured", va="center", fontsize=8.5, color=_GREY)
            continue
        change, sd, value = entries[strategy]
        axes.barh(row, change, height=0.62, color=STRATEGY_COLOURS[strategy])
        if not math.isnan(sd):
            axes.errorbar(change, row, xerr=sd, color="#222222", elinewidth=1.2, capsize=2.5, linestyle="none")
        written = f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
        axes.text(high + 0.06 * span, row, written + unit, va="center", fontsize=8.5)
    axes.axvline(0, color="#9A9A9A", linewidth=0.9)


def _patch_groups(
    groups: np.ndarray, b: int, grid_shape: tuple[int, int], cls_index: int | None, layer: int
) -> np.ndarray:
    """(b, rows, columns): for each patch the token it ended in."""
    patches = groups if cls_index is None else np.delete(groups, cls_index, axis=1)
    if patches.shape != (b, grid_shape[0] * grid_shape[1]):
        raise InputError(
            f"groups_by_layer: layer {layer} has the shape {groups.shape}; {b} images of {grid_shape[0]} x "
            f"{grid_shape[1]} patches{'' if cls_index is None else ' and a class token'} are expected"
        )
    return patches.reshape(b, *grid_shape)


def _show(axes: Axes, image: np.ndarray) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set_axis_off()


def _colour_groups(axes: Axes, groups: Int[np.ndarray, "rows columns"], patch_size: int, stride: int) -> None:
    """Tint the patches of each token that stands for more than one, and outline all tokens."""
    rows, columns = groups.shape
    _, first, inverse, count = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    tints = np.zeros((rows, columns, 4))
    fused = (count > 1)[inverse.reshape(groups.shape)]
    for token, patch in enumerate(first):
        if count[token] > 1:
            # Steps of the golden ratio keep neighbours' hues apart; two levels of value tell more tokens apart.
            hue = colorsys.hsv_to_rgb(patch * 0.618034 % 1, 0.85, 0.95 if patch % 2 else 0.75)
            tints[inverse.reshape(groups.shape) == token] = (*hue, 0.7)
    start = (patch_size - stride) / 2 - 0.5
    extent = (start, start + columns * stride, start + rows * stride, start)
    limits = axes.get_xlim(), axes.get_ylim()
    axes.imshow(tints, extent=extent, interpolation="nearest")
    lines = []
    ids, own = np.pad(groups, 1, constant_values=-1), np.pad(fused, 1)
    for row in range(rows + 1):
        for column in range(columns + 1):
            x, y = start + column * stride, start + row * stride
            here, left, above = (row + 1, column + 1), (row + 1, column), (row, column + 1)
            if ids[here] != ids[left] and (own[here] or own[left]):
                lines.append([(x, y), (x, y + stride)])
            if ids[here] != ids[above] and (own[here] or own[above]):
                lines.append([(x, y), (x + stride, y)])
    # White with a dark rim: seen on any image.
    axes.add_collection(LineCollection(lines, colors="#222222", linewidths=1.5, capstyle="round"))
    axes.add_collection(LineCollection(lines, colors="white", linewidths=0.7, capstyle="round"))
    axes.set(xlim=limits[0], ylim=limits[1])

"""Tidy frame or arrays in, Figure out: no reading, no show, no global state, no torch.

A strategy has one colour and one marker everywhere, and always the same place in the order. Spread is +-1 standard
deviation over seeds, and the caption says over how many. Here `t` tokens. Charts are drawn here; what is drawn over an
image is in `plots.tokens`, what all have in common in `plots.style`, and the names of both are at hand here too.

Statistical charts are seaborn's, drawn into figures that pyplot never hears of; matplotlib does what seaborn has no
chart for. Sources: the colours are seaborn's for colour-blind readers; the heat-map of token similarity is the picture
of Famba-V (arXiv:2409.09808).
"""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, MaxNLocator

from famba.analysis import similarity, summary
from famba.errors import InputError
from famba.fusion.strategies import STRATEGIES
from famba.plots.style import GREY, Figure, caption, styled
from famba.plots.style import save as save
from famba.plots.tokens import fusion_animation as fusion_animation
from famba.plots.tokens import fusion_at_layer as fusion_at_layer
from famba.plots.tokens import fusion_map as fusion_map
from famba.plots.tokens import image_grid as image_grid
from famba.plots.tokens import patch_grid as patch_grid
from famba.plots.tokens import saliency as saliency
from famba.plots.tokens import saliency_map as saliency_map

_PALETTE = seaborn.color_palette("colorblind").as_hex()
STRATEGY_COLOURS = {
    "none": _PALETTE[7],
    "all": _PALETTE[0],
    "interleaved": _PALETTE[1],
    "lower": _PALETTE[4],
    "upper": _PALETTE[2],
}
# Beside each other in one panel; no strategy's.
_WEIGHTS_COLOURS = {"trained": "0.2", "untrained": _PALETTE[9]}
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
_BY_STRATEGY: dict[str, Any] = {
    "hue": "strategy",
    "hue_order": STRATEGIES,
    "palette": STRATEGY_COLOURS,
    "legend": False,
}


@styled
def accuracy_against(frame: pd.DataFrame, cost: str = "train_time_s") -> Figure:
    """Top-1 accuracy against a cost: each strategy's mean with its spread, its runs, and the Pareto front.

    Args:
        frame: as from `summary.load_runs`.
        cost: one of `summary.COSTS`; less is better.

    Raises:
        InputError: a column that is not a cost.
    """
    front = summary.pareto(frame, cost)
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    names, chart = _strategies(frame), {"x": cost, "y": "top1_percent", "style": "strategy", "markers": _MARKERS}
    seaborn.scatterplot(frame, **chart, **_BY_STRATEGY, s=28, alpha=0.5, zorder=2, ax=axes)
    means, handles = {}, {}
    for name in names:
        runs = _of(frame, name)[[cost, "top1_percent"]].to_numpy(float)
        means[name] = runs.mean(axis=0)
        xerr, yerr = runs.std(axis=0, ddof=1) if len(runs) > 1 else (None, None)
        style = {"color": STRATEGY_COLOURS[name], "markersize": 10, "markeredgecolor": "white", "capsize": 3}
        handles[name], *_ = axes.errorbar(*means[name], yerr=yerr, xerr=xerr, fmt=_MARKERS[name], **style, zorder=3)
    corners = np.transpose([means[name] for name in front])
    step = {"drawstyle": "steps-post", "linestyle": "--", "linewidth": 1.2}
    (handles["Pareto front"],) = axes.plot(*corners, color="0.6", **step, zorder=1)
    axes.set(xlabel=_LABELS[cost], ylabel=_LABELS["top1_percent"])
    axes.margins(0.08)
    if cost == "flops_per_image":
        axes.xaxis.set_major_formatter(EngFormatter())
    figure.legend(handles.values(), handles, loc="outside right upper", handlelength=1.6)
    alone = _seeds(frame) == "n = 1 seed"
    spread = "one run each, so without spread" if alone else f"mean over {_seeds(frame)}, bars ± 1 sd"
    caption(
        figure,
        f"Large: {spread}. Small: single runs. Up and left is better; no strategy beats one on the Pareto front in "
        "both means.",
    )
    return figure


@styled
def tokens_per_layer(schedules: pd.DataFrame) -> Figure:
    """Tokens that each layer passes on, by strategy; what all strategies compute less of.

    Args:
        schedules: as from `summary.load_schedules` or `summary.schedule_frame`.
    """
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.add_subplot()
    names, chart = _strategies(schedules), {"x": "layer", "y": "tokens", "style": "strategy", "markers": _MARKERS}
    seaborn.lineplot(schedules, **chart, **_BY_STRATEGY, dashes=False, estimator=None, ax=axes)
    axes.set(
        xlabel="after layer (0 is the input)",
        ylabel="tokens in the sequence",
        ylim=(0, max(schedules["tokens"]) * 1.06),
    )
    axes.xaxis.set_major_locator(MaxNLocator(nbins=13, integer=True))
    left = [f"{name} ({_of(schedules, name)['tokens'].min()} left)" for name in names]
    figure.legend(axes.get_lines(), left, loc="outside right upper")
    return figure


@styled
def training_curves(history: pd.DataFrame) -> Figure:
    """Training loss, validation loss and validation accuracy by epoch: mean over seeds with its spread.

    Args:
        history: as from `summary.load_history`; without a row where nothing was trained, and the figure says so.
    """
    columns = {
        "train_loss": "training loss",
        "val_loss": "validation loss",
        "val_top1_percent": "validation top-1 accuracy (%)",
    }
    figure = Figure(figsize=(9.6, 3.7), layout="constrained")
    if history.empty:
        caption(figure, "Nothing was trained: the runs evaluate the weights that they were given.", width=130)
        return figure
    names = _strategies(history)
    panels = figure.subplots(1, len(columns))
    for axes, (column, label) in zip(panels, columns.items(), strict=True):
        seaborn.lineplot(history, x="epoch", y=column, **_BY_STRATEGY, errorbar=("sd", 1), ax=axes)
        axes.set(xlabel="epoch", ylabel="", title=label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    figure.legend(panels[0].get_lines(), names, loc="outside upper center", ncols=len(names))
    band = "" if _seeds(history) == "n = 1 seed" else "; the band is ± 1 sd"
    caption(figure, f"Mean over {_seeds(history)}{band}.", width=130)
    return figure


@styled
def paper_beside_ours(table: pd.DataFrame) -> Figure:
    """The paper's Table 1 and what was measured here, each as a change from its own `none`, with its value beside it.

    Other models, images and machines have other scales, so that only changes compare. A column whose runs were not
    made here stays empty and says so.

    Args:
        table: as from `summary.beside_paper`.
    """
    shown = {
        "top1_percent": ("top-1 accuracy\n(points from none)", "%"),
        "train_time_s": ("training time\n(% from none)", " s"),
        "peak_memory_mib": ("peak memory\n(% from none)", " MiB"),
    }
    side = ["model", "dataset", "source"]
    sides = [rows for _, rows in table.replace({"model": _MODELS, "dataset": _DATASETS}).groupby(side, sort=False)]
    widths = [1.0 if np.isfinite(rows["top1_percent"]).any() else 0.55 for rows in sides]
    figure = Figure(figsize=(2.1 * sum(widths) + 1.4, 6.6), layout="constrained")
    panels = figure.subplots(len(shown), len(widths), sharex="row", sharey=True, squeeze=False, width_ratios=widths)
    for axes, rows in zip(panels[0], sides, strict=True):
        axes.set_title("\n".join(rows[side].iloc[0]))
    for row, (metric, (label, unit)) in zip(panels, shown.items(), strict=True):
        changes = [_change(rows, metric) for rows in sides]
        ends = pd.concat([change["change"] + sign * change["sd"].fillna(0) for change in changes for sign in (-1, 1)])
        for axes, change in zip(row, changes, strict=True):
            _bars(axes, change, unit, min(0.0, *ends.dropna()), max(0.0, *ends.dropna()))
        row[0].set_ylabel(label)
    n = sorted(set(table.loc[table["source"] == "here", "n"]) - {0})
    ours = f"mean ± 1 sd over n = {', '.join(map(str, n))} seeds" if n else "nothing yet"
    caption(
        figure,
        "Bars: change from `none`; numbers: the value itself. Paper: Famba-V, Table 1, single runs on another machine. "
        f"Here: {ours}. Only changes compare across columns, and columns of different images only in direction.",
        width=round(25 * sum(widths)) + 22,
    )
    return figure


@styled
def strategies_overview(schedules: pd.DataFrame) -> Figure:
    """Which layers fuse how much: one row per strategy, one cell per layer, the tokens it removes written in.

    Args:
        schedules: as from `summary.load_schedules` or `summary.schedule_frame`.
    """
    table = schedules.pivot(index="strategy", columns="layer", values=["removed", "tokens"]).loc[_strategies(schedules)]
    removed, tokens = table["removed"].drop(columns=0), table["tokens"]
    rows, depth = removed.shape
    figure = Figure(figsize=(min(12.0, 3.0 + 0.36 * depth), 0.8 + 0.46 * rows), layout="constrained")
    axes = figure.add_subplot()
    for row, name in enumerate(removed.index):
        seaborn.heatmap(
            removed.loc[[name]].reindex(removed.index),  # the other rows are left blank: each has its own colours
            cmap=seaborn.blend_palette(["0.95", STRATEGY_COLOURS[name]], as_cmap=True),
            vmin=0,
            vmax=removed.to_numpy().max(),
            annot=removed.astype(str).where(removed > 0, ""),
            fmt="",
            annot_kws={"fontsize": 9, "color": "0.1"},
            linewidths=3,
            cbar=False,
            ax=axes,
        )
        first, last = tokens.loc[name].iloc[[0, -1]]
        axes.text(depth + 0.3, row + 0.5, f"{first} → {last} tokens", va="center", fontsize=9.5)
    axes.set(xlabel="layer", ylabel="")
    axes.set_title("tokens removed by each layer", loc="left")
    axes.tick_params(rotation=0)
    return figure


@styled
def similarity_heatmaps(matrices: Sequence[Float[np.ndarray, "_ _"]], *, layers: Sequence[int] | None = None) -> Figure:
    """Cosine similarity of every token with every other, one heat-map per layer on one scale of colours.

    Args:
        matrices: one per layer, as from `summary.cosine_similarity`; sizes may differ, since layers fuse.
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
    for axes in panels.flat[len(matrices) :]:
        axes.set_axis_off()
    for axes, layer, matrix in zip(panels.flat, numbers, matrices, strict=False):
        every = max(1, int(np.diff(MaxNLocator(4, integer=True).tick_values(0, len(matrix)))[0]))
        look = {"cmap": "viridis", "square": True, "cbar": False, "xticklabels": every, "yticklabels": every}
        seaborn.heatmap(matrix, vmin=low, vmax=1, **look, ax=axes)
        axes.set_title(f"layer {layer}: {len(matrix)} tokens", fontsize=9.5)
        axes.tick_params(rotation=0, labelsize=8)
    figure.supxlabel("token", fontsize=10)
    figure.supylabel("token", fontsize=10)
    bar = {"label": "cosine similarity", "shrink": 0.9, "aspect": 12 * down}
    figure.colorbar(panels.flat[0].collections[0], ax=panels, **bar)
    return figure


@styled
def benchmark(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """What is fast and what is not: scans, parts of a training step, what fusing gains, and memory.

    Args:
        tables: by name, as from `bench.frames`; a panel for each of `scan`, `profile`, `schedules`, `memory` and
            `curves` that is there. `schedules` needs `lengths` beside it, `curves` needs `precision`.

    Raises:
        InputError: none of them is there.
    """
    panels = {name: draw for name, draw in _BENCHMARKS.items() if name in tables}
    if not panels:
        raise InputError(f"tables: {', '.join(tables) or 'none'}; at least one of {', '.join(_BENCHMARKS)}")
    across = min(2, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(5.6 * across, 3.9 * down), layout="constrained")
    places = figure.subplots(down, across, squeeze=False)
    for axes in places.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, draw in zip(places.flat, panels.values(), strict=False):
        draw(axes, tables)
    caption(figure, "Medians of times taken in turn in one process.", width=100 * across)
    return figure


def _scan_times(axes: Axes, tables: Mapping[str, pd.DataFrame]) -> None:
    table = tables["scan"]
    names, shapes = (list(dict.fromkeys(table[column])) for column in ("contestant", "shape"))
    look = {"palette": seaborn.color_palette("crest", len(shapes)), "saturation": 1, "width": 0.75, "linewidth": 0}
    order = {"order": names, "hue_order": shapes}
    seaborn.barplot(table, y="contestant", x="matmuls", hue="shape", **order, **look, ax=axes)
    times = table.pivot(index="contestant", columns="shape", values="times")
    for bars, shape in zip(axes.containers, shapes, strict=True):
        written = [f" {_three_digits(times.loc[name, shape])}×" for name in names]
        axes.bar_label(bars, written, fontsize=7.5)  # pyright: ignore[reportArgumentType]
    axes.set(xscale="log", ylabel="", xlabel=f"time, in units of one {names[-1]}; labels: in units of {names[0]}")
    axes.set_title("selective scan, forward and backward")
    axes.margins(x=0.18)
    axes.grid(False, axis="y")
    axes.legend(title="(b, e, t, n)", fontsize=8, title_fontsize=8)


def _step_parts(axes: Axes, tables: Mapping[str, pd.DataFrame]) -> None:
    table = tables["profile"]
    steps, parts = (list(dict.fromkeys(table[column])) for column in ("step", "part"))
    shares = table.pivot(index="step", columns="part", values="share").loc[steps, parts]
    left = np.zeros(len(steps))
    for part, colour in zip(parts, seaborn.color_palette("colorblind", len(parts)), strict=True):
        share = 100 * shares[part].to_numpy(float)
        bars = axes.barh(steps, share, left=left, color=colour, height=0.6, linewidth=0, label=part)
        axes.bar_label(bars, [f"{x:.0f}" if x >= 4 else "" for x in share], label_type="center", fontsize=8)
        left += share
    for row, step in enumerate(steps):
        axes.text(101, row, f"{table.loc[table['step'] == step, 'ms'].sum():,.0f} ms", va="center", fontsize=8.5)
    axes.set(xlabel="share of the step (%)", xlim=(0, 116), title="where a training step spends its time")
    axes.set_yticks(range(len(steps)), [textwrap.fill(step, 15) for step in steps])
    axes.set_xticks(range(0, 101, 20))
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.14), ncols=5, fontsize=8, handlelength=1, columnspacing=1)


def _step_times(axes: Axes, tables: Mapping[str, pd.DataFrame]) -> None:
    lengths, table = tables["lengths"], tables["schedules"]
    axes.plot(lengths["tokens"], lengths["median_ms"], color=GREY, marker=".", linewidth=1.2, label="nothing fused")
    for name in _strategies(table):
        (row,) = _of(table, name).to_dict("records")
        label, at = f"{name}: {row['of_predicted']:.2f}× predicted", row["mean_tokens"]
        point = {"marker": _MARKERS[name], "s": 60, "edgecolor": "white", "zorder": 3}
        axes.scatter(at, row["median_ms"], color=STRATEGY_COLOURS[name], **point, label=label)
        axes.scatter(at, row["predicted_median_ms"], color=STRATEGY_COLOURS[name], marker="_", s=260, zorder=2)
    axes.set(xlabel="tokens, mean over layers", ylabel="training step (ms)", title="fused against shorter sequences")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, title="dash: what its tokens predict", title_fontsize=8)


def _peak_memory(axes: Axes, tables: Mapping[str, pd.DataFrame]) -> None:
    table = tables["memory"]
    labels = (table["strategy"] + ", " + table["backend"]).tolist()
    bars = axes.barh(labels, table["peak_mib"], height=0.6, color=[STRATEGY_COLOURS[x] for x in table["strategy"]])
    axes.bar_label(bars, [f" {x:.2f}×" for x in table["of_torch"]], fontsize=8)
    axes.plot(table["predicted_mib"], range(len(labels)), "k|", markersize=17, markeredgewidth=1.5, label="by formula")
    axes.set_xlabel("peak memory of a training step (MiB); labels: in units of the first")
    axes.set_title("memory, measured and by formula")
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.legend(loc="lower right", fontsize=8)


def _loss_curves(axes: Axes, tables: Mapping[str, pd.DataFrame]) -> None:
    table = tables["curves"].set_index("step")
    colours = seaborn.color_palette("colorblind", table.shape[1])
    for name, colour, line in zip(table, colours, ("-", "--", ":"), strict=True):
        axes.plot(table.index, table[name], line, color=colour, linewidth=1.6, label=name)
    faster = tables["precision"].set_index("precision").loc["bf16", "faster"]
    axes.set(xlabel="training step", ylabel="loss", title=f"bf16: a training step is {faster:.2f}× as fast as in fp32")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, title="vim_nano on digits", title_fontsize=8)


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@styled
def gpu_benchmark(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """What famba makes of a GPU: scans, training steps, what fusing gains, and graphs of a small model.

    Args:
        tables: as from `bench.gpu_frames`; a panel for each of `scan`, `steps`, `schedules` and `graphs` that is there.
            `schedules` needs `lengths` beside it. Without any, as where no GPU was measured, the figure says so.
    """
    panels = {name: draw for name, draw in _GPU_BENCHMARKS.items() if name in tables}
    if not panels:
        figure = Figure(figsize=(5.6, 1.0))
        figure.text(0.5, 0.5, "no GPU has been measured yet: make bench-gpu", ha="center", va="center", color=GREY)
        return figure
    across = min(2, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(5.6 * across, 3.6 * down), layout="constrained")
    places = figure.subplots(down, across, squeeze=False)
    for axes in places.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, draw in zip(places.flat, panels.values(), strict=False):
        draw(axes, tables)
    said = f" {tables['setting'].iloc[0]['device']}." if "setting" in tables else ""
    caption(figure, f"Medians of times taken in turn in one process.{said}", width=100 * across)
    return figure


def _gpu_scans(axes: Axes, tables: Mapping[str, pd.DataFrame]) -> None:
    table = tables["scan"].assign(ms=lambda x: x["device_ms"].fillna(x["median_ms"]).astype(float))
    labels = (table["contestant"] + ", " + table["directions"] + ", " + table["precision"]).tolist()
    written = [f" {x:,.1f}×" for x in table["of_roofline"]]
    _rows(axes, labels, table["ms"].tolist(), written, table["contestant"].tolist())
    axes.set(xscale="log", xlabel="time (ms); labels: in units of what its bytes take")
    axes.set_title("selective scan, forward and backward")


def _gpu_steps(axes: Axes, tables: Mapping[str, pd.DataFrame]) -> None:
    table = tables["steps"]
    names = table["model"].map(lambda name: _MODELS.get(name, name))
    labels = (names + ": " + table["contestant"]).tolist()
    written = [f" {x:,.0f}/s, {y:,.1f} GiB" for x, y in zip(table["img_per_s"], table["peak_mib"] / 1024, strict=True)]
    _rows(axes, labels, table["times"].tolist(), written, table["contestant"].tolist())
    axes.set(xscale="log", xlabel="time, in units of each model's first", title="a training step: images, peak memory")
    axes.set_xlim(0.5, 15 * max(table["times"].tolist()))


def _gpu_graphs(axes: Axes, tables: Mapping[str, pd.DataFrame]) -> None:
    table = tables["graphs"]
    names, written = table["what"].tolist(), [f" {x:.2f}×" for x in table["times"]]
    _rows(axes, names, table["median_ms"].tolist(), written, names)
    axes.set(xlabel="time (ms); labels: in units of the first", title="a training step of a small model")


def _rows(
    axes: Axes, labels: Sequence[str], lengths: Sequence[float], written: Sequence[str], colours: Sequence[str]
) -> None:
    """A bar for each label, from the top; what is alike in `colours` has one colour."""
    shades = dict(zip(dict.fromkeys(colours), seaborn.color_palette("crest", len(set(colours))), strict=True))
    bars = axes.barh(range(len(labels)), lengths, height=0.65, color=[shades[x] for x in colours], linewidth=0)
    axes.bar_label(bars, written, fontsize=8)
    axes.set_yticks(range(len(labels)), [textwrap.fill(label, 28) for label in labels])
    axes.margins(x=0.2)
    axes.invert_yaxis()
    axes.grid(False, axis="y")


_GPU_BENCHMARKS: dict[str, Callable[[Axes, Mapping[str, pd.DataFrame]], None]] = {
    "scan": _gpu_scans,
    "steps": _gpu_steps,
    "schedules": _step_times,
    "graphs": _gpu_graphs,
}
_BENCHMARKS: dict[str, Callable[[Axes, Mapping[str, pd.DataFrame]], None]] = {
    "scan": _scan_times,
    "profile": _step_parts,
    "schedules": _step_times,
    "memory": _peak_memory,
    "curves": _loss_curves,
}


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


def _change(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """By strategy: change from `none`, its sd, and the value; NaN where nothing was measured."""
    runs = rows.set_index("strategy").reindex(STRATEGIES)
    base = runs.loc["none", metric]
    relative = not metric.endswith("_percent")
    scale = 100 / base if relative and base else 1.0
    value = runs[metric] if base or not relative else runs[metric] * math.nan  # nothing is a percentage of zero
    return pd.DataFrame({"change": (value - base) * scale, "sd": runs[f"{metric}_sd"] * scale, "value": value})


def _bars(axes: Axes, change: pd.DataFrame, unit: str, low: float, high: float) -> None:
    span = high - low or 1.0
    bars = {"hue": change.index, "palette": STRATEGY_COLOURS, "saturation": 1, "width": 0.62, "linewidth": 0}
    seaborn.barplot(x=change["change"], y=change.index, **bars, legend=False, ax=axes)
    axes.set(xlabel="", ylabel="", xlim=(low - 0.05 * span, high + 0.75 * span))
    axes.set_xticks([tick for tick in MaxNLocator(nbins=3).tick_values(low, high) if low <= tick <= high])
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    if change["value"].dropna().empty:
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(labelbottom=False)
        axes.set_facecolor("0.96")
        axes.text(0.5, 0.5, "not\nmeasured\nhere", transform=axes.transAxes, ha="center", va="center", color=GREY)
        return
    style = {"fmt": "none", "ecolor": "0.15", "elinewidth": 1.2, "capsize": 2.5}
    spread = change.dropna()
    axes.errorbar(spread["change"], spread.index.to_numpy(), xerr=spread["sd"], **style)
    for row, value in enumerate(change["value"].to_numpy(float)):
        written = "not measured" if math.isnan(value) else (f"{value:,.0f}" if value >= 100 else f"{value:.1f}") + unit
        colour = GREY if math.isnan(value) else "black"
        axes.text(high + 0.06 * span, row, written, va="center", fontsize=8.5, color=colour)
    axes.axvline(0, color="0.6", linewidth=0.9)


@styled
def token_similarity(frame: pd.DataFrame) -> Figure:
    """How alike each token is with the one most like it, by layer, trained and untrained, and how that changes upwards.

    Args:
        frame: as from `tokens.similarity_in_runs`.
    """
    table = similarity.quantiles(frame.loc[frame["quantity"] == "similarity"])
    figure = Figure(figsize=(9.6, 3.9), layout="constrained")
    axes, right = figure.subplots(1, 2, width_ratios=[3, 2])
    _bands(axes, _of(table, summary.BASELINE))
    axes.set(xlabel="layer", ylabel="cosine similarity with the best match", title="unfused tokens (none)")
    axes.legend(loc="best")
    rises = similarity.rise(frame)
    for row, weights in enumerate(similarity.WEIGHTS):
        values = rises[weights].to_numpy()
        mean, low, high = similarity.bootstrap(values)
        _box(right, values, float(row), _WEIGHTS_COLOURS[weights])
        style = {"color": _PALETTE[3], "capsize": 4, "markersize": 5, "zorder": 4}
        right.errorbar(mean, row, xerr=[[mean - low], [high - mean]], fmt="o", **style)
    right.axvline(0, color="0.6", linewidth=0.9)
    right.set_yticks(range(len(similarity.WEIGHTS)), similarity.WEIGHTS)
    right.set(ylim=(len(similarity.WEIGHTS) - 0.5, -0.5), xlabel="difference in cosine similarity")
    right.set_title("upper third minus lower third of the layers")
    right.xaxis.set_major_locator(MaxNLocator(nbins=5))
    right.grid(False, axis="y")
    caption(
        figure,
        f"Left: median, middle half and 5 to 95% of the tokens of {len(rises)} images. Right: each image's difference "
        "of medians, as box (5 to 95%); in red their mean with its 95% bootstrap interval over images. Right of "
        "zero, tokens are more alike in the upper layers.",
        width=130,
    )
    return figure


@styled
def fused_distance(frame: pd.DataFrame) -> Figure:
    """How far apart in the image the tokens lie that each layer fuses, one panel for each strategy.

    Args:
        frame: as from `tokens.similarity_in_runs`.

    Raises:
        InputError: no strategy that fuses.
    """
    table = similarity.quantiles(frame.loc[frame["quantity"] == "distance"])
    names, chance = _strategies(table), similarity.chance_distance(frame)
    figure = Figure(figsize=(max(5.0, 2.5 * len(names) + 1.0), 3.6), layout="constrained")
    panels = figure.subplots(1, len(names), sharex=True, sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        _bands(axes, _of(table, name))
        axes.axhline(chance, color=GREY, linestyle="--", linewidth=1, label="two patches at random")
        axes.set_title(name, color=STRATEGY_COLOURS[name])
        axes.set(xlabel="layer", ylim=(0, None))
    panels[0].set_ylabel("distance of fused tokens (patches)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    n = frame["image"].nunique()
    text = f"Median, middle half and 5 to 95% over the pairs of {n} images; between the centres of the patches of each."
    caption(figure, text, width=round(14 * figure.get_figwidth()))
    return figure


@styled
def token_size(frame: pd.DataFrame) -> Figure:
    """How many patches a token stands for at the end, by strategy, trained and untrained.

    Args:
        frame: as from `tokens.similarity_in_runs`.

    Raises:
        InputError: a strategy that has no colour.
    """
    sizes = frame.loc[(frame["quantity"] == "size") & (frame["strategy"] != summary.BASELINE)]
    names = _strategies(sizes)
    figure = Figure(figsize=(7.2, 1.2 + 0.75 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    for row, name in enumerate(names):
        for offset, weights in zip((-0.19, 0.19), similarity.WEIGHTS, strict=True):
            values = _of(sizes, name).loc[sizes["weights"] == weights, "value"].to_numpy()
            _box(axes, values, row + offset, _WEIGHTS_COLOURS[weights], width=0.3)
    axes.set_yticks(range(len(names)), names)
    axes.set(ylim=(len(names) - 0.5, -0.5), xlabel="patches of a token, after the last layer")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    axes.grid(False, axis="y")
    handles = [Rectangle((0, 0), 1, 1, color=_WEIGHTS_COLOURS[weights], alpha=0.6) for weights in similarity.WEIGHTS]
    figure.legend(handles, similarity.WEIGHTS, loc="outside upper center", ncols=2)
    text = f"Tokens of {sizes['image'].nunique()} images, class token apart: median, middle half, whiskers 5 to 95%."
    caption(figure, text, width=110)
    return figure


def _bands(axes: Axes, table: pd.DataFrame) -> None:
    """Median, middle half and 5 to 95% by layer, for both kinds of weights."""
    for weights in similarity.WEIGHTS:
        own, colour = table.loc[table["weights"] == weights], _WEIGHTS_COLOURS[weights]
        for low, high, alpha in (("q05", "q95", 0.13), ("q25", "q75", 0.25)):
            axes.fill_between(own["layer"], own[low], own[high], color=colour, alpha=alpha, linewidth=0)
        axes.plot(own["layer"], own["median"], color=colour, marker=".", label=weights)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))


def _box(axes: Axes, values: np.ndarray, row: float, colour: str, width: float = 0.5) -> None:
    """A lying box: median, middle half, whiskers from 5 to 95%."""
    look = {"facecolor": colour, "alpha": 0.6, "linewidth": 0}
    axes.boxplot(
        values,
        positions=[row],
        widths=width,
        whis=(5, 95),
        showfliers=False,
        orientation="horizontal",
        manage_ticks=False,
        patch_artist=True,
        boxprops=look,
        medianprops={"color": "white", "linewidth": 1.6},
    )


@styled
def ablation(effects: pd.DataFrame, runs: pd.DataFrame) -> Figure:
    """What each option of fusion is worth, with 95% intervals, beside the mean accuracy of every cell of the grid.

    Args:
        effects: as from `ablation.effects`.
        runs: what they were made from, as from `ablation.run`.
    """
    pairs = effects[["factor", "kept", "instead"]].drop_duplicates()
    cells = _grid_of_means(_of(runs, _of_grid(effects)))
    height = max(3.6, 0.85 * len(pairs) + 1.2)
    figure = Figure(figsize=(7.4 + 0.75 * cells.shape[1], height), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[5.2, 1.2 + 0.75 * cells.shape[1]])
    _effects(left, effects, [f"{kept} \N{MINUS SIGN} {instead}" for _, kept, instead in pairs.to_numpy()])
    right.set_title(f"{_of_grid(effects)}: mean top-1 accuracy (%)", loc="left", fontsize=10)
    look = {"cmap": "viridis", "annot": True, "fmt": ".1f", "cbar": False, "linewidths": 1}
    seaborn.heatmap(cells, **look, ax=right)
    right.tick_params(rotation=0, labelsize=8.5, length=0)
    right.set(xlabel="", ylabel=cells.index.name)
    n = " or ".join(str(count) for count in sorted(set(effects["n"])))
    caption(
        figure,
        f"Left: top-1 with the first value minus top-1 with the second, mean and 95% t-interval over n = {n} seeds, "
        "pairs of one seed averaged first; right of zero, the first is better. Over the grid: the mean over every "
        "combination of the other options. The others: only this option changed. "
        f"Right: mean over {_seeds(runs)}.",
        width=round(16 * figure.get_figwidth()),
    )
    return figure


def _effects(axes: Axes, effects: pd.DataFrame, labels: list[str]) -> None:
    """A row for each pair of values, in it a mark for the grid and one for each strategy."""
    series = list(effects.groupby(["strategy", "over"], sort=False))
    offsets = np.linspace(-0.3, 0.3, len(series)) if len(series) > 1 else [0.0]
    for offset, (_, rows) in zip(offsets, series, strict=True):
        strategy, whole = rows["strategy"].iloc[0], rows["over"].iloc[0] == "grid"
        mean, low, high = rows[["mean", "low", "high"]].to_numpy(float).T
        axes.errorbar(
            mean,
            np.arange(len(labels)) + offset,
            xerr=None if np.isnan(low).all() else (mean - low, high - mean),
            fmt=_MARKERS[strategy],
            color="black" if whole else STRATEGY_COLOURS[strategy],
            markersize=8 if whole else 5,
            linewidth=2.2 if whole else 1.2,
            capsize=0,
            label=f"{strategy}, over the grid" if whole else strategy,
        )
    axes.axvline(0, color="0.4", linewidth=0.9, zorder=0)
    for row in range(1, len(labels)):
        axes.axhline(row - 0.5, color="0.9", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(labels)), labels)
    axes.set(ylim=(len(labels) - 0.5, -0.5), xlabel="difference in top-1 accuracy (points)")
    axes.grid(False, axis="y")
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=len(series))


def _of_grid(effects: pd.DataFrame) -> str:
    return str(effects.loc[effects["over"] == "grid", "strategy"].iloc[0])


def _grid_of_means(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean accuracy by what is compared (down) and the other options that vary (across)."""
    varied = [factor for factor in ("feature", "order", "weighting", "position") if len(set(runs[factor])) > 1]
    down, across = varied[0], varied[1:]
    rows = list(dict.fromkeys(runs[down]))
    table = runs.assign(column=["\n".join(values) for values in runs[across].to_numpy(str)] if across else "")
    columns = list(dict.fromkeys(table["column"]))
    return table.pivot_table(index=down, columns="column", values="top1_percent").loc[rows, columns]


# In the order in which they are drawn, below the named strategies.
_ADAPTIVE_COLOURS = {"adaptive-logits": _PALETTE[3], "adaptive-similarity": _PALETTE[6]}


@styled
def adaptive_schedules(schedules: pd.DataFrame, runs: pd.DataFrame) -> Figure:
    """What each strategy removes where, as bars by layer, and the accuracy that it reaches, the adaptive ones below.

    Args:
        schedules: as from `adaptive.schedules`.
        runs: as from `adaptive.runs`.

    Raises:
        InputError: a strategy that has no colour.
    """
    colours = STRATEGY_COLOURS | _ADAPTIVE_COLOURS
    present = list(dict.fromkeys(runs["strategy"]))
    if unknown := [name for name in present if name not in colours]:
        raise InputError(f"strategy: {unknown[0]!r} is not one of {', '.join(colours)}")
    names = [name for name in colours if name in present]
    figure = Figure(figsize=(9.6, 0.9 + 0.72 * len(names)), layout="constrained")
    grid = figure.add_gridspec(len(names), 2, width_ratios=[3, 2])
    score = figure.add_subplot(grid[:, 1])
    bars, most = None, schedules["removed"].max()
    for row, name in enumerate(names):
        own = _of(schedules, name)
        bars = figure.add_subplot(grid[row, 0], sharex=bars)
        drawn = bars.bar(own["layer"], own["removed"], color=colours[name], width=0.75)
        bars.bar_label(drawn, [str(r) if r else "" for r in own["removed"]], fontsize=8)
        bars.set(ylim=(0, 1.35 * most), yticks=[], ylabel=f"{name}\n{own['removed'].sum()} in all")
        bars.yaxis.label.set(rotation=0, ha="right", va="center", fontsize=9)
        bars.grid(False)
        bars.tick_params(labelbottom=row == len(names) - 1)
        points = _of(runs, name)["top1_percent"].to_numpy(float)
        mean, low, high = summary.interval(points.tolist())
        score.scatter(points, [row] * len(points), s=20, color=colours[name], alpha=0.5)
        error = None if math.isnan(low) else [[mean - low], [high - mean]]
        style: dict[str, Any] = {"color": colours[name], "markeredgecolor": "white", "markersize": 9, "capsize": 3}
        score.errorbar(mean, row, xerr=error, fmt="o", **style)
    assert bars is not None
    bars.set_xlabel("layer")
    bars.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    score.set(xlabel=_LABELS["top1_percent"], yticks=range(len(names)), yticklabels=[])
    score.set_ylim(len(names) - 0.5, -0.5)
    score.grid(False, axis="y")
    n = sorted({len(_of(runs, name)) for name in names})
    caption(
        figure,
        f"Bars: tokens removed by each layer. Right: single runs, small; their mean and its 95% t-interval, large; "
        f"n = {' or '.join(map(str, n))} seed{'' if n == [1] else 's'}.",
        width=130,
    )
    return figure


@styled
def paper_memory(shares: pd.DataFrame) -> Figure:
    """The paper's memory against the first fusing layer and against r, with what the formula says.

    Args:
        shares: as from `paper_memory.beside_formula`.
    """
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    charts = {2: ("first_layer", "first fusing layer (Table 2)"), 3: ("r", "tokens fused by each layer (Table 3)")}
    series: list[tuple[Any, pd.DataFrame]] = list(shares.groupby(["source", "model"], sort=False))
    colour = STRATEGY_COLOURS["upper"]
    looks: dict[tuple[str, str], dict[str, Any]] = {
        ("paper", "vim_tiny"): {"color": colour, "marker": "o", "linestyle": "none"},
        ("formula", "vim_tiny"): {"color": colour, "marker": ".", "linewidth": 1.2},
        # wide and pale: it lies on the other
        ("formula", "vim_small"): {"color": _PALETTE[9], "linewidth": 7, "alpha": 0.4, "zorder": 1},
    }
    for axes, (table, (column, label)) in zip(panels, charts.items(), strict=True):
        for (source, model), rows in series:
            own = rows.loc[rows["table"] == table].sort_values(column)
            name = f"{_MODELS[model]}, {source}"
            axes.plot(own[column], own["memory_share"], label=name, **looks[source, model])
        axes.axhline(1, color="0.4", linewidth=0.9, linestyle="--")
        axes.set(xlabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    panels[0].set_ylabel("peak memory of training\n(1 is the same model without fusion)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(series))
    caption(
        figure,
        "Points: Famba-V, Tables 2 and 3, one run each. Lines: the analytic memory of a training step here. Left, r "
        "falls as more layers fuse, so that about as many tokens go; right, layers 6 to 24 fuse. The direction is the "
        "same; the paper's runs save less, and with r of 1 and 2 they take more memory than without fusion.",
        width=130,
    )
    return figure

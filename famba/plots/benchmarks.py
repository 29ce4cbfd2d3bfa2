"""Figures of the benchmarks: what is fast on a CPU and on a GPU. Tidy tables in, Figure out."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes

from famba.plots import style
from famba.plots.style import GREY, Figure, caption, looks_in, rows_of, styled

_BELOW: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.45, -0.13), "fontsize": 8}  # a legend
_BELOW |= {"handlelength": 1, "columnspacing": 1}


@styled
def benchmark(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """What is fast and what is not: scans, parts of a training step, what fusing gains, and memory.

    Args:
        tables: by name, as from `bench.frames`; a panel for each of `scan`, `profile`, `schedules`, `memory` and
            `curves` that is there. `schedules` needs `lengths` beside it, `curves` `precision`, and all need `setting`.
    """
    return _panels(
        tables, scan=_scan_times, profile=_step_parts, schedules=_step_times, memory=_peak_memory, curves=_loss_curves
    )


def _scan_times(axes: Axes, tables: Mapping[str, pd.DataFrame]) -> None:
    table = tables["scan"]
    names, shapes = (list(dict.fromkeys(table[column])) for column in ("contestant", "shape"))
    look = {"palette": seaborn.color_palette("crest", len(shapes)), "saturation": 1, "width": 0.9, "linewidth": 0}
    order = {"order": names, "hue_order": shapes}
    seaborn.barplot(table, y="contestant", x="matmuls", hue="shape", **order, **look, ax=axes)
    times = table.pivot(index="contestant", columns="shape", values="times").loc[names]
    for bars, shape in zip(axes.containers, shapes, strict=True):
        written = [f" {x:,.0f}×" if x >= 100 else f" {x:.3g}×" for x in times[shape].to_numpy(float)]
        axes.bar_label(bars, written, fontsize=6.5)  # pyright: ignore[reportArgumentType]
    axes.set(xscale="log", ylabel="", xlabel=f"time, in units of one {names[-1]}; labels: in units of {names[0]}")
    axes.set_title("selective scan, forward and backward")
    axes.margins(x=0.1, y=0.02)
    axes.grid(False, axis="y")
    axes.legend(title="(b, e, t, n)", title_fontsize=8, ncols=4, **_BELOW)


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
    axes.legend(ncols=5, **_BELOW)


def _step_times(axes: Axes, tables: Mapping[str, pd.DataFrame]) -> None:
    lengths, table = tables["lengths"], tables["schedules"]
    axes.plot(lengths["tokens"], lengths["median_ms"], color=GREY, marker=".", linewidth=1.2, label="nothing fused")
    for name, (colour, marker) in looks_in(table).items():
        (row,) = rows_of(table, name).to_dict("records")
        label, at = f"{name}: {row['of_predicted']:.2f}× predicted", row["mean_tokens"]
        point = {"marker": marker, "s": 60, "edgecolor": "white", "zorder": 3}
        axes.scatter(at, row["median_ms"], color=colour, **point, label=label)
        axes.scatter(at, row["predicted_median_ms"], color=colour, marker="_", s=260, zorder=2)
    axes.set(xlabel="tokens, mean over layers", ylabel="training step (ms)", title="fused against shorter sequences")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, title="dash: what its tokens predict", title_fontsize=8)


def _peak_memory(axes: Axes, tables: Mapping[str, pd.DataFrame]) -> None:
    table = tables["memory"]
    labels = (table["strategy"] + ", " + table["backend"]).tolist()
    looks = looks_in(table)
    bars = axes.barh(labels, table["peak_mib"], height=0.6, color=[looks[x][0] for x in table["strategy"]])
    axes.bar_label(bars, [f" {x:.2f}×" for x in table["of_torch"]], fontsize=8)
    axes.plot(table["predicted_mib"], range(len(labels)), "k|", markersize=17, markeredgewidth=1.5, label="by formula")
    axes.set_xlabel("peak memory of a training step (MiB); labels: in units of the first")
    axes.set_title("memory, measured and by formula")
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.legend(loc="lower right", fontsize=8)


def _loss_curves(axes: Axes, tables: Mapping[str, pd.DataFrame]) -> None:
    table = tables["curves"].set_index("step").sort_index(axis=1)  # as they come from a file
    colours = seaborn.color_palette("colorblind", table.shape[1])
    for name, colour, line in zip(table, colours, ("-", "--", ":"), strict=True):
        axes.plot(table.index, table[name], line, color=colour, linewidth=1.6, label=name)
    faster = tables["precision"].set_index("precision").loc["bf16", "faster"]
    axes.set(xlabel="training step", ylabel="loss", title=f"bf16: a training step is {faster:.2f}× as fast as in fp32")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, title="vim_nano on digits", title_fontsize=8)


@styled
def gpu_benchmark(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """What famba makes of a GPU: scans, training steps, what fusing gains, and graphs of a small model.

    Args:
        tables: as from `bench.gpu_frames`; a panel for each of `scan`, `steps`, `schedules` and `graphs` that is there.
            `schedules` needs `lengths` beside it, and all need `setting`.
    """
    return _panels(tables, scan=_gpu_scans, steps=_gpu_steps, schedules=_step_times, graphs=_gpu_graphs)


def _panels(tables: Mapping[str, pd.DataFrame], **draws: Callable[[Axes, Mapping[str, pd.DataFrame]], None]) -> Figure:
    """A panel for each table that is there, two beside each other; without any the figure says so."""
    chosen = [draw for name, draw in draws.items() if name in tables]
    if not chosen:
        figure = Figure(figsize=(5.6, 1.0))
        said = "not measured yet: make bench, or on a GPU make bench-gpu"
        figure.text(0.5, 0.5, said, ha="center", va="center", color=GREY)
        return figure
    figure, panels = style.grid_of_panels(len(chosen), 2, (5.6, 4.4))
    for axes, draw in zip(panels.flat, chosen, strict=False):
        draw(axes, tables)
    device, threads = tables["setting"].loc[0, ["device", "threads"]]
    return caption(figure, f"Medians of times taken in turn in one process, on {device}, threads: {threads}.")


def _gpu_scans(axes: Axes, tables: Mapping[str, pd.DataFrame]) -> None:
    table = tables["scan"].assign(ms=lambda x: x["device_ms"].fillna(x["median_ms"]).astype(float))
    labels = (table["contestant"] + ", " + table["directions"] + ", " + table["precision"]).tolist()
    written = [f" {x:,.1f}×" for x in table["of_roofline"]]
    _rows(axes, labels, table["ms"].tolist(), written, table["contestant"].tolist())
    axes.set(xscale="log", xlabel="time (ms); labels: in units of what its bytes take")
    axes.set_title("selective scan, forward and backward")


def _gpu_steps(axes: Axes, tables: Mapping[str, pd.DataFrame]) -> None:
    table = tables["steps"]
    names = table["model"].map(lambda name: style.MODELS.get(name, name))
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

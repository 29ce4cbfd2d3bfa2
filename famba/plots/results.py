"""Figures of runs: tidy frame in, Figure out; no reading, no show, no global state, no torch.

Spread is +-1 standard deviation over seeds, and the caption says over how many. What is drawn over an image is in
`plots.tokens`, what all figures have in common in `plots.style`. Statistical charts are seaborn's, drawn into figures
that pyplot never hears of; matplotlib does what seaborn has no chart for.

Frames: `runs` as from `records.published`, `history` (curves.csv) from `records.gather`, `table` from
`summary.summary`, but of `costs` from `cost.table`, `schedules` from `summary.schedule_frame`, `effects` from
`ablation.effects`, `shares` from `paper_memory.beside_formula`; each of `plans` is as from `calibration.plan`.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn
from matplotlib.colors import PowerNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, MaxNLocator

from famba.analysis import ablation as ablation_table
from famba.analysis import cost as cost_table
from famba.analysis import summary
from famba.plots import style
from famba.plots.style import GREY, PALETTE, STRATEGY_COLOURS, Figure, caption, looks_in, rows_of, styled, variant

_LABELS = {
    "time_ratio": "training time (1 is that of none)",
    "peak_memory_mib": "peak memory of training (MiB)",
    "flops_per_image": "forward FLOPs of an image",
}
_TOP1 = "top-1 accuracy (%)"
_SHAPES = " Grey shapes: the strategy of a point's colour with one change."
_FUSING_COSTS = {
    "similarity": "1 \N{MINUS SIGN} cosine similarity, summed over pairs",
    "logits": "Kullback-Leibler divergence (nats)",
}


@styled
def accuracy_against(runs: pd.DataFrame, table: pd.DataFrame, cost: str) -> Figure:
    """Top-1 accuracy against a cost: each strategy's mean with its spread, its runs, and the Pareto front.

    What has fewer seeds than others is drawn, but compared with no mean: it is left out of the front.

    Args:
        cost: one of `summary.COSTS`; less is better.
    """
    costs, front = table.set_index("strategy"), summary.pareto(table.loc[table["n"] == table["n"].max()], cost)
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes, handles = figure.add_subplot(), {}
    aside = _aside(runs, table[cost].to_numpy(float))
    for name, (colour, marker) in looks_in(table).items():
        own, points = costs.loc[name], rows_of(runs, name)
        at = own[cost] + points["seed"].map(aside.get)
        axes.scatter(at, points["top1_percent"], s=22, alpha=0.6, linewidths=0, color=colour, marker=marker)
        xerr = style.error_bar(*own.reindex([cost, f"{cost}_low", f"{cost}_high"]))
        yerr = own["top1_percent_sd"] if own["n"] > 1 else None
        size = 16 if marker == "*" else 10  # a star is mostly gaps
        look: dict[str, Any] = {"marker": marker, "markersize": size, "markeredgecolor": "white", "linestyle": "none"}
        bars: dict[str, Any] = {"xerr": xerr, "yerr": yerr, "capsize": 3, "zorder": 3}
        drawn = axes.errorbar(own[cost], own["top1_percent_mean"], color=colour, **look, **bars).lines[0]
        change = variant(name)[1]
        handles[change or name] = Line2D([], [], color=GREY, **look) if change else drawn
    corners = costs.loc[front, [cost, "top1_percent_mean"]].to_numpy(float).T
    step = {"drawstyle": "steps-post", "linestyle": "--", "linewidth": 1.2, "color": "0.6", "zorder": 1}
    (handles["Pareto front"],) = axes.plot(*corners, **step)
    axes.set(xlabel=_LABELS[cost], ylabel=_TOP1)
    axes.margins(0.08)
    if cost == "flops_per_image":
        axes.xaxis.set_major_formatter(EngFormatter())
    figure.legend(handles.values(), handles, loc="outside right upper", handlelength=1.6)
    spread = f"mean over {_seeds(runs)}, vertical bars ± 1 sd of single runs (differences are paired: the table)"
    how = "" if {*handles} <= {*costs.index, "Pareto front"} else _SHAPES
    if set(table["n"]) == {1}:
        spread = "one run each, so without spread"
    if cost == "time_ratio":
        spread += "; horizontal bars: 95% intervals"
        how += f" {cost_table.caption(table).replace('**', '')}"
    return caption(
        figure,
        f"Large: {spread}. Small: single runs, moved sideways by seed. Up and left is better; no strategy with as "
        f"many runs beats one on the Pareto front in both means.{how}",
    )


def _aside(runs: pd.DataFrame, costs: np.ndarray) -> dict[int, float]:
    """How far beside its mean each seed's run is drawn, so that none lies on the bar and equal ones are told apart."""
    seeds = sorted(set(runs["seed"].tolist()))
    places = np.arange(len(seeds)) - len(seeds) // 2
    return dict(zip(seeds, 0.01 * (np.ptp(costs) or costs.max()) * (places + (places >= 0)), strict=True))


@styled
def paired_accuracy(runs: pd.DataFrame) -> Figure:
    """Each seed's accuracy without fusion and with a strategy, joined by a line; one panel for each strategy."""
    scores = runs.pivot(index="strategy", columns="seed", values="top1_percent")
    looks = looks_in(runs)
    looks.pop(summary.BASELINE)
    figure = Figure(figsize=(2.3 * len(looks) + 0.6, 3.6), layout="constrained")
    panels = figure.subplots(1, len(looks) or 1, sharey=True, squeeze=False)[0]
    for axes, (name, (colour, marker)) in zip(panels, looks.items(), strict=False):  # an empty panel: nothing fuses
        pair = scores.loc[[summary.BASELINE, name]]
        axes.plot(pair.index, pair, color=colour, marker=marker, alpha=0.5, linewidth=1.2)
        axes.plot(pair.index, pair.mean(axis=1), color="black", linewidth=2.2)
        axes.set_title(f"{pair.diff().iloc[1].mean():+.1f} points".replace("-", "\N{MINUS SIGN}"), fontsize=10)
        axes.margins(x=0.2)
    panels[0].set_ylabel(_TOP1)
    told = "n = 1 seed" if scores.shape[1] == 1 else f"A line is a seed; black: the mean of {_seeds(runs)}"
    return caption(figure, f"{told}.")


@styled
def costs(table: pd.DataFrame) -> Figure:
    """What each strategy costs in units of `none`: time of a training step with its interval, its memory, FLOPs."""
    names, rows = list(looks_in(table)), table.set_index("strategy")
    flops = rows["flops_per_image"] / rows.loc[summary.BASELINE, "flops_per_image"]
    shown = {  # with a colour that is no strategy's
        "time": (rows["time_ratio"], "o", "black"),
        "peak memory": (rows["memory_ratio"], "s", "0.4"),
        "FLOPs": (flops, "^", "0.65"),
    }
    with_ends = rows.loc[names, ["time_ratio", "time_ratio_low", "time_ratio_high"]].ffill(axis=1)  # none has no ends
    figure = Figure(figsize=(7.2, 1.4 + 0.6 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    for offset, (label, (ratios, mark, colour)) in zip((-0.2, 0.0, 0.2), shown.items(), strict=True):
        places = np.arange(len(names)) + offset
        xerr = style.error_bar(*with_ends.to_numpy(float).T) if label == "time" else None
        axes.errorbar(ratios[names], places, xerr=xerr, fmt=mark, color=colour, capsize=3, label=label)
    axes.axvline(1, color="0.6", linewidth=0.9, linestyle="--")
    style.label_rows(axes, names)
    axes.set(xlim=(0, None), xlabel="of a training step (FLOPs: of a forward pass), in units of none")
    figure.legend(loc="outside upper center", ncols=3)
    return caption(figure, cost_table.caption(table).replace("**", ""))


def _seeds(frame: pd.DataFrame) -> str:
    counts = sorted(frame.groupby("strategy")["seed"].nunique().unique())
    return f"n = {' or '.join(map(str, counts))} seed{'' if counts == [1] else 's'}"


@styled
def tokens_per_layer(schedules: pd.DataFrame) -> Figure:
    """Tokens that each layer passes on, by strategy; what all strategies compute less of."""
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.add_subplot()
    looks = looks_in(schedules)
    markers = {name: marker for name, (_, marker) in looks.items()}
    chart = {"x": "layer", "y": "tokens", "style": "strategy", "markers": markers, "dashes": False, "estimator": None}
    seaborn.lineplot(schedules, **chart, **_by_strategy(looks), ax=axes)
    axes.set(xlabel="after layer (0 is the input)", ylabel="tokens in the sequence")
    axes.set_ylim(0, max(schedules["tokens"]) * 1.06)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=13, integer=True))
    left = [f"{name} ({rows_of(schedules, name)['tokens'].min()} left)" for name in looks]
    figure.legend(axes.get_lines(), left, loc="outside right upper")
    return figure


@styled
def training_curves(history: pd.DataFrame) -> Figure:
    """Training loss, validation loss and validation accuracy by epoch: mean over seeds with its spread.

    Without a row, where nothing was trained, the figure says so.
    """
    columns = ("train_loss", "val_loss", "val_top1_percent")
    titles = ("training loss", "validation loss", "validation top-1 accuracy (%)")
    figure = Figure(figsize=(9.6, 3.7), layout="constrained")
    if history.empty:
        return caption(figure, "Nothing was trained: the runs evaluate the weights that they were given.")
    looks = looks_in(history)
    panels = figure.subplots(1, len(columns))
    for axes, column, title in zip(panels, columns, titles, strict=True):
        seaborn.lineplot(history, x="epoch", y=column, **_by_strategy(looks), errorbar=("sd", 1), ax=axes)
        axes.set(xlabel="epoch", ylabel="", title=title)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    figure.legend(panels[0].get_lines(), looks, loc="outside upper center", ncols=len(looks))
    told = _seeds(history)
    told = told if told == "n = 1 seed" else f"Mean over {told}; the band is ± 1 sd"
    return caption(
        figure,
        f"{told}. The training loss includes augmentation and label smoothing where the profile has them, the "
        "validation loss neither, so that the two cannot be compared.",
    )


@styled
def strategies_overview(schedules: pd.DataFrame) -> Figure:
    """Which layers fuse how much: one row per strategy, one cell per layer, the tokens it removes written in."""
    table = schedules.pivot(index="strategy", columns="layer", values=["removed", "tokens"])
    looks = looks_in(schedules)
    table = table.loc[list(looks)]
    removed, tokens = table["removed"].drop(columns=0), table["tokens"]
    rows, depth = removed.shape
    figure = Figure(figsize=(min(12.0, 3.0 + 0.36 * depth), 0.8 + 0.46 * rows), layout="constrained")
    axes = figure.add_subplot()
    look: dict[str, Any] = {"vmin": 0, "vmax": removed.to_numpy().max(), "linewidths": 3, "cbar": False}
    look |= {"annot": removed.astype(str).where(removed > 0, ""), "annot_kws": {"fontsize": 9, "color": "0.1"}}
    for row, name in enumerate(removed.index):
        own = removed.loc[[name]].reindex(removed.index)  # the other rows are left blank: each has its own colours
        colours = seaborn.blend_palette(["0.95", looks[name][0]], as_cmap=True)
        seaborn.heatmap(own, cmap=colours, fmt="", **look, ax=axes)
        first, last = tokens.loc[name].iloc[[0, -1]]
        axes.text(depth + 0.3, row + 0.5, f"{first} → {last} tokens", va="center", fontsize=9.5)
    axes.set(xlabel="layer", ylabel="")
    axes.set_title("tokens removed by each layer", loc="left")
    axes.tick_params(rotation=0)
    return figure


@styled
def ablation(effects: pd.DataFrame) -> Figure:
    """What each change is worth: a row for each, in it a mark with its interval for each strategy."""
    changes = effects["change"].unique().tolist()
    looks = looks_in(effects)
    figure = Figure(figsize=(7.2, 1.8 + 0.14 * len(changes) * (2 + len(looks))), layout="constrained")
    axes, offsets = figure.add_subplot(), np.linspace(-0.3, 0.3, len(looks)) if len(looks) > 1 else [0.0]
    for (name, (colour, marker)), offset in zip(looks.items(), offsets, strict=True):
        rows = rows_of(effects, name)
        mean, low, high = rows[["mean", "low", "high"]].to_numpy(float).T
        places = offset + np.array([changes.index(x) for x in rows["change"]])
        look: dict[str, Any] = {"fmt": marker, "color": colour, "label": name}
        axes.errorbar(mean, places, xerr=style.error_bar(mean, low, high), **look)
    axes.axvline(0, color="0.4", linewidth=0.9, zorder=1)
    for row in range(1, len(changes)):
        axes.axhline(row - 0.5, color="0.9", linewidth=0.8, zorder=0)
    style.label_rows(axes, changes)
    axes.set(xlabel="change of top-1 accuracy (points)")
    figure.legend(loc="outside upper center", ncols=len(looks))
    n = effects["n"].iloc[0]
    told = "n = 1 seed" if n == 1 else f"mean and 95% interval over n = {n} seeds and images"
    return caption(figure, f"Top-1 with one change minus top-1 of the same strategy without it, {told}.")


def ablations(runs: pd.DataFrame, table: pd.DataFrame) -> dict[str, Figure]:
    """Figures of accuracy and cost by name; the paper's beside it where the first layer or r of `upper` changes.

    More than 20 variants cannot be told apart in one panel: only their effects are drawn (`ablation`).
    """
    costs = ("time_ratio", "peak_memory_mib") if len(table) <= 20 else ()
    figures = {cost: accuracy_against(runs, table, cost) for cost in costs}
    varied = [x for x in ("first_layer", "r") if len(set(_of_upper(table)[x])) > 1]
    return figures | ({"paper": upper_beside_paper(table, varied[0])} if varied else {})


def _of_upper(table: pd.DataFrame) -> pd.DataFrame:
    return table.loc[table["strategy"].str.match("upper(_|$)")]


@styled
def upper_beside_paper(table: pd.DataFrame, column: str) -> Figure:
    """What upper-layer fusion changes against its first layer or against r: the paper's Table 2 or 3, and here.

    Args:
        table: of `upper` and its changes.
        column: first_layer or r.
    """
    number, label = {"first_layer": (2, "first fusing layer"), "r": (3, "tokens fused by each layer, r")}[column]
    quantities = ("top1_percent_diff", "time_ratio", "memory_ratio")
    names = ("change of top-1\n(points)", "training time", "peak memory")
    figure = Figure(figsize=(8.4, 6.4), layout="constrained")
    panels = figure.subplots(3, 2, sharex="col", sharey="row")
    sides = {f"Famba-V, Table {number} (Vim-Ti)": ablation_table.paper(number), "here": _of_upper(table)}
    for (title, side), axes in zip(sides.items(), panels.T, strict=True):
        side = side.sort_values(column)
        axes[0].set_title(title)
        axes[-1].set_xlabel(label)
        axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
        for panel, quantity, name in zip(axes, quantities, names, strict=True):
            with_ends = side.reindex(columns=[quantity, f"{quantity}_low", f"{quantity}_high"])
            yerr = style.error_bar(*with_ends.to_numpy(float).T)
            look: dict[str, Any] = {"fmt": "^-", "color": STRATEGY_COLOURS["upper"], "capsize": 3}
            panel.errorbar(side[column], side[quantity], yerr=yerr, **look)
            panel.axhline(0 if quantity == "top1_percent_diff" else 1, color="0.4", linewidth=0.9, linestyle="--")
            panel.set_ylabel(name if title != "here" else "")
    told = " ".join(f"{title}: {_break_even(side)}." for title, side in sides.items()) if column == "r" else ""
    told += " The r is interpolated." if "from r =" in told else ""
    return caption(
        figure,
        "Dashed: the same model without fusion, which all are relative to. The paper's are one run each; here 95% "
        f"intervals, of accuracy over seeds and images, of time over rounds. {told}",
    )


def _break_even(side: pd.DataFrame) -> str:
    found = cost_table.break_even(side)
    if math.isnan(found):
        return "no r saves time"
    return f"time is saved from r = {found:.1f} on" if found else f"even r = {side['r'].min()} saves time"


def _by_strategy(looks: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """seaborn's arguments for one line of each strategy; that of `none`, on which others lie, is wide."""
    colours = [colour for colour, _ in looks.values()]
    widths = {name: 4.0 if name == summary.BASELINE else 1.8 for name in looks}
    hues = {"hue": "strategy", "hue_order": list(looks), "palette": colours}
    return hues | {"size": "strategy", "sizes": widths, "legend": False}


@styled
def fusing_costs(plans: Sequence[Any]) -> Figure:
    """What fusing some tokens at one layer alone costs: a panel for each plan; layers by numbers of tokens."""
    depth = len(plans[0].costs)
    figure = Figure(figsize=(5.6 * len(plans), 1.6 + 0.28 * depth), layout="constrained")
    panels = figure.subplots(1, len(plans), squeeze=False)[0]
    for axes, plan in zip(panels, plans, strict=True):
        table = pd.DataFrame(plan.costs, index=range(1, depth + 1))
        norm = PowerNorm(0.3, vmin=0)  # the costs of few tokens, which the schedule is made of, are small
        seaborn.heatmap(table, cmap="viridis_r", norm=norm, ax=axes, cbar_kws={"label": _FUSING_COSTS[plan.kind]})
        for layer, removed in enumerate(plan.schedule):
            frame = Rectangle((removed, layer), 1, 1, fill=False, edgecolor=PALETTE[3], linewidth=1.6)
            axes.add_patch(frame).set_clip_on(False)
        axes.set(xlabel="tokens fused", ylabel="layer", title=f"cost by {plan.kind}")
        axes.tick_params(rotation=0)
    return caption(figure, "Framed: the schedule of least cost within the budget.")


@styled
def paper_memory(shares: pd.DataFrame) -> Figure:
    """The paper's memory against the first fusing layer and against r, with what the formula says."""
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    charts = {2: ("first_layer", "first fusing layer (Table 2)"), 3: ("r", "tokens fused by each layer (Table 3)")}
    series: list[tuple[Any, pd.DataFrame]] = list(shares.groupby(["source", "model"], sort=False))
    colour = STRATEGY_COLOURS["upper"]
    looks: dict[tuple[str, str], dict[str, Any]] = {
        ("paper", "vim_tiny"): {"color": colour, "marker": "o", "linestyle": "none"},
        ("formula", "vim_tiny"): {"color": colour, "marker": ".", "linewidth": 1.2},
        # wide and pale: it lies on the other
        ("formula", "vim_small"): {"color": PALETTE[9], "linewidth": 7, "alpha": 0.4, "zorder": 1},
    }
    for axes, (table, (column, label)) in zip(panels, charts.items(), strict=True):
        for (source, model), rows in series:
            own = rows.loc[rows["table"] == table].sort_values(column)
            name = f"{style.MODELS[model]}, {source}"
            axes.plot(own[column], own["memory_share"], label=name, **looks[source, model])
        axes.axhline(1, color="0.4", linewidth=0.9, linestyle="--")
        axes.set(xlabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    panels[0].set_ylabel("peak memory of training\n(1 is the same model without fusion)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(series))
    return caption(
        figure,
        "Points: Famba-V, Tables 2 and 3, one run each. Lines: the analytic memory of a training step here. Left, r "
        "falls as more layers fuse, so that about as many tokens go; right, layers 6 to 24 fuse. The direction is the "
        "same; the paper's runs save less, and with r of 1 and 2 they take more memory than without fusion.",
    )

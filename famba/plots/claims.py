"""The forest plot of `claims.verdicts`; no other stage than `claims` depends on it and on what judges them."""

import pandas as pd
from matplotlib.lines import Line2D

from famba.analysis.claims import LABELS, VERDICTS
from famba.plots.style import GREY, PALETTE, Figure, caption, error_bar, label_rows, styled


@styled
def forest(verdicts: pd.DataFrame) -> Figure:
    """Forest plot of the claims that were measured: each comparison's effect, its interval and the claim's bound."""
    colours: dict[str, str] = dict(zip(VERDICTS, (PALETTE[2], PALETTE[3], GREY), strict=False))
    measured = verdicts.loc[verdicts["effect"].notna()]
    quantities = list(dict.fromkeys(measured["quantity"]))
    heights = [int((measured["quantity"] == quantity).sum()) + 3 for quantity in quantities]
    figure = Figure(figsize=(8.4, 2.0 + 0.24 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(quantities) or 1, 1, squeeze=False, height_ratios=heights or [1])
    for axes, quantity in zip(panels[:, 0], quantities, strict=False):  # an empty panel where nothing was measured
        own = measured.loc[measured["quantity"] == quantity]
        for row, found in enumerate(own.to_dict("records")):
            xerr = error_bar(*(found[key] for key in ("effect", "low", "high")))
            side, bound = found["required"].split()
            axes.errorbar(found["effect"], row, xerr=xerr, fmt="o", color=colours[found["verdict"]], capsize=3)
            mark = ">" if side == "above" else "<"
            axes.plot(float(bound), row, mark, color="0.1", fillstyle="none", markersize=6, zorder=3)
        sign = "\N{MINUS SIGN}" if quantity == "top1_percent_diff" else "/"
        pairs = own[["claim", "strategy", "against"]].to_numpy(str)
        labels = [f"{name.replace('_', ' ')}:  {ours} {sign} {theirs}" for name, ours, theirs in pairs]
        label_rows(axes, labels)
        axes.set(xlabel=LABELS[quantity])
    handles = [Line2D([], [], color=colour, marker="o", linestyle="none") for colour in colours.values()]
    figure.legend(handles, colours, loc="outside upper right", ncols=3)
    missing = len(verdicts.loc[verdicts["effect"].isna() & (verdicts["strategy"] != "")])
    told = f" Not drawn, since no variant costs as much: {missing} of the comparisons at the same cost."
    return caption(
        figure,
        "Effects with 95% intervals, each by itself; colour: the claim's verdict, Holm-adjusted over the claims. Open "
        "marks: the bound, pointing to where every effect of the claim must lie. Memory has no interval."
        + (told if missing else ""),
    )

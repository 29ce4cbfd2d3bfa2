"""What each change of an ablation is worth, in points of accuracy, and the paper's ablations in the same units."""

import math

import pandas as pd

from famba.analysis import intervals, summary
from famba.config import SweepParams


def effects(asked: SweepParams, runs: pd.DataFrame) -> pd.DataFrame:
    """Top-1 with a change minus top-1 without it, same strategy, paired by seed and image.

    Args:
        asked: whose varied strategies are all among its unchanged ones.
        runs: as from `records.published`.

    Returns:
        A row for each change and strategy: change, strategy, mean, low and high (points, 95%), n (seeds).
    """
    rows = []
    for change in asked.changes:
        for strategy in asked.varied:
            changed, plain = (runs[runs["strategy"] == x].set_index("seed") for x in (f"{strategy}_{change}", strategy))
            rows.append((change, strategy, *summary.accuracy_difference(changed, plain), len(changed)))
    return pd.DataFrame(rows, columns=["change", "strategy", "mean", "low", "high", "n"])


def markdown(effects: pd.DataFrame) -> str:
    """The effects as a table, a row for each change."""
    rows = effects[["mean", "low", "high"]].to_numpy(float)
    entries = [intervals.with_interval(intervals.signed, *row) for row in rows]
    clear = (effects["low"] > 0) | (effects["high"] < 0)
    bold = [f"**{entry}**" if sure else entry for entry, sure in zip(entries, clear, strict=True)]
    table = effects.assign(entry=bold).pivot(index="change", columns="strategy", values="entry")
    table = table.loc[effects["change"].unique(), effects["strategy"].unique()]
    count, told = len(effects), "one seed has no interval"
    if not math.isnan(rows[0, 1]):
        told = (
            "95% interval over seeds and images, bold where it excludes zero. By chance alone, about "
            f"{count / 20:g} of {count} would exclude zero"
        )
    return (
        f"{table.to_markdown(disable_numparse=True)}\n\nTop-1 with one change minus top-1 of the same strategy without "
        f"it (points), paired by seed and image, n = {effects['n'].iloc[0]}; {told}.\n"
    )


def paper(table: int) -> pd.DataFrame:
    """The paper's Table 2 (the first fusing layer varies) or 3 (r varies), in units of its model without fusion.

    Returns:
        One row per run: r, first_layer, top1_percent_diff, time_ratio, memory_ratio.
    """
    published = summary.paper_table().rename(columns={"tokens_fused_per_layer": "r"})
    rows = published.loc[published["table"] == table]
    rows = rows.assign(first_layer=rows["fused_layers"].str.split("-").str[0].astype(int))
    return rows.loc[:, ["r", "first_layer", "top1_percent_diff", "time_ratio", "memory_ratio"]]

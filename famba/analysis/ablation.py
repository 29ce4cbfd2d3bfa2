"""What each change of an ablation is worth, in points of accuracy, and the paper's ablations in the same units."""

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
            found = zip(("mean", "low", "high"), summary.accuracy_difference(changed, plain), strict=True)
            rows.append({"change": change, "strategy": strategy, **dict(found), "n": len(changed)})
    return pd.DataFrame(rows)


def markdown(effects: pd.DataFrame) -> str:
    """The effects as a table, a row for each change."""
    entries = [
        intervals.with_interval(intervals.signed, *row) for row in effects[["mean", "low", "high"]].to_numpy(float)
    ]
    clear = (effects["low"] > 0) | (effects["high"] < 0)
    bold = [f"**{entry}**" if sure else entry for entry, sure in zip(entries, clear, strict=True)]
    table = effects.assign(entry=bold).pivot(index="change", columns="strategy", values="entry")
    table = table.loc[effects["change"].unique(), effects["strategy"].unique()]
    return (
        f"{table.to_markdown(disable_numparse=True)}\n\nTop-1 with one change minus top-1 of the same strategy without "
        f"it (points), paired by seed and image, n = {effects['n'].iloc[0]}; 95% interval over seeds and images, bold "
        f"where it excludes zero. Of {len(effects)}, {len(effects) / 20:.1f} would by chance alone.\n"
    )


def paper(table: int) -> pd.DataFrame:
    """The paper's Table 2 (the first fusing layer varies) or 3 (r varies), in units of its model without fusion.

    Returns:
        One row per run: r, first_layer, top1_percent_diff, time_ratio, memory_ratio.
    """
    published = summary.paper_table()
    base = published.query("table == 1 and model == 'vim_tiny' and strategy == 'none'").iloc[0]
    rows = published.loc[published["table"] == table]
    return pd.DataFrame(
        {
            "r": rows["tokens_fused_per_layer"],
            "first_layer": rows["fused_layers"].str.split("-").str[0].astype(int),
            "top1_percent_diff": rows["top1_percent"] - base["top1_percent"],
            "time_ratio": rows["train_time_s"] / base["train_time_s"],
            "memory_ratio": rows["peak_memory_mib"] / base["peak_memory_mib"],
        }
    )

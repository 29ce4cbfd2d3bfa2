"""From finished runs to the numbers that are reported: exactly the runs a sweep names, their spread and differences.

Frames are tidy: one row is one run (`records`), or one layer of a strategy. Strategies always come in the order of
`strategies.ordered`. A number that does not exist (the spread of one run) is an empty cell, never a zero.

Accuracy is the runs'; what a step costs is measured apart (`training.cost`), since a run's own wall-clock depends on
what ran beside it. Source of the paper's tables: arXiv:2409.09808.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from famba import config
from famba.analysis import cost, intervals, records
from famba.analysis.cost import BASELINE
from famba.errors import InputError
from famba.fusion import strategies
from famba.fusion.strategies import STRATEGIES, ordered
from famba.storage.files import json_bytes, write_atomic

TABLES_IN = ("README.md", "docs/results.md")
# Less of these is better, so that accuracy can be weighed against them.
COSTS = {"time_ratio": "training time", "peak_memory_mib": "peak memory", "flops_per_image": "FLOPs"}
# What all runs of a summary have in common, or what it must say if they do not.
_SETTING = ("profile", "dataset", "img_size", "model", "device", "threads", "versions")


def schedule_frame(schedules: Mapping[str, Sequence[int]], *, tokens: int) -> pd.DataFrame:
    """Schedules by strategy as a tidy frame: strategy, layer (0 is the input), removed, tokens (after the layer).

    Args:
        tokens: sequence length at the input, class token included.

    Raises:
        InputError: a schedule that asks a layer for more than it can fuse.
    """
    rows = []
    for name in ordered(schedules):
        layers = zip([0, *schedules[name]], strategies.token_counts(schedules[name], tokens), strict=True)
        rows += [(name, layer, removed, left) for layer, (removed, left) in enumerate(layers)]
    return pd.DataFrame(rows, columns=["strategy", "layer", "removed", "tokens"])


def summary(frame: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """Accuracy, its difference to `none`, and cost, one row per strategy.

    Columns: strategy, n (seeds), images (tested, over all seeds), the runs' setting (profile, dataset, model, device,
    ..); top1_percent and top5_percent as `_mean` and `_sd` (over seeds, n - 1); top1_percent_diff (mean of the
    differences to `none` with the same seed), `_diff_low` and `_diff_high` (95%, `intervals.two_way`); and of the
    costs step_time_ms, throughput_img_s, time_ratio with its interval, peak_memory_mib, memory_ratio, flops_per_image,
    rounds and disturbed. NaN where there is no such number: spread and interval of one run, the difference of `none`.

    Args:
        frame: as from `records.published`.
        costs: as from `cost.table`.

    Raises:
        InputError: a strategy whose seeds are not those of `none`, or whose cost was not measured under this profile.
    """
    rows = []
    baseline = frame[frame["strategy"] == BASELINE].set_index("seed")
    measured = costs.set_index("strategy")
    for strategy in ordered(list(frame["strategy"])):
        own = frame[frame["strategy"] == strategy].set_index("seed")
        if strategy not in measured.index or measured.loc[strategy, "profile"] != own["profile"].iloc[0]:
            raise InputError(f"cost.csv: strategy {strategy} was not measured under profile {own['profile'].iloc[0]}")
        row: dict[str, Any] = {"strategy": strategy, "n": len(own)}
        row["images"] = int((~np.isnan(intervals.answers(own["correct"]))).any(axis=0).sum())
        row |= {key: "; ".join(str(value) for value in frame[key].unique()) for key in _SETTING}
        for metric in ("top1_percent", "top5_percent"):
            row |= {f"{metric}_mean": own[metric].mean(), f"{metric}_sd": own[metric].std()}
        found = accuracy_difference(own, baseline)  # of `none` as well, whose seeds may stand twice
        found = (math.nan,) * 3 if strategy == BASELINE else found
        row |= dict(zip([f"top1_percent_diff{end}" for end in ("", "_low", "_high")], found, strict=True))
        rows.append(row | measured.loc[strategy].drop(["profile", "device", "threads", "versions"]).to_dict())
    return pd.DataFrame(rows)


def accuracy_difference(
    ours: pd.DataFrame, *theirs: pd.DataFrame, weights: Sequence[float] = (1.0,)
) -> tuple[float, float, float]:
    """Mean difference in top-1 (points), paired by seed and image, and its interval (`intervals.two_way`).

    Args:
        ours, theirs: rows of `records.published`, one for each seed, indexed by seed.
        weights: of theirs, whose weighted mean ours are compared with.

    Raises:
        InputError: other seeds, or a seed twice.
    """
    groups = (ours, *theirs)
    seeds = [f"{group['strategy'].iloc[0]}: seeds {sorted(group.index)}" for group in groups]
    if not all(group.index.is_unique and set(group.index) == set(ours.index) for group in groups):
        raise InputError(f"{'; '.join(seeds)}; only the same seeds can be paired, each once")
    found = intervals.answers(answers for group in groups for answers in group["correct"].sort_index())
    own, *others = np.split(100 * found, len(groups))
    return intervals.two_way(own - sum(weight * x for weight, x in zip(weights, others, strict=True)))


def pareto(table: pd.DataFrame, cost_column: str) -> list[str]:
    """The strategies that no other beats in mean top-1 and mean cost together, the cheapest first.

    Args:
        table: as from `summary`.
        cost_column: one of `COSTS`; less is better.
    """
    points = {row["strategy"]: (row[cost_column], row["top1_percent_mean"]) for row in table.to_dict("records")}

    def beaten(name: str) -> bool:
        cost, score = points[name]
        return any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points.values())

    return sorted((name for name in points if not beaten(name)), key=lambda name: (*points[name], name))


def write_summary(frame: pd.DataFrame, costs: pd.DataFrame, folder: str | Path) -> pd.DataFrame:
    """Write summary.csv, summary.md and summary_short.md (for readers), and summary.json (for `dvc metrics`).

    Args:
        frame, costs: as for `summary`, which is returned.
        folder: if relative, from the repository root.
    """
    table, folder = summary(frame, costs), config.root() / folder
    means = table.set_index("strategy")[["top1_percent_mean", "time_ratio", "memory_ratio"]].to_dict()
    records.write(table, folder, "summary.csv")
    write_atomic(folder / "summary.md", markdown(table).encode())
    write_atomic(folder / "summary_short.md", markdown_short(table).encode())
    write_atomic(folder / "summary.json", json_bytes(means))
    return table


def markdown(summary: pd.DataFrame) -> str:
    """The summary as a reader wants it: accuracy and cost, what is Pareto-optimal, the paper beside it, and where."""
    fronts = {word: ", ".join(pareto(summary, key)) for key, word in COSTS.items()}
    parts = [
        _table(_readable(summary)),
        _explained(summary),
        "\n".join(f"Pareto-optimal in mean top-1 against {word}: {names}." for word, names in fronts.items()),
        "Beside the paper's Table 1 (CIFAR-100 at 224 px): top-1 of `none` (%); for the others the change of top-1 "
        "(points), training time and peak memory relative to `none`.",
        _table(beside_paper(summary)),
        setting(summary),
    ]
    return "\n\n".join(parts) + "\n"


def markdown_short(summary: pd.DataFrame) -> str:
    """The summary in one small table: top-1 and its difference to `none`, training time and peak memory."""
    shown = ["strategy", "n", "top-1 (%)", "difference to `none` (points)", "training time", "peak memory"]
    return "\n\n".join([_table(_readable(summary).loc[:, shown]), _explained(summary), setting(summary)]) + "\n"


def paper_table() -> pd.DataFrame:
    """The paper's Tables 1 to 3, one row per run, n = 1 each; paper/README.md says what the columns are.

    In units of the same model without fusion, which comes first there: top1_percent_diff, time_ratio, memory_ratio.
    """
    path = Path(__file__).parent / "paper" / "famba_v_results.csv"
    rows = pd.read_csv(path, dtype={"fused_layers": str}, keep_default_na=False)
    none: Any = rows.groupby("model")[["top1_percent", "train_time_s", "peak_memory_mib"]].transform("first")
    return rows.assign(
        top1_percent_diff=rows["top1_percent"] - none["top1_percent"],
        time_ratio=rows["train_time_s"] / none["train_time_s"],
        memory_ratio=rows["peak_memory_mib"] / none["peak_memory_mib"],
    )


def beside_paper(summary: pd.DataFrame) -> pd.DataFrame:
    """What each strategy changes, in the paper's Table 1 and here: numbers that compare where accuracies do not.

    Returns:
        Text: a row per strategy, a column for each of the paper's models and one for the summary's.
    """

    def entry(row: dict[Any, Any]) -> str:
        if row["strategy"] == BASELINE:
            return f"{row['top1_percent']:.1f}"
        return f"{intervals.signed(row['top1_percent_diff'])}, {row['time_ratio']:.2f}, {row['memory_ratio']:.2f}"

    published = paper_table().query("table == 1").groupby("model", sort=False)
    sides = {f"paper, {model}": rows for model, rows in published}
    sides["here"] = summary.rename(columns={"top1_percent_mean": "top1_percent"})
    columns = {side: {row["strategy"]: entry(row) for row in rows.to_dict("records")} for side, rows in sides.items()}
    table = pd.DataFrame(columns).reindex(STRATEGIES).fillna("")
    return table.rename_axis("strategy").reset_index()


def with_tables(text: str, name: str) -> str:
    """The text with each generated block up to date: what stands between `<!-- FILE:begin -->` and `<!-- FILE:end -->`.

    Args:
        text: of README.md or a page of docs/; FILE is from the repository root.
        name: of the text, for errors.

    Raises:
        InputError: a marker without the other one, no block, or a file that is missing.
    """
    filled, blocks = re.subn(
        r"<!-- (\S+):begin -->(?:(?!<!--).)*<!-- \1:end -->",
        lambda found: f"<!-- {found[1]}:begin -->\n\n{_read(config.root() / found[1])}\n<!-- {found[1]}:end -->",
        text,
        flags=re.DOTALL,
    )
    if not blocks or len(re.findall(r"<!-- \S+:(?:begin|end) -->", text)) != 2 * blocks:
        raise InputError(f"{name}: each table needs <!-- FILE:begin --> before it and, after it, <!-- FILE:end -->")
    return filled


def update_readme() -> None:
    """Bring the tables of README.md and docs/results.md up to date. Errors as in `with_tables`."""
    for name in TABLES_IN:
        path = config.root() / name
        write_atomic(path, with_tables(_read(path), name).encode())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _with_sd(summary: pd.DataFrame, key: str) -> list[str]:
    rows = summary[[f"{key}_mean", f"{key}_sd"]].to_numpy(float)
    return [f"{mean:.1f}" + ("" if math.isnan(sd) else f" ± {sd:.1f}") for mean, sd in rows]


def _readable(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary as text, under the names that readers see."""
    differences = summary[[f"top1_percent_diff{end}" for end in ("", "_low", "_high")]].to_numpy(float)
    times = summary[["time_ratio", "time_ratio_low", "time_ratio_high"]].to_numpy(float)
    columns = {
        "strategy": summary["strategy"],
        "n": summary["n"],
        "top-1 (%)": _with_sd(summary, "top1_percent"),
        "difference to `none` (points)": [intervals.with_interval(intervals.signed, *row) for row in differences],
        "top-5 (%)": _with_sd(summary, "top5_percent"),
        "training time": [intervals.with_interval("{:.2f}".format, *row) for row in times],
        "step (ms)": summary["step_time_ms"].map("{:.3g}".format),
        "images/s": summary["throughput_img_s"].map("{:,.0f}".format),
        "peak memory": summary["memory_ratio"].map("{:.2f}".format),
        "MiB": summary["peak_memory_mib"].map("{:,.1f}".format),
        "FLOPs (M)": (summary["flops_per_image"] / 1e6).map("{:,.2f}".format),
    }
    return pd.DataFrame(columns)


def _table(frame: pd.DataFrame) -> str:
    align = ["left", *["right"] * (frame.shape[1] - 1)]
    return frame.to_markdown(index=False, disable_numparse=True, colalign=align)


def _explained(summary: pd.DataFrame) -> str:
    first = summary.iloc[0]
    text = (
        f"Top-1: mean ± 1 standard deviation over n seeds, {first['images']:,} test images in all. Difference: paired "
        "by seed and image, 95% interval over seeds and images."
    )
    if first["n"] == 1:
        text += " One seed has no spread and no interval."
    return f"{text} Training time and peak memory: relative to `none`."


def setting(summary: pd.DataFrame) -> str:
    """What was trained and measured, and on which machine."""
    first = summary.iloc[0]
    text = (
        f"Profile `{first['profile']}`: `{first['model']}` on {first['dataset']} at {first['img_size']} px. "
        f"{cost.caption(summary)} {first['versions']}. runs.csv has the command of each run."
    )
    if any(";" in str(first[key]) for key in ("device", "threads", "versions")):
        text += " **Runs were made on different machines or versions.**"
    return text

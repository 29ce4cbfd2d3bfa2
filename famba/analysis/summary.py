"""From finished runs to the numbers that are reported: exactly the runs a sweep names, their spread and differences.

Frames are tidy: one row is one run, one epoch of a run, or one layer of a strategy. Strategies always come in the
order of `STRATEGIES`. A number that does not exist (the spread of one run) is an empty cell, never a zero.

Sources: the paper's tables, arXiv:2409.09808. Intervals are Student's, on differences paired by seed: runs of one seed
share initial weights and the order of images, so the pairing takes out what the seed does to every strategy alike.
"""

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from famba import config
from famba.config import SweepParams
from famba.errors import InputError
from famba.fusion import strategies
from famba.fusion.strategies import STRATEGIES
from famba.storage import runs
from famba.storage.files import json_bytes, write_atomic

BASELINE = "none"
DETERMINISTIC = ("top1_percent", "top5_percent")
MEASURED = ("train_time_s", "step_time_ms", "peak_memory_mib", "throughput_img_s")
REPORTED = (*DETERMINISTIC, *MEASURED)
CURVES = ("strategy", "seed", "epoch", "train_loss", "val_loss", "train_top1_percent", "val_top1_percent")
# Less of these is better, so that accuracy can be weighed against them.
COSTS = ("train_time_s", "step_time_ms", "peak_memory_mib", "flops_per_image")
_SHOWN = ("top1_percent", "train_time_s", "peak_memory_mib")  # by `dvc metrics`
# What all runs of a summary have in common, or what it must say if they do not.
_SETTING = ("profile", "dataset", "img_size", "model", "device", "threads", "versions")
_HEADINGS = {
    "top1_percent": "top-1 (%)",
    "top5_percent": "top-5 (%)",
    "train_time_s": "training time (s)",
    "step_time_ms": "step (ms)",
    "peak_memory_mib": "peak memory (MiB)",
    "throughput_img_s": "throughput (images/s)",
}


def load_runs(sweep: SweepParams, runs_dir: str | Path) -> pd.DataFrame:
    """One row for every run that the sweep names, and no other: a folder left from an earlier sweep is not counted.

    Args:
        runs_dir: folder of the runs; if relative, from the repository root.

    Raises:
        InputError: a run that is missing or spoilt, a seed or strategy named twice, runs of different profiles, runs
            whose parameters differ in more than the strategy's fusion rule; names run and key.
    """
    rows = []
    for record in _records(sweep, runs_dir):
        data, model = record.params["data"], record.params["model"]
        measured = {key: record.cost[key] for key in (*MEASURED, "data_time_ms", "flops_per_image", "params_count")}
        rows.append(
            {
                "strategy": record.strategy,
                "seed": record.seed,
                "profile": record.profile,
                "dataset": data["dataset"],
                "img_size": data["img_size"],
                "model": model["name"],
                **{key: record.metrics[key] for key in (*DETERMINISTIC, "loss")},
                "chosen_weights": record.metrics["chosen"]["weights"],
                "chosen_epoch": record.metrics["chosen"]["epoch"],
                **measured,
                "tokens_removed": sum(record.schedule),
                "tokens_left": record.token_counts[-1],
                "device": record.cost["device"],
                "threads": record.cost["threads"],
                "versions": ", ".join(f"{name} {version}" for name, version in sorted(record.cost["versions"].items())),
                "command": record.cost["command"],
            }
        )
    return pd.DataFrame(rows)


def load_history(sweep: SweepParams, runs_dir: str | Path) -> pd.DataFrame:
    """One row per epoch of every run of the sweep: strategy, seed and `runs.HISTORY_COLUMNS`; errors as above."""
    rows = [
        {"strategy": record.strategy, "seed": record.seed, **row}
        for record in _records(sweep, runs_dir)
        for row in record.history
    ]
    frame = pd.DataFrame(rows, columns=["strategy", "seed", *runs.HISTORY_COLUMNS])
    return frame.astype({column: float for column in runs.HISTORY_COLUMNS if column != "epoch"})


def load_schedules(sweep: SweepParams, runs_dir: str | Path) -> pd.DataFrame:
    """One row per layer of every strategy: what the runs removed and what their traces showed; as `schedule_frame`.

    Raises:
        InputError: as `load_runs`; or two seeds of one strategy that fused differently.
    """
    by_strategy: dict[str, runs.RunRecord] = {}
    for record in _records(sweep, runs_dir):
        first = by_strategy.setdefault(record.strategy, record)
        if list(record.token_counts) != list(first.token_counts):
            raise InputError(
                f"{runs.run_name(record.strategy, record.seed)}: token_counts differ from those of "
                f"{runs.run_name(first.strategy, first.seed)}"
            )
    return _layers({name: (record.schedule, record.token_counts) for name, record in by_strategy.items()})


def schedule_frame(schedules: Mapping[str, Sequence[int]], *, tokens: int) -> pd.DataFrame:
    """Schedules by strategy as a tidy frame: strategy, layer (0 is the input), removed, tokens (after the layer).

    Args:
        tokens: sequence length at the input, class token included.

    Raises:
        InputError: a schedule that asks a layer for more than it can fuse.
    """
    return _layers({name: (plan, strategies.token_counts(plan, tokens)) for name, plan in schedules.items()})


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean, spread and difference to `none` of every reported metric, one row per strategy.

    Columns: strategy, n, the setting (profile, dataset, model, device, ..), and for each of `REPORTED` its `_mean`,
    `_sd` (over seeds, n - 1), `_diff` (mean of the differences to `none` with the same seed), `_diff_low` and
    `_diff_high` (95% interval). Empty (NaN) where there is no such number: sd and interval of one run, differences of
    `none` to itself or without a run of it.

    Args:
        frame: as from `load_runs`.

    Raises:
        InputError: a strategy whose seeds are not those of `none`.
    """
    rows = []
    baseline = frame[frame["strategy"] == BASELINE].set_index("seed")
    for strategy in _ordered(frame):
        runs = frame[frame["strategy"] == strategy].set_index("seed")
        if not runs.index.is_unique:
            raise InputError(f"strategy {strategy}: a seed comes twice among {sorted(runs.index)}")
        if len(baseline) and set(runs.index) != set(baseline.index):
            raise InputError(
                f"strategy {strategy}: seeds {sorted(runs.index)}; `none` has {sorted(baseline.index)}, and only the "
                "same seeds can be paired"
            )
        row: dict[str, Any] = {"strategy": strategy, "n": len(runs)}
        row |= {key: "; ".join(str(value) for value in frame[key].unique()) for key in _SETTING}
        for metric in REPORTED:
            values = runs[metric].to_list()
            row[f"{metric}_mean"] = float(np.mean(values))
            row[f"{metric}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
            paired = len(baseline) > 0 and strategy != BASELINE
            differences = (runs[metric] - baseline[metric]).to_list() if paired else []
            row |= dict(zip(_difference_columns(metric), interval(differences), strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and Student's t interval of the mean: (mean, low, high).

    NaN where there is none: all three without a value, the bounds with only one.
    """
    n = len(values)
    if n == 0:
        return math.nan, math.nan, math.nan
    mean = float(np.mean(values))
    if n == 1:
        return mean, math.nan, math.nan
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return mean, mean - half, mean + half


def pareto(frame: pd.DataFrame, cost_column: str) -> list[str]:
    """The strategies that no other beats in mean top-1 and mean cost together, the cheapest first.

    Args:
        frame: as from `load_runs`.
        cost_column: one of `COSTS`; less is better.

    Raises:
        InputError: a column that is not a cost.
    """
    if cost_column not in COSTS:
        raise InputError(f"cost_column: {cost_column!r} is not one of {', '.join(COSTS)}")
    points = {}
    for strategy in frame["strategy"].unique():
        runs = frame[frame["strategy"] == strategy]
        points[strategy] = (float(np.mean(runs[cost_column])), float(np.mean(runs["top1_percent"])))
    return _front(points)


def write_summary(frame: pd.DataFrame, folder: str | Path) -> pd.DataFrame:
    """Write summary.csv, summary.md (the table for readers) and summary.json (for `dvc metrics`); return the summary.

    Args:
        frame: as from `load_runs`.
        folder: if relative, from the repository root.
    """
    table, folder = summary(frame), config.root() / folder
    write_atomic(folder / "summary.csv", table.to_csv(index=False, lineterminator="\n").encode())
    write_atomic(folder / "summary.md", markdown(table).encode())
    write_atomic(folder / "summary.json", json_bytes(_means(table)))
    return table


def write_curves(history: pd.DataFrame, folder: str | Path) -> pd.DataFrame:
    """Write curves.csv, which `dvc plots` draws: one row per epoch of every run; return what it holds.

    Args:
        history: as from `load_history`.
        folder: if relative, from the repository root.
    """
    curves = history.loc[:, list(CURVES)]
    write_atomic(config.root() / folder / "curves.csv", curves.to_csv(index=False, lineterminator="\n").encode())
    return curves


def load_summary(folder: str | Path) -> pd.DataFrame:
    """What `write_summary` wrote, digit for digit.

    Raises:
        InputError: no such file, or another one.
    """
    path = config.root() / folder / "summary.csv"
    try:
        table = pd.read_csv(StringIO(path.read_text(encoding="utf-8")), dtype=str, keep_default_na=False)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path}: not readable as CSV: {' '.join(str(error).split())}") from None
    expected = ["strategy", "n", *_SETTING, *(column for metric in REPORTED for column in _columns(metric))]
    if list(table.columns) != expected:
        raise InputError(f"{path}: columns {', '.join(table.columns)}; expected {', '.join(expected)}")
    try:
        for column in expected[2 + len(_SETTING) :]:
            table[column] = [float(text or "nan") for text in table[column]]  # Python's own reading loses no digit
        return table.astype({"n": int})
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def markdown(summary: pd.DataFrame) -> str:
    """The summary as a reader wants it: two tables with n, spread and intervals, what is Pareto-optimal, and where."""
    head = ["strategy", "n", *_HEADINGS.values()]
    values = [
        [row["strategy"], str(row["n"]), *(_spread(row, metric) for metric in REPORTED)]
        for row in summary.to_dict("records")
    ]
    lines = [*_table(head, values), "", "Mean ± 1 standard deviation over n seeds."]
    if 1 in summary["n"].to_list():
        lines[-1] += " One run has no spread and no interval."
    others = [row for row in summary.to_dict("records") if not math.isnan(row["top1_percent_diff"])]
    if others:
        differences = [[row["strategy"], *(_difference(row, metric) for metric in REPORTED)] for row in others]
        headings = [heading.replace("(%)", "(points)") for heading in _HEADINGS.values()]
        lines += ["", f"Difference to `{BASELINE}`, paired by seed, with its 95% t-interval:", ""]
        lines += _table(["strategy", *headings], differences)
    lines.append("")
    for cost, word in {"train_time_s": "training time", "peak_memory_mib": "peak memory"}.items():
        means = zip(summary["strategy"], summary[f"{cost}_mean"], summary["top1_percent_mean"], strict=True)
        front = _front({name: (price, score) for name, price, score in means})
        lines.append(f"Pareto-optimal in mean top-1 against {word}: {', '.join(front)}.")
    lines += ["", _setting(summary)]
    return "\n".join(lines) + "\n"


def markdown_short(summary: pd.DataFrame) -> str:
    """The summary in one small table: top-1 and its difference to `none`, training time and peak memory relative to it.

    Raises:
        InputError: a summary without `none`.
    """
    table = summary.to_dict("records")
    base = next((row for row in table if row["strategy"] == BASELINE), None)
    if base is None:
        raise InputError(f"summary: no runs of {BASELINE} among {', '.join(summary['strategy'])}")
    lines = _table(
        ["strategy", "n", "top-1 (%)", "difference to `none` (points)", "training time", "peak memory"],
        [
            [
                row["strategy"],
                str(row["n"]),
                _spread(row, "top1_percent"),
                "" if row is base else _difference(row, "top1_percent"),
                *(f"{row[f'{cost}_mean'] / base[f'{cost}_mean']:.2f}" for cost in ("train_time_s", "peak_memory_mib")),
            ]
            for row in table
        ],
    )
    lines += [
        "",
        "Top-1: mean ± 1 standard deviation over n seeds; its difference is paired by seed, with the 95% interval. "
        "Training time and peak memory are relative to `none`.",
        "",
        _setting(summary),
    ]
    return "\n".join(lines) + "\n"


def paper_table() -> pd.DataFrame:
    """The paper's Tables 1 to 3, one row per run, n = 1 each; paper/README.md says what the columns are."""
    file = resources.files("famba.analysis") / "paper" / "famba_v_results.csv"
    return pd.read_csv(
        StringIO(file.read_text(encoding="utf-8")), dtype={"fused_layers": str}, keep_default_na=False, na_values=[]
    )


def beside_paper(summary: pd.DataFrame) -> pd.DataFrame:
    """The paper's Table 1 with ours beside it, one row per model, data set, source (`paper` or `here`) and strategy.

    Each of the paper's models has rows for a run of it here, under the profile `paper`; they are empty until there is
    one. Runs of another profile are another experiment: they come as a model of their own, without a paper's side.

    Args:
        summary: as from `summary`.

    Returns:
        Columns model, dataset, source, strategy, n, and for each metric of the paper its mean and its `_sd`.
    """
    published = [row for row in paper_table().to_dict("records") if row["table"] == 1]
    metrics = ("top1_percent", "top5_percent", "train_time_s", "peak_memory_mib")
    is_paper = summary["profile"].to_list()[0] == "paper"
    ours_model, ours_data = summary["model"].to_list()[0], summary["dataset"].to_list()[0]
    ours = {
        row["strategy"]: {"n": row["n"]}
        | {metric: row[f"{metric}_mean"] for metric in metrics}
        | {f"{metric}_sd": row[f"{metric}_sd"] for metric in metrics}
        for row in summary.to_dict("records")
    }
    rows: list[dict[str, Any]] = []
    for model in dict.fromkeys(row["model"] for row in published):
        theirs = {row["strategy"]: row for row in published if row["model"] == model}
        for strategy in STRATEGIES:
            key = {"model": model, "dataset": "cifar100", "strategy": strategy}
            values = {metric: float(theirs[strategy][metric]) for metric in metrics}
            measured = ours.get(strategy, {}) if is_paper and model == ours_model else {}
            rows += [key | {"source": "paper", "n": 1} | values, key | {"source": "here", "n": 0} | measured]
    if not is_paper:
        key = {"model": ours_model, "dataset": ours_data, "source": "here", "n": 0}
        rows += [key | {"strategy": strategy} | ours.get(strategy, {}) for strategy in STRATEGIES]
    columns = [name for metric in metrics for name in (metric, f"{metric}_sd")]
    frame = pd.DataFrame(rows, columns=["model", "dataset", "source", "strategy", "n", *columns])
    return frame.astype(dict.fromkeys(columns, float))


def markdown_beside_paper(ours: Mapping[str, pd.DataFrame]) -> str:
    """What each strategy changes, in the paper's Table 1 and in runs of ours: a table of differences and shares.

    Top-1 in points above `none`, training time and peak memory as shares of those of `none`: numbers that may be set
    beside each other, as those of other images, models and machines may not.

    Args:
        ours: summaries by what their columns are to be called.

    Raises:
        InputError: a summary without `none`.
    """
    keys = ("top1_percent", "train_time_s", "peak_memory_mib")
    columns: dict[str, dict[str, tuple[float, ...]]] = {}
    for row in paper_table().query("table == 1").to_dict("records"):
        label = f"paper, {row['model']}"
        columns.setdefault(label, {})[row["strategy"]] = tuple(float(row[key]) for key in keys)
    for label, summary in ours.items():
        by_strategy = {row["strategy"]: row for row in summary.to_dict("records")}
        if BASELINE not in by_strategy:
            raise InputError(f"summary {label!r}: no runs of {BASELINE}, which the others are set against")
        columns[label] = {name: tuple(row[f"{key}_mean"] for key in keys) for name, row in by_strategy.items()}

    def cell(values: Mapping[str, tuple[float, ...]], strategy: str) -> str:
        if strategy not in values:
            return ""
        (top1, *cost), (base, *whole) = values[strategy], values[BASELINE]
        if strategy == BASELINE:
            return f"{top1:.1f}"
        points = f"{top1 - base:+.1f}".replace("-", "−")
        return f"{points}, {cost[0] / whole[0]:.2f}, {cost[1] / whole[1]:.2f}"

    rows = [[name, *(cell(values, name) for values in columns.values())] for name in STRATEGIES]
    lines = _table(["strategy", *columns], rows)
    lines += [
        "",
        "First row: top-1 (%). Other rows: change of top-1 (points), training time and peak memory relative to `none`.",
    ]
    return "\n".join(lines) + "\n"


def readme_text(text: str, blocks: Mapping[str, str], name: str = "README.md") -> str:
    """The text with what stands between each block's two markers, `<!-- NAME:begin -->` and `:end`, replaced.

    Args:
        blocks: contents by the blocks' names.
        name: of the text, for errors.

    Raises:
        InputError: a block's markers are not there once each, in order.
    """
    for block, content in blocks.items():
        begin, end = f"<!-- {block}:begin -->", f"<!-- {block}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise InputError(f"{name}: needs one {begin} and, after it, one {end}")
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n\n{content}\n{end}{after}"
    return text


def readme_blocks(results_dir: str | Path) -> dict[str, dict[str, str]]:
    """The blocks of README.md and docs/results.md by file and name; without results on photographs, none of those.

    Raises:
        InputError: a summary of the sweep that is missing, or any that is spoilt or has no runs of `none`.
    """
    default, photographs = load_summary(results_dir), config.root() / results_dir / "photographs"
    blocks = {"results": markdown(default)}
    if photographs.exists():
        beside = {"digits": default, "photographs": load_summary(photographs)}
        blocks |= {"photographs": markdown(beside["photographs"]), "beside": markdown_beside_paper(beside)}
    return {"README.md": {"results": markdown_short(default)}, "docs/results.md": blocks}


def update_readme(readme_path: str | Path, blocks: Mapping[str, str]) -> bool:
    """Bring a file's blocks up to date; whether that changed it. Errors as in `readme_text`."""
    path = config.root() / readme_path
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    new = readme_text(text, blocks, path.name)
    if new != text:
        write_atomic(path, new.encode())
    return new != text


def cosine_similarity(tokens: Float[np.ndarray, "t d"]) -> Float[np.ndarray, "t t"]:
    """Cosine similarity of every token with every other; 0 for a token of zero length."""
    length = np.linalg.norm(tokens, axis=-1, keepdims=True)
    unit = tokens / np.where(length == 0, 1, length)
    return np.clip(unit @ unit.T, -1, 1)  # rounding alone leads outside


def _records(sweep: SweepParams, runs_dir: str | Path) -> list[runs.RunRecord]:
    """The sweep's runs, strategies in their fixed order, checked to be runs of one experiment."""
    folder, found = config.root() / runs_dir, []
    for strategy in [name for name in STRATEGIES if name in sweep.strategies]:
        for seed in sweep.seeds:
            name = runs.run_name(strategy, seed)
            record = runs.read(folder / name)
            if (record.strategy, record.seed) != (strategy, seed):
                raise InputError(f"{folder / name}: holds the run {runs.run_name(record.strategy, record.seed)}")
            found.append(record)
    first = found[0]
    by_strategy: dict[str, runs.RunRecord] = {}
    for record in found:
        _same(first, record, but=("strategy", "fusion"))
        _same(by_strategy.setdefault(record.strategy, record), record, but=())
    return found


def _same(first: runs.RunRecord, other: runs.RunRecord, *, but: tuple[str, ...]) -> None:
    theirs, ours = _flat(other.params, but), _flat(first.params, but)
    for key in [*theirs, *(key for key in ours if key not in theirs)]:
        if theirs.get(key) != ours.get(key):
            names = [runs.run_name(record.strategy, record.seed) for record in (other, first)]
            raise InputError(
                f"{names[0]}: {key}: {theirs.get(key)!r}, but {ours.get(key)!r} in {names[1]}: not one experiment"
            )


def _flat(tree: Mapping[str, Any], but: tuple[str, ...], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if prefix == "" and key in but:
            continue
        flat |= _flat(value, but, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _layers(plans: Mapping[str, tuple[Sequence[int], Sequence[int]]]) -> pd.DataFrame:
    rows = [
        {"strategy": name, "layer": layer, "removed": removed, "tokens": tokens}
        for name in STRATEGIES
        if name in plans
        for layer, (removed, tokens) in enumerate(zip([0, *plans[name][0]], plans[name][1], strict=True))
    ]
    unknown = [name for name in plans if name not in STRATEGIES]
    if unknown:
        raise InputError(f"strategy: {unknown[0]!r} is not one of {', '.join(STRATEGIES)}")
    return pd.DataFrame(rows, columns=["strategy", "layer", "removed", "tokens"])


def _ordered(frame: pd.DataFrame) -> list[str]:
    present = set(frame["strategy"])
    return [name for name in STRATEGIES if name in present]


def _front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the (cost, score) that no other beats or equals in one and beats in the other, by rising cost."""

    def beaten(name: str) -> bool:
        cost, score = points[name]
        return any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points.values())

    return sorted((name for name in points if not beaten(name)), key=lambda name: (*points[name], name))


def _difference_columns(metric: str) -> list[str]:
    return [f"{metric}_diff", f"{metric}_diff_low", f"{metric}_diff_high"]


def _columns(metric: str) -> list[str]:
    return [f"{metric}_mean", f"{metric}_sd", *_difference_columns(metric)]


def _means(summary: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Means by strategy of the few numbers that `dvc metrics` compares; all others are in summary.csv."""
    by_strategy = summary.set_index("strategy")
    return {metric: by_strategy[f"{metric}_mean"].to_dict() for metric in _SHOWN}


def _spread(row: Mapping[Any, Any], metric: str) -> str:
    mean, sd = row[f"{metric}_mean"], row[f"{metric}_sd"]
    decimals = _decimals(mean, metric)
    return f"{mean:.{decimals}f}" + ("" if math.isnan(sd) else f" ± {sd:.{decimals}f}")


def _difference(row: Mapping[Any, Any], metric: str) -> str:
    decimals = _decimals(row[f"{metric}_mean"], metric)
    mean, *bounds = (f"{row[column]:+.{decimals}f}".replace("-", "−") for column in _difference_columns(metric))
    return mean if math.isnan(row[f"{metric}_diff_low"]) else f"{mean} ({' to '.join(bounds)})"


def _decimals(value: float, metric: str) -> int:
    """One for accuracies; for other values as many as make three significant digits, at most three."""
    if metric in DETERMINISTIC or value == 0:
        return 1
    return min(3, max(0, 2 - math.floor(math.log10(abs(value)))))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---", *["---:"] * (len(head) - 1)], *rows)]


def _setting(summary: pd.DataFrame) -> str:
    at = {key: summary[key].to_list()[0] for key in _SETTING}
    text = (
        f"Profile `{at['profile']}`: `{at['model']}` on {at['dataset']} at {at['img_size']} px. Measured on "
        f"{at['device']}, {at['threads']} threads; {at['versions']}. The command of each run is in its cost.json."
    )
    if any(";" in at[key] for key in ("device", "threads", "versions")):
        text += " **Runs were measured on different machines or versions: times and memory do not compare.**"
    return text

"""The sweep's results: the tables that the notebooks `compare` and `cost` show, and what their figures say in words."""

from typing import Any

import pandas as pd
from IPython.display import Markdown

from famba.analysis import cost, records, summary
from famba.experiments import sweep
from famba.reports import Report


def make(report: Report) -> None:
    """Write runs.csv, curves.csv and the summary; only smoke runs are trained."""
    asked = report.sweep()
    sweep.ensure_runs(asked, profile=report.profile, runs_dir=report.runs_dir, train_missing=report.smoke)
    if report.smoke:
        make_costs(report)
    costs = cost.load(report.results_dir)
    records.gather(asked, report.runs_dir, report.results_dir)
    summary.write_summary(records.published(asked, report.results_dir), costs, report.results_dir)


def make_costs(report: Report) -> None:
    """Measure training steps of all strategies in turn, and write cost.csv."""
    sweep.measure_costs(report.sweep(), profile=report.profile, results_dir=report.results_dir)


def schedules(profile: str) -> pd.DataFrame:
    """Every strategy's schedule, as `summary.schedule_frame`; a run that fused otherwise would have failed."""
    params = sweep.resolve(profile)
    depth, tokens = sweep.depth_and_tokens(params[0])
    return summary.schedule_frame({p.strategy: p.schedule(depth) for p in params}, tokens=tokens)


def pairs_in_words(runs: pd.DataFrame) -> Markdown:
    """In how many of the seeds each strategy is less accurate than no fusion."""
    scores = runs.pivot(index="seed", columns="strategy", values="top1_percent")
    below: Any = scores.lt(scores[summary.BASELINE], axis=0).sum().drop(summary.BASELINE)
    if len(scores) == 1:
        fallen = listed([f"`{name}`" for name, count in below.items() if count]) or "no strategy"
        return Markdown(f"With the one seed, accuracy falls by fusing with {fallen}.")
    told = listed([f"{name} in {count}" for name, count in below.items()])
    return Markdown(
        f"Of {len(scores)} seeds, accuracy falls by fusing with {told}. Where lines cross, this differs from "
        "seed to seed, by the images that each seed tests as well as by what it trains."
    )


def curves_in_words(history: pd.DataFrame) -> Markdown:
    """Where training ends, and by how much it fits its own images better than others."""
    if history.empty:
        return Markdown("")
    last = history.loc[history["epoch"] == history["epoch"].max()]
    by_strategy: Any = last.groupby("strategy")
    val, train = by_strategy["val_top1_percent"].mean(), by_strategy["train_top1_percent"].mean()
    return Markdown(
        f"After epoch {last['epoch'].max()} accuracy on the validation images is highest with `{val.idxmax()}` "
        f"({val.max():.1f} %) and lowest with `{val.idxmin()}` ({val.min():.1f} %). On its own, augmented images a "
        f"model is at most {(train - val).max():.1f} points better than on those: the larger this is, the more it has "
        "learned by heart."
    )


def schedules_in_words(schedules: pd.DataFrame) -> Markdown:
    """How many tokens a layer's mixer gets on average, by strategy, where layers fuse before it."""
    means: Any = schedules.loc[schedules["layer"] > 0].groupby("strategy", sort=False)["tokens"].mean()
    told = listed([f"{name} {mean:.1f}" for name, mean in means.items()])
    return Markdown(
        f"A layer's mixer gets this many tokens on average: {told}. What a model computes is nearly in proportion to "
        "that, not to what is left at the end, so the strategies that fuse early save most."
    )


def costs_in_words(costs: pd.DataFrame) -> Markdown:
    """By how much time falls short of FLOPs."""
    rows = costs.set_index("strategy").to_dict("index")
    none = rows.pop(summary.BASELINE)
    shares = [(name, x["time_ratio"], x["flops_per_image"] / none["flops_per_image"]) for name, x in rows.items()]
    told = listed([f"{name} {time:.2f} of the time with {flops:.2f} of the FLOPs" for name, time, flops in shares])
    return Markdown(
        f"In units of no fusion: {told}. What time has above FLOPs is matching, merging, and what does not depend on "
        "tokens at all, such as the optimiser."
    )


def listed(names: list[str]) -> str:
    """Names as in a sentence."""
    return " and ".join([", ".join(names[:-1]), *names[-1:]] if len(names) > 1 else names)

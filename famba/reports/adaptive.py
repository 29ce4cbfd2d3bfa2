"""The results that the notebook `adaptive` shows: adaptive.csv, adaptive.md, adaptive.json and a figure."""

import json

import pandas as pd

from famba import plots
from famba.experiments import adaptive, sweep
from famba.reports import Report


def make(report: Report) -> None:
    """Make schedules of measured costs, train them with the sweep's seeds, and compare them with the named ones."""
    asked = report.sweep()
    trained_dir = report.folder / ("adaptive" if report.smoke else "results/experiments/adaptive")
    given = {"profile": report.profile, "runs_dir": report.runs_dir}
    sweep.ensure_runs(asked, **given, train_missing=report.smoke)
    plans = adaptive.plans(asked, **given)
    runs = adaptive.run_plans(plans, asked, **given, trained_dir=trained_dir)
    schedules = adaptive.schedules(plans, asked, runs_dir=report.runs_dir)
    adaptive.write(adaptive.table(runs, schedules, plans), plans, report.results_dir)
    report.save(adaptive=plots.adaptive_schedules(schedules, runs))


def costs(report: Report, kind: str) -> pd.DataFrame:
    """What fusing costs by a measure: a row for each layer, a column for each number of tokens fused there."""
    plans = json.loads((report.results_dir / "adaptive.json").read_text())
    table = pd.DataFrame(plans[kind]["costs"])
    return table.set_axis(range(1, len(table) + 1), axis="index").rename_axis("layer").rename_axis(columns="tokens")

"""The results that the notebook `ablation` shows: ablation.csv, ablation.md and a figure."""

from typing import Any

from famba import config, plots
from famba.analysis import ablation as analysis
from famba.experiments import ablation
from famba.reports import Report

_SMOKE: dict[str, Any] = {"strategies": ["lower"], "factors": ["order"], "controls": [], "epochs": 2}


def make(report: Report) -> None:
    """Train what is missing of the ablation's runs, and compare them."""
    changes: Any = _SMOKE | {"seeds": report.sweep().seeds} if report.smoke else {}
    asked = config.load_ablation(**changes)
    reference = config.load(report.profile, strategy=asked.strategy).options
    runs = ablation.run(asked, profile=report.profile, runs_dir=report.runs_dir)
    effects = analysis.effects(runs, grid=asked.strategy, reference=reference, controls=asked.controls)
    analysis.write(effects, runs, report.results_dir)
    report.save(ablation=plots.ablation(effects, runs))

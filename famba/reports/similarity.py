"""The results that the notebook `similarity` shows: similarity.csv, similarity.md and three figures."""

import itertools
from pathlib import Path

from famba import plots
from famba.analysis import similarity, tokens
from famba.analysis.summary import BASELINE
from famba.config import SweepParams
from famba.experiments import sweep
from famba.reports import Report
from famba.storage.runs import run_name

_IMAGES, _SMOKE_IMAGES = 200, 40


def make(report: Report) -> None:
    """Measure the runs of the sweep over test images."""
    asked = report.sweep()
    sweep.ensure_runs(asked, profile=report.profile, runs_dir=report.runs_dir, train_missing=report.smoke)
    report.save(**measure(report, asked, report.runs_dir, report.results_dir))


def measure(report: Report, asked: SweepParams, models: Path, results_dir: Path) -> dict[str, plots.Figure]:
    """Measure all models without fusion, and the first seed's of the others; write the tables, return the figures."""
    first = asked.seeds[0]
    named = itertools.product(asked.variants, asked.seeds)
    wanted = [models / run_name(name, seed) for name, seed in named if name == BASELINE or seed == first]
    found = tokens.similarity_in_runs(wanted, images=_SMOKE_IMAGES if report.smoke else _IMAGES)
    similarity.write(found, results_dir, seed=first, profile=report.profile)
    return {
        "token_similarity": plots.token_similarity(found),
        "fused_distance": plots.fused_distance(found),
        "token_size": plots.token_size(found),
    }

"""The results that the notebook `similarity` shows: similarity.csv, similarity.md and three figures."""

from famba import config, plots
from famba.analysis import similarity, tokens
from famba.experiments import sweep
from famba.reports import Report


def make(report: Report, images: int = 200) -> None:
    """Measure the runs of the sweep's first seed over test images."""
    asked = config.load_sweep(seeds=report.sweep().seeds[:1])
    given = {"profile": report.profile, "runs_dir": report.runs_dir}
    folders = sweep.ensure_runs(asked, **given, train_missing=report.smoke)
    found = tokens.similarity_in_runs(folders, images=40 if report.smoke else images)
    similarity.write(found, report.results_dir, seed=asked.seeds[0], profile=report.profile)
    report.save(
        token_similarity=plots.token_similarity(found),
        fused_distance=plots.fused_distance(found),
        token_size=plots.token_size(found),
    )

"""What the notebook `claims` shows."""

from famba import config
from famba.analysis import claims
from famba.reports import Report, compare


def make(report: Report) -> None:
    """Judge the claims by the tables that there are."""
    if report.smoke:
        compare.make(report)
    claims.write(claims.verdicts(config.load_claims(), claims.load(report.results_dir)), report.results_dir)

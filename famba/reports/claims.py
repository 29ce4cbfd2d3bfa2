"""What the notebook `claims` shows: the verdicts on the claims, and what the ablations found."""

from typing import Any

import pandas as pd
from IPython.display import Markdown

from famba import config
from famba.analysis import claims
from famba.reports import Report, compare


def make(report: Report) -> None:
    """Judge the claims by the tables that there are."""
    if report.smoke:
        compare.make(report)
    claims.write(claims.verdicts(config.load_claims(), claims.load(report.results_dir)), report.results_dir)


def in_words(found: pd.DataFrame) -> Markdown:
    """How many claims have each verdict."""
    verdicts: Any = found.groupby("claim", sort=False)["verdict"].first()
    told = compare.listed([f"{count} {verdict}" for verdict, count in verdicts.value_counts(sort=False).items()])
    return Markdown(f"Of {len(verdicts)} claims: {told}. A claim holds only if each of its comparisons does.")

"""Intervals of means: over seeds and test images, and over seeds alone.

Sources: A. B. Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2), 2007, for resampling two crossed
factors, each on its own; it errs on the wide side. A. C. Cameron, J. B. Gelbach and D. L. Miller, "Bootstrap-based
improvements for inference with clustered errors", Review of Economics and Statistics 90(3), 2008, for why few seeds
need Student's quantile and not percentiles.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats

_RESAMPLES = 2000


def answers(correct: Iterable[str]) -> Float[np.ndarray, "runs images"]:
    """For each run and image of the data set 1 if it was classified correctly, 0 if not, NaN if not tested.

    Args:
        correct: of each run, as `runs.RunRecord.correct`.
    """
    runs = list(correct)
    length = max(map(len, runs))
    marks = np.array([list(run.ljust(length, "-")) for run in runs])
    return np.select([marks == "1", marks == "0"], [1.0, 0.0], np.nan)


def two_level(values: Float[np.ndarray, "seeds images"], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean over seeds of each seed's mean over its images, and the interval for other seeds and other images.

    Each resample draws the seeds and, apart from them, the images, with replacement. The interval is the mean plus and
    minus Student's quantile (seeds - 1 degrees of freedom) times the standard deviation of the resamples' means,
    corrected by n / (n - 1) for the few seeds. Always the same resamples.

    Args:
        values: NaN where a seed did not test an image.

    Returns:
        (mean, low, high); the bounds are NaN with one seed.
    """
    values = values[:, ~np.isnan(values).all(axis=0)]
    seeds, images = values.shape
    tested, known = (~np.isnan(values)).astype(float), np.nan_to_num(values)
    mean = float((known.sum(1) / tested.sum(1)).mean())
    if seeds == 1:
        return mean, math.nan, math.nan
    draw, means = np.random.default_rng(0), np.empty(_RESAMPLES)
    for i in range(_RESAMPLES):
        times = np.bincount(draw.integers(images, size=images), minlength=images)
        of_seeds = (known @ times) / (tested @ times)
        means[i] = of_seeds[draw.integers(seeds, size=seeds)].mean()
    half = stats.t.ppf((1 + confidence) / 2, seeds - 1) * means.std(ddof=1) * math.sqrt(seeds / (seeds - 1))
    return mean, float(mean - half), float(mean + half)


def student(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and Student's t interval over seeds alone: (mean, low, high); the bounds are NaN with one value."""
    mean, error = float(np.mean(values)), float(stats.sem(values)) if len(values) > 1 else math.nan
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * error
    return mean, mean - half, mean + half


def signed(points: float) -> str:
    """A difference as text, to one digit: +0.0, never -0.0."""
    return f"{round(points, 1) + 0.0:+.1f}".replace("-", "−")


def with_interval(form: Callable[[float], str], value: float, low: float, high: float) -> str:
    """A value and its interval as text; the value alone where there is no interval, "" where there is no value."""
    if math.isnan(value):
        return ""
    text = form(value) + ("" if math.isnan(low) else f" ({form(low)} to {form(high)})")
    return text.replace("-", "−")

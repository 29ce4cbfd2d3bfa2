"""Intervals of means: over seeds and test images, and over seeds alone.

Sources: A. C. Cameron, J. B. Gelbach and D. L. Miller, "Robust inference with multiway clustering", Journal of Business
& Economic Statistics 29(2), 2011, for the variance over two crossed factors. A. B. Owen, "The pigeonhole bootstrap",
Annals of Applied Statistics 1(2), 2007, for why it is no bootstrap: resampling both factors counts what is neither a
seed's nor an image's three times, which is most of the variance here.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats


def answers(correct: Iterable[str]) -> Float[np.ndarray, "runs images"]:
    """For each run and image of the data set 1 if it was classified correctly, 0 if not, NaN if not tested.

    Args:
        correct: of each run, as `runs.RunRecord.correct`.
    """
    runs = list(correct)
    length = max(map(len, runs))
    marks = np.array([list(run.ljust(length, "-")) for run in runs])
    return np.select([marks == "1", marks == "0"], [1.0, 0.0], np.nan)


def two_way(values: Float[np.ndarray, "seeds images"]) -> tuple[float, float, float]:
    """Mean over seeds of each seed's mean over its images, and the 95% interval for other seeds and other images.

    The variance of the mean is that over seeds, and what images have in common over the seeds: that over images less
    what both count, or zero where chance makes it less. The interval is the mean plus and minus its root times
    Student's quantile of seeds - 1 degrees of freedom.

    Args:
        values: NaN where a seed did not test an image.

    Returns:
        (mean, low, high); the bounds are NaN with one seed.
    """
    seeds = len(values)
    means = np.nanmean(values, axis=1, keepdims=True)
    mean = float(means.mean())
    if seeds == 1:
        return mean, math.nan, math.nan
    parts = np.nan_to_num((values - mean) / (seeds * (~np.isnan(values)).sum(1, keepdims=True)))
    of_seeds, of_images, of_both = (float((x**2).sum()) for x in (parts.sum(1), parts.sum(0), parts))
    error = math.sqrt(seeds / (seeds - 1) * of_seeds + max(0.0, of_images - of_both))
    half = float(stats.t.ppf(0.975, seeds - 1)) * error
    return mean, mean - half, mean + half


def student(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and Student's 95% interval over seeds alone: (mean, low, high); the bounds are NaN with one value."""
    mean, error = float(np.mean(values)), float(stats.sem(values)) if len(values) > 1 else math.nan
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return mean, mean - half, mean + half


def signed(points: float) -> str:
    """A difference as text, to one digit, or two where one would leave zero: its sign can be read."""
    digits = 2 if 0 < abs(points) < 0.05 else 1
    return f"{round(points, digits) + 0.0:+.{digits}f}".replace("-", "−")


def with_interval(form: Callable[[float], str], value: float, low: float, high: float) -> str:
    """A value and its interval as text; the value alone where there is no interval, "" where there is no value."""
    if math.isnan(value):
        return ""
    text = form(value) + ("" if math.isnan(low) else f" ({form(low)} to {form(high)})")
    return text.replace("-", "−")

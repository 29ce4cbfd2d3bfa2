import numpy as np
import pandas as pd
import pytest

from famba.analysis import intervals


def test_answers_are_numbers_by_run_and_image_and_nan_where_nothing_was_tested():
    found = intervals.answers(pd.Series(["10-", "-0"]))
    np.testing.assert_array_equal(found, [[1, 0, np.nan], [np.nan, 0, np.nan]])


def test_the_mean_is_over_seeds_of_each_seeds_images():
    values = np.tile([[1.0, 0.0, np.nan, np.nan], [np.nan, 1.0, 1.0, 1.0]], 20)
    mean, low, high = intervals.two_level(values)
    assert mean == 0.75
    assert low < 0.75 < high
    assert intervals.two_level(values) == (mean, low, high), "the same resamples again"


def test_one_seed_has_no_interval_and_equal_values_have_one_without_width():
    np.testing.assert_equal(intervals.two_level(np.array([[1.0, 0.0]])), (0.5, np.nan, np.nan))
    assert intervals.two_level(np.ones((3, 5))) == (1.0, 1.0, 1.0)
    np.testing.assert_equal(intervals.student([3.0]), (3.0, np.nan, np.nan))
    assert intervals.student([2.0, 2.0]) == (2.0, 2.0, 2.0)


def test_students_interval_of_a_case_worked_by_hand():
    # -1, -2, -3: mean -2, sd 1, n 3; t(0.975, 2) = 4.302653, half width 4.302653 / sqrt(3)
    assert intervals.student([-1.0, -2.0, -3.0]) == pytest.approx((-2, -4.484138, 0.484138), abs=1e-6)


def sample(draw, *, same_images: bool) -> np.ndarray:
    """Values of 6 seeds with the true mean 0; an effect of the seed, one of the image, and noise."""
    values = draw.normal(0, 1, (6, 1)) + draw.normal(0, 3, (1, 40)) + draw.normal(0, 3, (6, 40))
    if not same_images:
        values[np.arange(40) % 2 == (np.arange(6) % 2)[:, None]] = np.nan
    return values


@pytest.mark.parametrize("same_images", [True, False], ids=["every seed tests all images", "folds"])
def test_the_two_level_interval_covers_the_truth_as_often_as_it_says_and_seeds_alone_do_not(same_images, monkeypatch):
    monkeypatch.setattr(intervals, "_RESAMPLES", 200)
    draw = np.random.default_rng(0)
    samples = [sample(draw, same_images=same_images) for _ in range(400)]
    both = [low <= 0 <= high for _, low, high in map(intervals.two_level, samples)]
    seeds = [intervals.student(np.nanmean(values, axis=1).tolist()) for values in samples]
    assert 0.93 < np.mean(both) <= 1
    assert np.mean([low <= 0 <= high for _, low, high in seeds]) < np.mean(both) - 0.03

import numpy as np
import pandas as pd
import pytest

from famba.analysis import intervals


def test_answers_are_numbers_by_run_and_image_and_nan_where_nothing_was_tested():
    found = intervals.answers(pd.Series(["10-", "-0"]))
    np.testing.assert_array_equal(found, [[1, 0, np.nan], [np.nan, 0, np.nan]])


def test_the_mean_is_over_seeds_of_each_seeds_images_and_its_interval_one_worked_by_hand():
    values = np.array([[1.0, 0.0, np.nan, np.nan], [np.nan, 1.0, 1.0, 1.0]])
    mean, low, high = intervals.two_way(values)
    assert mean == 0.75
    # Parts of the seeds: -1/8 and 1/8. Squares of the images' less those of both: 2 * -3/16 * 1/24, below zero.
    assert [low, high] == pytest.approx([0.75 - 12.706205 * 0.25, 0.75 + 12.706205 * 0.25])
    # Parts of the seeds: 0. Squares of the images' less those of both: 2 * (1/2)^2 - 4 * (1/4)^2.
    _, low, high = intervals.two_way(np.array([[1.0, -1.0], [1.0, -1.0]]))
    assert [low, high] == pytest.approx([-12.706205 * 0.5, 12.706205 * 0.5])


def test_one_seed_has_no_interval_and_equal_values_have_one_without_width():
    np.testing.assert_equal(intervals.two_way(np.array([[1.0, 0.0]])), (0.5, np.nan, np.nan))
    assert intervals.two_way(np.ones((3, 5))) == (1.0, 1.0, 1.0)
    np.testing.assert_equal(intervals.student([3.0]), (3.0, np.nan, np.nan))
    assert intervals.student([2.0, 2.0]) == (2.0, 2.0, 2.0)


def test_students_interval_of_a_case_worked_by_hand():
    # -1, -2, -3: mean -2, sd 1, n 3; t(0.975, 2) = 4.302653, half width 4.302653 / sqrt(3)
    assert intervals.student([-1.0, -2.0, -3.0]) == pytest.approx((-2, -4.484138, 0.484138), abs=1e-6)


def test_a_bound_near_zero_keeps_its_sign_and_zero_has_none():
    assert [*map(intervals.signed, (-0.03, 0.04, 0.0, -0.0, -1.26))] == ["−0.03", "+0.04", "+0.0", "+0.0", "−1.3"]


@pytest.mark.parametrize("tested", ["all images", "folds"])
@pytest.mark.parametrize("of_image", [0, 3], ids=["noise", "images"])
def test_the_interval_covers_the_truth_as_often_as_it_says_where_seeds_alone_do_not(tested, of_image):
    """6 seeds, 40 images, the true mean 0; deviations of 1 by the seed, 3 or none by the image, and 3 at random."""
    draw, both, seeds = np.random.default_rng(0), [], []
    for _ in range(500):
        values = draw.normal(0, 1, (6, 1)) + draw.normal(0, of_image, (1, 40)) + draw.normal(0, 3, (6, 40))
        if tested == "folds":
            values[np.arange(40) % 2 == (np.arange(6) % 2)[:, None]] = np.nan
        both.append(intervals.two_way(values))
        seeds.append(intervals.student(np.nanmean(values, axis=1).tolist()))
    covered, by_seeds = (np.mean([low <= 0 <= high for _, low, high in found]) for found in (both, seeds))
    assert 0.93 < covered < (0.99 if of_image else 0.97)
    assert by_seeds < 0.92 or not of_image

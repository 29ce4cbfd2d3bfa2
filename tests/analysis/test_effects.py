"""Differences and intervals of an ablation, against numbers worked out by hand."""

import dataclasses
import itertools
import math
import re

import numpy as np
import pandas as pd
import pytest

from famba.analysis import ablation, intervals
from famba.analysis.ablation import FACTORS
from famba.errors import InputError
from famba.fusion.options import FusionOptions, levels

SETTING = {"profile": "made-up", "dataset": "digits", "img_size": 8, "model": "vim_nano", "epochs": 4}
SETTING |= {"profile_epochs": 10, "loss": 0.5, "flops_per_image": 1000, "device": "cpu: none", "versions": "torch 0"}


def run(strategy: str, seed: int, top1: float, **options: str) -> dict:
    plain = dataclasses.asdict(FusionOptions())
    answers = "1" * int(top1) + "0" * (100 - int(top1))
    return SETTING | plain | options | {"strategy": strategy, "seed": seed, "top1_percent": top1, "correct": answers}


def two_by_two() -> pd.DataFrame:
    """upper: order x weighting with three seeds. lower: one factor at a time."""
    upper = {  # seed: scan size, scan mean, append size, append mean
        0: (90.0, 89.0, 88.0, 89.0),
        1: (92.0, 90.0, 88.0, 88.0),
        2: (91.0, 93.0, 91.0, 90.0),
    }
    rows = []
    for seed, scores in upper.items():
        for (order, weighting), score in zip(
            itertools.product(("scan", "append"), ("size", "mean")), scores, strict=True
        ):
            rows.append(run("upper", seed, score, order=order, weighting=weighting))
        rows.append(run("lower", seed, 80.0))
        rows.append(run("lower", seed, 80.0 + seed, order="append"))
        rows.append(run("lower", seed, 81.0, weighting="mean"))
    return pd.DataFrame(rows)


def effect(table: pd.DataFrame, strategy: str, over: str, factor: str) -> dict:
    return table.set_index(["strategy", "over", "factor"], drop=False).loc[(strategy, over, factor)].to_dict()


@pytest.fixture
def table() -> pd.DataFrame:
    return ablation.effects(two_by_two(), grid="upper", reference=FusionOptions())


def answers(score: int) -> np.ndarray:
    """By image, in percent: the first so many of 100 are right."""
    return 100.0 * (np.arange(100) < score)


def test_an_effect_over_the_grid_is_the_mean_of_each_seeds_pairs_and_its_interval_is_over_seeds_and_images(table):
    # scan - append: seed 0: (2 + 0) / 2 = 1; seed 1: (4 + 2) / 2 = 3; seed 2: (0 + 3) / 2 = 1.5
    by_image = [
        (answers(90) - answers(88) + answers(89) - answers(89)) / 2,
        (answers(92) - answers(88) + answers(90) - answers(88)) / 2,
        (answers(91) - answers(91) + answers(93) - answers(90)) / 2,
    ]
    found = effect(table, "upper", "grid", "order")
    assert (found["kept"], found["instead"], found["n"], found["pairs"]) == ("scan", "append", 3, 2)
    assert found["mean"] == pytest.approx(5.5 / 3)
    expected = intervals.two_level(np.stack(by_image))
    assert (found["mean"], found["low"], found["high"]) == pytest.approx(expected)


def test_an_effect_at_the_reference_takes_the_pairs_that_have_its_other_values(table):
    # scan size - append size: 2, 4, 0; scan size - scan mean: 1, 2, -2
    order, weighting = (effect(table, "upper", "reference", factor) for factor in ("order", "weighting"))
    assert (order["mean"], order["n"], order["pairs"]) == (pytest.approx(2), 3, 1)
    assert weighting["mean"] == pytest.approx(1 / 3)


def test_a_control_is_changed_alone_and_its_runs_do_not_count_in_the_grid(table):
    more = [run("upper", seed, 80.0, matching="random") for seed in range(3)]
    runs = pd.concat([two_by_two(), pd.DataFrame(more)])
    with_controls = ablation.effects(runs, grid="upper", reference=FusionOptions(), controls=("matching", "reduction"))
    found = effect(with_controls, "upper", "reference", "matching")
    assert (found["kept"], found["instead"], found["mean"]) == ("similarity", "random", pytest.approx(11))
    others = with_controls[with_controls["factor"] != "matching"].reset_index(drop=True)
    pd.testing.assert_frame_equal(others, table)
    said = "- Pairing similar tokens instead of pairing tokens at random: no significant difference (+11.0 points"
    assert said in ablation.markdown(with_controls, runs)


def test_other_strategies_have_no_grid(table):
    assert [(row["strategy"], row["over"], row["factor"]) for row in table.to_dict("records")] == [
        ("upper", "grid", "order"),
        ("upper", "grid", "weighting"),
        ("upper", "reference", "order"),
        ("upper", "reference", "weighting"),
        ("lower", "reference", "order"),
        ("lower", "reference", "weighting"),
    ]
    assert effect(table, "lower", "reference", "order")["mean"] == pytest.approx(-1)


def test_more_pairs_of_the_same_seeds_do_not_make_an_interval_narrower():
    """Every pair doubled under another option: the same seeds' means, so the same interval."""
    frame = two_by_two()
    frame = frame[frame["strategy"] == "upper"]
    twice = pd.concat([frame, frame.assign(position="after_scan")])
    once, doubled = (
        effect(ablation.effects(runs, grid="upper", reference=FusionOptions()), "upper", "grid", "order")
        for runs in (frame, twice)
    )
    assert (once["pairs"], doubled["pairs"]) == (2, 4)
    assert [doubled[key] for key in ("mean", "low", "high", "n")] == [once[key] for key in ("mean", "low", "high", "n")]


def test_another_reference_turns_the_sign():
    frame = two_by_two().query("strategy == 'upper'")
    table = ablation.effects(frame, grid="upper", reference=FusionOptions(order="append"))
    found = effect(table, "upper", "grid", "order")
    assert (found["kept"], found["instead"], found["mean"]) == ("append", "scan", pytest.approx(-5.5 / 3))


def test_one_seed_has_no_interval():
    frame = two_by_two()
    table = ablation.effects(frame[frame["seed"] == 1], grid="upper", reference=FusionOptions())
    found = effect(table, "upper", "grid", "order")
    assert found["mean"] == pytest.approx(3)
    assert math.isnan(found["low"])
    assert not ablation.is_significant(found)
    assert ablation.sentence(found).endswith(
        "+3.0 points, n = 1 seed with 2 pairs of runs: one seed has no confidence interval."
    )
    text = re.sub(" +", " ", ablation.markdown(table, frame))
    assert " nan" not in text
    assert "+nan" not in text
    assert "| order: scan − append | +3.0 | +4.0 | −1.0 |" in text
    assert "One seed has no interval." in text


@pytest.mark.parametrize(
    ("dropped", "said"),
    [
        ("order == 'append' and weighting == 'mean' and seed == 1",
         "scan against append: the run mean-normed-before_mixer-similarity-mean of seed 1 has no"),
        ("weighting == 'mean' and seed == 1", r"from seed to seed: \{0: 2, 1: 1, 2: 2\}"),
        ("strategy == 'upper'", "'upper' has no runs; there are runs of lower"),
    ],
)  # fmt: skip
def test_runs_that_are_no_whole_experiment_are_refused(dropped, said):
    frame = two_by_two()
    with pytest.raises(InputError, match=said):
        ablation.effects(frame.drop(frame.query(dropped).index), grid="upper", reference=FusionOptions())


def test_a_run_that_comes_twice_is_refused():
    frame = two_by_two()
    with pytest.raises(
        InputError, match="order scan: the run size-normed-before_mixer-similarity-mean of seed 0 comes twice"
    ):
        ablation.effects(pd.concat([frame, frame.iloc[:1]]), grid="upper", reference=FusionOptions())


MADE_UP = {"factor": "order", "kept": "scan", "instead": "append", "n": 5, "pairs": 20}


@pytest.mark.parametrize(
    ("mean", "low", "high", "said"),
    [
        (0.62, 0.1, 1.14, "+0.6 points, 95% interval +0.1 to +1.1, n = 5 seeds with 20 pairs of runs each."),
        (-0.62, -1.14, -0.1, "−0.6 points, 95% interval −1.1 to −0.1, n = 5 seeds with 20 pairs of runs each."),
        (-0.04, -0.05, -0.01, "+0.0 points, 95% interval −0.1 to +0.0, n = 5 seeds with 20 pairs of runs each."),
        (0.0, 0.0, 0.0, "no significant difference (+0.0 points, 95% interval +0.0 to +0.0, n = 5 seeds"),
        (0.0, 0.0, 1.2, "no significant difference (+0.0 points, 95% interval +0.0 to +1.2, n = 5 seeds"),
        (0.0, -1.2, 1.3, "no significant difference (+0.0 points, 95% interval −1.2 to +1.3, n = 5 seeds"),
        (0.0, -1.2, 0.0, "no significant difference (+0.0 points, 95% interval −1.2 to +0.0, n = 5 seeds"),
    ],
)
def test_a_sentence_says_difference_interval_and_n_and_whether_zero_is_included(mean, low, high, said):
    text = ablation.sentence(MADE_UP | {"mean": mean, "low": low, "high": high})
    assert text.startswith(f"Keeping scan order instead of putting even tokens first, then odd ones: {said}")


def test_every_pair_of_values_has_its_words():
    for factor in FACTORS:
        for kept, instead in itertools.permutations(levels(factor), 2):  # pyright: ignore[reportArgumentType]
            row = {"factor": factor, "kept": kept, "instead": instead, "mean": 1.0, "low": 0.5, "high": 1.5, "pairs": 1}
            assert " instead of " in (said := ablation.sentence(MADE_UP | row))
            assert said.endswith("n = 5 seeds with a pair of runs each.")


def test_the_text_has_a_sentence_per_effect_a_table_and_how_many_intervals_exclude_zero(table):
    text = re.sub(" +", " ", ablation.markdown(table, two_by_two()))
    assert text.count("\n- ") == 2
    assert "| option | upper, over the grid | upper | lower |" in text
    (order,) = [line for line in text.splitlines() if line.startswith("| order: scan − append |")]
    interval = r"\([−+]\d\.\d to [−+]\d\.\d\)"
    assert re.search(rf"\| \+1\.8 {interval} \| \+2\.0 {interval} \| −1\.0 {interval} \|", order)
    assert "21 runs of 4 epochs (the profile's own are 10) with the seeds 0, 1, 2" in text
    assert "Of 6 intervals, 0 exclude zero; 0.3 would by chance alone" in text


def test_files_hold_every_run_and_the_text_and_are_the_same_bytes_again(tmp_path, table):
    runs = two_by_two()
    ablation.write(table, runs, tmp_path)
    lines = (tmp_path / "ablation.csv").read_text().splitlines()
    head = "profile,strategy,order,weighting,feature,position,matching,reduction,seed,epochs,top1_percent,loss"
    assert lines[0] == f"{head},flops_per_image"
    assert len(lines) == 1 + len(runs)
    assert (tmp_path / "ablation.md").read_text() == ablation.markdown(table, runs)
    before = (tmp_path / "ablation.csv").read_bytes()
    ablation.write(table, runs, tmp_path)
    assert (tmp_path / "ablation.csv").read_bytes() == before

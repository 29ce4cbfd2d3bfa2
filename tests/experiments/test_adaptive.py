"""The comparison of adaptive schedules with the sweep: what is trained, what is worked out, what is said."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from famba.analysis import intervals
from famba.analysis.calibration import Plan
from famba.config import AdaptiveRule, SweepParams
from famba.errors import InputError
from famba.experiments import adaptive, sweep
from famba.storage import runs

COSTS = {
    "logits": [[0.0, 1.0, 2.0, 3.0, 4.5], [0.0, 0.0, 0.5, 1.0, 2.0]],
    "similarity": [[0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 4.0, 6.0, 8.0]],
}
PLANS = [
    Plan(kind, AdaptiveRule(total=4), schedule, 0.8, 0.9, COSTS[kind], ["none-0"], 9)
    for kind, schedule in {"logits": [0, 4], "similarity": [4, 0]}.items()
]
SCORES = {
    "none": [96.0, 97.0, 98.0],
    "lower": [90.0, 91.5, 92.0],
    "upper": [95.0, 93.0, 97.0],
    "adaptive-logits": [95.0, 96.0, 97.5],
    "adaptive-similarity": [90.0, 89.0, 94.0],
}
REMOVED = {"none": [0, 0], "lower": [3, 1], "upper": [0, 4], "adaptive-logits": [0, 4], "adaptive-similarity": [4, 0]}


def answers(score: float) -> str:
    """Of 2,000 images the first are right."""
    return "1" * int(20 * score) + "0" * (2000 - int(20 * score))


@pytest.fixture
def frames() -> tuple[pd.DataFrame, pd.DataFrame]:
    measured = {"peak_memory_mib": 20.0, "flops_per_image": 2_000_000}
    runs = [
        {"strategy": name, "seed": seed, "top1_percent": score, "tokens_removed": sum(REMOVED[name]), **measured}
        | {"correct": answers(score)}
        for name, scores in SCORES.items()
        for seed, score in enumerate(scores)
    ]
    layers = [
        {"strategy": name, "layer": layer, "removed": removed}
        for name, plan in REMOVED.items()
        for layer, removed in enumerate(plan, start=1)
    ]
    return pd.DataFrame(runs), pd.DataFrame(layers)


def test_the_table_pairs_by_seed_and_prices_every_schedule(frames):
    table = adaptive.table(*frames, PLANS).set_index("strategy")
    assert list(table.index) == list(SCORES)
    assert table.loc["lower", ["tokens_removed", "schedule", "n"]].to_list() == [4, "3 1", 3]
    assert table.loc["lower", "cost_logits"] == 3 + 0
    assert table.loc["lower", "cost_similarity"] == 3 + 2
    assert table.loc["upper", "top1_percent_mean"] == 95
    assert table.loc["upper", "top1_percent_sd"] == 2
    # 100, 90 and 110 of 2,000 images, one after the other
    by_image = np.zeros((3, 2000))
    by_image[0, 1800:1900] = by_image[1, 1830:1920] = by_image[2, 1840:1950] = 100
    ahead = table.loc["lower", ["logits_ahead", "logits_ahead_low", "logits_ahead_high"]].to_list()
    assert ahead[0] == pytest.approx(5)
    assert ahead == pytest.approx(intervals.two_level(by_image))
    assert np.isnan(table.loc["adaptive-logits", "logits_ahead"])
    assert not np.isnan(table.loc["adaptive-logits", "similarity_ahead"])


def test_the_verdict_names_what_is_above_below_and_too_close(frames):
    runs, schedules = frames
    table = adaptive.table(runs, schedules, PLANS)
    said = adaptive.verdict(table, "logits")
    assert "`adaptive-logits` reaches 96.2% with 4 tokens removed" in said
    assert "the best of the named strategies, `upper`, 95.0% with 4" in said
    assert "over 3 seeds it is above `lower`, too close to call against `upper`." in said
    assert "none" not in said
    ahead = runs["strategy"] == "adaptive-similarity"
    runs.loc[ahead, "correct"] = [answers(score) for score in (60.0, 61.5, 62.0)]
    said = adaptive.verdict(adaptive.table(runs, schedules, PLANS), "similarity")
    assert said.endswith("over 3 seeds it is below `lower` and `upper`.")
    with pytest.raises(InputError, match="'accuracy' is not in the table"):
        adaptive.verdict(table, "accuracy")


def test_one_seed_gives_no_interval_and_no_verdict_beyond_that(frames):
    runs, schedules = frames
    table = adaptive.table(runs[runs["seed"] == 0], schedules, PLANS)
    assert table["top1_percent_sd"].isna().all()
    assert adaptive.verdict(table, "logits").endswith("it is too close to call against `lower` and `upper`.")
    assert "| upper | +0.0 | −5.0 |" in adaptive.markdown(table, PLANS)


def test_what_is_written_is_whole_and_for_readers(frames, tmp_path):
    table = adaptive.table(*frames, PLANS)
    adaptive.write(table, PLANS, tmp_path)
    text = (tmp_path / "adaptive.md").read_text()
    assert "| lower | 3 1 | 4 | 91.2 ± 1.0 | 20.0 | 2.00 | 3.000 | 5.000 |" in text
    assert re.search(r"\| lower \| \+5\.0 \(\+\d\.\d to \+\d\.\d\) \|", text)
    assert adaptive.verdict(table, "similarity") in text
    assert "Budget: `total: 4`. Costs were measured on 9 validation images with none-0." in text
    written = json.loads((tmp_path / "adaptive.json").read_text())
    assert written["logits"]["schedule"] == [0, 4]
    assert written["logits"]["costs"] == PLANS[0].costs
    assert written["similarity"]["rule"] == {"total": 4, "memory": None, "flops": None}
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "adaptive.csv"), table)


SWEEP = SweepParams(strategies=("none", "upper"), seeds=(0,))


def test_plans_are_trained_once_with_the_sweeps_seeds_and_fuse_as_they_say(tmp_path):
    sweep.ensure_runs(SWEEP, profile="smoke", runs_dir=tmp_path / "runs", train_missing=True)
    where = {"profile": "smoke", "runs_dir": tmp_path / "runs"}
    plans = adaptive.plans(SWEEP, **where, kinds=["similarity"], images=20)
    assert [adaptive.name(plan) for plan in plans] == ["adaptive-similarity"]
    assert sum(plans[0].schedule) == 24  # the smoke profile's budget
    found = adaptive.run_plans(plans, SWEEP, **where, trained_dir=tmp_path / "trained")
    assert found["strategy"].to_list() == ["none", "upper", "adaptive-similarity"]
    assert found["tokens_removed"].to_list() == [0, 24, 24]
    folder = tmp_path / "trained" / "adaptive-similarity-0"
    run = runs.read(folder)
    assert (run.strategy, run.schedule) == ("adaptive", plans[0].schedule)
    assert run.cost["command"] == "make adaptive"
    changed = (folder / "metrics.json").stat().st_mtime_ns
    again = adaptive.run_plans(plans, SWEEP, **where, trained_dir=tmp_path / "trained")
    pd.testing.assert_frame_equal(again, found)
    assert (folder / "metrics.json").stat().st_mtime_ns == changed
    layers = adaptive.schedules(plans, SWEEP, runs_dir=tmp_path / "runs")
    own = layers[layers["strategy"] == "adaptive-similarity"]
    assert own["removed"].to_list() == plans[0].schedule
    assert own["layer"].to_list() == [1, 2, 3, 4]


def test_a_sweep_without_a_strategy_that_fuses_has_nothing_to_compare_with(tmp_path):
    with pytest.raises(InputError, match="none that fuses"):
        adaptive.run_plans(
            PLANS,
            SweepParams(strategies=("none",), seeds=(0,)),
            profile="smoke",
            runs_dir=tmp_path,
            trained_dir=tmp_path,
        )

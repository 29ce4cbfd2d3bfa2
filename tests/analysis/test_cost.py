"""Ratios of steps that took turns, and the mark of a busy machine."""

import itertools
import math
from collections import Counter

import pandas as pd
import pytest
import torch

from famba import config
from famba.analysis import cost
from famba.errors import InputError
from famba.params import Params
from famba.training.cost import measure


def steps(times: dict[str, list[float]]) -> pd.DataFrame:
    setting = {"batch_size": 32, "epochs": 4, "flops_per_image": 10, "tokens_left": 7, "profile": "smoke"}
    setting |= {"device": "a CPU", "threads": 1, "versions": "torch 0", "disturbed": ""}
    return pd.DataFrame(
        {"strategy": name, "round": i, "step_time_ms": ms, "peak_memory_mib": 2.0 + len(name), **setting}
        for name, each in times.items()
        for i, ms in enumerate(each, start=1)
    )


def test_ratios_are_taken_within_each_round_so_that_a_slow_machine_changes_none():
    slow = [10.0, 100.0, 20.0, 1000.0, 40.0]
    table = cost.table(steps({"upper": [0.5 * x for x in slow], "none": slow})).set_index("strategy")
    assert table.index.to_list() == ["none", "upper"]
    assert table.loc["upper", ["time_ratio", "time_ratio_low", "time_ratio_high"]].to_list() == [0.5, 0.5, 0.5]
    assert (table.loc["none", "time_ratio"], math.isnan(table.loc["none", "time_ratio_low"])) == (1.0, True)
    assert table.loc["upper", ["step_time_ms", "throughput_img_s", "rounds"]].to_list() == [20.0, 1600.0, 5]
    assert table.loc["upper", "memory_ratio"] == pytest.approx(7 / 6)


def test_the_interval_is_that_of_the_median_over_rounds():
    ratios = [0.5, 0.6, 0.7, 0.8, 0.9] * 8
    row = cost.table(steps({"none": [1.0] * 40, "all": ratios})).set_index("strategy").loc["all"]
    assert 0.5 < row["time_ratio_low"] < row["time_ratio"] == 0.7 < row["time_ratio_high"] < 0.9


def test_costs_read_back_as_they_were_written_and_a_missing_file_is_named(tmp_path):
    made = steps({"none": [1.0, 2.0, 3.0], "all": [0.5, 0.7, 0.9]})
    cost.write(made, tmp_path)
    pd.testing.assert_frame_equal(cost.load(tmp_path), cost.table(made), check_dtype=False)
    times = pd.read_csv(tmp_path / "step_times.csv")
    assert times.to_dict("list") == {"round": [1, 2, 3], "all": [0.5, 0.7, 0.9], "none": [1.0, 2.0, 3.0]}
    with pytest.raises(InputError, match=r"nowhere/cost\.csv: cannot be read \(No such file"):
        cost.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="steps: of all; those of 'none' are needed"):
        cost.table(steps({"all": [1.0, 2.0]}))


def test_training_for_fewer_epochs_takes_that_much_less_time():
    made = steps({"none": [10.0, 20.0, 30.0], "none_short": [10.0, 20.0, 30.0]})
    made.loc[made["strategy"] == "none_short", "epochs"] = 3
    row = cost.table(made).set_index("strategy").loc["none_short"]
    assert row[["step_time_ms", "time_ratio", "time_ratio_low", "time_ratio_high"]].to_list() == [20, 0.75, 0.75, 0.75]


def test_published_step_times_and_ratios_are_the_medians_of_the_published_rounds():
    tables = [path.parent for path in (config.root() / "results").rglob("cost.csv")]
    assert len(tables) > 5
    for folder in tables:
        times, table = pd.read_csv(folder / "step_times.csv"), cost.load(folder).set_index("strategy")
        ratios = times.div(times["none"], axis=0).median() * table["epochs"] / table.loc["none", "epochs"]
        assert times.median()[table.index].to_list() == pytest.approx(table["step_time_ms"].to_list(), rel=1e-4)
        assert ratios[table.index].to_list() == pytest.approx(table["time_ratio"].to_list(), rel=1e-4), folder


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([1.2, 1.1, 0.9], 2.5),
        ([0.99, 1.3, 0.9], 2.75),  # saves time from the last r on that does not
        ([0.9, 0.8, 0.7], 0.0),
        ([0.9, 1.2, 1.1], math.nan),
    ],
)
def test_the_break_even_r_is_where_the_ratio_falls_below_one_for_good(ratios, expected):
    rows = pd.DataFrame({"r": [3, 2, 1], "time_ratio": ratios[::-1]})
    assert cost.break_even(rows) == pytest.approx(expected, nan_ok=True)


def smoke(*strategies: str) -> dict[str, Params]:
    return {name: config.load("smoke", strategy=name) for name in strategies}


def test_variants_of_other_data_or_batch_size_are_refused():
    other = {"small": config.load("smoke", strategy="none", given={"train.batch_size": 16})}
    with pytest.raises(InputError, match=r"small: other data or train\.batch_size than none"):
        measure(smoke("none") | other, rounds=2)


def test_steps_of_all_strategies_take_turns_on_one_batch_and_costs_are_those_of_their_schedules():
    found = measure(smoke("none", "upper"), rounds=2)
    assert found.groupby("strategy")["round"].apply(list).to_dict() == {"none": [1, 2], "upper": [1, 2]}
    assert (found["step_time_ms"] > 0).all()
    none, upper = (found[found["strategy"] == name].iloc[0] for name in ("none", "upper"))
    assert (none["tokens_left"], upper["tokens_left"]) == (37, 13)
    assert upper["peak_memory_mib"] < none["peak_memory_mib"]
    assert upper["flops_per_image"] < none["flops_per_image"]
    columns = ["epochs", "r", "first_layer"]
    assert (none[columns].to_list(), upper[columns].to_list()) == ([2, 0, 0], [2, 8, 2])
    with pytest.raises(InputError, match="rounds: 1; must be 2 or more"):
        measure(smoke("none"), rounds=1)


@pytest.fixture
def order(monkeypatch) -> list[str]:
    """Steps that do nothing, so that their times are noise alone; whose step was called."""
    called: list[str] = []
    step = "famba.training.trainer.Trainer._step"
    monkeypatch.setattr(step, lambda trainer, *_: called.append(trainer.p.strategy))
    monkeypatch.setattr("famba.training.trainer.Trainer.measure_memory", lambda trainer: None)
    return called


def test_no_strategy_always_follows_the_same_other_one_and_each_has_one_step_in_every_round(order):
    measure(smoke("none", "all", "upper"), rounds=60)
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert len(rounds) == 62
    assert all(sorted(each) == ["all", "none", "upper"] for each in rounds)
    followed = Counter(itertools.pairwise(itertools.chain.from_iterable(rounds)))
    assert all(18 < followed[pair] < 36 for pair in itertools.permutations(("none", "all", "upper"), 2))


def test_the_machine_was_busy_if_other_processes_ran_whatever_the_spread_of_the_times(order, monkeypatch):
    for busy_percent, said in ((0.0, ""), (300.0, r"other processes used [23]\d\d% of the CPU")):
        monkeypatch.setattr("psutil.cpu_percent", lambda busy=busy_percent: busy)
        assert measure(smoke("none"), rounds=9)["disturbed"].str.fullmatch(said).all()


def test_torch_has_its_settings_back_after_measuring(order, threads):
    threads(3)
    measure(smoke("none"), rounds=2)  # on one thread
    assert torch.get_num_threads() == 3

"""Ratios of steps that took turns, and the marks of a busy machine."""

import math

import pandas as pd
import pytest

from famba.analysis import cost
from famba.errors import InputError
from famba.training.cost import disturbances, measure


def steps(times: dict[str, list[float]]) -> pd.DataFrame:
    setting = {"batch_size": 32, "flops_per_image": 10, "tokens_left": 7, "profile": "smoke", "device": "a CPU"}
    setting |= {"threads": 1, "versions": "torch 0", "disturbed": ""}
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
    table = cost.table(steps({"none": [1.0, 2.0, 3.0], "all": [0.5, 0.7, 0.9]}))
    cost.write(table, tmp_path)
    pd.testing.assert_frame_equal(cost.load(tmp_path), table, check_dtype=False)
    with pytest.raises(InputError, match=r"nowhere/cost\.csv: cannot be read \(No such file"):
        cost.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="steps: of all; those of 'none' are needed"):
        cost.table(steps({"all": [1.0, 2.0]}))


@pytest.mark.parametrize(
    ("times", "switches", "load", "said"),
    [
        ([100.0, 101.0, 99.0, 100.0], 3.0, 0.5, ""),
        ([100.0, 101.0, 99.0, 100.0], 3.0, 9000.0, "load average 9000.0 on"),
        ([100.0, 101.0, 99.0, 100.0], 80.0, 0.5, "80 involuntary context switches a second"),
        ([100.0, 150.0, 90.0, 180.0], 3.0, 0.5, "middle half of the step times spread over 48%"),
    ],
)
def test_a_busy_machine_is_seen_by_its_load_by_switches_and_by_the_spread(times, switches, load, said):
    found = disturbances(times, switches, load)
    assert found.startswith(said)
    assert bool(found) == bool(said)


def test_steps_of_all_strategies_take_turns_on_one_batch_and_costs_are_those_of_their_schedules():
    found = measure("smoke", ["none", "upper"], rounds=2)
    assert found.groupby("strategy")["round"].apply(list).to_dict() == {"none": [1, 2], "upper": [1, 2]}
    assert (found["step_time_ms"] > 0).all()
    none, upper = (found[found["strategy"] == name].iloc[0] for name in ("none", "upper"))
    assert (none["tokens_left"], upper["tokens_left"]) == (37, 13)
    assert upper["peak_memory_mib"] < none["peak_memory_mib"]
    assert upper["flops_per_image"] < none["flops_per_image"]
    with pytest.raises(InputError, match="rounds: 1; must be 2 or more"):
        measure("smoke", ["none"], rounds=1)


def test_every_round_begins_with_another_strategy(monkeypatch):
    order = []
    step = "famba.training.trainer.Trainer._step"
    monkeypatch.setattr(step, lambda trainer, *_: order.append(trainer.p.strategy))
    monkeypatch.setattr("famba.training.trainer.Trainer.measure_memory", lambda trainer: None)
    measure("smoke", ["none", "all", "upper"], rounds=2)
    assert ["".join(name[0] for name in order[i : i + 3]) for i in range(0, 12, 3)] == ["nau", "aun", "una", "nau"]

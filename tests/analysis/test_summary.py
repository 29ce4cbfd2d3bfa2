import json
import math
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from famba.analysis import intervals, summary
from famba.errors import InputError
from famba.fusion.strategies import STRATEGIES


def runs_frame(top1, **columns):
    """A frame as records.published gives it, from {strategy: [top1 of seed 0, 1, ..]}, of 100 images each."""
    setting = {"profile": "default", "dataset": "digits", "img_size": 8, "model": "vim_nano", "device": "a CPU"}
    setting |= {"threads": 2, "versions": "torch 2.13.0", "top5_percent": 99.0, **columns}
    return pd.DataFrame(
        {"strategy": strategy, "seed": seed, "top1_percent": value, "correct": answers(int(value))}
        | {"made_of": f"{strategy}-{seed}", **setting}
        for strategy, values in top1.items()
        for seed, value in enumerate(values)
    )


def answers(right):
    return "1" * right + "0" * (100 - right)


# In units of `none`.
RATIOS = {"none": 1.0, "all": 0.8, "interleaved": 0.75, "lower": 0.6, "upper": 0.9}


def costs_frame(ratios=RATIOS, **columns):
    """A frame as cost.table gives it: a step of `none` takes 40 ms and 100 MiB, and memory is saved as time is."""
    setting = {"batch_size": 32, "tokens_left": 7, "profile": "default", "device": "a CPU", "threads": 2}
    setting |= {"versions": "torch 2.13.0", "disturbed": "", "rounds": 60, **columns}
    frame = pd.DataFrame({"strategy": list(ratios), "time_ratio": list(ratios.values())}).assign(**setting)
    ratio, none = frame["time_ratio"], frame["strategy"] == "none"
    return frame.assign(
        step_time_ms=40 * ratio,
        peak_memory_mib=100 * ratio,
        flops_per_image=1e7 * ratio,
        throughput_img_s=800 / ratio,
        memory_ratio=ratio,
        time_ratio_low=(ratio - 0.01).mask(none),
        time_ratio_high=(ratio + 0.01).mask(none),
    )


def summarised(top1, **columns):
    return summary.summary(runs_frame(top1, **columns), costs_frame(profile=columns.get("profile", "default")))


def test_schedules_are_a_frame_in_the_fixed_order_those_of_ones_own_last():
    frame = summary.schedule_frame({"late": [0, 2], "early": [2, 0], "none": [0, 0], "upper": [0, 2]}, tokens=5)
    assert frame["strategy"].unique().tolist() == ["none", "upper", "late", "early"]
    early = frame.loc[frame["strategy"] == "early", ["layer", "removed", "tokens"]]
    assert early.to_numpy().tolist() == [[0, 0, 5], [1, 2, 3], [2, 0, 3]]


def test_mean_spread_and_paired_difference_of_a_case_worked_by_hand():
    table = summarised({"none": [90.0, 96.0, 93.0], "upper": [89.0, 94.0, 90.0]}).set_index("strategy")
    none, upper = table.loc["none"], table.loc["upper"]
    assert (none["n"], none["images"], none["top1_percent_mean"], none["top1_percent_sd"]) == (3, 100, 93.0, 3.0)
    assert upper["top1_percent_mean"] == 91.0
    assert upper["top1_percent_sd"] == pytest.approx(math.sqrt((4 + 9 + 1) / 2))
    assert upper["top1_percent_diff"] == pytest.approx(-2.0)
    # by image: seed 0 loses image 89, seed 1 images 94 and 95, seed 2 images 90, 91 and 92
    lost = np.zeros((3, 100))
    lost[0, 89] = lost[1, [94, 95]] = lost[2, [90, 91, 92]] = -100
    expected = intervals.two_way(lost)[1:]
    assert tuple(upper[["top1_percent_diff_low", "top1_percent_diff_high"]]) == pytest.approx(expected)
    assert none[["top1_percent_diff", "top1_percent_diff_low"]].isna().all()
    assert (upper["time_ratio"], upper["memory_ratio"], upper["rounds"]) == (0.9, 0.9, 60)


def test_pairing_is_by_seed_not_by_row():
    frame = runs_frame({"none": [90.0, 96.0, 93.0], "upper": [89.0, 94.0, 90.0]})
    mixed = pd.concat([frame.iloc[:3], frame.iloc[:2:-1]])
    pd.testing.assert_frame_equal(summary.summary(mixed, costs_frame()), summary.summary(frame, costs_frame()))


def test_files_of_one_run_have_neither_spread_nor_interval_nor_the_text_nan(tmp_path):
    table = summary.write_summary(runs_frame({"none": [90.0], "upper": [89.0]}), costs_frame(), tmp_path)
    assert table["top1_percent_sd"].isna().all()
    names = ("summary.csv", "summary.md", "summary_short.md", "summary.json")
    _, page, _, metrics = texts = [(tmp_path / name).read_text() for name in names]
    assert not re.search(r"\bnan\b", " ".join(texts), re.IGNORECASE)
    assert "89.0 |" in page
    assert "One seed has no spread and no interval." in page
    assert json.loads(metrics)["top1_percent_mean"] == {"none": 90.0, "upper": 89.0}
    assert json.loads(metrics)["time_ratio"] == {"none": 1.0, "upper": 0.9}


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(InputError, match=r"^upper: seeds \[0\]; none: seeds \[0, 1\]; only"):
        summarised({"none": [90.0, 91.0], "upper": [89.0]})
    twice = runs_frame({"none": [90.0], "upper": [89.0]}).iloc[[0, 1, 1]]  # as a merge of two runs.csv may leave it
    with pytest.raises(InputError, match=r"^upper: seeds \[0, 0\]; .* each once$"):
        summary.summary(twice, costs_frame())
    frame = runs_frame({"none": [90.0], "upper": [89.0]})
    with pytest.raises(InputError, match=r"cost\.csv: strategy none was not measured under profile default"):
        summary.summary(frame, costs_frame(profile="smoke"))
    with pytest.raises(InputError, match=r"cost\.csv: strategy upper was not measured"):
        summary.summary(frame, costs_frame({"none": 1.0}))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=5))
def test_every_strategy_off_the_front_is_beaten_by_one_on_it(points):
    scores = [(name, cost, score) for name, (cost, score) in zip(STRATEGIES, points, strict=False)]
    frame = pd.DataFrame(scores, columns=["strategy", "peak_memory_mib", "top1_percent_mean"])
    front = summary.pareto(frame, "peak_memory_mib")
    at = dict(zip(STRATEGIES, points, strict=False))
    assert front
    costs = [at[name] for name in front]
    assert costs == sorted(costs)
    for name, (cost, score) in at.items():
        better = [at[other] for other in front if at[other] != (cost, score)]
        assert (name in front) != any(c <= cost and s >= score for c, s in better)


def cells(text, first):
    """The stripped cells of the table's row that begins so, by the headings of its table."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    head = next(line for line in lines if line[0] == "strategy")
    return dict(zip(head, next(line for line in lines if line[0] == first), strict=True))


def test_the_readers_table_shows_n_spread_interval_costs_and_machine():
    table = summarised({"none": [90.0, 96.0, 93.0], "upper": [89.0, 94.0, 90.0]})
    text = summary.markdown(table)
    assert cells(text, "none") == {
        "strategy": "none",
        "n": "3",
        "top-1 (%)": "93.0 ± 3.0",
        "difference to `none` (points)": "",
        "top-5 (%)": "99.0 ± 0.0",
        "training time": "1.00",
        "step (ms)": "40",
        "images/s": "800",
        "peak memory": "1.00",
        "MiB": "100.0",
        "FLOPs (M)": "10.00",
    }
    upper = cells(text, "upper")
    assert re.fullmatch(r"−2\.0 \(−\d\.\d to [−+]\d\.\d\)", upper["difference to `none` (points)"])
    assert upper["training time"] == "0.90 (0.89 to 0.91)"
    assert "Pareto-optimal in mean top-1 against training time: upper, none." in text
    assert "mean ± 1 standard deviation over n seeds, 100 test images in all" in text
    assert "Step times: medians of 60 training steps of 32 images in turn, on a CPU, threads: 2" in text
    assert "busy" not in text
    assert cells(summary.markdown_short(table), "upper").items() < upper.items(), "some of the columns"


def test_a_measurement_on_a_busy_machine_and_runs_of_two_machines_are_marked():
    frame = runs_frame({"none": [90.0, 96.0]})
    text = summary.markdown(summary.summary(frame, costs_frame(disturbed="load average 9.0 on 2 cores")))
    assert "**The machine was busy meanwhile: load average 9.0 on 2 cores.**" in text
    frame["device"] = ["a CPU", "another"]
    assert "**Runs were made on different machines" in summary.markdown(summary.summary(frame, costs_frame()))


def test_beside_the_paper_stand_differences_and_shares_not_numbers_of_other_machines():
    table = summary.beside_paper(summarised({"none": [90.0, 96.0], "upper": [45.0, 48.0]})).set_index("strategy")
    assert table.columns.to_list() == ["paper, vim_tiny", "paper, vim_small", "here"]
    assert table.loc["none"].to_list() == ["70.1", "76.9", "93.0"]
    # 14,920 s of 16,382 s and 5,996 MiB of 8,302 MiB
    assert table.loc["upper"].to_list() == ["+0.4, 0.91, 0.72", "−1.7, 0.81, 0.74", "−46.5, 0.90, 0.90"]
    assert table.loc["lower", "here"] == "", "a strategy that was not run has an empty cell"


def test_a_text_gets_the_file_that_its_markers_name_and_nothing_else_changes(repository):
    (repository / "a.md").write_text("a table\n")
    text = summary.with_tables("# a\n<!-- a.md:begin -->\nold\n<!-- a.md:end -->\nb", "README.md")
    assert text == "# a\n<!-- a.md:begin -->\n\na table\n\n<!-- a.md:end -->\nb"
    assert summary.with_tables(text, "README.md") == text
    (repository / "a.md").unlink()
    with pytest.raises(InputError, match=r"a\.md: cannot be read \(No such file"):
        summary.with_tables(text, "README.md")


WHOLE = "<!-- params.yaml:begin --><!-- params.yaml:end -->"


@pytest.mark.parametrize("text", ["", "<!-- a:begin --><!-- b:end -->", f"{WHOLE}<!-- a:end -->"])
def test_a_text_without_both_markers_of_a_table_is_refused(text):
    with pytest.raises(InputError, match=r"README\.md: each table needs <!-- FILE:begin --> before it and"):
        summary.with_tables(text, "README.md")

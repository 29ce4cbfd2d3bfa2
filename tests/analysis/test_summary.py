import json
import math
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_runs import make_run, spoil

from famba import config
from famba.analysis import summary
from famba.config import SweepParams
from famba.errors import InputError
from famba.fusion.strategies import STRATEGIES
from famba.storage import runs

SWEEP = SweepParams(strategies=("upper", "none"), seeds=(0, 1))


def write_runs(folder, strategies=("none", "upper"), seeds=(0, 1), **changes):
    for strategy in strategies:
        for seed in seeds:
            runs.write(make_run(strategy, seed, **changes), folder / f"{strategy}-{seed}")
    return folder


def runs_frame(top1, **columns):
    """A frame as load_runs gives it, from {strategy: [top1 of seed 0, 1, ..]}; costs are multiples of it."""
    rows = [
        {
            "strategy": strategy,
            "seed": seed,
            "profile": "default",
            "dataset": "digits",
            "img_size": 8,
            "model": "vim_nano",
            "top1_percent": value,
            "top5_percent": 99.0,
            "train_time_s": 2 * value,
            "step_time_ms": value / 4,
            "peak_memory_mib": 10 * value,
            "throughput_img_s": 1000.0,
            "flops_per_image": 10,
            "device": "a CPU",
            "threads": 2,
            "versions": "torch 2.13.0",
        }
        | columns
        for strategy, values in top1.items()
        for seed, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_exactly_the_runs_of_the_sweep_are_loaded_in_the_fixed_order(tmp_path):
    write_runs(tmp_path, ("none", "upper", "all"), (0, 1, 2))
    frame = summary.load_runs(SWEEP, tmp_path)
    assert list(zip(frame["strategy"], frame["seed"], strict=True)) == [
        *(("none", 0), ("none", 1), ("upper", 0), ("upper", 1))
    ]
    row = frame.iloc[0]
    assert (row["top1_percent"], row["peak_memory_mib"], row["model"]) == (95.0, 100.0, "vim_nano")
    assert (row["tokens_removed"], row["tokens_left"], row["versions"]) == (4, 13, "torch 2.13.0")


def test_a_missing_run_is_named(tmp_path):
    write_runs(tmp_path, seeds=(0,))
    with pytest.raises(InputError, match="none-1: no such run"):
        summary.load_runs(SWEEP, tmp_path)


def test_a_run_in_the_folder_of_another_is_refused(tmp_path):
    write_runs(tmp_path)
    runs.write(make_run("upper", 7), tmp_path / "upper-1")
    with pytest.raises(InputError, match="upper-1: holds the run upper-7"):
        summary.load_runs(SWEEP, tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("train", "lr"), 0.5, r"upper-1: train\.lr: 0\.5, but 0\.\d+ in none-0: not one experiment"),
        (("options", "order"), "append", r"upper-1: options\.order: 'append', but 'scan' in none-0"),
        (("fusion", "r"), 3, r"upper-1: fusion\.r: 3, but 8 in upper-0"),
        (("train", "lr"), KeyError, r"upper-1: train\.lr: None, but 0\.\d+ in none-0"),
    ],
)
def test_runs_of_two_experiments_are_refused(tmp_path, path, value, said):
    write_runs(tmp_path)
    runs.write(make_run("upper", 1, params=spoil(dict(make_run().params), path, value)), tmp_path / "upper-1")
    with pytest.raises(InputError, match=said):
        summary.load_runs(SWEEP, tmp_path)


def test_runs_of_two_profiles_are_refused(tmp_path):
    write_runs(tmp_path)
    other = {**make_run("upper").params, "profile": "paper"}
    runs.write(make_run("upper", 1, profile="paper", params=other), tmp_path / "upper-1")
    with pytest.raises(InputError, match="upper-1: profile: 'paper', but 'smoke' in none-0"):
        summary.load_runs(SWEEP, tmp_path)


def test_history_has_a_row_per_epoch_and_empty_cells_without_ema(tmp_path):
    frame = summary.load_history(SWEEP, write_runs(tmp_path))
    assert len(frame) == 2 * 2 * 2
    assert frame["train_loss"].to_list() == [2.0, 1.0] * 4
    assert frame["ema_val_loss"].isna().all()
    assert {str(kind) for kind in frame.dtypes.drop(["strategy", "seed", "epoch"])} == {"float64"}


def test_the_curves_are_the_history_of_all_runs_digit_for_digit(tmp_path):
    history = summary.load_history(SWEEP, write_runs(tmp_path / "runs"))
    summary.write_curves(history, tmp_path / "results")
    lines = (tmp_path / "results" / "curves.csv").read_text().splitlines()
    assert lines[0] == "strategy,seed,epoch,train_loss,val_loss,train_top1_percent,val_top1_percent"
    assert lines[1:3] == ["none,0,1,2.0,1.9,40.0,45.0", "none,0,2,1.0,0.95,80.0,90.0"]
    assert len(lines) == 1 + len(history)


def test_curves_of_runs_that_trained_nothing_are_a_table_without_rows(tmp_path):
    history = summary.load_history(SWEEP, write_runs(tmp_path / "runs")).head(0)
    assert summary.write_curves(history, tmp_path).empty
    assert (tmp_path / "curves.csv").read_text().splitlines() == [",".join(summary.CURVES)]


def test_schedules_have_a_row_per_layer_from_the_input_on(tmp_path):
    frame = summary.load_schedules(SWEEP, write_runs(tmp_path))
    upper = frame[frame["strategy"] == "upper"]
    assert upper["layer"].to_list() == [0, 1, 2]
    assert upper["removed"].to_list() == [0, 0, 4]
    assert upper["tokens"].to_list() == [17, 17, 13]


def test_seeds_that_fused_differently_are_refused(tmp_path):
    write_runs(tmp_path)
    runs.write(make_run("upper", 1, schedule=[4, 0], token_counts=[17, 13, 13]), tmp_path / "upper-1")
    with pytest.raises(InputError, match="upper-1: token_counts differ from those of upper-0"):
        summary.load_schedules(SWEEP, tmp_path)


def test_the_papers_schedules_as_a_frame_end_at_the_papers_counts():
    plans = {"upper": [0] * 5 + [9] * 19, "none": [0] * 24}
    frame = summary.schedule_frame(plans, tokens=197)
    assert frame["strategy"].unique().tolist() == ["none", "upper"]
    assert frame[frame["layer"] == 24]["tokens"].to_list() == [197, 26]
    with pytest.raises(InputError, match="'middle' is not one of none, all"):
        summary.schedule_frame({"middle": [0]}, tokens=5)


def test_mean_spread_and_paired_interval_of_a_case_worked_by_hand():
    # upper - none by seed: -1, -2, -3. Mean -2, sd 1, n 3; t(0.975, 2) = 4.302653, half width 4.302653 / sqrt(3).
    frame = runs_frame({"none": [90.0, 96.0, 93.0], "upper": [89.0, 94.0, 90.0]})
    table = summary.summary(frame).set_index("strategy")
    none, upper = table.loc["none"], table.loc["upper"]
    assert (none["n"], none["top1_percent_mean"], none["top1_percent_sd"]) == (3, 93.0, 3.0)
    assert upper["top1_percent_mean"] == 91.0
    assert upper["top1_percent_sd"] == pytest.approx(math.sqrt((4 + 9 + 1) / 2))
    assert upper["top1_percent_diff"] == -2.0
    assert upper["top1_percent_diff_low"] == pytest.approx(-2 - 2.484138, abs=1e-6)
    assert upper["top1_percent_diff_high"] == pytest.approx(-2 + 2.484138, abs=1e-6)
    assert upper["peak_memory_mib_diff"] == -20.0
    assert none[["top1_percent_diff", "top1_percent_diff_low"]].isna().all()


def test_pairing_is_by_seed_not_by_row():
    frame = runs_frame({"none": [90.0, 96.0, 93.0], "upper": [89.0, 94.0, 90.0]})
    pd.testing.assert_frame_equal(summary.summary(frame.iloc[::-1]), summary.summary(frame))


def test_one_run_has_neither_spread_nor_interval_nor_the_text_nan(tmp_path):
    table = summary.write_summary(runs_frame({"none": [90.0], "upper": [89.0]}), tmp_path)
    assert table["top1_percent_sd"].isna().all()
    for name in ("summary.csv", "summary.md", "summary.json"):
        assert not re.search(r"\bnan\b", (tmp_path / name).read_text(), re.IGNORECASE), name
    text = (tmp_path / "summary.md").read_text()
    assert "| upper | 1 | 89.0 | 99.0 | 178 |" in text
    assert "| upper | −1.0 |" in text
    assert "One run has no spread" in text


def test_without_a_baseline_there_are_no_differences():
    table = summary.summary(runs_frame({"all": [90.0, 91.0], "upper": [89.0, 90.0]}))
    assert table[[column for column in table.columns if "_diff" in column]].isna().all(axis=None)
    assert "Difference" not in summary.markdown(table)


def test_seeds_that_cannot_be_paired_are_refused():
    frame = runs_frame({"none": [90.0, 91.0], "upper": [89.0]})
    with pytest.raises(InputError, match=r"strategy upper: seeds \[0\]; `none` has \[0, 1\]"):
        summary.summary(frame)


def test_an_interval_of_nothing_or_one_value_is_empty():
    assert all(math.isnan(value) for value in summary.interval([]))
    mean, low, high = summary.interval([3.0])
    assert (mean, math.isnan(low), math.isnan(high)) == (3.0, True, True)
    assert summary.interval([2.0, 2.0]) == (2.0, 2.0, 2.0)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(5, 2, (2000, 3))
    inside = [low <= 5 <= high for _, low, high in map(summary.interval, draws.tolist())]
    assert 0.93 < np.mean(inside) < 0.97


def test_the_pareto_front_of_a_case_worked_by_hand():
    # (cost, top-1): none (40, 96), upper (30, 95), lower (20, 90), all (30, 94) and interleaved (20, 90) with lower.
    frame = runs_frame({"none": [96.0], "upper": [95.0], "lower": [90.0], "all": [94.0], "interleaved": [90.0]})
    frame["train_time_s"] = [40.0, 30.0, 20.0, 30.0, 20.0]
    assert summary.pareto(frame, "train_time_s") == ["interleaved", "lower", "upper", "none"]
    with pytest.raises(InputError, match="'throughput_img_s' is not one of train_time_s"):
        summary.pareto(frame, "throughput_img_s")


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=5))
def test_every_strategy_off_the_front_is_beaten_by_one_on_it(points):
    frame = runs_frame({name: [float(score)] for name, (_, score) in zip(STRATEGIES, points, strict=False)})
    frame["peak_memory_mib"] = [float(cost) for cost, _ in points]
    front = summary.pareto(frame, "peak_memory_mib")
    at = dict(zip(STRATEGIES, points, strict=False))
    assert front
    costs = [at[name] for name in front]
    assert costs == sorted(costs)
    for name, (cost, score) in at.items():
        better = [at[other] for other in front if at[other] != (cost, score)]
        assert (name in front) != any(c <= cost and s >= score for c, s in better)


def test_the_summary_reads_back_and_makes_the_same_table(tmp_path):
    table = summary.write_summary(runs_frame({"none": [90.1, 96.2], "upper": [89.3, 94.4]}), tmp_path)
    again = summary.load_summary(tmp_path)
    pd.testing.assert_frame_equal(again, table, check_exact=True)
    assert summary.markdown(again) == (tmp_path / "summary.md").read_text()


def test_the_summary_is_the_same_bytes_again(tmp_path):
    for name in ("one", "two"):
        summary.write_summary(runs_frame({"none": [90.1, 96.2], "upper": [89.3, 94.4]}), tmp_path / name)
    for name in ("summary.csv", "summary.md", "summary.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_metrics_for_dvc_are_the_means_by_strategy(tmp_path):
    summary.write_summary(runs_frame({"none": [90.0, 96.0], "upper": [89.0, 94.0]}), tmp_path)
    tree = json.loads((tmp_path / "summary.json").read_text())
    assert set(tree) == {"top1_percent", "train_time_s", "peak_memory_mib"}
    assert tree["top1_percent"] == {"none": 93.0, "upper": 91.5}


def test_a_foreign_summary_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"summary\.csv: cannot be read \(No such file"):
        summary.load_summary(tmp_path)
    (tmp_path / "summary.csv").write_text("strategy,n\nnone,3\n")
    with pytest.raises(InputError, match=r"summary\.csv: columns strategy, n; expected strategy, n, profile"):
        summary.load_summary(tmp_path)
    table = summary.write_summary(runs_frame({"none": [90.0]}), tmp_path)
    table["top1_percent_mean"] = "ninety"
    table.to_csv(tmp_path / "summary.csv", index=False)
    with pytest.raises(InputError, match=r"summary\.csv: could not convert string to float: 'ninety'"):
        summary.load_summary(tmp_path)


def test_the_readers_table_shows_n_spread_interval_and_machine():
    text = summary.markdown(summary.summary(runs_frame({"none": [90.0, 96.0, 93.0], "upper": [89.0, 94.0, 90.0]})))
    lines = text.splitlines()
    assert lines[2] == "| none | 3 | 93.0 ± 3.0 | 99.0 ± 0.0 | 186 ± 6 | 23.2 ± 0.8 | 930 ± 30 | 1000 ± 0 |"
    assert "| upper | −2.0 (−4.5 to +0.5) | +0.0 (+0.0 to +0.0) | −4 (−9 to +1) |" in text
    assert "Pareto-optimal in mean top-1 against training time: upper, none." in lines
    assert lines[-1].startswith("Profile `default`: `vim_nano` on digits at 8 px. Measured on a CPU, 2 threads; torch")
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert widths == {9, 8}


def test_runs_of_two_machines_are_told_apart():
    frame = runs_frame({"none": [90.0, 96.0]})
    frame["device"] = ["a CPU", "another"]
    assert "a CPU; another, 2 threads" in summary.markdown(summary.summary(frame))
    assert "**Runs were measured on different machines" in summary.markdown(summary.summary(frame))


def test_the_papers_table_holds_its_three_tables():
    table = summary.paper_table()
    assert table["table"].value_counts().to_dict() == {1: 10, 2: 14, 3: 9}
    best = table[(table["table"] == 1) & (table["model"] == "vim_tiny")].set_index("strategy")
    assert best.loc["upper", "top1_percent"] == 70.5
    assert best.loc["none", "peak_memory_mib"] == 8302


def test_beside_the_paper_what_was_not_measured_here_is_empty():
    table = summary.beside_paper(summary.summary(runs_frame({"none": [90.0, 96.0], "upper": [89.0, 94.0]})))
    assert table.groupby(["model", "source"], sort=False).size().to_dict() == {
        **{(model, source): 5 for model in ("vim_tiny", "vim_small") for source in ("paper", "here")},
        ("vim_nano", "here"): 5,
    }
    theirs_here = table[(table["model"] != "vim_nano") & (table["source"] == "here")]
    assert theirs_here["top1_percent"].isna().all()
    assert (theirs_here["n"] == 0).all()
    ours = table[table["model"] == "vim_nano"].set_index("strategy")
    assert ours.loc["none", "top1_percent"] == 93.0
    assert math.isnan(ours.loc["lower", "top1_percent"])


def test_a_run_of_the_papers_profile_stands_beside_the_papers_model():
    frame = runs_frame({"none": [71.0, 72.0]}, profile="paper", model="vim_tiny", dataset="cifar100", img_size=224)
    table = summary.beside_paper(summary.summary(frame))
    assert set(table["model"]) == {"vim_tiny", "vim_small"}
    here = table[(table["source"] == "here") & table["top1_percent"].notna()]
    assert here[["model", "strategy", "n", "top1_percent"]].to_numpy().tolist() == [["vim_tiny", "none", 2, 71.5]]


def test_the_readme_gets_the_blocks_between_their_markers_and_nothing_else_changes(tmp_path):
    blocks = {"results": "a table\n", "beside": "another\n"}
    readme = tmp_path / "README.md"
    readme.write_text(
        "# a\n<!-- results:begin -->\nold\n<!-- results:end -->\nb <!-- beside:begin --><!-- beside:end -->c\n"
    )
    assert summary.update_readme(readme, blocks)
    text = readme.read_text()
    assert text == (
        "# a\n<!-- results:begin -->\n\na table\n\n<!-- results:end -->\n"
        "b <!-- beside:begin -->\n\nanother\n\n<!-- beside:end -->c\n"
    )
    assert not summary.update_readme(readme, blocks), "a second time changes nothing"
    assert summary.readme_text(text, blocks) == text


@pytest.mark.parametrize(
    "text", ["", "<!-- results:begin -->", "<!-- results:end --><!-- results:begin -->", "<!-- results:begin -->" * 2]
)
def test_a_readme_without_its_markers_is_refused(text):
    with pytest.raises(InputError, match=r"README\.md: needs one <!-- results:begin --> and"):
        summary.readme_text(text, {"results": ""})


def test_the_readme_gets_a_short_table_and_its_results_page_all_tables_that_there_are(tmp_path):
    frame = runs_frame({"none": [90.0, 96.0], "upper": [89.0, 94.0]})
    table = summary.write_summary(frame, tmp_path)
    short = {"results": summary.markdown_short(table)}
    assert summary.readme_blocks(tmp_path) == {
        "README.md": short,
        "docs/results.md": {"results": summary.markdown(table)},
    }
    other = summary.write_summary(runs_frame({"none": [50.0], "upper": [40.0]}), tmp_path / "photographs")
    blocks = summary.readme_blocks(tmp_path)
    assert blocks["README.md"] == short
    assert list(blocks["docs/results.md"]) == ["results", "photographs", "beside"]
    assert blocks["docs/results.md"]["photographs"] == summary.markdown(other)
    head = "| strategy | paper, vim_tiny | paper, vim_small | digits | photographs |"
    assert blocks["docs/results.md"]["beside"].startswith(head)


def test_the_short_table_gives_differences_and_costs_relative_to_none():
    table = summary.summary(runs_frame({"none": [90.0, 96.0], "upper": [45.0, 48.0]}))
    lines = summary.markdown_short(table).splitlines()
    assert lines[2] == "| none | 2 | 93.0 ± 4.2 |  | 1.00 | 1.00 |"
    # Differences -45 and -48: mean -46.5, half the interval 12.706 * 2.1213 / sqrt(2). Costs are multiples of accuracy.
    assert lines[3] == "| upper | 2 | 46.5 ± 2.1 | −46.5 (−65.6 to −27.4) | 0.50 | 0.50 |"
    with pytest.raises(InputError, match="summary: no runs of none among upper"):
        summary.markdown_short(table[table["strategy"] == "upper"])


def test_beside_the_paper_stand_differences_and_shares_not_numbers_of_other_machines():
    ours = summary.summary(runs_frame({"none": [90.0, 96.0], "upper": [45.0, 48.0]}))
    lines = summary.markdown_beside_paper({"here": ours}).splitlines()
    assert lines[0] == "| strategy | paper, vim_tiny | paper, vim_small | here |"
    assert lines[2] == "| none | 70.1 | 76.9 | 93.0 |"
    # 14,920 s of 16,382 s and 5,996 MiB of 8,302 MiB; ours are multiples of the accuracy, which is half.
    assert lines[6] == "| upper | +0.4, 0.91, 0.72 | −1.7, 0.81, 0.74 | −46.5, 0.50, 0.50 |"
    assert lines[4].endswith("|  |"), "a strategy that was not run has an empty cell"
    with pytest.raises(InputError, match="summary 'here': no runs of none"):
        summary.markdown_beside_paper({"here": ours[ours["strategy"] == "upper"]})


def test_cosine_similarity_of_a_case_worked_by_hand():
    tokens = np.array([[1.0, 0.0], [2.0, 2.0], [-3.0, 0.0], [0.0, 0.0]])
    half = math.sqrt(0.5)
    expected = [[1, half, -1, 0], [half, 1, -half, 0], [-1, -half, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(summary.cosine_similarity(tokens), expected, atol=1e-12)


def test_the_sweep_of_the_project_can_be_paired():
    assert summary.BASELINE in config.load_sweep().strategies

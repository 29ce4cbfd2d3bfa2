"""Runs become lines, and lines are read where the runs are not."""

import dataclasses

import pandas as pd
import pytest
from test_runs import make_run, spoil

from famba.analysis import records
from famba.config import SweepParams
from famba.errors import InputError
from famba.storage import runs

SWEEP = SweepParams(strategies=("upper", "none"), seeds=(0, 1))


def write_runs(folder, strategies=("none", "upper"), seeds=(0, 1), **changes):
    for strategy in strategies:
        for seed in seeds:
            runs.write(make_run(strategy, seed, **changes), folder / f"{strategy}-{seed}")
    return folder


def test_exactly_the_runs_of_the_sweep_are_loaded_in_the_fixed_order(tmp_path):
    write_runs(tmp_path, ("none", "upper", "all"), (0, 1, 2))
    frame = records.load_runs(SWEEP, tmp_path)
    assert list(zip(frame["strategy"], frame["seed"], strict=True)) == [
        *(("none", 0), ("none", 1), ("upper", 0), ("upper", 1))
    ]
    row = frame.iloc[0]
    assert (row["top1_percent"], row["peak_memory_mib"], row["model"]) == (95.0, 100.0, "vim_nano")
    assert row["correct"].count("1") == 19
    assert (row["tokens_removed"], row["tokens_left"], row["versions"]) == (4, 13, "torch 2.13.0")


def test_images_that_no_run_tested_are_left_out(tmp_path):
    for strategy in SWEEP.strategies:
        runs.write(make_run(strategy, seed=0, correct="--" + "1" * 19 + "0"), tmp_path / f"{strategy}-0")
        runs.write(make_run(strategy, seed=1, correct="-" * 4 + "0" + "1" * 19), tmp_path / f"{strategy}-1")
    frame = records.load_runs(SWEEP, tmp_path)
    assert frame["correct"].tolist() == ["1" * 19 + "0--", "--0" + "1" * 19] * 2


def test_a_missing_run_is_named(tmp_path):
    write_runs(tmp_path, seeds=(0,))
    with pytest.raises(InputError, match="none-1: no such run"):
        records.load_runs(SWEEP, tmp_path)


def changed(path, value):
    """The parameters of a run with one of them replaced, or removed."""
    return {"params": spoil(dict(make_run("upper").params), path, value)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 7}, "upper-1: holds the run upper-7"),
        (changed(("train", "lr"), 0.5), r"upper-1: train\.lr: 0\.5, but 0\.\d+ in none-0: not one experiment"),
        (changed(("train", "lr"), KeyError), r"upper-1: train\.lr: None, but 0\.\d+ in none-0"),
        (changed(("options", "order"), "append"), r"upper-1: options\.order: 'append', but 'scan' in none-0"),
        (changed(("fusion", "r"), 3), r"upper-1: fusion\.r: 3, but 8 in upper-0"),
        (
            {"profile": "paper", **changed(("profile",), "paper")},
            "upper-1: profile: 'paper', but 'smoke' in none-0: not one experiment",
        ),
    ],
)
def test_runs_of_two_experiments_are_refused(tmp_path, changes, said):
    write_runs(tmp_path)
    runs.write(make_run("upper", **{"seed": 1, **changes}), tmp_path / "upper-1")
    with pytest.raises(InputError, match=said):
        records.load_runs(SWEEP, tmp_path)


def test_history_has_a_row_per_epoch_and_empty_cells_without_ema(tmp_path):
    frame = records.load_history(SWEEP, write_runs(tmp_path))
    assert len(frame) == 2 * 2 * 2
    assert frame["train_loss"].to_list() == [2.0, 1.0] * 4
    assert frame["ema_val_loss"].isna().all()
    assert {str(kind) for kind in frame.dtypes.drop(["strategy", "seed", "epoch"])} == {"float64"}


def test_the_curves_are_the_history_of_all_runs_digit_for_digit(tmp_path):
    history = records.load_history(SWEEP, write_runs(tmp_path / "runs"))
    records.write(history[list(records.CURVES)], tmp_path / "results", "curves.csv")
    lines = (tmp_path / "results" / "curves.csv").read_text().splitlines()
    assert lines[0] == "strategy,seed,epoch,train_loss,val_loss,train_top1_percent,val_top1_percent"
    assert lines[1:3] == ["none,0,1,2.0,1.9,40.0,45.0", "none,0,2,1.0,0.95,80.0,90.0"]
    assert len(lines) == 1 + len(history)


def test_curves_of_runs_that_trained_nothing_are_a_table_without_rows(tmp_path):
    history = records.load_history(SWEEP, write_runs(tmp_path / "runs")).head(0)
    records.write(history[list(records.CURVES)], tmp_path, "curves.csv")
    assert (tmp_path / "curves.csv").read_text().splitlines() == [",".join(records.CURVES)]


def test_lines_say_what_the_runs_say_and_need_none_of_them(tmp_path):
    for strategy in SWEEP.strategies:
        runs.write(make_run(strategy, seed=0, correct="--" + "1" * 19 + "0"), tmp_path / f"{strategy}-0")
        runs.write(make_run(strategy, seed=1, correct="-" * 4 + "0" + "1" * 19), tmp_path / f"{strategy}-1")
    loaded = records.load_runs(SWEEP, tmp_path)
    lines = [records.line(name, runs.read(tmp_path / f"{name}-{seed}")) for seed in (1, 0) for name in SWEEP.strategies]
    records.write(pd.DataFrame(lines), tmp_path)
    pd.testing.assert_frame_equal(records.published(SWEEP, tmp_path), loaded)
    with pytest.raises(InputError, match=r"runs\.csv: 2 of 4 runs are missing, the first none-2"):
        records.published(SweepParams(strategies=("upper", "none"), seeds=(0, 2)), tmp_path)
    with pytest.raises(InputError, match=r"elsewhere/runs\.csv: cannot be read"):
        records.published(SWEEP, tmp_path / "elsewhere")


def test_a_line_leaves_out_images_that_are_never_tested_but_keeps_the_place_of_those_that_another_seed_tests():
    run, answers = make_run("none"), "--" + "1" * 19 + "0"
    for folds, expected in ((4, answers), (None, answers[2:])):
        params = spoil(dict(run.params), ("data", "folds"), folds)
        assert records.line("none", dataclasses.replace(run, correct=answers, params=params))["correct"] == expected

"""Runs become lines, and lines are read where the runs are not."""

import dataclasses

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


def gathered(folder):
    """The lines of the sweep's runs in a folder, by way of the file."""
    records.gather(SWEEP, folder, folder)
    return records.published(SWEEP, folder)


def test_exactly_the_runs_of_the_sweep_are_loaded_in_the_fixed_order(tmp_path):
    write_runs(tmp_path, ("none", "upper", "all"), (0, 1, 2))
    frame = gathered(tmp_path)
    assert (frame["strategy"].tolist(), frame["seed"].tolist()) == (["none"] * 2 + ["upper"] * 2, [0, 1, 0, 1])
    row = frame.iloc[0]
    assert (row["top1_percent"], row["peak_memory_mib"], row["model"]) == (95.0, 100.0, "vim_nano")
    assert row["correct"].count("1") == 19
    assert (row["tokens_removed"], row["tokens_left"], row["versions"]) == (4, 13, "torch 2.13.0")


def test_images_that_no_run_tested_are_left_out(tmp_path):
    for strategy in SWEEP.strategies:
        runs.write(make_run(strategy, seed=0, correct="--" + "1" * 19 + "0"), tmp_path / f"{strategy}-0")
        runs.write(make_run(strategy, seed=1, correct="-" * 4 + "0" + "1" * 19), tmp_path / f"{strategy}-1")
    frame = gathered(tmp_path)
    assert frame["correct"].tolist() == ["1" * 19 + "0--", "--0" + "1" * 19] * 2


def test_the_curves_are_the_history_of_all_runs_digit_for_digit(tmp_path):
    records.gather(SWEEP, write_runs(tmp_path / "runs"), tmp_path / "results")
    lines = (tmp_path / "results" / "curves.csv").read_text().splitlines()
    assert lines[0] == "strategy,seed,epoch,train_loss,val_loss,train_top1_percent,val_top1_percent"
    assert lines[1:3] == ["none,0,1,2.0,1.9,40.0,45.0", "none,0,2,1.0,0.95,80.0,90.0"]
    assert len(lines) == 1 + 2 * 2 * 2


def test_curves_of_runs_that_trained_nothing_are_a_table_without_rows(tmp_path):
    for strategy in SWEEP.strategies:
        params = spoil(dict(make_run(strategy).params), ("train", "epochs"), 0)
        write_runs(tmp_path / "runs", (strategy,), history=[], params=params)
    records.gather(SWEEP, tmp_path / "runs", tmp_path)
    assert (tmp_path / "curves.csv").read_text().splitlines() == [",".join(records.CURVES)]


def test_lines_serve_a_sweep_of_some_of_them_and_a_missing_one_is_named(tmp_path):
    records.gather(SWEEP, write_runs(tmp_path), tmp_path)
    some = SweepParams(strategies=("upper",), seeds=(1,))
    assert records.published(some, tmp_path)[["strategy", "seed"]].to_numpy().tolist() == [["upper", 1]]
    with pytest.raises(InputError, match=r"runs\.csv: 2 of 4 runs are missing, the first none-2"):
        records.published(SweepParams(strategies=("upper", "none"), seeds=(0, 2)), tmp_path)
    with pytest.raises(InputError, match=r"elsewhere/runs\.csv: cannot be read"):
        records.published(SWEEP, tmp_path / "elsewhere")


def test_a_line_leaves_out_images_that_are_never_tested_but_keeps_the_place_of_those_that_another_seed_tests():
    run, answers = make_run("none"), "--" + "1" * 19 + "0"
    for folds, expected in ((4, answers), (None, answers[2:])):
        params = spoil(dict(run.params), ("data", "folds"), folds)
        assert records.line("none", dataclasses.replace(run, correct=answers, params=params))["correct"] == expected

import pytest

from famba.bench import side_by_side


def test_two_scripts_are_timed_together_and_against_one_without_what_the_caller_has_set(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "nonsense")
    monkeypatch.setattr(
        side_by_side, "_SCRIPT", "import os; assert 'OMP_WAIT_POLICY' not in os.environ\n" + side_by_side._SCRIPT
    )
    (row,) = side_by_side.bench_side_by_side("vim_nano", batch=2, seconds=0.5, rounds=1)
    assert row["ratio"] == row["both_img_s"] / row["alone_img_s"] > 0


def test_a_script_that_fails_is_said():
    with pytest.raises(RuntimeError, match="ended before its first step"):
        side_by_side.bench_side_by_side("vim_nono", rounds=1)

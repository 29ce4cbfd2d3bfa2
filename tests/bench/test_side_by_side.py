import pytest

from famba.bench import side_by_side


def test_two_scripts_are_timed_together_and_against_one_without_what_the_caller_has_set(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "nonsense")
    script = "import os; assert not os.getenv('OMP_WAIT_POLICY'); print('ready', flush=True); input(); print({batch})"
    monkeypatch.setattr(side_by_side, "_SCRIPT", script)
    (row,) = side_by_side.bench_side_by_side(batch=3, rounds=1)
    assert row == {"alone_img_s": 3.0, "both_img_s": 6.0, "ratio": 2.0}


def test_a_script_trains_and_says_how_many_images_it_took_in_a_second(monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", str)
    exec(side_by_side._SCRIPT.format(model="vim_nano", batch=2, seconds=0.1), {})
    ready, images_per_s = capsys.readouterr().out.split()
    assert ready == "ready"
    assert float(images_per_s) > 0


def test_a_script_that_fails_is_said(monkeypatch):
    monkeypatch.setattr(side_by_side, "_SCRIPT", "exit()")
    with pytest.raises(RuntimeError, match="ended before its first step"):
        side_by_side.bench_side_by_side(rounds=1)

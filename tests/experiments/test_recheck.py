"""Changed training code is as good as the code before it only if runs say so."""

import dataclasses
import re
import shutil
import sys
from unittest.mock import Mock

import pytest
from checkout import ROOT
from refusals import refusal
from test_ablations import ASKED
from test_sweep import trained  # noqa: F401 (a fixture)

from famba import config
from famba.errors import TrainingError
from famba.experiments import ablations, launcher, recheck, sweep
from famba.storage import provenance

FOUR = dataclasses.replace(ASKED, profile="smoke")  # none, upper and upper_append, with the seeds 0 and 3


@pytest.fixture
def retrain(tmp_path, trained, monkeypatch):  # noqa: F811
    """Rechecks the recorded ablation `one`, whose runs were trained by earlier code; the runs trained for it."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.setattr(config, "root", lambda: tmp_path)
    monkeypatch.setattr(sweep, "measure_costs", lambda *_, **__: None)
    monkeypatch.setattr(sweep, "load_ablation", lambda name: FOUR)
    monkeypatch.setattr(launcher, "run", lambda task, items, *, jobs: [task(item) for item in items.values()])
    folder = tmp_path / "results" / "records" / "one"
    ablations.record(
        "one", dataclasses.replace(FOUR, profile=None), folder, profile="smoke", runs_dir=tmp_path / "runs"
    )
    sys.modules["famba.training.fit"].code = "later"
    monkeypatch.setattr(provenance, "of_module", {"famba.training.fit": "later"}.get)

    def make(*names):
        del trained[:]
        recheck.recheck(names or ["one"])
        return [strategy.removesuffix(", forgotten") for strategy, seed in trained if seed == 0]

    return make


def test_code_that_trains_the_same_runs_counts_as_the_code_before_it(tmp_path, retrain):
    assert provenance.of_training() == "later"
    assert retrain("one:none") == ["none"]
    assert provenance.of_training() == "code"
    assert provenance.same_runs() == {"code": "later", "same_as": "code", "runs": ["smoke none-0"]}
    file = tmp_path / "results" / "records" / "one" / "runs.csv"
    file.write_text(re.sub(r"\b([01-]+),raw", r"\1--,raw", file.read_text()))  # images that were not tested
    assert retrain() == ["none", "upper", "upper"], "however often it is asked"
    assert provenance.same_runs()["runs"] == ["smoke none-0", "smoke upper-0", "smoke upper_append-0"]
    provenance.of_module.__self__["famba.training.fit"] = "still later"
    assert provenance.of_training() == "still later"


def test_code_that_trains_another_run_does_not_even_if_it_did_before(retrain, monkeypatch):
    retrain("one:none")
    fit = sys.modules["famba.training.fit"].fit

    def other(p, *, seed):
        run = fit(p, seed=seed)
        run.metrics["loss"] += 1e-12 * (p.options.order == "append")
        return run

    monkeypatch.setattr(sys.modules["famba.training.fit"], "fit", other)
    with pytest.raises(TrainingError, match=r"^smoke upper_append-0: loss: [0-9.]+; recorded was [0-9.]+$"):
        retrain()
    assert provenance.of_training() == "later"


def test_code_that_is_edited_meanwhile_does_not(retrain, monkeypatch):
    monkeypatch.setattr(sys.modules["famba.training.fit"], "code", "edited")
    with pytest.raises(TrainingError, match=r"^smoke none-0: trained by .*-edited; the code was later when"):
        retrain()
    assert provenance.of_training() == "later"


def test_what_was_found_before_stays_known_where_nothing_else_was_found(retrain, monkeypatch):
    retrain("one:none")
    assert refusal(lambda: retrain("one:most")) == "one: 'most' is not one of none, upper, upper_append"
    assert provenance.of_training() == "code"
    monkeypatch.setattr(launcher, "run", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        retrain()
    assert provenance.of_training() == "code"


def test_runs_that_are_not_recorded_cannot_be_compared(tmp_path, retrain, monkeypatch):
    file = tmp_path / "results" / "records" / "one" / "runs.csv"
    file.write_text(re.sub("-code$", "-other", file.read_text(), count=1, flags=re.MULTILINE))
    assert refusal(retrain) == "one: recorded of different code, code and other; must be of one"
    monkeypatch.setattr(sweep, "load_ablation", lambda name: dataclasses.replace(FOUR, seeds=(5,)))
    assert refusal(retrain) == "one: none: not recorded with these parameters; make ablation NAME=one"
    monkeypatch.setattr(sweep, "load_ablation", lambda name: FOUR)
    file.unlink()
    assert refusal(retrain) == "one: none: not recorded with these parameters; make ablation NAME=one"

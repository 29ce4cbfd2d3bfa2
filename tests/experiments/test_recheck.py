"""Changed training code is as good as the code before it only if runs say so."""

import dataclasses
import json
import shutil
import sys

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
    monkeypatch.setattr(sweep, "ensure_costs", lambda *_, **__: None)
    monkeypatch.setattr(sweep, "load_ablation", lambda name: FOUR)
    monkeypatch.setattr(launcher, "run", lambda task, items, *, jobs: [task(item) for item in items.values()])
    folder = tmp_path / "results" / "records" / "one"
    ablations.record(
        "one", dataclasses.replace(FOUR, profile=None), folder, profile="smoke", runs_dir=tmp_path / "runs"
    )
    sys.modules["famba.training.fit"].code = "later"
    monkeypatch.setattr(provenance, "of_module", {"famba.training.fit": "later"}.get)

    def make(**given):
        del trained[:]
        recheck.recheck(["one"], **given)
        return [strategy.removesuffix(", forgotten") for strategy, seed in trained if seed == 0]

    return make


def test_code_that_trains_the_same_runs_counts_as_the_code_before_it(tmp_path, retrain):
    assert provenance.of_training() == "later"
    assert retrain(variants=["none"]) == ["none"]
    assert provenance.of_training() == "code"
    assert json.loads((tmp_path / provenance.SAME_RUNS).read_bytes())["runs"] == ["smoke none-0"]
    assert retrain() == ["none", "upper", "upper"], "however often it is asked"
    known = ["smoke none-0", "smoke upper-0", "smoke upper_append-0"]
    assert provenance.same_runs() == {"code": "later", "same_as": "code", "runs": known}
    assert retrain(variants=["none"]) == ["none"]
    assert provenance.same_runs()["runs"] == known
    provenance.of_module.__self__["famba.training.fit"] = "still later"
    assert provenance.of_training() == "still later"


def test_code_that_trains_another_run_does_not(tmp_path, retrain, trained, monkeypatch):  # noqa: F811
    fit = sys.modules["famba.training.fit"].fit

    def other(p, *, seed):
        run = fit(p, seed=seed)
        run.metrics["loss"] += 1e-12 * (p.options.order == "append")
        return run

    monkeypatch.setattr(sys.modules["famba.training.fit"], "fit", other)
    with pytest.raises(TrainingError, match=r"^smoke upper_append-0: loss: [0-9.]+; recorded was [0-9.]+$"):
        retrain()
    assert provenance.of_training() == "later"


def test_runs_that_are_not_recorded_cannot_be_compared(tmp_path, retrain, monkeypatch):
    monkeypatch.setattr(sweep, "load_ablation", lambda name: dataclasses.replace(FOUR, seeds=(5,)))
    assert refusal(retrain) == "one: none-5: not recorded with these parameters; make ablation NAME=one"
    monkeypatch.setattr(sweep, "load_ablation", lambda name: FOUR)
    assert refusal(lambda: retrain(variants=["most"])).startswith("recheck: one: 0 runs recorded of 0 codes;")
    shutil.rmtree(tmp_path / "results")
    assert refusal(retrain).endswith("runs.csv: missing, so nothing is recorded")

"""Runs that are there are taken; runs that are not are trained only where that is allowed."""

import dataclasses
import json
import logging
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
from processes import PATIENCE_S
from refusals import refusal, refused
from test_runs import make_run

from famba import config, training
from famba.analysis import records
from famba.config import SweepParams
from famba.errors import InputError
from famba.experiments import sweep
from famba.storage import runs


@pytest.fixture
def trained(monkeypatch) -> list[tuple[str, int]]:
    """Training that takes no time; what was trained, and forgotten afterwards."""
    made: list[tuple[str, int]] = []

    def fit(p, *, seed):
        made.append((p.strategy, seed))
        run = make_run(p.strategy, seed, profile=p.profile, params=p.as_dict())
        run.cost.update(command="none", made_of=made_of(p, seed=seed))
        if (start := config.init_sha256(p, seed)) is not None:
            run.metrics["init_sha256"] = start
        return run

    def forget(p, *, seed):
        assert made[-1] == (p.strategy, seed)
        made[-1] = (f"{p.strategy}, forgotten", seed)

    def made_of(p, *, seed):
        return f"{p.digest(seed)}-{fake.code}"

    fake = SimpleNamespace(fit=fit, forget=forget, made_of=made_of, code="code")
    monkeypatch.setitem(sys.modules, "famba.training.fit", fake)
    monkeypatch.setattr(training, "fit", fake, raising=False)
    return made


SWEEP = SweepParams(strategies=("none", "upper"), seeds=(0, 3))
RUN = {"strategy": "none", "seed": 0, "profile": "smoke"}


def test_runs_that_are_missing_are_trained_once_and_their_checkpoints_forgotten(tmp_path, trained):
    folders = sweep.ensure_runs(SWEEP, profile="smoke", runs_dir=tmp_path, train_missing=True)
    assert folders == [tmp_path / name for name in ("none-0", "none-3", "upper-0", "upper-3")]
    names = [f"{name}, forgotten" for name in ("none", "none", "upper", "upper")]
    assert trained == list(zip(names, [0, 3, 0, 3], strict=True))
    assert sweep.ensure_runs(SWEEP, profile="smoke", runs_dir=tmp_path, train_missing=True) == folders
    assert len(trained) == 4


def test_the_runs_of_variants_lie_apart_and_are_loaded_under_their_names(tmp_path, trained):
    changes = {"append": {"options.order": "append"}, "smaller": {"model.d_model": 8}}
    asked = dataclasses.replace(SWEEP, varied=("upper",), changes=changes, seeds=(3,))
    folders = sweep.ensure_runs(asked, profile="smoke", runs_dir=tmp_path, train_missing=True)
    names = ["none", "upper", "upper_append", "upper_smaller"]
    assert folders == [tmp_path / f"{name}-3" for name in names]
    sweep.ensure_runs(asked, profile="smoke", runs_dir=tmp_path, train_missing=True)
    assert len(trained) == 4, "each once"
    assert runs.read(folders[2]).params == asked.params("smoke")["upper_append"].as_dict()
    records.gather(asked, tmp_path, tmp_path)
    table = records.published(asked, tmp_path)
    assert table["strategy"].to_list() == names


def test_a_schedule_that_does_not_fit_is_refused_before_anything_is_trained(tmp_path, trained):
    asked = dataclasses.replace(SWEEP, varied=("upper",), changes={"more": {"fusion.upper.r": 17}})
    with pytest.raises(InputError, match=r"fusion\.upper, upper_more under profile smoke: layer 3: r = 17"):
        sweep.ensure_runs(asked, profile="smoke", runs_dir=tmp_path, train_missing=True)
    assert not trained


def test_a_rule_that_asks_a_layer_for_too_much_is_named_by_resolve_before_anything_is_written(
    tmp_path, monkeypatch, capsys
):
    text = re.sub(r"(?<=\nsweep:\n  strategies: )\[.*\]", "[none, last]", (config.root() / "params.yaml").read_text())
    (tmp_path / "params.yaml").write_text(text.replace("fusion:  ", "fusion:\n  last: {r: 30, first_layer: 5}\n  #", 1))
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, "resolve", "--out", "resolved")
    assert "fusion.last" in said
    assert said.endswith("layer 5: r = 30 of t = 37 tokens; allowed: 0..18\n")
    assert not (tmp_path / "resolved").exists()
    text = text.replace("fusion:  ", "fusion:\n  last: {schedule: [0, 3]}\n  #", 1)
    (tmp_path / "params.yaml").write_text(text)
    said = refused(capsys, "resolve", "--out", "resolved")
    assert said == "famba: fusion.last under profile default: schedule: [0, 3] has 2 layers; the model has 10\n"


def test_a_run_that_started_from_other_weights_is_refused_or_trained_again(tmp_path, trained, monkeypatch):
    load, weights = config.load, tmp_path / "weights.safetensors"
    weights.write_bytes(b"some")

    def started(profile=None, **asked):
        p = load(profile, **asked)
        return dataclasses.replace(p, train=dataclasses.replace(p.train, init_from=str(weights)))

    monkeypatch.setattr(config, "load", started)
    for content in (b"some", b"other"):
        weights.write_bytes(content)
        sweep.ensure_run(tmp_path / "run", **RUN, train_missing=True)
        sweep.ensure_run(tmp_path / "run", **RUN, train_missing=False)
    assert len(trained) == 2
    weights.write_bytes(b"yet others")
    with pytest.raises(InputError, match=r"init_sha256: started from other weights than .*weights\.safetensors holds"):
        sweep.ensure_run(tmp_path / "run", **RUN, train_missing=False)


def test_a_run_of_other_or_unknown_code_is_trained_again_where_that_is_allowed(tmp_path, trained, monkeypatch):
    sweep.ensure_run(tmp_path, **RUN, train_missing=True)
    monkeypatch.setattr(sys.modules["famba.training.fit"], "code", "changed")
    sweep.ensure_run(tmp_path, **RUN, train_missing=False)
    assert len(trained) == 1
    sweep.ensure_run(tmp_path, **RUN, train_missing=True)
    assert len(trained) == 2
    cost = json.loads((tmp_path / "cost.json").read_text())
    assert cost.pop("made_of").endswith("-changed")
    (tmp_path / "cost.json").write_text(json.dumps(cost))
    sweep.ensure_run(tmp_path, **RUN, train_missing=True)
    assert len(trained) == 3


def test_a_run_that_another_process_is_making_is_waited_for_and_taken(tmp_path, trained, monkeypatch):
    fake, said = sys.modules["famba.training.fit"], SimpleQueue()
    fit = fake.fit
    monkeypatch.setattr(
        logging.getLogger("famba.storage.files"), "warning", lambda text, *words: said.put(text % words)
    )
    waiting = f"{tmp_path}: another process is making a run there; waiting for it"

    def fit_when_waited_for(p, *, seed):
        assert said.get(timeout=PATIENCE_S) == waiting
        return fit(p, seed=seed)

    monkeypatch.setattr(fake, "fit", fit_when_waited_for)
    with ThreadPoolExecutor(2) as both:
        ensured = [both.submit(sweep.ensure_run, tmp_path, **RUN, train_missing=True) for _ in range(2)]
        assert [done.result() for done in ensured] == [tmp_path, tmp_path]
    assert trained == [("none, forgotten", 0)]


def test_where_training_is_not_allowed_another_run_is_an_error(tmp_path, trained):
    sweep.ensure_run(tmp_path, **RUN, train_missing=True)
    assert sweep.ensure_run(tmp_path, **RUN, train_missing=False) == tmp_path
    for asked, said in (({"seed": 1}, "seed: 0; asked for 1"), ({"strategy": "all"}, "other parameters")):
        assert said in refusal(lambda asked=asked: sweep.ensure_run(tmp_path, **RUN | asked, train_missing=False))

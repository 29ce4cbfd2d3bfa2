"""What runs found stays known without them."""

import dataclasses
import json
import shutil
import sys

import pandas as pd
import pytest
from refusals import refusal, refused
from test_sweep import trained  # noqa: F401 (a fixture)

from famba import config
from famba.analysis import records
from famba.analysis import trained as models
from famba.config import AblationParams, SweepParams
from famba.experiments import ablations, launcher, sweep
from famba.storage import provenance

ASKED = AblationParams(
    strategies=("none", "upper"), varied=("upper",), changes={"append": {"options.order": "append"}}, seeds=(0, 3)
)


@pytest.fixture
def record(tmp_path, trained, monkeypatch):  # noqa: F811
    """Records an ablation of the smoke profile without measuring costs; the strategies and seeds trained for it."""
    monkeypatch.setattr(sweep, "measure_costs", lambda *_, **__: None)

    def publish(run_dir, folder, *, made_of):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"made_of": made_of}))

    monkeypatch.setattr(models, "publish", publish)

    def make(name="one", asked=ASKED, **given):
        before = len(trained)
        folder = tmp_path / "records" / name
        ablations.record(name, asked, folder, profile="smoke", runs_dir=tmp_path / "runs", **given)
        return [(strategy.removesuffix(", forgotten"), seed) for strategy, seed in trained[before:]]

    return make


def lines(folder):
    table = records.read(folder)
    return list(zip(table["strategy"], table["seed"], strict=True))


ALL = [(name, seed) for name in ("none", "upper", "upper_append") for seed in (0, 3)]


def test_runs_are_trained_once_and_stay_known_without_their_folders_whatever_other_records_hold(tmp_path, record):
    assert len(record()) == 6
    file = tmp_path / "records" / "one" / "runs.csv"
    assert lines(file.parent) == ALL
    assert set(records.published(ASKED, file.parent)["command"]) == {"make ablation NAME=one"}
    made = file.read_bytes()
    shutil.rmtree(tmp_path / "runs")
    for other in (tmp_path, tmp_path / "records" / "earlier", tmp_path / "records" / "later"):
        other.mkdir(exist_ok=True)
        (other / "runs.csv").write_bytes(made.replace(b"NAME=one", b"NAME=other"))
    assert record() == []
    assert file.read_bytes() == made


def test_a_line_is_written_as_soon_as_its_run_is_finished(tmp_path, record, trained, monkeypatch):  # noqa: F811
    module, begun = sys.modules["famba.training.fit"], []

    def interrupted(p, *, seed, fit=module.fit):
        begun.append(p.strategy)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return fit(p, seed=seed)

    with monkeypatch.context() as patch:
        patch.setattr(module, "fit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            record()
    assert lines(tmp_path / "records" / "one") == ALL[:2]
    shutil.rmtree(tmp_path / "runs")
    assert record() == [("upper", 0), ("upper", 3)] * 2


def test_lines_of_other_ablations_serve_and_those_of_other_code_or_that_are_not_asked_for_do_not(tmp_path, record):
    asked = SweepParams(strategies=("none",), seeds=(0,))
    sweep.ensure_runs(asked, profile="smoke", runs_dir=tmp_path / "sweep", train_missing=True)
    records.gather(asked, tmp_path / "sweep", tmp_path)
    assert record().count(("none", 0)) == 0, "which is the sweep's"
    assert lines(tmp_path / "records" / "one") == ALL
    other = dataclasses.replace(ASKED, changes={"scrambled": {"options.order": "append"}}, seeds=(3, 5))
    assert record("other", other) == [("none", 5), ("upper", 5), ("upper", 5)]
    assert lines(tmp_path / "records" / "other") == [
        (name, seed) for name in ("none", "upper", "upper_scrambled") for seed in (3, 5)
    ]
    sys.modules["famba.training.fit"].code = "other"
    assert len(record("other", other)) == 6
    assert len(record("other", dataclasses.replace(other, seeds=(3,)))) == 0
    assert len(lines(tmp_path / "records" / "other")) == 3


def test_a_record_that_is_no_table_is_named(tmp_path, record):
    file = tmp_path / "records" / "one" / "runs.csv"
    file.parent.mkdir(parents=True)
    file.write_text('strategy,seed\n"none,0\n')
    assert refusal(record).startswith(f"{file}: not readable as CSV: ")


def test_worker_processes_are_asked_for_runs_that_are_not_known_and_not_on_disk(tmp_path, record, monkeypatch):
    asked = []

    def run(one, cells, *, jobs, done):
        asked.append((list(cells), jobs))
        for name, cell in cells.items():
            one(cell)
            done(name)

    monkeypatch.setattr(launcher, "run", run)
    sweep.ensure_run(tmp_path / "runs" / "none-3", strategy="none", seed=3, profile="smoke", train_missing=True)
    for _ in range(2):
        record(jobs=2)
    assert asked == [(["none-0", "upper-0", "upper-3", "upper_append-0", "upper_append-3"], 2)]
    assert lines(tmp_path / "records" / "one") == ALL


def test_strategies_of_another_profile_have_curves_and_models_all_of_none_and_one_of_each_other(tmp_path, record):
    asked = AblationParams(profile="smoke", strategies=("none", "upper"), seeds=(0, 3))
    assert len(record("photographs", asked)) == 4
    folder = tmp_path / "records" / "photographs"
    curves = pd.read_csv(folder / "curves.csv")
    assert curves[["strategy", "seed"]].drop_duplicates().to_records(index=False).tolist() == ALL[:4]
    assert curves["train_loss"].tolist() == [2.0, 1.0] * 4
    assert {path.name for path in (folder / "models").iterdir()} == {"none-0", "none-3", "upper-0"}
    made = (folder / "curves.csv").read_bytes()
    shutil.rmtree(tmp_path / "runs")
    shutil.rmtree(folder / "models" / "none-3")
    assert record("photographs", asked) == [("none", 3)], "which is looked into"
    assert (folder / "curves.csv").read_bytes() == made
    record("photographs", dataclasses.replace(asked, strategies=("none",), seeds=(3,)))
    assert {path.name for path in (folder / "models").iterdir()} == {"none-3"}


@pytest.mark.parametrize("arguments", [["ablation", "most"], ["resolve", "--ablation", "most", "--out", "most.json"]])
def test_an_unknown_ablation_is_an_error_of_one_line(arguments, capsys):
    assert "params.yaml: ablation: 'most' is not one of photographs, " in refused(capsys, *arguments)


def test_every_committed_line_names_an_ablation_that_makes_its_run():
    known = {ablations.command(name) for name in config.load_ablations()}
    found = [records.read(file.parent)["command"] for file in config.root().glob("results/records/*/runs.csv")]
    assert len(found) >= len(known)
    assert set(pd.concat(found)) <= known


def test_every_committed_line_was_trained_by_this_code():
    files = list(config.root().glob("results/records/*/runs.csv"))
    assert len(files) > 5
    for file in files:
        codes = records.read(file.parent)["made_of"].str.split("-").str[1]
        assert set(codes) == {provenance.of_training()}, f"{file}: python -m famba recheck"

"""What a notebook shows in a checkout with finished runs, in a fresh clone, and where there is neither."""

import json
import shutil
from unittest.mock import Mock, call

import pytest
from test_runs import make_run
from test_summary import costs_frame, runs_frame

from famba import config, plots, reports
from famba.analysis import cost, records, summary
from famba.analysis.tokens import Traced
from famba.config import AblationParams
from famba.errors import InputError
from famba.reports import ablation, compare, models
from famba.storage import runs

PROFILE = {"profile": "default", "pipeline": False}


@pytest.fixture
def checkout(repository, monkeypatch):
    """A fresh clone whose committed results are two runs."""
    monkeypatch.delenv("FAMBA_PROFILE", raising=False)
    frame = runs_frame({"none": [95.0], "upper": [94.0]})
    records.write(frame, repository / "results")
    summary.write_summary(frame, costs_frame(), repository / "results")
    return repository


def opened(made, file="summary.md", **changes):
    return reports.opened(made.append, file, **PROFILE | changes)


def test_a_fresh_clone_shows_the_committed_results_and_writes_nothing(checkout):
    made = []
    report = opened(made)
    assert made == []
    assert not report.smoke
    assert "behind them: <code>make repro</code> makes them again." in report._repr_html_()
    assert "smoke" not in report._repr_html_().lower()
    assert report.table("runs.csv")["top1_percent"].tolist() == [95.0, 94.0]
    assert "busy" not in cost.caption(report.table("summary.csv"))  # an empty field of a csv file is read as NaN
    assert "| none" in report.text("summary.md").data
    report.save(drawn=plots.paired_accuracy(report.table("runs.csv")))
    assert not (checkout / "figures").exists()


def test_runs_are_finished_only_if_all_of_them_have_the_accuracy_of_the_table(checkout):
    for name, score in (("none", 95.0), ("upper", 93.0), ("upper", 94.0)):
        assert "Committed" in opened([]).shown
        (checkout / f"results/runs/{name}-0").mkdir(parents=True, exist_ok=True)
        (checkout / f"results/runs/{name}-0/metrics.json").write_text(json.dumps({"top1_percent": score}))
    assert opened([]).shown == "Finished runs of the profile `default`: results/runs."


def test_what_is_measured_apart_is_not_called_runs(checkout):
    costs_frame().to_csv(checkout / "results" / "cost.csv")
    shown = opened([], file="cost.csv", of="cost.csv").shown
    assert shown == "Measurements of the profile `default`, made apart from its runs: `make repro` makes them again."


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"file": "ablation.md"}, "ablation.md: missing"),
        ({"profile": "cifar10"}, "of the profile 'default'; 'cifar10' is asked for"),
        ({"profile": "smoke"}, "asks for it"),
    ],
)
def test_without_results_of_the_profile_smoke_runs_are_made_under_a_warning(checkout, changes, why):
    made = []
    report = opened(made, **changes)
    assert made == [report]
    assert (report.profile, report.folder) == ("smoke", checkout / "build" / "smoke")
    assert "these numbers mean nothing" in report._repr_html_()
    assert why in report.shown
    assert len(report.sweep().seeds) == 2


def test_the_environment_asks_for_smoke_but_not_in_the_pipeline(checkout, monkeypatch):
    monkeypatch.setenv("FAMBA_PROFILE", "smoke")
    assert opened([]).smoke
    made = []
    report = opened(made, pipeline=True)
    assert made == [report]
    assert (report.profile, report.folder, report.made) == ("default", checkout, True)
    report.save(drawn=plots.paired_accuracy(report.table("runs.csv")))
    assert (checkout / "figures" / "drawn.png").is_file()


def test_the_pipeline_takes_finished_runs_only(checkout):
    with pytest.raises(InputError, match="results/runs/none-0: no such run"):
        reports.opened(compare.make, "summary.md", profile="default", pipeline=True)
    with pytest.raises(InputError, match="results/runs/upper-0: no such run"):
        models.opened("default", strategy="upper", seed=0, pipeline=True)


def test_a_model_is_the_finished_run_else_the_published_one(checkout):
    (checkout / models.MODELS / "upper-0").mkdir(parents=True)
    report, folder = models.opened("default", strategy="upper", seed=0, pipeline=False)
    assert folder == checkout / models.MODELS / "upper-0"
    assert report.shown.startswith(f"The trained model {models.MODELS}/upper-0.")
    params = config.load("default", strategy="upper").as_dict()
    runs.write(make_run("upper", profile="default", params=params), checkout / "results" / "runs" / "upper-0")
    report, folder = models.opened("default", strategy="upper", seed=0, pipeline=False)
    assert folder == checkout / "results" / "runs" / "upper-0"
    assert report.shown == "The finished run results/runs/upper-0 of the profile `default`."


def test_the_finished_runs_of_a_seed_can_be_played_with_and_the_published_models(checkout, monkeypatch):
    traced = Mock(return_value=Mock(spec=Traced))
    monkeypatch.setattr(models, "traced", traced)
    smoke = {"profile": "smoke", "params": config.load("smoke", strategy="all").as_dict()}
    for name, seed in (("upper", 0), ("none", 0), ("none", 10), ("lower", 0), ("all", 0)):
        made = {"profile": "default", "params": config.load("default", strategy=name).as_dict()}
        run = make_run(name, seed=seed, **(smoke if name == "all" else made))
        runs.write(run, checkout / "results" / "runs" / f"{name}-{seed}")
    (checkout / "results" / "runs" / "lower-0" / runs.MODEL_FILE).unlink()  # `all` is of another profile
    for name in ("upper-0", "none-1"):
        (checkout / models.MODELS / name).mkdir(parents=True)
        (checkout / models.MODELS / name / "config.json").touch()
    found = models.all_traced(checkout / "results" / "runs" / "upper-0")
    assert list(found) == ["upper-0", "none-0", "photographs, upper-0"]
    runs_dir, published = checkout / "results" / "runs", checkout / models.MODELS
    assert traced.mock_calls == [
        call(folder, count=10) for folder in (runs_dir / "upper-0", runs_dir / "none-0", published / "upper-0")
    ]
    assert list(models.all_traced(checkout / models.MODELS / "upper-0")) == ["upper-0"]


def test_an_ablation_of_a_fresh_clone_is_drawn_again_of_its_record(checkout):
    for table, folder in (("runs.csv", "records"), ("summary.md", "ablation")):
        (checkout / "results" / folder / "options").mkdir(parents=True)
        shutil.copy(checkout / "results" / table, checkout / "results" / folder / "options")
    report = ablation.open_report("options", **PROFILE)
    assert ablation.changes(report, "calibration").data == "No change: other schedules."
    shown = report.shown
    assert shown.startswith("Committed results of the profile `default`")
    assert shown.endswith("`make ablation NAME=options` draws them again, and trains only runs that are not recorded.")


def test_the_pipeline_draws_accuracy_costs_the_paper_and_effects_of_an_ablation(checkout, monkeypatch):
    asked = AblationParams(strategies=("none", "upper"), varied=("upper",), changes={"r2": {}}, seeds=(0,))
    monkeypatch.setattr(ablation.sweep, "load_ablation", lambda _: asked)
    record = checkout / "results" / "records" / "options"
    top1 = {"none": [95.0], "upper": [94.0], "upper_r2": [94.0]}
    records.write(runs_frame(top1), record)
    costs = costs_frame(dict.fromkeys(top1, 1.0))
    costs.assign(first_layer=3, r=[0, 3, 2]).to_csv(record / "cost.csv", index=False)
    ablation.open_report("options", profile="default", pipeline=True)
    drawn = {path.stem for path in (checkout / "figures" / "ablation" / "options").iterdir()}
    assert drawn == {"effects", "time_ratio", "peak_memory_mib", "paper"}


def test_words_under_a_figure_are_those_of_its_numbers():
    frame = runs_frame({"none": [90.0, 96.0], "upper": [89.0, 97.0]})
    assert compare.pairs_in_words(frame).data.startswith("Of 2 seeds, accuracy falls by fusing with upper in 1.")
    one = runs_frame({"none": [90.0], "upper": [89.0], "all": [91.0]})
    assert compare.pairs_in_words(one).data == "With the one seed, accuracy falls by fusing with `upper`."
    costs = compare.costs_in_words(costs_frame().query("strategy in ('none', 'lower')")).data
    assert costs.startswith("In units of no fusion: lower 0.60 of the time with 0.60 of the FLOPs.")
    assert "none 37.0, all 20.5" in compare.schedules_in_words(compare.schedules("default")).data

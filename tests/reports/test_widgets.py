"""The widgets as objects: no browser, no kernel."""

import dataclasses
import io
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_runs import make_run
from test_summary import costs_frame, runs_frame
from test_tokens import run  # noqa: F401 (a fixture)

from famba import create_model, plots
from famba.analysis import cost, records, summary, tokens, trained
from famba.fusion import strategies
from famba.fusion.strategies import STRATEGIES
from famba.models import saved
from famba.reports import Report, widgets
from famba.reports.models import PHOTOGRAPHS
from famba.reports.widgets import TokenExplorer
from famba.storage import runs


@pytest.fixture(scope="module")
def traced(run, tmp_path_factory):  # noqa: F811
    """A run and a model as it is published, in half precision."""
    tmp_path = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "stride": 8, "depth": 3, "d_model": 16, "d_state": 4}
    model = create_model("vim_micro", **sizes, num_classes=10, schedule=[0, 2, 5])
    described = {"strategy": "lower", "classes": list("abcdefghij"), "mean": [0.5] * 3, "std": [0.25] * 3}
    content = saved.model_bytes(model, model.state_dict(), described)
    runs.write(dataclasses.replace(make_run("lower"), model_bytes=content), tmp_path / "run")
    trained.publish(tmp_path / "run", tmp_path / "lower", made_of="")
    photos = tokens.trace(*trained.load(tmp_path / "lower"), PHOTOGRAPHS)
    return {"upper-0": tokens.trace_run(run, count=3), "photos": photos}


@pytest.fixture
def explorer(traced):
    return TokenExplorer(traced)


def no_picture(*_, **__):
    return SimpleNamespace(_repr_png_=lambda: b"")


def test_it_starts_as_trained_every_control_redraws_and_going_back_shows_the_same_again(explorer):
    assert [control.value for control in explorer._controls] == ["upper-0", "as trained", 0, 4, 0]
    assert explorer.r.disabled
    first = bytes(explorer.picture.value)
    assert Image.open(io.BytesIO(first)).size == (960, 270)
    shown = {first}
    for control, value in ((explorer.image, 2), (explorer.layer, 3), (explorer.strategy, "lower"), (explorer.r, 3)):
        control.value = value
        assert bytes(explorer.picture.value) not in shown, control.description
        shown.add(bytes(explorer.picture.value))
    for control, value in ((explorer.strategy, "as trained"), (explorer.layer, 4), (explorer.image, 0)):
        control.value = value
    assert bytes(explorer.picture.value) == first


def test_what_is_shown_is_the_model_under_the_chosen_schedule(explorer, run, monkeypatch):  # noqa: F811
    asked = []
    monkeypatch.setattr(plots, "fusion_at_layer", lambda *a, **k: asked.append((a, k)) or no_picture())
    explorer.strategy.value, explorer.r.value, explorer.image.value = "lower", 5, 1
    (_, groups, _), named = asked[-1]
    expected = tokens.with_schedule(tokens.trace_run(run, count=3), strategies.schedule("lower", depth=4, r=5))
    np.testing.assert_array_equal(groups, [of_layer[1] for of_layer in tokens.groups(expected.trace)])
    assert named == {"label": f"1, predicted {expected.predicted[1]}", "layer": 4}


def test_r_cannot_leave_what_a_strategy_can_fuse(explorer, monkeypatch):
    monkeypatch.setattr(plots, "fusion_at_layer", no_picture)
    for strategy in STRATEGIES:
        explorer.strategy.value = strategy
        assert explorer.r.disabled == (strategy == "none")
        explorer.r.value = explorer.r.max
        assert explorer.r.value == tokens.largest_r(explorer._models["upper-0"].model, strategy)


def test_an_update_is_one_picture_and_the_model_runs_only_for_another_schedule(explorer, monkeypatch):
    done = []
    with_schedule = tokens.with_schedule
    monkeypatch.setattr(tokens, "with_schedule", lambda *given: done.append("model") or with_schedule(*given))
    monkeypatch.setattr(plots, "fusion_at_layer", lambda *_, **__: done.append("picture") or no_picture())
    for control, value, expected in (
        (explorer.layer, 1, ["picture"]),
        (explorer.image, 1, ["picture"]),
        (explorer.strategy, "all", ["model", "picture"]),
        (explorer.r, 2, ["model", "picture"]),
        (explorer.strategy, "as trained", []),
    ):
        done.clear()
        control.value = value
        assert done == expected, (control.description, value)


def test_another_model_begins_with_its_own_schedule_and_images(explorer):
    explorer.model.value = "photos"
    assert (explorer.strategy.value, explorer.layer.value, explorer.layer.max) == ("as trained", 3, 3)
    explorer.strategy.value = "all"
    assert explorer.r.value == 2, "as 0 + 2 + 5 tokens in three layers"
    assert [label for label, _ in explorer.image.options] == ["1: china.jpg", "2: flower.jpg"]


def test_uploaded_images_replace_those_of_every_model_and_what_is_none_is_refused(explorer):
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(content, "PNG")
    before = bytes(explorer.picture.value)
    file = {"name": "mine.png", "type": "image/png", "size": 1, "last_modified": pd.Timestamp(0, tz="UTC")}
    explorer.upload.value = ({**file, "content": memoryview(content.getvalue())},)
    assert bytes(explorer.picture.value) != before
    explorer.model.value = "photos"
    explorer.upload.value = ({**file, "name": "<b>.png", "content": memoryview(b"no image")},)
    assert "&lt;b&gt;.png: not an image, or a damaged one<" in explorer.message.value
    assert [label for label, _ in explorer.image.options] == ["1: mine.png"]


def test_the_sliders_over_vim_tiny_say_what_a_schedule_costs_or_why_it_cannot_be():
    explorer = widgets.ScheduleExplorer()
    numbers = np.reshape(re.findall(r">([\d.]+)</td>", explorer.table.value), (4, 3)).astype(float)
    assert numbers[0].tolist() == [197, 26, 0.13], "tokens after the last layer"
    assert (numbers[:, 2] < 1).all()
    first = bytes(explorer.picture.value)
    explorer.strategy.value = "all"
    assert (explorer.r.value, explorer.first_layer.value) == (7, 1)
    assert bytes(explorer.picture.value) != first
    explorer.r.value = 60
    assert "layer 3: r = 60 of t = 77 tokens" in explorer.table.value
    explorer.strategy.value = "none"
    assert "layer 3" not in explorer.table.value


def test_a_matching_is_drawn_anew_for_another_r_and_image():
    explorer = widgets.MatchingExplorer({path.stem: path for path in PHOTOGRAPHS}, patch_size=32, img_size=128)
    shown = [explorer.picture.value]
    for control, value in ((explorer.r, 3), (explorer.image, "flower")):
        control.value = value
        shown.append(explorer.picture.value)
    assert len(set(map(bytes, shown))) == 3


def test_the_matching_that_is_drawn_is_the_models_own():
    pixels = torch.zeros(3, 4, 4, dtype=torch.uint8)
    pixels[:, :, :2], pixels[:, :, 2:] = 100, torch.tensor([200, 100, 0], dtype=torch.uint8)[:, None, None]
    figure = widgets.matching_steps(pixels, plots.Patches(2, 2), 1)
    (best,), (taken,) = ([len(x.get_segments()) for x in axes.collections] for axes in figure.axes[1:3])
    assert (best, taken) == (2, 1)
    assert figure.axes[3].get_title() == "3 tokens, each a mean"


def test_a_schedule_of_ones_own_is_trained_and_drawn_beside_the_named_ones(tmp_path, monkeypatch):
    frame = runs_frame({"none": [30.0, 40.0], "upper": [20.0, 30.0]}, profile="smoke")
    records.write(frame, tmp_path / "results")
    summary.write_summary(frame, costs_frame(profile="smoke"), tmp_path / "results")
    trainer = widgets.ScheduleTrainer(Report("smoke", "", tmp_path, tmp_path, made=False))
    assert trainer.schedule == [0, 8, 8, 8]
    trainer.removed[0].value = 18
    assert "layer 3" in trainer.message.value
    assert trainer.train.disabled
    for slider, r in zip(trainer.removed, (6, 0, 0, 6), strict=True):
        slider.value = r
    assert trainer.message.value == "37 tokens, 25 left"
    before = bytes(trainer.picture.value)
    trainer.train.click()
    assert re.match(r"own_1: [\d.]+ % with seed 0 \(none: 30.0 %\); about ", trainer.message.value)
    assert "60 training steps of 32 images" in cost.caption(trainer._table)
    assert not trainer.train.disabled
    assert trainer.progress.value == trainer.progress.max == 2
    assert bytes(trainer.picture.value) != before
    *_, own = trainer._table.to_dict("records")
    assert own["strategy"] == "own_1"
    assert own["time_ratio"] == pytest.approx(own["flops_per_image"] / 10_000_000), "on the line of the named ones"

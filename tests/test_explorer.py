"""The sliders as objects: no browser, no kernel."""

import io

import numpy as np
import pytest
from famba.plots.explorer import Explorer
from PIL import Image
from test_tokens import run  # noqa: F401 (a fixture)

from famba import plots
from famba.analysis import tokens
from famba.fusion import strategies
from famba.fusion.strategies import STRATEGIES


@pytest.fixture
def explorer(run):  # noqa: F811
    return Explorer(tokens.trace_run(run, count=3))


def pixels(explorer):
    return np.asarray(Image.open(io.BytesIO(bytes(explorer.picture.value))).convert("RGB"))


def test_it_starts_at_the_run_as_it_was_trained_after_its_last_layer(explorer):
    assert (explorer.strategy.value, explorer.r.value, explorer.layer.value, explorer.image.value) == ("upper", 8, 4, 0)
    assert pixels(explorer).shape == (270, 960, 3)


def test_every_control_redraws_and_going_back_shows_the_same_again(explorer):
    first = bytes(explorer.picture.value)
    shown = {first}
    for control, value in ((explorer.image, 2), (explorer.layer, 2), (explorer.r, 3), (explorer.strategy, "lower")):
        control.value = value
        assert bytes(explorer.picture.value) not in shown, control.description
        shown.add(bytes(explorer.picture.value))
    for control, value in ((explorer.strategy, "upper"), (explorer.r, 8), (explorer.layer, 4), (explorer.image, 0)):
        control.value = value
    assert bytes(explorer.picture.value) == first


def test_what_is_shown_is_the_model_under_the_chosen_schedule(explorer, run, monkeypatch):  # noqa: F811
    asked = []
    draw = plots.fusion_at_layer
    monkeypatch.setattr(plots, "fusion_at_layer", lambda *a, **k: asked.append((a, k)) or draw(*a, **k))
    explorer.strategy.value = "lower"
    explorer.r.value = 5
    explorer.image.value = 1
    (_, groups, _), named = asked[-1]
    seen = tokens.trace_run(run, count=3)
    expected = tokens.with_schedule(seen, strategies.schedule("lower", depth=4, r=5))
    assert all(
        np.array_equal(ours, theirs[1]) for ours, theirs in zip(groups, tokens.groups(expected.trace), strict=True)
    )
    assert named["label"] == f"1, predicted {expected.predicted[1]}"
    assert named["layer"] == 4


def test_r_cannot_leave_what_a_strategy_can_fuse(explorer):
    for strategy in STRATEGIES:
        explorer.strategy.value = strategy
        explorer.r.value = explorer.r.max
        assert explorer.r.value == tokens.largest_r(explorer._traced.model, strategy)


def test_an_update_is_one_picture_and_the_model_runs_only_for_another_schedule(explorer, monkeypatch):
    done = []
    for module, name in ((tokens, "with_schedule"), (plots, "fusion_at_layer")):
        work = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _name=name, _work=work, **k: done.append(_name) or _work(*a, **k))
    under, picture = ["with_schedule", "fusion_at_layer"], ["fusion_at_layer"]
    updates = [
        (explorer.layer, 1, picture),
        (explorer.image, 1, picture),
        (explorer.r, 2, under),
        (explorer.strategy, "all", under),
        (explorer.strategy, "upper", []),
        (explorer.r, 8, []),
        (explorer.layer, 3, picture),
    ]
    for control, value, expected in updates:
        done.clear()
        control.value = value
        assert done == expected, (control.description, value)

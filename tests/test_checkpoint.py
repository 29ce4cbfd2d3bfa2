"""Model files: what goes in comes out, and anything else is refused by name."""

import json

import pytest
import torch
from safetensors.torch import save

from famba import FusionOptions, InputError, create_model
from famba.checkpoint import load_model, model_bytes


@pytest.fixture
def model():
    torch.manual_seed(0)
    options = FusionOptions(order="append", weighting="mean", feature="delta", position="after_scan")
    return create_model("vim_nano", num_classes=10, depth=2, d_model=16, schedule=[3, 4], fusion=options)


@pytest.fixture
def path(model, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(model_bytes(model, model.state_dict(), {"strategy": "upper", "seed": 3}))
    return path


def test_a_model_comes_back_with_its_fusion_and_gives_the_same_logits(model, path):
    images = torch.randn(2, 3, 8, 8)
    back, described = load_model(path)
    assert (back.schedule, back.options) == (model.schedule, model.options)
    assert (described["strategy"], described["seed"]) == ("upper", 3)
    assert torch.equal(back(images), model(images))


def test_the_same_model_is_the_same_bytes(model, path):
    assert model_bytes(model, model.state_dict(), {"seed": 3, "strategy": "upper"}) == path.read_bytes()


def test_a_file_cut_short_anywhere_is_refused(path):
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"model\.safetensors: not a whole safetensors file"):
            load_model(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_model(tmp_path / "nothing.safetensors")


def test_a_foreign_file_is_refused(path):
    path.write_bytes(save({"a": torch.zeros(2)}))
    with pytest.raises(InputError, match="tensors that famba did not write; expected a famba model"):
        load_model(path)
    path.write_bytes(save({"a": torch.zeros(2)}, metadata={"famba": json.dumps({"kind": "training state"})}))
    with pytest.raises(InputError, match="holds training state; expected a famba model"):
        load_model(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("norm_f.weight"), "lacks norm_f.weight"),
        (lambda state: state.update(extra=torch.zeros(1)), "has the unknown extra"),
        (lambda state: state.update({"head.bias": torch.zeros(3)}), r"head.bias has shape \(3,\); expected \(10,\)"),
    ],
)
def test_tensors_that_are_not_the_models_are_refused_by_name(model, path, change, said):
    state = dict(model.state_dict())
    change(state)
    path.write_bytes(model_bytes(model, state, {}))
    with pytest.raises(InputError, match=said):
        load_model(path)


def test_a_description_that_makes_no_model_is_refused(model, path):
    model.config = {**model.config, "depth": 7}
    path.write_bytes(model_bytes(model, model.state_dict(), {}))
    with pytest.raises(InputError, match="does not describe a model: schedule: 2 entries"):
        load_model(path)

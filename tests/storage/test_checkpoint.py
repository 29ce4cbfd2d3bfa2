"""Model files: what goes in comes out, and anything else is refused by name."""

import pytest
import torch
from safetensors.torch import save

from famba import FusionOptions, InputError, create_model
from famba.models.saved import load_model, model_bytes
from famba.storage.checkpoint import pack, read


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


def test_a_byte_that_changed_anywhere_is_noticed_or_changes_nothing(path):
    """Nothing: in blanks of the header, say."""
    tensors, described = read(path)
    whole, refused = bytearray(path.read_bytes()), 0
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(0, header, 7), *range(header, len(whole), 499), len(whole) - 1]
    assert len(places) > 500
    for place in places:
        for bit in (1, 64):
            whole[place] ^= bit
            path.write_bytes(whole)
            whole[place] ^= bit
            try:
                back, said = read(path)
            except InputError:
                refused += 1
                continue
            assert said is None or said == described, place  # None: no longer one of famba's by its name
            assert all(torch.equal(back[key], t) for key, t in tensors.items()), place
    assert refused > 0.9 * 2 * len(places)


def test_a_changed_weight_is_named_by_its_checksum(path):
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    with pytest.raises(
        InputError, match=r"model\.safetensors: spoilt: its CRC-32 is [0-9a-f]{8}; that of what was wri"
    ):
        load_model(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_of_any_type_and_shape_come_back(tmp_path, dtype):
    tensors = {"scalar": torch.ones((), dtype=dtype), "none": torch.ones(0, 2, dtype=dtype), "some": torch.ones(3, 2)}
    (tmp_path / "x").write_bytes(pack(tensors, {"pair": (1, 0.1 + 0.2), 7: None}))
    back, described = read(tmp_path / "x")
    assert described == {"pair": [1, 0.1 + 0.2], "7": None}
    assert {key: (t.dtype, t.tolist()) for key, t in back.items()} == {
        key: (t.dtype, t.tolist()) for key, t in tensors.items()
    }


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_model(tmp_path / "nothing.safetensors")


def test_a_foreign_file_is_refused(path):
    path.write_bytes(save({"a": torch.zeros(2)}))
    with pytest.raises(InputError, match="tensors that famba did not write; expected a famba model"):
        load_model(path)
    path.write_bytes(pack({"a": torch.zeros(2)}, {"kind": "training state"}))
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

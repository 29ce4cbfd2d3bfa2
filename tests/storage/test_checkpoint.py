"""Model files: what goes in comes out, and anything else is refused by name."""

import re

import pytest
import torch
from refusals import refusal
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


def test_what_is_no_whole_model_file_is_refused(path):
    whole = path.read_bytes()
    cut_short = (b"", whole[:4], whole[:100], whole[: len(whole) // 2], whole[:-1])
    contents = dict.fromkeys(cut_short, "not a whole safetensors file")
    contents[save({"a": torch.zeros(2)})] = "holds tensors that famba did not write; expected a famba model"
    contents[pack({"a": torch.zeros(2)}, {"kind": "training state"})] = "holds training state; expected a famba model"
    for content, said in contents.items():
        path.write_bytes(content)
        assert f"model.safetensors: {said}" in refusal(lambda: load_model(path))


def test_a_byte_that_changed_anywhere_is_noticed_or_changes_nothing(path):
    """Nothing: in blanks of the header, say."""
    tensors, described = read(path)
    whole, refused = bytearray(path.read_bytes()), []
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
            except InputError as error:
                refused.append(str(error))
                continue
            assert said is None or said == described, place  # None: no longer one of famba's by its name
            assert all(torch.equal(back[key], t) for key, t in tensors.items()), place
    assert len(refused) > 0.9 * 2 * len(places)
    assert re.search(r"model\.safetensors: spoilt: its CRC-32 is [0-9a-f]{8}; that of what was wri", refused[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_of_any_type_and_shape_come_back(tmp_path, dtype):
    tensors = {"scalar": torch.ones((), dtype=dtype), "none": torch.ones(0, 2, dtype=dtype), "some": torch.ones(3, 2)}
    (tmp_path / "x").write_bytes(pack(tensors, {"pair": (1, 0.1 + 0.2), 7: None}))
    back, described = read(tmp_path / "x")
    assert described == {"pair": [1, 0.1 + 0.2], "7": None}
    assert {key: (t.dtype, t.tolist()) for key, t in back.items()} == {
        key: (t.dtype, t.tolist()) for key, t in tensors.items()
    }

"""Damaged files and odd arguments: each gives a result or an error of one line. `make fuzz` tries many more of them."""

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from famba import VisionMamba, config, create_model, data, fuse, load_model, load_vim, match_tokens, schedule
from famba.errors import FambaError
from famba.fusion.strategies import STRATEGIES
from famba.models.saved import model_bytes

PARAMS = (Path(__file__).resolve().parents[1] / "params.yaml").read_bytes()
few = settings(max_examples=settings.default.max_examples // 5)


@contextlib.contextmanager
def one_line():
    """An error that is meant for the user is fine if it can be read."""
    try:
        yield
    except FambaError as error:
        if "\n" in str(error) or not 0 < len(str(error)) < 2000:
            raise AssertionError(f"no message of one line: {str(error)[:2000]!r}") from error


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    """The bytes with some overwritten, inserted, removed or repeated, or cut short."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        end = min(len(content), at + draw(st.sampled_from([0, 1, 4, 100, 10**9])))
        content[at:end] = draw(st.one_of(st.binary(max_size=8), st.just(bytes(content[at:end]) * 2)))
    return bytes(content)


def encoded(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    exif, file = Image.Exif(), io.BytesIO()
    exif[274] = 6
    Image.fromarray(pixels).save(file, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}))
    return file.getvalue()


def small() -> VisionMamba:
    torch.manual_seed(0)
    return create_model("vim_nano", num_classes=3, depth=1, d_model=8, d_state=2)


def weights() -> dict[str, torch.Tensor]:
    return small().state_dict()


def torch_file(state: dict) -> bytes:
    file = io.BytesIO()
    torch.save({"model": state}, file)
    return file.getvalue()


def with_value(at: int, value: str) -> bytes:
    """The parameters with another value after a colon."""
    return PARAMS[:at] + f": {value}".encode() + PARAMS[PARAMS.index(b"\n", at) :]


COLONS = [colon.start() for colon in re.finditer(b":", PARAMS)]
VALUES = ["~", "-1", "0", "1e308", ".nan", "'\\0'", "[]", "{}", "yes", "9" * 400, "*x", "1.5", "ünï", "&a [*a]"]


@pytest.mark.filterwarnings("ignore::ruamel.yaml.error.ReusedAnchorWarning")  # printed; what follows is an error
@few
@given(damaged(PARAMS) | st.builds(with_value, st.sampled_from(COLONS), st.sampled_from(VALUES)))
def test_damaged_parameters(tmp_path, content):
    (tmp_path / "params.yaml").write_bytes(content)
    with one_line():
        config.load("smoke", strategy="upper", path=tmp_path / "params.yaml")


@given(
    st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"]).flatmap(lambda kind: damaged(encoded(kind)))
)
def test_a_damaged_image(tmp_path, content):
    (tmp_path / "image").write_bytes(content)
    with one_line():
        assert data.read_image(tmp_path / "image", 8).shape == (3, 8, 8)


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "famba"])
@few
@given(draw=st.data())
def test_a_damaged_checkpoint(tmp_path, suffix, draw):
    whole = {"pth": torch_file, "safetensors": save, "famba": lambda state: model_bytes(small(), state, {})}[suffix]
    path = tmp_path / f"vim.{suffix}"
    path.write_bytes(draw.draw(damaged(whole(weights()))))
    with one_line():
        model = load_model(path)[0] if suffix == "famba" else load_vim(path, trained_at=8)
        assert all(weight.isfinite().all() for weight in model.parameters())


@few
@given(
    st.sampled_from(sorted(weights())),
    st.sampled_from([torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.int8, torch.complex64]),
    st.lists(st.integers(0, 40), max_size=5),
    st.sampled_from([0.0, 1.0, float("nan"), float("inf")]),
)
def test_a_checkpoint_with_a_strange_tensor(key, dtype, shape, value):
    strange = torch.full(shape, value).to(dtype) if dtype != torch.int8 else torch.ones(shape, dtype=dtype)
    with one_line():
        model = load_vim(weights() | {key: strange}, trained_at=8)
        assert all(weight.isfinite().all() for weight in model.parameters())


@few
@given(
    st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(
            ("num_classes", "img_size", "patch_size", "stride", "depth", "d_model", "d_state", "in_chans"),
            st.integers(-1, 12),
        )
        | {
            "cls_position": st.sampled_from(["middle", "head", "none", "tail"]),
            "pool": st.sampled_from(["cls", "mean", "max"]),
            "schedule": st.lists(st.integers(-1, 9), max_size=6),
            "drop_path_rate": st.sampled_from([0.0, 0.5, 1.0, float("nan")]),
        },
    )
)
def test_odd_sizes_of_a_model(sizes):
    with one_line():
        model = create_model("vim_nano", **sizes)
        images = torch.randn(2, model.config["in_chans"], model.img_size, model.img_size)
        assert model(images).shape == (2, model.config["num_classes"])


@given(
    *(st.integers(-1, 20) for _ in range(3)),
    st.lists(st.integers(-2, 20), max_size=3),
    st.sampled_from(["scan", "append"]),
    st.sampled_from(["size", "mean"]),
    st.sampled_from(STRATEGIES),
)
def test_odd_arguments_of_fusion(t, r, depth, protected, order, weighting, strategy):
    with one_line():
        x = torch.randn(2, max(t, 0), 4)
        matching = match_tokens(x, r, protected=protected)
        fused, sizes = fuse(x, matching, order=order, weighting=weighting)
        assert fused.shape[1] == sizes.shape[1] == max(t, 0) - r
    with one_line():
        assert len(schedule(strategy, depth=depth, r=r, first_layer=t)) == depth

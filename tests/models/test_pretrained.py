"""Weights trained before: the released form read to the letter, fitted to other sizes, and fused without training."""

import argparse
import collections
import datetime
import json
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from goldens import golden_json
from hypothesis import given
from hypothesis import strategies as st
from refusals import refusal
from safetensors.torch import save_file

from famba import FusionOptions, VisionMamba, load_model, load_vim, schedule, set_schedule
from famba.models import pretrained
from famba.models.pretrained import resize_positions, take_weights
from famba.models.saved import model_bytes

SMALL = {"img_size": 32, "patch_size": 8, "stride": 8, "depth": 3, "d_model": 16, "d_state": 4}


def small(**changes) -> VisionMamba:
    return VisionMamba(**({"num_classes": 7} | SMALL | changes))


def drawn(seed: int = 0, **changes) -> VisionMamba:
    torch.manual_seed(seed)
    return small(**changes)


def images(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def release(path: Path, **states) -> Path:
    """A torch file with all that the public training code leaves beside the weights."""
    arguments = argparse.Namespace(
        model="vim", input_size=32, lr=5e-4, mixup_minmax=None, distributed=True, color=(1, 2)
    )
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    beside = {"optimizer": optimizer, "lr_scheduler": {"t": 1}, "epoch": 299, "scaler": {}, "args": arguments}
    torch.save({key: collections.OrderedDict(state) for key, state in states.items()} | beside, path)
    return path


def same(left: VisionMamba, right: VisionMamba) -> bool:
    theirs = right.state_dict()
    return all(torch.equal(t, theirs[key]) for key, t in left.state_dict().items())


# load_vim


@pytest.mark.parametrize("reference", ["vim_ti", "vim_ti_stride8"])
def test_the_sizes_of_a_released_model_are_read_off_its_shapes(reference, monkeypatch):
    expected = golden_json("vim_state_dict_keys")[reference]
    tensors = {key: torch.empty(shape, device="meta") for key, shape in expected["shapes"].items()}
    monkeypatch.setattr(pretrained, "_read_vim", lambda path, state: (Path(path), tensors))
    with torch.device("meta"):
        model = load_vim("released.pth", stride=None)
    sizes = {key: expected[key] for key in ("img_size", "patch_size", "stride", "depth", "d_state")}
    assert sizes.items() <= model.config.items()
    assert (model.config["d_model"], model.config["num_classes"]) == (expected["embed_dim"], 1000)
    assert (model.tokens, model.cls_position, model.pool) == (expected["num_tokens"], "middle", "cls")
    assert model.config["average_directions"]


def test_the_moving_average_is_taken_where_there_is_one_unless_the_other_is_asked_for(tmp_path):
    raw, averaged = drawn(0), drawn(1)
    both = release(tmp_path / "both.pth", model=raw.state_dict(), model_ema=averaged.state_dict())
    assert same(load_vim(both, trained_at=32), averaged)
    assert same(load_vim(both, trained_at=32, state="model_ema"), averaged)
    assert same(load_vim(both, trained_at=32, state="model"), raw)
    alone = release(tmp_path / "alone.pth", model=raw.state_dict())
    assert same(load_vim(alone, trained_at=32), raw)
    assert "expected a state dict under model_ema" in refusal(lambda: load_vim(alone, state="model_ema"))
    assert refusal(lambda: load_vim(alone, state="ema")) == "state: 'ema' is not one of model_ema, model"


def test_half_precision_weights_come_as_fp32(tmp_path):
    model = drawn()
    halves = {key: t.half() for key, t in model.state_dict().items()}
    back = load_vim(release(tmp_path / "vim.pth", model=halves), trained_at=32)
    assert {t.dtype for t in back.state_dict().values()} == {torch.float32}
    assert torch.equal(back.head.weight, halves["head.weight"].float())


def test_a_new_head_is_drawn_for_another_number_of_classes_and_all_else_is_kept(tmp_path):
    model = drawn(d_model=64)
    path = release(tmp_path / "vim.pth", model=model.state_dict())
    torch.manual_seed(3)
    other = load_vim(path, trained_at=32, num_classes=500)
    kept = {key: t for key, t in other.state_dict().items() if not key.startswith("head.")}
    assert len(kept) == len(model.state_dict()) - 2
    assert all(torch.equal(t, model.state_dict()[key]) for key, t in kept.items())
    assert other.head.weight.shape == (500, 64)
    assert other.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not other.head.bias.any()
    torch.manual_seed(3)
    assert same(load_vim(path, trained_at=32, num_classes=500), other)


def test_another_size_or_stride_interpolates_the_positions_and_keeps_all_else(tmp_path):
    model = drawn()
    path = release(tmp_path / "vim.pth", model=model.state_dict())
    for sizes, grid in (({"img_size": 48}, 6), ({"stride": 4}, 7), ({"img_size": 48, "stride": 4}, 11)):
        other = load_vim(path, trained_at=32, **sizes)
        assert (other.grid, other.tokens) == (grid, grid**2 + 1)
        assert torch.equal(other.pos_embed, resize_positions(model.pos_embed, grid))
        assert torch.equal(other.layers[2].mixer.A_log, model.layers[2].mixer.A_log)
        assert other(images(other.img_size)).shape == (2, 7)


def test_a_model_is_fused_from_the_start_if_it_is_told_to(tmp_path):
    path = release(tmp_path / "vim.pth", model=drawn().state_dict())
    options = FusionOptions(order="append", weighting="mean")
    model = load_vim(path, trained_at=32, schedule=[0, 3, 3], fusion=options)
    assert (model.schedule, model.options) == ([0, 3, 3], options)


@pytest.mark.parametrize("cls_position", ["middle", "head", "none"])
def test_models_with_the_class_token_elsewhere_are_read_if_that_is_said(tmp_path, cls_position):
    model = drawn(cls_position=cls_position, pool="mean" if cls_position == "none" else "cls", average_directions=False)
    path = release(tmp_path / "vim.pth", model=model.state_dict())
    back = load_vim(path, trained_at=32, cls_position=cls_position, average_directions=False)
    assert back.config == model.config
    assert torch.equal(back(images()), model(images()))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.pop("norm_f.weight"), "lacks norm_f.weight; expected"),
        (lambda s: s.pop("pos_embed"), "lacks pos_embed; expected the tensors of a Vision Mamba"),
        (lambda s: [s.pop(key) for key in list(s) if key.startswith("layers.1.")], "lacks layers.1.mixer.A_log and"),
        (lambda s: s.update({"head_dist.bias": torch.zeros(7)}), "has the unknown head_dist.bias; expected"),
        (lambda s: s.update({"head.bias": torch.zeros(3)}), "head.bias has shape (3,); expected (7,)"),
        (lambda s: s.update({"head.weight": torch.zeros(7, 5)}), "head.weight has shape (7, 5); expected (7, 16)"),
        (lambda s: s.update({"pos_embed": torch.zeros(17, 16)}), "pos_embed has shape (17, 16); expected 3 dimensions"),
        (lambda s: s.update({"pos_embed": torch.zeros(1, 18, 16)}), "18 rows; must be a square number of patches and"),
        (lambda s: s.update({"pos_embed": torch.zeros(1, 17, 8)}), "pos_embed has shape (1, 17, 8); expected"),
        (lambda s: s.update({"cls_token": 3}), "model.cls_token is no tensor"),
        (lambda s: s.update({"head.bias": torch.zeros(7, dtype=torch.complex64)}), "head.bias is torch.complex64"),
        (lambda s: s.update({"head.bias": torch.zeros(7).to_sparse()}), "head.bias is torch.float32, torch.sparse_coo"),
        (lambda s: s.update({"head.bias": torch.zeros(7, device="meta")}), "head.bias is torch.float32, torch.strided"),
        (lambda s: s["head.bias"].fill_(torch.nan), "head.bias holds numbers that are not finite in float32"),
        (lambda s: s.update({"head.bias": torch.full((7,), 1e300, dtype=torch.float64)}), "head.bias holds numbers"),
        (lambda s: s.update({"pos_embed": torch.zeros(1).expand(1, 10**9 + 1, 16)}), "the file holds fewer numbers"),
    ],
)
def test_tensors_that_are_missing_foreign_or_of_another_shape_are_named(tmp_path, change, expected):
    state = dict(drawn().state_dict())
    change(state)
    path = release(tmp_path / "vim.pth", model=state)
    message = refusal(lambda: load_vim(path, trained_at=32, num_classes=4))
    assert message.startswith(f"{path}: ")
    assert expected in message


def test_a_file_that_holds_no_state_dict_says_what_it_holds(tmp_path):
    path = tmp_path / "other.pth"
    for content, found in (
        ({"net": {}, "epoch": 3}, "net, epoch"),
        ([1, 2], "nothing by name"),
        ({"model": 3}, "model"),
    ):
        torch.save(content, path)
        assert f"holds {found}; expected a state dict under model_ema or model" in refusal(lambda: load_vim(path))


def test_a_file_that_would_run_something_is_refused_by_the_name_of_it(tmp_path):
    path = tmp_path / "vim.pth"
    torch.save({"model": dict(drawn().state_dict()), "args": argparse.Namespace(since=datetime.timedelta(1))}, path)
    message = refusal(lambda: load_vim(path))
    assert message == f"{path}: holds datetime.timedelta; only tensors and plain values are read"


def test_a_broken_file_is_refused(tmp_path):
    path = release(tmp_path / "vim.pth", model=drawn().state_dict())
    whole = path.read_bytes()
    for content in (b"", b"no checkpoint at all" * 9, whole[:100], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        assert refusal(lambda: load_vim(path)).startswith(f"{path}: not a whole torch file")
    assert refusal(lambda: load_vim(tmp_path / "none.pth")) == f"{tmp_path / 'none.pth'}: no such file"
    assert refusal(lambda: load_vim(tmp_path / "no.safetensors")) == f"{tmp_path / 'no.safetensors'}: no such file"
    path = run_file(tmp_path / "model.safetensors", drawn(schedule=[0, 2, 2]))
    assert refusal(lambda: load_vim(path)).endswith("take famba.load_model")
    model, _ = load_model(str(path))
    assert (model.schedule, model.training) == ([0, 2, 2], False)


def test_a_folder_is_refused_before_the_hub_is_asked_for_its_name(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert refusal(lambda: load_vim("owner/name")).startswith("owner/name: is a folder; must be a file")


def test_weights_of_save_pretrained_are_not_taken_for_released_ones(tmp_path):
    """They have the same form; but the shapes do not tell their scan, nor what their images were normalised by."""
    drawn(average_directions=False).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    assert refusal(lambda: load_vim(path)).endswith("take VisionMamba.from_pretrained")
    model = drawn(1, average_directions=False)
    assert refusal(lambda: take_weights(model, path)).endswith("must be a run's model.safetensors")
    (tmp_path / "config.json").write_text('{"architectures": ["vim"]}')  # of another library
    take_weights(model, path)
    assert same(model, drawn(average_directions=False))


def test_a_size_that_the_weights_cannot_have_been_trained_at_is_refused(tmp_path):
    path = release(tmp_path / "vim.pth", model=drawn().state_dict())
    message = refusal(lambda: load_vim(path))
    assert "trained_at: 224 pixels; no stride of patches of 8 makes 4 of them along a side" in message
    assert load_vim(path, img_size=32, stride=8).grid == 4


# resize_positions


@given(st.integers(1, 7), st.integers(1, 9), st.sampled_from(["middle", "head", "none"]))
def test_a_constant_field_stays_constant_and_the_class_tokens_row_is_untouched(before, after, cls_position):
    own = torch.tensor([3.0, -2.0])
    at = {"middle": lambda grid: grid**2 // 2, "head": lambda grid: 0, "none": lambda grid: None}[cls_position]

    def field(grid: int) -> torch.Tensor:
        rows = torch.tensor([0.25, 7.0]).expand(1, grid**2, 2)
        if at(grid) is None:
            return rows.clone()
        return torch.cat([rows[:, : at(grid)], own.expand(1, 1, 2), rows[:, at(grid) :]], dim=1)

    resized = resize_positions(field(before), after, cls_position=cls_position)
    torch.testing.assert_close(resized, field(after), rtol=1e-5, atol=1e-5)
    if cls_position != "none":
        assert torch.equal(resized[0, at(after)], own)


def test_a_gradient_across_the_image_stays_one_in_both_axes():
    """Away from the edges a plane stays one, but for the kernel's own ripple of 3/64; rows stay rows."""
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    plane = torch.stack([x, y], dim=-1).reshape(1, 64, 2)
    resized = resize_positions(plane, 16, cls_position="none").unflatten(1, (16, 16))[0]
    at = (torch.arange(16) + 0.5) / 2 - 0.5  # where the new patches' centres lie among the old
    inner = slice(4, 12)
    torch.testing.assert_close(resized[inner, inner, 0], at[inner].expand(8, 8), rtol=0, atol=0.047)
    torch.testing.assert_close(resized[inner, inner, 1], at[inner, None].expand(8, 8), rtol=0, atol=0.047)


@pytest.mark.parametrize(("rows", "cls_position"), [(16, "middle"), (17, "none"), (0, "head"), (1, "head")])
def test_rows_that_are_no_square_of_patches_are_refused(rows, cls_position):
    assert f"{rows} rows" in refusal(lambda: resize_positions(torch.zeros(1, rows, 2), 3, cls_position=cls_position))


# set_schedule


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("position", ["before_mixer", "after_scan"])
@pytest.mark.parametrize("before", [FusionOptions(), FusionOptions(order="append", weighting="mean", feature="B")])
def test_fusion_goes_on_and_off_again_and_gives_the_unfused_model_bit_for_bit(pool, position, before):
    model = drawn(pool=pool, fusion=before)
    weights = {key: t.clone() for key, t in model.state_dict().items()}
    unfused = model(images())
    options = FusionOptions(position=position)
    assert set_schedule(model, schedule("upper", depth=3, r=5), options) is model
    fused, trace = model.forward_with_trace(images())
    assert trace.token_counts == [17, 17, 12, 7]
    assert model.options == options
    assert not torch.equal(fused, unfused)
    assert torch.equal(fused, drawn(pool=pool, schedule=[0, 5, 5], fusion=options)(images()))
    assert set_schedule(model, None) is model
    assert torch.equal(model(images()), unfused)
    assert model.forward_with_trace(images())[1].token_counts == [17] * 4
    assert all(torch.equal(t, weights[key]) for key, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ("upper", "schedule: 'upper'; must be 3 whole numbers, such as famba.schedule('upper', depth=3, r=..) gives"),
        ([0, 1.5, 2], "must be 3 whole numbers"),
        (7, "must be 3 whole numbers"),
        ([0, 9, 0], "layer 2: r = 9 of t = 17 tokens; allowed: 0..8"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_and_the_model_is_as_it_was(plan, expected, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # outside of tests nothing checks the types
    model = drawn(schedule=[0, 2, 2], fusion=FusionOptions(order="append"))
    assert expected in refusal(lambda: set_schedule(model, plan))
    model.schedule[0] = 5  # of a copy
    assert model.schedule == [0, 2, 2]
    with pytest.raises(AttributeError, match="no setter"):
        model.schedule = [0, 5, 0]
    for options in ({"order": "append"}, "append"):
        assert "must be a FusionOptions" in refusal(lambda options=options: set_schedule(model, [0, 2, 2], options))
    assert refusal(lambda: set_schedule(model.head, [0, 2, 2])) == "model: Linear; must be a VisionMamba"
    assert set_schedule(model, [0, 3, 2]).options == FusionOptions(order="append"), "as it was, where nothing is said"


def test_a_schedule_of_another_librarys_whole_numbers_is_one_of_pythons(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    assert json.dumps(drawn(schedule=np.array([0, 2, 2])).schedule) == "[0, 2, 2]"


# take_weights


def run_file(path: Path, model: VisionMamba, **described) -> Path:
    images = {"classes": list("abcdefg"), "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    path.write_bytes(model_bytes(model, model.state_dict(), images | described))
    return path


def test_a_runs_weights_come_with_what_its_images_were_normalised_by(tmp_path):
    trained, model = drawn(0, schedule=[0, 3, 3]), drawn(1)
    origin = take_weights(model, run_file(tmp_path / "model.safetensors", trained))
    assert same(model, trained)
    assert model.schedule == [0, 0, 0]
    assert origin == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 7, tuple("abcdefg"))


@pytest.mark.parametrize("name", ["vim.pth", "vim.safetensors"])
def test_released_weights_come_with_imagenets_normalisation(tmp_path, name):
    trained, model = drawn(0), drawn(1)
    path = tmp_path / name
    if path.suffix == ".pth":
        release(path, model_ema=trained.state_dict())
    else:
        save_file(trained.state_dict(), path)
    origin = take_weights(model, path)
    assert same(model, trained)
    assert origin == (pretrained.IMAGENET_MEAN, pretrained.IMAGENET_STD, 7, None)


def test_weights_fit_a_model_of_another_size_and_other_classes(tmp_path):
    trained, model = drawn(0), drawn(1, img_size=48, num_classes=5)
    head = model.head.weight.clone()
    origin = take_weights(model, run_file(tmp_path / "model.safetensors", trained))
    assert origin.num_classes == 7
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.pos_embed, resize_positions(trained.pos_embed, 6))
    assert torch.equal(model.norm_f.weight, trained.norm_f.weight)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"depth": 2}, "has the unknown layers.2.mixer.A_b_log and 16 more"),
        ({"d_model": 32}, "cls_token has shape (1, 1, 16); expected (1, 1, 32)"),
        ({"d_state": 8}, "layers.0.mixer.A_log has shape (32, 4); expected (32, 8)"),
        ({"patch_size": 4, "stride": 4}, "patch_embed.proj.weight has shape (16, 3, 8, 8); expected (16, 3, 4, 4)"),
        ({"cls_position": "head"}, "model.cls_position: trained with 'middle'; here it is 'head'"),
        ({"pool": "mean"}, "model.pool: trained with 'cls'; here it is 'mean'"),
        ({"average_directions": False}, "model.average_directions: trained with True; here it is False"),
    ],
)
def test_weights_of_another_architecture_are_refused_by_the_first_difference(tmp_path, change, expected):
    path = run_file(tmp_path / "model.safetensors", drawn(0))
    model = drawn(1, **change)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    message = refusal(lambda: take_weights(model, path))
    assert message.startswith(f"{path}: ")
    assert expected in message
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_a_famba_file_that_is_no_runs_model_is_refused(tmp_path):
    model = drawn()
    path = tmp_path / "model.safetensors"
    path.write_bytes(model_bytes(model, model.state_dict(), {}))
    assert "expected the model.safetensors of a run" in refusal(lambda: take_weights(drawn(1), path))

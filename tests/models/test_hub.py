"""Models in other people's code: folders and the hub, timm, torch.hub, and what those expect of a model."""

import json
import os
import shutil
import sys
from pathlib import Path

import bridge  # noqa: F401 (timm can be imported after it)
import huggingface_hub
import pytest
import timm
import timm.optim
import torch
from checkout import ROOT
from huggingface_hub.errors import EntryNotFoundError
from refusals import refusal
from safetensors.torch import save_file

import famba.models.timm_models  # noqa: F401 (registers)
from famba import FusionOptions, VisionMamba, create_model, load_vim

OPTIONS = FusionOptions(order="append", weighting="mean")


@pytest.fixture
def model() -> VisionMamba:
    torch.manual_seed(0)
    return create_model("vim_nano", num_classes=10, depth=2, d_model=16, schedule=[0, 5], fusion=OPTIONS)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """Stands in for the hub: repositories are folders, owner/name."""

    def download(repo_id, filename, **options):
        if not (tmp_path / "hub" / repo_id).is_dir():
            raise ConnectionError("no such repository\nat all")
        if not (tmp_path / "hub" / repo_id / filename).is_file():
            raise EntryNotFoundError(filename)
        (cached := tmp_path / "cache" / repo_id).mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(tmp_path / "hub" / repo_id / filename, cached))

    def upload(self, *, repo_id, folder_path, **options):
        shutil.copytree(folder_path, tmp_path / "hub" / repo_id)
        return f"hub/{repo_id}"

    def create(self, repo_id, **options):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files", lambda self, name: os.listdir(tmp_path / "hub" / name)
    )
    return tmp_path / "hub"


def images(channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(1))


def same(back: VisionMamba, model: VisionMamba) -> bool:
    assert (back.config, back.schedule, back.options) == (model.config, model.schedule, model.options)
    assert not back.training
    return torch.equal(back(images()), model.eval()(images()))


def test_a_model_in_a_folder_keeps_its_sizes_schedule_and_options(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"model": model.config, "schedule": [0, 5], "fusion": vars(OPTIONS)}
    assert "removes 5 tokens of 37 by the schedule [0, 5]" in (tmp_path / "README.md").read_text()
    assert same(VisionMamba.from_pretrained(tmp_path), model)
    assert same(VisionMamba.from_pretrained(str(tmp_path)), model)
    said = refusal(lambda: VisionMamba.from_pretrained(tmp_path, num_classes=3))
    assert said.startswith("num_classes: not an option of from_pretrained; allowed: cache_dir, ")
    (tmp_path / "model.safetensors").unlink()
    assert refusal(lambda: VisionMamba.from_pretrained(tmp_path)).endswith("model.safetensors: no such file")


def test_a_model_goes_to_the_hub_and_comes_back_by_its_name(model, hub):
    assert model.push_to_hub("someone/model") == "hub/someone/model"
    assert same(VisionMamba.from_pretrained("someone/model"), model)
    assert refusal(lambda: VisionMamba.from_pretrained("someone/else")) == (
        "someone/else: no such file or folder, and not to be had from the hub (no such repository)"
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c["model"].update(d_model=10**9), "does not describe a model: "),
        (lambda c: c["model"].update(depth=10**9), "does not describe a model: depth: 1000000000 of 41 tensors"),
        (lambda c: c["model"].update(d_state=4), "layers.0.mixer.A_log has shape (32, 8); expected (32, 4)"),
        (lambda c: c.update(schedule=["a", 0]), "does not describe a model: "),
        (lambda c: c["fusion"].update(order="backwards"), "does not describe a model: "),
        (lambda c: c.update(module="x") or c.pop("model"), "does not describe a model: 'model'"),
    ],
)
def test_a_config_that_is_not_of_these_weights_is_refused(model, tmp_path, change, expected):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert expected in refusal(lambda: VisionMamba.from_pretrained(tmp_path))


def test_released_weights_are_found_on_the_hub_by_the_name_of_repository_and_file(model, hub):
    (hub / "hustvl" / "tiny").mkdir(parents=True)
    for name in ("README.md", "76p1.pth"):
        torch.save({"model": model.state_dict()}, hub / "hustvl" / "tiny" / name)
    expected = model.state_dict()["head.weight"]
    assert torch.equal(load_vim("hustvl/tiny", trained_at=8).head.weight, expected)
    save_file(model.state_dict(), hub / "hustvl" / "tiny" / "ft.safetensors")
    assert "ft.safetensors" in (message := refusal(lambda: load_vim("hustvl/tiny")))
    assert message.endswith("give hustvl/tiny/<file>")
    assert torch.equal(load_vim("hustvl/tiny/ft.safetensors", trained_at=8).head.weight, expected)
    assert "nowhere/x: no such file or folder" in refusal(lambda: load_vim("nowhere/x"))
    model.push_to_hub("someone/ours")
    for name in ("someone/ours", "someone/ours/model.safetensors"):
        assert refusal(lambda name=name: load_vim(name)).endswith("take VisionMamba.from_pretrained")
        shutil.rmtree(hub.with_name("cache"))


def test_without_huggingface_hub_the_error_says_what_to_install(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, "famba.models.hub", raising=False)
    monkeypatch.delattr("famba.models.hub", raising=False)
    for action in (lambda: model.save_pretrained(tmp_path), lambda: load_vim("hustvl/tiny")):
        assert refusal(action) == "huggingface_hub: not installed; pip install 'famba[hub]'"


def test_a_state_dict_is_taken_as_it_is_and_under_the_prefix_of_data_parallel(model, tmp_path):
    state = model.state_dict()
    torch.save({f"module.{key}": t for key, t in state.items()}, tmp_path / "parallel.pth")
    for source in (state, {"model": state}, tmp_path / "parallel.pth"):
        assert torch.equal(load_vim(source, trained_at=8).head.weight, state["head.weight"])


def test_timm_makes_the_models_by_name():
    made = timm.create_model("vim_nano", num_classes=7, in_chans=1, drop_path_rate=0.1)
    assert isinstance(made, VisionMamba)
    assert made(images(1)).shape == (2, 7)
    assert "famba.load_vim" in refusal(lambda: timm.create_model("vim_tiny", pretrained=True))


def test_timms_optimiser_decays_what_ours_decays(model):
    groups = timm.optim.create_optimizer_v2(model, opt="adamw", weight_decay=0.05).param_groups
    decayed = {id(weight) for group in groups if group["weight_decay"] for weight in group["params"]}
    kept = {name for name, weight in model.named_parameters() if id(weight) not in decayed}
    assert model.no_weight_decay() < kept
    assert {name for name, weight in model.named_parameters() if hasattr(weight, "_no_weight_decay")} == (
        {"cls_token", "pos_embed"}
        | {f"layers.{i}.mixer.{name}" for i in (0, 1) for name in ("A_log", "A_b_log", "D", "D_b")}
    )


def test_features_and_head_make_the_logits_and_the_head_can_be_replaced(model):
    features = model.forward_features(images())
    assert features.shape == (2, model.num_features)
    assert torch.equal(model.forward_head(features), model(images()))
    assert model.forward_head(features, pre_logits=True) is features
    model.double().reset_classifier(3)
    assert (model(images().double()).shape, model.config["num_classes"]) == ((2, 3), 3)
    assert refusal(lambda: model.reset_classifier(0)) == "num_classes: 0; must be a whole number of 1 or more"


def test_a_dropped_path_leaves_an_image_as_the_layer_found_it():
    torch.manual_seed(0)
    model = create_model("vim_nano", num_classes=10, depth=2, d_model=16, drop_path_rate=0.5)
    batch = images()[:1].expand(64, -1, -1, -1)
    _, trace = model.train().forward_with_trace(batch)
    dropped = (trace.hidden_states[1] == 0).all(dim=(1, 2))
    assert 20 < dropped.sum() < 44
    _, kept = model.eval().forward_with_trace(batch)
    torch.testing.assert_close(trace.hidden_states[1][~dropped], 2 * kept.hidden_states[1][~dropped])
    assert torch.equal(trace.hidden_states[0], kept.hidden_states[0])
    assert "drop_path_rate: 1.0; must be" in refusal(lambda: create_model("vim_nano", drop_path_rate=1.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_model_in_half_precision_gives_nearly_the_same_and_has_gradients(dtype, backend):
    torch.manual_seed(0)
    model = create_model("vim_nano", num_classes=10, depth=3, schedule=[0, 5, 5], backend=backend)
    expected = model(images())
    logits = model.to(dtype)(images().to(dtype))
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), expected, rtol=0.05, atol=0.01)
    logits.sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())


def test_torch_hub_finds_the_models_in_the_checkout():
    made = torch.hub.load(str(ROOT), "create_model", "vim_nano", source="local", num_classes=3, trust_repo=True)
    assert isinstance(made, VisionMamba)

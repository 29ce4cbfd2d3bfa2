import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from ruamel.yaml import YAML

from famba import config
from famba.config import AblationParams, DataParams, FusionRule, ModelParams, Params, SweepParams, TrainParams
from famba.errors import InputError
from famba.fusion import options
from famba.fusion.options import FusionOptions
from famba.fusion.strategies import STRATEGIES

FILE = Path(__file__).parent.parent / "params.yaml"
TEXT = FILE.read_text(encoding="utf-8")
SECTIONS: dict[str, Any] = {"data": DataParams, "model": ModelParams, "options": FusionOptions, "train": TrainParams}


def document() -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(TEXT)


PROFILES = tuple(document()["profiles"])


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """A copy of params.yaml with one value changed: edited("data", "shift", to=3); `delete` takes the key out."""

    def edit(*keys: Any, to: Any = None, delete: bool = False) -> Path:
        changed = document()
        section = changed
        for key in keys[:-1]:
            section = section[key]
        if delete:
            del section[keys[-1]]
        else:
            section[keys[-1]] = to
        path = tmp_path / "params.yaml"
        with path.open("w", encoding="utf-8") as file:
            YAML(typ="safe", pure=True).dump(changed, file)
        return path

    return edit


def said(action: Callable[[], object]) -> str:
    with pytest.raises(InputError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message
    return message


# the file as it is


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_spells_out_every_field_of_its_dataclass_and_comes_back_as_it_was(section: str):
    written = document()[section]
    assert list(written) == [field.name for field in dataclasses.fields(SECTIONS[section])]
    built = SECTIONS[section](**written)
    assert json.loads(json.dumps(dataclasses.asdict(built))) == written


def test_the_sweep_comes_back_as_it_was():
    written = document()["sweep"]
    assert json.loads(json.dumps(dataclasses.asdict(config.load_sweep(FILE)))) == written


def test_the_ablation_comes_back_as_it_was_and_changes_replace_its_values():
    written = document()["ablation"]
    assert list(written) == [field.name for field in dataclasses.fields(AblationParams)]
    assert json.loads(json.dumps(dataclasses.asdict(config.load_ablation(FILE)))) == written
    changed = config.load_ablation(FILE, seeds=[5], epochs=None)
    assert (changed.seeds, changed.epochs) == ((5,), None)
    assert dataclasses.replace(changed, seeds=(0,), epochs=1) == config.load_ablation(FILE, seeds=[0], epochs=1)


def test_the_runs_on_photographs_come_back_as_they_were_and_name_a_profile():
    written = document()["photographs"]
    assert json.loads(json.dumps(dataclasses.asdict(config.load_photographs(FILE)))) == written
    assert written["profile"] in PROFILES


def test_bad_runs_on_photographs_are_named_in_one_line(edited: Callable[..., Path]):
    message = said(lambda: config.load_photographs(edited("photographs", "seeds", to=[0, 0])))
    assert "params.yaml: photographs.seeds: [0, 0]" in message
    assert "photographs.jobs: 0" in said(lambda: config.load_photographs(edited("photographs", "jobs", to=0)))


def test_other_seeds_than_the_files_can_be_swept():
    assert config.load_sweep(FILE, seeds=[7]).seeds == (7,)
    assert config.load_sweep(FILE, seeds=[7]).strategies == config.load_sweep(FILE).strategies
    assert "sweep.seeds" in said(lambda: config.load_sweep(FILE, seeds=[7, 7]))


def test_the_levels_of_a_factor_are_the_values_that_its_option_can_take():
    assert options.levels("feature") == ("normed", "residual", "delta", "B", "C")
    assert get_args(options.Factor) == tuple(field.name for field in dataclasses.fields(FusionOptions))
    for factor in get_args(options.Factor):
        assert getattr(FusionOptions(), factor) in options.levels(factor)


def test_the_fusion_section_has_one_rule_for_each_strategy_and_each_comes_back_as_it_was():
    written = document()["fusion"]
    assert tuple(written) == (*STRATEGIES, "adaptive")
    for strategy in STRATEGIES:
        loaded = dataclasses.asdict(config.load("default", strategy=strategy, path=FILE).fusion)
        assert {key: value for key, value in loaded.items() if value is not None} == written[strategy]
    budget = dataclasses.asdict(config.load_adaptive("default", path=FILE))
    assert {key: value for key, value in budget.items() if value is not None} == written["adaptive"]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({}, ("fusion.adaptive", "nothing given", "total, memory, flops")),
        ({"total": 3, "memory": 0.5}, ("fusion.adaptive", "'total': 3, 'memory': 0.5", "exactly one")),
        ({"memory": 0}, ("fusion.adaptive.memory", "0", "greater than 0")),
        ({"flops": 1.5}, ("fusion.adaptive.flops", "1.5", "less than or equal to 1")),
        ({"memory": "60%"}, ("fusion.adaptive.memory", "'60%'", "number")),
        ({"r": 3}, ("fusion.adaptive", "'r'", "allowed: flops, memory, total")),
    ],
)
def test_a_budget_that_is_none_is_refused(edited: Callable[..., Path], rule: dict, expected: tuple[str, ...]):
    path = edited("fusion", "adaptive", to=rule)
    message = said(lambda: config.load_adaptive("default", path=path))
    assert all(part in message for part in expected)


def test_a_profile_replaces_the_budget_whole(edited: Callable[..., Path]):
    path = edited("profiles", "smoke", "fusion", to={"adaptive": {"memory": 0.5}})
    assert config.load_adaptive("smoke", path=path) == config.AdaptiveRule(memory=0.5)
    assert config.load_adaptive("default", path=path).memory is None


def test_no_section_is_left_untested():
    assert {*SECTIONS, "sweep", "ablation", "photographs", "fusion", "profile", "profiles"} == set(document())


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_profile_loads_with_every_strategy_and_changes_what_it_names_only(profile: str, strategy: str):
    p = config.load(profile, strategy=strategy, path=FILE)
    assert (p.profile, p.strategy) == (profile, strategy)
    base, changes = document(), document()["profiles"][profile]
    for section in SECTIONS:
        assert p.as_dict()[section] == {**base[section], **changes.get(section, {})}
    rule = changes.get("fusion", {}).get(strategy, base["fusion"][strategy])
    assert {key: value for key, value in p.as_dict()["fusion"].items() if value is not None} == rule


def test_without_a_profile_the_one_that_the_file_names_is_taken(edited: Callable[..., Path]):
    assert config.load(strategy="all", path=FILE).profile == document()["profile"]
    assert config.load(strategy="all", path=edited("profile", to="smoke")).profile == "smoke"


def test_a_resolved_configuration_can_be_rebuilt_from_the_record_of_it():
    p = config.load("smoke", strategy="upper", path=FILE)
    record = json.loads(json.dumps(p.as_dict()))
    rebuilt = Params(
        profile=record["profile"],
        strategy=record["strategy"],
        fusion=FusionRule(**record["fusion"]),
        **{section: kind(**record[section]) for section, kind in SECTIONS.items()},
    )
    assert rebuilt == p
    assert rebuilt.digest(3) == p.digest(3)


def test_numbers_are_read_by_yaml_1_2(tmp_path: Path):
    path = tmp_path / "params.yaml"
    path.write_text(re.sub(r"\blr: \S+", "lr: 1e-3", TEXT, count=1))
    assert config.load(strategy="none", path=path).train.lr == 0.001
    path.write_text(TEXT.replace("flip: false", "flip: no", 1))
    assert "data.flip: 'no'" in said(lambda: config.load(strategy="none", path=path))


def test_a_file_that_changed_is_read_again(tmp_path: Path):
    path = tmp_path / "params.yaml"
    path.write_text(TEXT)
    before = config.load(strategy="none", path=path)
    path.write_text(re.sub(r"batch_size: \d+", "batch_size: 999", TEXT, count=1))
    assert before.train.batch_size != 999
    assert config.load(strategy="none", path=path).train.batch_size == 999


def test_reading_parameters_imports_no_torch():
    code = "import sys; from famba import config; config.load(strategy='all'); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=FILE.parent, check=True)


# the digest

OTHER: dict[tuple[str, str], Any] = {
    ("data", "dataset"): "folder",
    ("data", "root"): "images",
    ("data", "limit"): 7,
    ("data", "flip"): True,
    ("data", "eval_crop"): 0.875,
    ("data", "normalise"): "imagenet",
    ("data", "augment"): "timm",
    ("data", "rand_augment"): "rand-m9",
    ("model", "name"): "vim_tiny",
    ("model", "depth"): 3,
    ("model", "d_model"): 8,
    ("model", "d_state"): 8,
    ("model", "cls_position"): "head",
    ("model", "pool"): "mean",
    ("model", "average_directions"): False,
    ("train", "choose"): "best",
    ("options", "order"): "append",
    ("options", "weighting"): "mean",
    ("options", "feature"): "delta",
    ("options", "position"): "after_scan",
    ("options", "matching"): "random",
    ("options", "reduction"): "drop",
    ("train", "init_from"): "weights.safetensors",
    ("train", "device_batch"): 8,
    ("train", "lr_batch"): 512,
    ("train", "betas"): (0.8, 0.999),
    ("train", "clip_grad_norm"): 2.0,
    ("train", "ema_decay"): 0.99,
    ("train", "precision"): "bf16",
    ("train", "device"): "cuda",
    ("train", "backend"): "reference",
    ("train", "threads"): None,
    ("fusion", "total"): 5,
    ("fusion", "schedule"): (1, 2),
    ("fusion", "first_layer"): 2,
    ("fusion", "last_layer"): 3,
}


def test_the_digest_changes_with_every_single_value_that_makes_the_result_and_with_the_seed():
    p = config.load("default", strategy="all", path=FILE)
    digests = [p.digest(0), p.digest(1)]
    digests.append(dataclasses.replace(p, profile="smoke").digest(0))
    digests.append(dataclasses.replace(p, strategy="lower").digest(0))
    for section in (*SECTIONS, "fusion"):
        part = getattr(p, section)
        for field in dataclasses.fields(part):
            if field.name in config.EXECUTION.get(section, ()):
                continue
            old = getattr(part, field.name)
            new = OTHER[section, field.name] if (section, field.name) in OTHER else old + type(old)(1) / 4
            new = type(old)(new + 1) if isinstance(old, int) and isinstance(new, float) else new
            assert new != old, f"{section}.{field.name}"
            changed = dataclasses.replace(part, **{field.name: new})
            digests.append(dataclasses.replace(p, **{section: changed}).digest(0))
    assert len(digests) > 35
    assert len(set(digests)) == len(digests)


def test_a_run_may_go_on_under_the_same_digest_whatever_carries_it_out():
    p = config.load("default", strategy="all", path=FILE)
    other = {"workers": 3, "memory_mib": 1, "processes": 2, "tensorboard": True}
    assert {key for keys in config.EXECUTION.values() for key in keys} == set(other)
    for section, keys in config.EXECUTION.items():
        changed = dataclasses.replace(getattr(p, section), **{key: other[key] for key in keys})
        assert changed != getattr(p, section)
        assert dataclasses.replace(p, **{section: changed}).digest(0) == p.digest(0)


def test_the_number_of_processes_may_be_given_instead_of_the_files():
    p = config.load("smoke", strategy="all", processes=4, path=FILE)
    assert p.train.processes == 4
    assert p.digest(0) == config.load("smoke", strategy="all", path=FILE).digest(0)
    message = said(lambda: config.load("smoke", strategy="all", processes=0, path=FILE))
    assert "params.yaml: train.processes: 0" in message


def test_resolved_parameters_come_back_from_the_file_that_a_run_has(tmp_path: Path):
    p = config.load("paper", strategy="upper", path=FILE)
    path = tmp_path / "params.json"
    path.write_text(json.dumps(p.as_dict()))
    assert config.read_resolved(path) == p


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda d: d["train"].update(lr="fast"), ("params.json: train.lr: 'fast'", "number")),
        (lambda d: d["train"].pop("lr"), ("params.json: train.lr: missing",)),
        (lambda d: d.update(extra=1), ("params.json: unknown key 'extra'",)),
        (lambda d: d.pop("data"), ("params.json: data: None is not a section",)),
        (lambda d: d.update(strategy=3), ("params.json: strategy: 3 is not text",)),
    ],
)
def test_resolved_parameters_that_are_wrong_are_named_in_one_line(tmp_path: Path, change, parts: tuple[str, ...]):
    document = config.load("smoke", strategy="upper", path=FILE).as_dict()
    change(document)
    path = tmp_path / "params.json"
    path.write_text(json.dumps(document))
    message = said(lambda: config.read_resolved(path))
    assert all(part in message for part in parts)


def test_a_file_of_resolved_parameters_that_is_none_is_named(tmp_path: Path):
    assert "cannot be read" in said(lambda: config.read_resolved(tmp_path / "none.json"))
    (tmp_path / "params.json").write_text("{")
    assert "params.json: not readable as JSON" in said(lambda: config.read_resolved(tmp_path / "params.json"))


def test_the_digest_of_the_same_values_is_the_same_in_another_process():
    p = config.load("smoke", strategy="all", path=FILE)
    code = "from famba import config; print(config.load('smoke', strategy='all').digest(4))"
    out = subprocess.run([sys.executable, "-c", code], cwd=FILE.parent, check=True, capture_output=True, text=True)
    assert out.stdout.strip() == p.digest(4)
    assert len(p.digest(4)) == 20


# bad input: one line with the key, the value and what is allowed


@pytest.mark.parametrize(
    ("keys", "value", "parts"),
    [
        (("data", "img_size"), "8", ("data.img_size", "'8'", "integer")),
        (("data", "img_size"), 8.0, ("data.img_size", "8.0", "integer")),
        (("data", "img_size"), True, ("data.img_size", "True", "integer")),
        (("data", "img_size"), None, ("data.img_size", "None", "integer")),
        (("data", "img_size"), 0, ("data.img_size", "0", "greater than or equal to 1")),
        (("data", "val_fraction"), 0, ("data.val_fraction", "0", "greater than 0")),
        (("data", "val_fraction"), 1, ("data.val_fraction", "1", "less than 1")),
        (("data", "split_seed"), -1, ("data.split_seed", "-1", "greater than or equal to 0")),
        (("data", "flip"), 0, ("data.flip", "0", "boolean")),
        (("data", "limit"), 0, ("data.limit", "0", "greater than or equal to 1")),
        (("data", "root"), ["a", "b"], ("data.root", "['a', 'b']", "string")),
        (("data", "sise"), 8, ("data", "'sise'", "allowed", "img_size")),
        (("data", 8), 8, ("data", "unknown key 8", "allowed", "img_size")),
        (("model", "cls_position"), "tail", ("model.cls_position", "'tail'", "'middle', 'head' or 'none'")),
        (("model", "pool"), None, ("model.pool", "None", "'cls' or 'mean'")),
        (("options", "order"), "sorted", ("options.order", "'sorted'", "'scan' or 'append'")),
        (("options", "feature"), "b", ("options.feature", "'b'", "'normed', 'residual', 'delta', 'B' or 'C'")),
        (("train", "lr"), "1e-3", ("train.lr", "'1e-3'", "number")),
        (("train", "lr"), 0.0, ("train.lr", "0.0", "greater than 0")),
        (("train", "lr"), float("nan"), ("train.lr", "nan", "finite")),
        (("train", "lr"), float("inf"), ("train.lr", "inf", "finite")),
        (("train", "min_lr"), 1.0, ("train.min_lr", "1.0", "at most train.lr")),
        (("train", "warmup_epochs"), 999, ("train.warmup_epochs", "999", "at most train.epochs")),
        (("train", "epochs"), 0, ("train.epochs", "0 trains nothing", "train.init_from")),
        (("train", "epochs"), -1, ("train.epochs", "-1", "greater than or equal to 0")),
        (("train", "init_from"), "", ("train.init_from", "''", "at least 1 character")),
        (("train", "init_from"), 3, ("train.init_from", "3", "string")),
        (("train", "betas"), [0.9], ("train.betas", "[0.9]", "too few")),
        (("train", "betas"), [0.9, 0.9, 0.9], ("train.betas", "[0.9, 0.9, 0.9]", "at most 2")),
        (("train", "betas"), [0.9, 1.0], ("train.betas", "[0.9, 1.0]", "less than 1")),
        (("train", "betas"), "ab", ("train.betas", "'ab'", "tuple")),
        (("train", "ema_decay"), 1.0, ("train.ema_decay", "1.0", "less than 1")),
        (("train", "precision"), "fp16", ("train.precision", "'fp16'", "'fp32' or 'bf16'")),
        (("train", "device_batch"), 5, ("train.batch_size", "32", "multiple", "5")),
        (("train", "processes"), 3, ("train.batch_size", "32", "multiple", "train.processes", "3")),
        (("train", "lr_batch"), 0, ("train.lr_batch", "0", "greater than or equal to 1")),
        (("data", "erase"), 1.5, ("data.erase", "1.5", "less than or equal to 1")),
        (("data", "mixup"), -0.1, ("data.mixup", "-0.1", "greater than or equal to 0")),
        (("data", "augment"), "torchvision", ("data.augment", "'torchvision'", "'tensor' or 'timm'")),
        (("data", "augment"), "timm", ("data.shift", "1", "must be 0")),
        (("data", "rand_augment"), "rand-m9", ("data.rand_augment", "'rand-m9'", "data.augment: timm")),
        (("data", "color_jitter"), 0.3, ("data.color_jitter", "0.3", "data.augment: timm")),
        (("train", "threads"), 0, ("train.threads", "0", "greater than or equal to 1")),
        (("train",), 3, ("train", "3", "section")),
        (("train",), None, ("train", "None", "section")),
        (("fusion", "all"), 4, ("fusion.all", "4", "section")),
        (("fusion", "all"), {}, ("fusion.all", "nothing given", "r, total, schedule")),
        (("fusion", "all"), {"r": 1, "total": 2}, ("fusion.all", "'r': 1, 'total': 2", "exactly one")),
        (("fusion", "all"), {"r": -1}, ("fusion.all.r", "-1", "greater than or equal to 0")),
        (("fusion", "all"), {"rr": 1}, ("fusion.all", "'rr'", "allowed", "total")),
        (("fusion", "all"), {"schedule": [1, "x"]}, ("fusion.all.schedule", "[1, 'x']", "integer")),
        (("fusion", "all"), {"r": 1, "first_layer": 0}, ("fusion.all.first_layer", "0", "equal to 1")),
        (("fusion", "every"), {"r": 1}, ("fusion", "'every'", "interleaved")),
        (("fusion",), [], ("fusion", "[]", "section")),
        (("extra",), {}, ("'extra'", "allowed", "data, fusion, model")),
        (("profile",), "huge", ("profile", "'huge'", *PROFILES)),
        (("profile",), ["smoke"], ("profile", "['smoke']", *PROFILES)),
        (("profile",), None, ("profile", "None", *PROFILES)),
        (("profiles",), "smoke", ("profiles", "'smoke'", "section")),
        (("profiles", 3), {}, ("profiles", "3", "string")),
        (("profiles", "default"), None, ("profiles.default", "None", "section")),
        (("profiles", "default"), {"dta": {}}, ("profiles.default", "'dta'", "data, fusion, model")),
        (("profiles", "default"), {"sweep": {}}, ("profiles.default", "'sweep'", "data, fusion, model")),
        (("profiles", "default"), {"data": None}, ("profiles.default.data", "None", "section")),
        (("profiles", "default"), {"data": {"lmit": 1}}, ("profiles.default.data", "'lmit'", "limit")),
        (("profiles", "default"), {"data": {"limit": "x"}}, ("profiles.default.data.limit", "'x'", "integer")),
        (("profiles", "default"), {"fusion": {"all": {"r": "x"}}}, ("profiles.default.fusion.all.r", "'x'", "integer")),
        (("profiles", "default"), {"fusion": {"most": {}}}, ("profiles.default.fusion", "'most'", "interleaved")),
    ],
)
def test_a_bad_value_is_named_in_one_line_with_its_key_and_what_is_allowed(
    edited: Callable[..., Path], keys: tuple[Any, ...], value: Any, parts: tuple[str, ...]
):
    path = edited(*keys, to=value)
    message = said(lambda: config.load(strategy="all", path=path))
    assert message.startswith("params.yaml: ")
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("seeds", [], ("sweep.seeds", "[]", "at least 1")),
        ("seeds", 3, ("sweep.seeds", "3", "tuple")),
        ("seeds", [0, "x"], ("sweep.seeds", "[0, 'x']", "integer")),
        ("seeds", [-1], ("sweep.seeds", "[-1]", "greater than or equal to 0")),
        ("seeds", [2**32], ("sweep.seeds", "[4294967296]", "less than 4294967296")),
        ("seeds", [0, 1, 0], ("sweep.seeds", "[0, 1, 0]", "only once")),
        ("strategies", [], ("sweep.strategies", "[]", "at least 1")),
        ("strategies", ["none", "most"], ("sweep.strategies", "'most'", "'interleaved'")),
        ("strategies", ["all", "all"], ("sweep.strategies", "['all', 'all']", "only once")),
        ("seed", [0], ("sweep", "'seed'", "seeds, strategies")),
    ],
)
def test_a_bad_sweep_is_named_in_one_line(edited: Callable[..., Path], key: str, value: Any, parts: tuple[str, ...]):
    path = edited("sweep", key, to=value)
    message = said(lambda: config.load_sweep(path))
    assert all(part in message for part in ("params.yaml", *parts))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (("data", "shift"), "params.yaml: data.shift: missing"),
        (("train", "lr"), "params.yaml: train.lr: missing"),
        (("model", "name"), "params.yaml: model.name: missing"),
        (("fusion", "all"), "params.yaml: fusion.all: missing; give {r: ...} or {total: ...} or {schedule: ...}"),
        (("data",), "params.yaml: data: None is not a section of `key: value` lines"),
        (("profiles",), "params.yaml: profiles: None is not a section of `key: value` lines"),
    ],
)
def test_what_is_missing_is_named(edited: Callable[..., Path], keys: tuple[str, ...], expected: str):
    path = edited(*keys, delete=True)
    assert said(lambda: config.load(strategy="all", path=path)) == expected


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("strategy", "most", ("ablation.strategy", "'most'", "'interleaved'")),
        ("strategy", "none", ("ablation.strategy", "'none' fuses nothing")),
        ("strategies", ["all", "none"], ("ablation.strategies", "'none' fuses nothing")),
        ("strategies", ["all", "all"], ("ablation.strategies", "only once")),
        ("strategies", ["upper"], ("ablation.strategies", "'upper' is ablation.strategy already")),
        ("factors", [], ("ablation.factors", "at least 1")),
        ("factors", ["colour"], ("ablation.factors", "'colour'", "'weighting'")),
        ("controls", ["colour"], ("ablation.controls", "'colour'", "'reduction'")),
        ("controls", ["matching", "matching"], ("ablation.controls", "only once")),
        ("factors", ["order", "order"], ("ablation.factors", "only once")),
        ("seeds", [], ("ablation.seeds", "at least 1")),
        ("seeds", [3, 3], ("ablation.seeds", "only once")),
        ("epochs", 0, ("ablation.epochs", "0", "greater than or equal to 1")),
        ("jobs", None, ("ablation.jobs", "None", "integer")),
        ("threads", 2, ("ablation", "'threads'", "controls, epochs, factors, jobs")),
    ],
)
def test_a_bad_ablation_is_named_in_one_line(edited: Callable[..., Path], key: str, value: Any, parts: tuple[str, ...]):
    path = edited("ablation", key, to=value)
    in_file = said(lambda: config.load_ablation(path))
    assert all(part in in_file for part in ("params.yaml", *parts))
    assert said(lambda: config.load_ablation(FILE, **{key: value})) == in_file


def test_an_ablation_of_one_strategy_needs_no_others():
    assert config.load_ablation(FILE, strategies=[]).strategies == ()


def test_a_missing_sweep_is_named(edited: Callable[..., Path]):
    path = edited("sweep", delete=True)
    assert said(lambda: config.load_sweep(path)).startswith("params.yaml: sweep: None")


def test_an_unknown_strategy_or_profile_is_named_with_those_that_there_are():
    assert said(lambda: config.load(strategy="most", path=FILE)) == (
        "strategy: 'most' is not one of none, all, interleaved, lower, upper"
    )
    message = said(lambda: config.load("big", strategy="all", path=FILE))
    assert message == f"params.yaml: profile: 'big' is not one of {', '.join(PROFILES)}"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"- 1\n",
        b"just words\n",
        b"data: [1\n",
        b"data:\n\t- 1\n",
        b"data: {a: 1, a: 2}\n",
        b"data: *nothing\n",
        b"data: !!python/object:os.system {}\n",
        b"data: 2026-13-01\n",
        b"\xff\xfe\x00",
    ],
)
def test_a_file_that_is_no_yaml_mapping_is_named_in_one_line(tmp_path: Path, raw: bytes):
    path = tmp_path / "params.yaml"
    path.write_bytes(raw)
    assert said(lambda: config.load(strategy="all", path=path)).startswith("params.yaml: ")


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    path = tmp_path / "none.yaml"
    assert said(lambda: config.load(strategy="all", path=path)) == f"{path}: cannot be read (No such file or directory)"


# weights to start from


def test_nothing_is_trained_where_there_are_weights_whatever_the_warm_up(edited: Callable[..., Path]):
    changes = {"epochs": 0, "init_from": "weights.safetensors", "warmup_epochs": 3}
    train = config.load("default", strategy="all", path=edited("profiles", "default", to={"train": changes})).train
    assert (train.epochs, train.init_from) == (0, "weights.safetensors")


def test_the_weights_to_start_from_are_a_file_in_the_repository_known_by_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    p = config.load("finetune", strategy="all", path=FILE)
    assert p.train.init_from is not None
    own = dataclasses.replace(p, train=dataclasses.replace(p.train, init_from="runs/of {seed}/{name}"))
    path = tmp_path / "runs" / "of 4" / "{name}"
    assert own.init_path(4) == path
    assert said(lambda: own.init_sha256(4)) == f"{path}: cannot be read (No such file or directory)"
    path.parent.mkdir(parents=True)
    for content in (b"weights", b"other weights"):
        path.write_bytes(content)
        assert own.init_sha256(4) == hashlib.sha256(content).hexdigest()
    assert config.load("default", strategy="all", path=FILE).init_sha256(4) is None


# dataclasses and the root


@pytest.mark.parametrize("kind", [*SECTIONS.values(), FusionRule, SweepParams, Params])
def test_parameters_cannot_be_changed_after_they_are_made(kind: type):
    assert kind.__dataclass_params__.frozen


def test_the_root_is_the_nearest_folder_above_that_holds_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "params.yaml").touch()  # alone it makes no root
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).touch()
    monkeypatch.chdir(inner)
    assert config.root() == tmp_path


def test_outside_any_checkout_the_root_is_the_one_that_the_package_lies_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert config.root() == FILE.parent
    monkeypatch.setattr(config, "__file__", str(tmp_path / "site-packages" / "famba" / "config.py"))
    assert said(config.root).startswith(f"{tmp_path}: no params.yaml and dvc.yaml")

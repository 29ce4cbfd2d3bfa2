import copy
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
from dvc.utils.serialize import modify_yaml
from refusals import refusal
from ruamel.yaml import YAML

from famba import config
from famba.config import DataParams, ModelParams, SweepParams, TrainParams
from famba.fusion import options
from famba.fusion.options import FusionOptions
from famba.fusion.strategies import STRATEGIES

FILE = Path(__file__).parent.parent / "params.yaml"
TEXT = FILE.read_text(encoding="utf-8")
DOCUMENT = YAML(typ="safe", pure=True).load(TEXT)
SECTIONS: dict[str, Any] = {"data": DataParams, "model": ModelParams, "options": FusionOptions, "train": TrainParams}


def document() -> dict[str, Any]:
    return copy.deepcopy(DOCUMENT)


ABLATION = {"strategies": ["none", "all"], "seeds": [0]}
CLAIM = {"says": "x", "source": "y", "quantity": "time_ratio", "strategies": ["all"], "below": 1.0}
PROFILES = tuple(document()["profiles"])


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """A copy of params.yaml with one value changed: edited("data", "shift", to=3); `delete` takes the key out."""

    def edit(*keys: Any, to: Any = None, delete: bool = False) -> Path:
        changed = document()
        if keys[0] not in ("ablation", "claims"):  # more than half of the file, which takes long to parse
            changed |= {"ablation": {"x": ABLATION}, "claims": {"x": CLAIM}}
        section = changed
        for key in keys[:-1]:
            section = section[key]
        if delete:
            del section[keys[-1]]
        else:
            section[keys[-1]] = to
        path = tmp_path / "params.yaml"
        path.write_text(json.dumps(changed, sort_keys=True).replace("NaN", ".nan"), encoding="utf-8")  # YAML, too
        return path

    return edit


# the file as it is

LOADED = {"sweep": config.load_sweep}


@pytest.mark.parametrize("section", [*SECTIONS, *LOADED])
def test_a_section_spells_out_every_field_of_its_dataclass_and_comes_back_as_it_was(section):
    written = document()[section]
    loaded = LOADED[section](FILE) if section in LOADED else SECTIONS[section](**written)
    unvaried = {"varied": [], "changes": {}} if section in LOADED else {}
    assert set(written | unvaried) == {field.name for field in dataclasses.fields(loaded)}
    assert json.loads(json.dumps(dataclasses.asdict(loaded))) == written | unvaried


def test_ablations_come_back_as_they_were_and_their_variants_are_runs_of_the_profile():
    written = document()["ablation"]
    found = config.load_ablations(FILE)
    optional = {"profile": None, "varied": [], "changes": {}}
    for name, asked in found.items():
        assert json.loads(json.dumps(dataclasses.asdict(asked))) == optional | written[name]
        assert {*asked.varied, "none"} <= set(asked.strategies)
        params = asked.params("default")
        assert {p.profile for p in params.values()} == {asked.profile or "default"}
        assert len(params) == len(asked.strategies) + len(asked.varied) * len(asked.changes)
        assert len({p.digest(0) for p in params.values()}) == len(params), "two variants are the same run"


def test_a_variant_is_a_strategy_with_a_change_and_has_both_names():
    changes = {
        "early": {"fusion.upper.first_layer": 1, "fusion.upper.total": 20},
        "append": {"options.order": "append"},
    }
    asked = SweepParams(strategies=("upper", "none"), seeds=(0,), varied=("upper",), changes=changes)
    params = asked.params("default")
    assert list(params) == ["none", "upper", "upper_early", "upper_append"]
    assert {p.strategy for p in params.values()} == {"none", "upper"}
    assert params["upper"] == config.load("default", strategy="upper")
    assert params["upper_early"].schedule(10) == [2] * 10
    assert params["upper_append"].options.order == "append"


def test_other_seeds_than_the_files_can_be_swept():
    assert config.load_sweep(FILE, seeds=[7]).seeds == (7,)
    assert config.load_sweep(FILE, seeds=[7]).strategies == config.load_sweep(FILE).strategies


def test_the_levels_of_a_factor_are_the_values_that_its_option_can_take():
    assert options.levels("feature") == ("normed", "residual", "delta", "B", "C")
    assert get_args(options.Factor) == tuple(field.name for field in dataclasses.fields(FusionOptions))
    for factor in get_args(options.Factor):
        assert getattr(FusionOptions(), factor) in options.levels(factor)


def test_the_fusion_section_has_one_rule_for_each_strategy_and_each_comes_back_as_it_was():
    written = document()["fusion"]
    assert tuple(written) == (*STRATEGIES, "by_logits", "by_similarity", "adaptive")
    for strategy in STRATEGIES:
        loaded = dataclasses.asdict(config.load("default", strategy=strategy, path=FILE).fusion)
        assert {key: value for key, value in loaded.items() if value is not None} == written[strategy]
    budget = dataclasses.asdict(config.load_adaptive("default", path=FILE))
    assert {key: value for key, value in budget.items() if value is not None} == written["adaptive"]


def test_a_profile_replaces_the_budget_whole(edited):
    path = edited("profiles", "smoke", "fusion", to={"adaptive": {"memory": 0.5}})
    assert config.load_adaptive("smoke", path=path) == config.AdaptiveRule(memory=0.5)
    assert config.load_adaptive("default", path=path).memory is None


def test_no_section_is_left_untested():
    assert {*SECTIONS, "sweep", "ablation", "claims", "fusion", "profile", "profiles"} == set(document())


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_profile_loads_with_every_strategy_and_changes_what_it_names_only(profile, strategy):
    p = config.load(profile, strategy=strategy, path=FILE)
    assert (p.profile, p.strategy) == (profile, strategy)
    base, changes = document(), document()["profiles"][profile]
    for section in SECTIONS:
        assert p.as_dict()[section] == {**base[section], **changes.get(section, {})}
    rule = changes.get("fusion", {}).get(strategy, base["fusion"][strategy])
    assert {key: value for key, value in p.as_dict()["fusion"].items() if value is not None} == rule


def test_without_a_profile_the_one_that_the_file_names_is_taken(edited):
    assert config.load(strategy="all", path=FILE).profile == document()["profile"]
    assert config.load(strategy="all", path=edited("profile", to="smoke")).profile == "smoke"


def test_numbers_are_read_by_yaml_1_2(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(re.sub(r"\blr: \S+", "lr: 1e-3", TEXT, count=1))
    assert config.load(strategy="none", path=path).train.lr == 0.001
    path.write_text(TEXT.replace("flip: false", "flip: no", 1))
    assert "data.flip: 'no'" in refusal(lambda: config.load(strategy="none", path=path))


def test_a_file_that_changed_is_read_again(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(TEXT)
    before = config.load(strategy="none", path=path)
    path.write_text(re.sub(r"batch_size: \d+", "batch_size: 999", TEXT, count=1))
    assert before.train.batch_size != 999
    assert config.load(strategy="none", path=path).train.batch_size == 999


# the digest


def test_the_digest_changes_with_every_single_value_that_makes_the_result_and_with_the_seed():
    p = config.load("default", strategy="all", path=FILE)
    digests = [p.digest(0), p.digest(1)]
    digests += [dataclasses.replace(p, **{key: "lower"}).digest(0) for key in ("profile", "strategy")]
    for section in (*SECTIONS, "fusion"):
        for field in dataclasses.fields(getattr(p, section)):
            if field.name not in config.EXECUTION.get(section, ()):
                changed = copy.deepcopy(p)
                other = [getattr(getattr(p, section), field.name), "other"]  # whether or not it fits the rest
                object.__setattr__(getattr(changed, section), field.name, other)
                digests.append(changed.digest(0))
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
    message = refusal(lambda: config.load("smoke", strategy="all", processes=0, path=FILE))
    assert "params.yaml: train.processes: 0" in message


def test_resolved_parameters_come_back_from_the_file_that_a_run_has(tmp_path):
    p = config.load("paper", strategy="upper", path=FILE)
    path = tmp_path / "params.json"
    path.write_text(json.dumps(p.as_dict()))
    assert config.read_resolved(path) == p


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda d: d["train"].update(lr="fast"), ("params.json: train.lr: 'fast'", "number")),
        (lambda d: d["train"].pop("lr"), ("params.json: train.lr: missing",)),
        (lambda d: d.update(extra=1), ("params.json: extra: unknown key",)),
        (lambda d: d.pop("data"), ("params.json: data: missing",)),
        (lambda d: d.update(strategy=3), ("params.json: strategy: 3: Input should be a valid string",)),
        (lambda d: d["data"].update(dataset="x" * 55_000_000), ("params.json: data.dataset: 'xxx", "at most 1000")),
    ],
)
def test_resolved_parameters_that_are_wrong_are_named_in_one_line(tmp_path, change, parts):
    document = config.load("smoke", strategy="upper", path=FILE).as_dict()
    change(document)
    path = tmp_path / "params.json"
    path.write_text(json.dumps(document))
    message = refusal(lambda: config.read_resolved(path))
    assert all(part in message for part in parts)
    assert len(message) < 400


def test_a_file_of_resolved_parameters_that_is_none_is_named(tmp_path):
    assert "cannot be read" in refusal(lambda: config.read_resolved(tmp_path / "none.json"))
    (tmp_path / "params.json").write_text("{")
    assert "params.json: not readable as JSON" in refusal(lambda: config.read_resolved(tmp_path / "params.json"))


def test_the_digest_of_the_same_values_is_the_same_in_another_process():
    p = config.load("smoke", strategy="all", path=FILE)
    code = "from famba import config; print(config.load('smoke', strategy='all').digest(4))"
    out = subprocess.run([sys.executable, "-c", code], cwd=FILE.parent, check=True, capture_output=True, text=True)
    assert out.stdout.strip() == p.digest(4)
    assert len(p.digest(4)) == 20


def test_dvc_rewrites_the_file_with_the_changed_line_alone(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(TEXT)
    with modify_yaml(str(path)) as content:  # as `dvc exp run -S fusion.upper.r=3` does
        content["fusion"]["upper"]["r"] = 3
    before, after = TEXT.splitlines(), path.read_text().splitlines()
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert [old.replace("{r: 6", "{r: 3") for old, _ in changed] == [new for _, new in changed]
    assert len(changed) == 1
    assert config.load(strategy="upper", path=path).fusion.r == 3


# bad input: one line with the key, the value and what is allowed


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.img_size", "8", "data.img_size: '8': Input should be a valid integer"),
        ("data.img_size", 8.0, "data.img_size: 8.0: Input should be a valid integer"),
        ("data.img_size", True, "data.img_size: True: Input should be a valid integer"),
        ("data.img_size", None, "data.img_size: None: Input should be a valid integer"),
        ("data.img_size", 0, "data.img_size: 0: Input should be greater than or equal to 1"),
        ("data.val_fraction", 1, "data.val_fraction: 1: Input should be less than 1"),
        ("data.flip", 0, "data.flip: 0: Input should be a valid boolean"),
        ("data.sise", 8, "data.sise: unknown key; allowed: augment, color_jitter, cutmix, dataset, "),
        ("data.augment", "timm", "data.shift: 1: must be 0 with data.augment: timm, which crops by itself"),
        ("data.rand_augment", "rand-m9", "data.rand_augment: 'rand-m9': only data.augment: timm does that"),
        ("data.color_jitter", 0.3, "data.color_jitter: 0.3: only data.augment: timm does that"),
        ("model.cls_position", "tail", "model.cls_position: 'tail': Input should be 'middle', 'head' or 'none'"),
        ("options.order", "sorted", "options.order: 'sorted': Input should be 'scan' or 'append'"),
        ("train.lr", "1e-3", "train.lr: '1e-3': Input should be a valid number"),
        ("train.lr", float("nan"), "train.lr: nan: Input should be a finite number"),
        ("train.min_lr", 1.0, "train.min_lr: 1.0: must be at most train.lr, which train.lr_batch may scale, 0.005"),
        ("train.warmup_epochs", 999, "train.warmup_epochs: 999: must be at most train.epochs, 14"),
        ("train.epochs", 0, "train.epochs: 0: trains nothing; give train.init_from, the weights to evaluate"),
        ("train.init_from", "", "train.init_from: '': String should have at least 1 character"),
        ("train.betas", [0.9], "train.betas.1: missing"),
        ("train.betas", [0.9, 1.0], "train.betas.1: 1.0: Input should be less than 1"),
        ("train.betas", "ab", "train.betas: 'ab': Input should be a valid tuple"),
        (
            "train.device_batch",
            5,
            "train.batch_size: 32: must be a multiple of train.processes times train.device_batch",
        ),
        ("train.processes", 3, "train.batch_size: 32: must be a multiple of train.processes times train.device_batch"),
        ("train", 3, "train: 3 is not a section of `key: value` lines"),
        ("fusion.all", 4, "fusion.all: 4 is not a section of `key: value` lines"),
        ("fusion.all", {}, "fusion.all: {}: exactly one of r, total, schedule is allowed"),
        ("fusion.all", {"r": 1, "total": 2}, "fusion.all: {'r': 1, 'total': 2}: exactly one of r, total, schedule is "),
        ("fusion.all", {"rr": 1}, "fusion.all.rr: unknown key; allowed: first_layer, last_layer, r, schedule, total"),
        ("fusion.all", {"schedule": [1, "x"]}, "fusion.all.schedule.1: 'x': Input should be a valid integer"),
        ("fusion.A-b", {"r": 1}, "fusion.A-b: 'A-b': String should match pattern '^[a-z][a-z0-9_]{0,39}$'"),
        ("fusion", [], "fusion: [] is not a section of `key: value` lines"),
        ("extra", {}, "extra: unknown key; allowed: ablation, claims, data, fusion, model, options, profile, "),
        ("profile", "huge", "profile: 'huge' is not one of cifar10, "),
        ("profiles.default", None, "profiles.default: None is not a section of `key: value` lines"),
        ("profiles.default", {"dta": {}}, "profiles.default.dta: 'dta': Input should be 'data', 'model', 'options', "),
        ("profiles.default", {"data": None}, "profiles.default.data: None is not a section of `key: value` lines"),
        ("profiles.default", {"data": {"lmit": 1}}, "profiles.default.data.lmit: unknown key; allowed: augment, "),
        ("profiles.default", {"data": {"limit": "x"}}, "profiles.default.data.limit: 'x': Input should be a valid in"),
        ("profiles.default", {"fusion": {"all": {"r": "x"}}}, "profiles.default.fusion.all.r: 'x': Input should be a "),
        ("profiles.default", {"fusion": {"most": {}}}, "profiles.default.fusion: 'most' is not one of fusion's: adap"),
        # what would be ignored, crash, hang or exhaust the machine
        ("data.root", "images", "data.root: 'images': must be null with data.dataset: digits"),
        ("data.root", "a\0b", r"data.root: 'a\x00b': String should match pattern"),
        ("data.img_size", 10**6, "data.img_size: 1000000: Input should be less than or equal to 4096"),
        ("data.workers", 10**5, "data.workers: 100000: Input should be less than or equal to 256"),
        ("data.mixup", 1e308, "data.mixup: 1e+308: Input should be less than or equal to 100"),
        ("model.depth", 10**6, "model.depth: 1000000: Input should be less than or equal to 1000"),
        ("model.d_model", 10**7, "model.d_model: 10000000: Input should be less than or equal to 8192"),
        ("model.d_state", 10**6, "model.d_state: 1000000: Input should be less than or equal to 256"),
        ("train.threads", 10**6, "train.threads: 1000000: Input should be less than or equal to 1024"),
        ("train.device", "cpu:7", "train.device: 'cpu:7': must be auto, cpu, cuda or cuda:N"),
        (
            "train.lr_batch",
            10**6,
            "train.min_lr: 1e-05: must be at most train.lr, which train.lr_batch may scale, 1.6e-07",
        ),
    ],
)
def test_a_bad_value_is_named_in_one_line_with_its_key_and_what_is_allowed(edited, key, value, message):
    path = edited(*key.split("."), to=value)
    assert refusal(lambda: config.load(strategy="all", path=path)).startswith(f"params.yaml: {message}")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("adaptive", {"memory": 0.5, "total": 3}, ": {'memory': 0.5, 'total': 3}: exactly one of total, memory, flops"),
        ("adaptive", {"memory": 0}, ".memory: 0: Input should be greater than 0"),
        ("adaptive", {"r": 3}, ".r: unknown key; allowed: flops, memory, total"),
        ("sweep", {"seeds": []}, ".seeds: []: Tuple should have at least 1 item"),
        ("sweep", {"seeds": 3}, ".seeds: 3: Input should be a valid tuple"),
        ("sweep", {"seeds": [2**32]}, ".seeds.0: 4294967296: Input should be less than 4294967296"),
        ("sweep", {"seeds": [0, 1, 0]}, ".seeds: [0, 1, 0]: each may be named only once"),
        ("sweep", {"strategies": ["none", "most"]}, ".strategies: 'most' is not one of all, "),
        ("sweep", {"seed": [0]}, ".seed: unknown key; allowed: changes, seeds, strategies, varied"),
        ("ablation", {"options": {"seeds": [0]}}, ".options.strategies: missing"),
        (
            "ablation",
            {"options": ABLATION | {"varied": ["most"]}},
            ".options.varied: 'most' is not one of all, ",
        ),
        ("ablation", {"options": ABLATION | {"changes": {"A": {}}}}, ".options.changes.A: 'A': String should match"),
        (
            "ablation",
            {"options": ABLATION | {"varied": ["all"], "changes": {"r1": {"fusion.all.r": 1}}}},
            ".tokens_per_layer.changes.r1: {'fusion.upper.r': 1} has the name of another ablation's change, ",
        ),
        ("ablation", {"options": 3}, ".options: 3 is not a section of `key: value` lines"),
        ("ablation", {"options": ABLATION | {"seeds": [0, 0]}}, ".options.seeds: [0, 0]: each may be named only once"),
        ("claims", {"faster": {"says": "x"}}, ".faster.source: missing"),
        (
            "claims",
            {"faster": CLAIM | {"against": ["most"]}},
            ".faster.against: 'most' is not one of all, ",
        ),
        (
            "claims",
            {"faster": CLAIM | {"ablation": "most"}},
            ".faster.ablation: 'most' is not one of calibration, options, ",
        ),
        (
            "claims",
            {"faster": CLAIM | {"ablation": "options", "against": ["all_most"]}},
            ".faster.against: 'all_most' is",
        ),
        ("claims", {"faster": CLAIM | {"at_same": "memory_ratio"}}, ".faster.at_same: 'memory_ratio': only for top1_p"),
        ("claims", {"faster": CLAIM | {"above": 1.0}}, ".faster: {'above': 1.0, 'below': 1.0, 'quantity': 'time"),
        (
            "claims",
            {"faster": CLAIM | {"quantity": None}},
            ".faster.quantity: None: Input should be 'top1_percent_diff', ",
        ),
        ("claims", {"faster": CLAIM | {"strategies": []}}, ".faster.strategies: []: Value should have at least 1 item"),
        ("claims", {"faster": CLAIM | {"below": 0}}, ".faster.below: 0: a ratio is compared with a positive number"),
    ],
)
def test_a_bad_section_of_several_runs_is_named_in_one_line(edited, key, value, message):
    path = edited("fusion", key, to=value) if key == "adaptive" else edited(key, to=document()[key] | value)
    loading = {
        "adaptive": config.load_adaptive,
        "sweep": config.load_sweep,
        "ablation": config.load_ablations,
        "claims": config.load_claims,
    }
    section = "fusion.adaptive" if key == "adaptive" else key
    assert refusal(lambda: loading[key](path=path)).startswith(f"params.yaml: {section}{message}")


@pytest.mark.parametrize(
    ("keys", "key"),
    [(("data", "shift"), "data.shift"), (("data",), "data"), (("profiles",), "profiles"), (("sweep",), "sweep")],
)
def test_what_is_missing_is_named(edited, keys, key):
    path = edited(*keys, delete=True)
    assert refusal(lambda: config.load(strategy="all", path=path)) == f"params.yaml: {key}: missing"


def test_an_unknown_strategy_or_profile_is_named_with_those_that_there_are():
    assert refusal(lambda: config.load(strategy="most", path=FILE)) == (
        "strategy: 'most' is not one of none, all, interleaved, lower, upper, by_logits, by_similarity"
    )
    message = refusal(lambda: config.load("big", strategy="all", path=FILE))
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
        b"data: &d {dataset: *d}\n",
        b"data: " + b"[" * 5000,
        b"data: " + b"9" * 5000,
        TEXT.replace("img_size: 8 ", "img_size: 0x" + "f" * 5000).encode(),
        b"a0: &a0 {k: 1}\n" + b"".join(b"a%d: &a%d {<<: [*a%d, *a%d]}\n" % (k, k, k - 1, k - 1) for k in range(1, 40)),
        b"data: {dataset: " + b"x" * 10**6 + b"}\n",
    ],
    ids=range(16),
)
def test_a_file_that_is_no_yaml_mapping_is_named_in_one_line(tmp_path, raw):
    path = tmp_path / "params.yaml"
    path.write_bytes(raw)
    message = refusal(lambda: config.load(strategy="all", path=path))
    assert message.startswith("params.yaml: ")
    assert len(message) < 400


def test_a_file_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "none.yaml"
    assert (
        refusal(lambda: config.load(strategy="all", path=path)) == f"{path}: cannot be read (No such file or directory)"
    )


# weights to start from


def test_nothing_is_trained_where_there_are_weights_whatever_the_warm_up(edited):
    changes = {"epochs": 0, "init_from": "weights.safetensors", "warmup_epochs": 3}
    train = config.load("default", strategy="all", path=edited("profiles", "default", to={"train": changes})).train
    assert (train.epochs, train.init_from) == (0, "weights.safetensors")


def test_the_weights_to_start_from_are_a_file_in_the_repository_known_by_its_content(tmp_path, monkeypatch):
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    p = config.load("finetune", strategy="all", path=FILE)
    assert p.train.init_from is not None
    own = dataclasses.replace(p, train=dataclasses.replace(p.train, init_from="runs/of {seed}/{name}"))
    path = tmp_path / "runs" / "of 4" / "{name}"
    assert own.init_path(4) == path
    assert refusal(lambda: own.init_sha256(4)) == f"{path}: cannot be read (No such file or directory)"
    path.parent.mkdir(parents=True)
    for content in (b"weights", b"other weights"):
        path.write_bytes(content)
        assert own.init_sha256(4) == hashlib.sha256(content).hexdigest()
    assert config.load("default", strategy="all", path=FILE).init_sha256(4) is None


# dataclasses and the root


def test_values_that_code_changes_are_checked_in_the_same_words():
    train = config.load("default", strategy="all", path=FILE).train
    assert refusal(lambda: dataclasses.replace(train, device="tpu")) == (
        "train.device: 'tpu': must be auto, cpu, cuda or cuda:N"
    )
    assert refusal(lambda: dataclasses.replace(train, device_batch=5)).startswith("train.batch_size: 32: must be a mul")


def test_the_root_is_the_nearest_folder_above_that_holds_both_files(tmp_path, monkeypatch):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "params.yaml").touch()  # alone it makes no root
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).touch()
    monkeypatch.chdir(inner)
    assert config.root() == tmp_path


def test_outside_any_checkout_the_root_is_the_one_that_the_package_lies_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.root() == FILE.parent
    monkeypatch.setattr(config, "__file__", str(tmp_path / "site-packages" / "famba" / "config.py"))
    assert config.root() == tmp_path
    (tmp_path / "site-packages" / "famba").mkdir(parents=True)
    (tmp_path / "site-packages" / "famba" / "params.yaml").write_bytes(FILE.read_bytes())  # as a wheel has it
    assert config.load_sweep() == config.load_sweep(FILE)


@pytest.mark.parametrize(
    ("setting", "section", "field", "value"),
    [
        ("train.lr=1e-3", "train", "lr", 0.001),
        ("data.limit=null", "data", "limit", None),
        ("fusion.upper.first_layer=3", "fusion", "r", 8),
        ("fusion.upper.total=9", "fusion", "r", None),
        ("fusion.upper.schedule=[0,1]", "fusion", "schedule", (0, 1)),
    ],
)
def test_a_setting_replaces_one_value_of_the_profile(setting, section, field, value):
    p = config.load("smoke", strategy="upper", given=config.parse_settings([setting]))
    assert getattr(getattr(p, section), field) == value


def test_a_setting_can_make_a_strategy():
    p = config.load(strategy="mine", given={"fusion.mine.schedule": [0] * 9 + [5]})
    assert p.schedule(10) == [0] * 9 + [5]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.epochs", "--set: 'train.epochs' is not KEY=VALUE"),
        ("epochs=3", "--set: 'epochs' is not data, model, options or train and a key"),
        ("fusion.upper=3", "--set: 'fusion.upper' is not "),
        ("train.epochz=3", "params.yaml: train.epochz: unknown key"),
        ("train.epochs=[", "train.epochs = '[': not readable as YAML"),
    ],
)
def test_a_setting_that_says_nothing_is_refused(setting, said):
    message = refusal(lambda: config.load(strategy="upper", given=config.parse_settings([setting])))
    assert message.startswith(said)

import copy
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.serialize import modify_yaml
from refusals import refusal
from ruamel.yaml import YAML

from famba import config
from famba.fusion.strategies import STRATEGIES
from famba.params import EXECUTION, AdaptiveRule

FILE = Path(__file__).parent.parent / "params.yaml"
TEXT = FILE.read_text(encoding="utf-8")
DOCUMENT = YAML(typ="safe", pure=True).load(TEXT)
SECTIONS = ("data", "model", "options", "train")
ABLATION = {"strategies": ["none", "all"], "seeds": [0]}
CLAIM = {"says": "x", "source": "y", "quantity": "time_ratio", "strategies": ["all"], "below": 1.0}
PROFILES = tuple(DOCUMENT["profiles"])
STRATEGY_NAMES = [name for name in DOCUMENT["fusion"] if name != "adaptive"]


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """A copy of params.yaml with one value changed: edited("data", "shift", to=3); `delete` takes the key out."""

    def edit(*keys: Any, to: Any = None, delete: bool = False) -> Path:
        changed = copy.deepcopy(DOCUMENT)
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


def test_ablations_come_back_as_they_were_and_their_variants_are_runs_of_the_profile():
    optional = {"profile": None, "varied": [], "changes": {}}
    for name, asked in config.load_ablations(FILE).items():
        assert json.loads(json.dumps(dataclasses.asdict(asked))) == optional | DOCUMENT["ablation"][name]
        assert {*asked.varied, "none"} <= set(asked.strategies)
        params = asked.params("default")
        assert {p.profile for p in params.values()} == {asked.profile or "default"}
        assert len(params) == len(asked.strategies) + len(asked.varied) * len(asked.changes)
        assert len({p.digest(0) for p in params.values()}) == len(params), "two variants are the same run"


def test_a_profile_replaces_the_budget_whole(edited):
    path = edited("profiles", "smoke", "fusion", to={"adaptive": {"memory": 0.5}})
    assert config.load_adaptive("smoke", path=path) == AdaptiveRule(memory=0.5)
    assert config.load_adaptive("default", path=path) == AdaptiveRule(**DOCUMENT["fusion"]["adaptive"])


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_profile_loads_with_every_strategy_and_changes_what_it_names_only(profile, strategy):
    """So a section spells out every field of its dataclass, and comes back as it was written."""
    p = config.load(profile, strategy=strategy, path=FILE).as_dict()
    assert (p["profile"], p["strategy"]) == (profile, strategy)
    changes = DOCUMENT["profiles"][profile]
    for section in SECTIONS:
        assert p[section] == {**DOCUMENT[section], **changes.get(section, {})}
    rule = changes.get("fusion", {}).get(strategy, DOCUMENT["fusion"][strategy])
    assert {key: value for key, value in p["fusion"].items() if value is not None} == rule


def test_without_a_profile_the_one_that_the_file_names_is_taken(edited):
    assert config.load(strategy="all", path=edited("profile", to="smoke")).profile == "smoke"


def test_numbers_are_read_by_yaml_1_2_from_a_file_that_may_change(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(re.sub(r"\blr: \S+", "lr: 1e-3", TEXT, count=1))
    assert config.load(strategy="none", path=path).train.lr == 0.001
    path.write_text(TEXT.replace("flip: false", "flip: no", 1))
    assert "data.flip: 'no'" in refusal(lambda: config.load(strategy="none", path=path))


# the digest


def test_the_digest_changes_with_every_single_value_that_makes_the_result_and_with_the_seed():
    p = config.load("default", strategy="all", path=FILE)
    digests = [p.digest(0), p.digest(1)]
    digests += [dataclasses.replace(p, **{key: "lower"}).digest(0) for key in ("profile", "strategy")]
    for section in (*SECTIONS, "fusion"):
        for field in dataclasses.fields(getattr(p, section)):
            if field.name not in EXECUTION.get(section, ()):
                changed = copy.deepcopy(p)
                other = [getattr(getattr(p, section), field.name), "other"]  # whether or not it fits the rest
                object.__setattr__(getattr(changed, section), field.name, other)
                digests.append(changed.digest(0))
    assert len(digests) > 35
    assert len(set(digests)) == len(digests)


def test_a_run_may_go_on_under_the_same_digest_whatever_carries_it_out():
    p = config.load("default", strategy="all", path=FILE)
    other = {"workers": 3, "memory_mib": 1, "processes": 2, "tensorboard": True}
    assert {key for keys in EXECUTION.values() for key in keys} == set(other)
    for section, keys in EXECUTION.items():
        changed = dataclasses.replace(getattr(p, section), **{key: other[key] for key in keys})
        assert changed != getattr(p, section)
        assert dataclasses.replace(p, **{section: changed}).digest(0) == p.digest(0)


def test_the_number_of_processes_may_be_given_instead_of_the_files():
    assert config.load("smoke", strategy="all", processes=4, path=FILE).train.processes == 4
    message = refusal(lambda: config.load("smoke", strategy="all", processes=0, path=FILE))
    assert "params.yaml: train.processes: 0" in message


def test_resolved_parameters_come_back_from_the_file_that_a_run_has(tmp_path):
    p = config.load("paper", strategy="upper", path=FILE)
    path = tmp_path / "params.json"
    path.write_text(json.dumps(p.as_dict()))
    assert config.read_resolved(path) == p


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["train"].update(lr="fast"), "params.json: train.lr: 'fast': Input should be a valid number"),
        (lambda d: d.update(extra=1), "params.json: extra: unknown key"),
        (lambda d: d.pop("data"), "params.json: data: missing"),
        (lambda d: d["data"].update(dataset="x" * 55_000_000), "params.json: data.dataset: 'xxx"),
    ],
)
def test_resolved_parameters_that_are_wrong_are_named_in_one_line(tmp_path, change, said):
    document = config.load("smoke", strategy="upper", path=FILE).as_dict()
    change(document)
    path = tmp_path / "params.json"
    path.write_text(json.dumps(document))
    message = refusal(lambda: config.read_resolved(path))
    assert said in message
    assert len(message) < 400


def test_a_file_of_resolved_parameters_that_is_none_is_named(tmp_path):
    assert "cannot be read" in refusal(lambda: config.read_resolved(tmp_path / "none.json"))
    (tmp_path / "params.json").write_text("{")
    assert "params.json: not readable as JSON" in refusal(lambda: config.read_resolved(tmp_path / "params.json"))


def test_dvc_rewrites_the_file_with_the_changed_line_alone(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(TEXT)
    with modify_yaml(str(path)) as content:  # as `dvc exp run -S fusion.upper.r=3` does
        content["fusion"]["upper"]["r"] = 3
    assert path.read_text() == TEXT.replace("  upper: {r: 6", "  upper: {r: 3", 1)
    assert config.load(strategy="upper", path=path).fusion.r == 3


# bad input: one line with the key, the value and what is allowed


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.img_size", "8", "data.img_size: '8': Input should be a valid integer"),
        ("data.img_size", 0, "data.img_size: 0: Input should be greater than or equal to 1"),
        ("data.flip", 0, "data.flip: 0: Input should be a valid boolean"),
        ("data.sise", 8, "data.sise: unknown key; allowed: augment, color_jitter, cutmix, dataset, "),
        ("data.dataset", "digts", "data.dataset: 'digts': must be one of digits, folder, parquet, cifar10, cifar100, "),
        ("data.folds", 1, "data.folds: 1: Input should be greater than or equal to 2"),
        (
            "profiles.default",
            {"data": {"dataset": "cifar10"}},
            "data.folds: 4: must be null with data.dataset: cifar10",
        ),
        ("data.augment", "timm", "data.shift: 1: must be 0 with data.augment: timm, which crops by itself"),
        ("data.eval_crop", 0.01, "data.eval_crop: 0.01: Input should be greater than or equal to 0.1"),
        ("data.rand_augment", "rand-m9", "data.rand_augment: 'rand-m9': only data.augment: timm does that"),
        ("data.color_jitter", 0.3, "data.color_jitter: 0.3: only data.augment: timm does that"),
        ("options.order", "sorted", "options.order: 'sorted': Input should be 'scan' or 'append'"),
        ("train.lr", "1e-3", "train.lr: '1e-3': Input should be a valid number"),
        ("train.lr", float("nan"), "train.lr: nan: Input should be a finite number"),
        ("train.warmup_epochs", 999, "train.warmup_epochs: 999: must be at most train.epochs, 14"),
        ("train.epochs", 0, "train.epochs: 0: trains nothing; give train.init_from, the weights to evaluate"),
        ("train.init_from", "", "train.init_from: '': String should have at least 1 character"),
        ("train.betas", [0.9, 1.0], "train.betas.1: 1.0: Input should be less than 1"),
        ("train.processes", 3, "train.batch_size: 32: must be a multiple of train.processes times train.device_batch"),
        ("train", 3, "train: 3 is not a section of `key: value` lines"),
        ("fusion.all", 4, "fusion.all: 4 is not a section of `key: value` lines"),
        ("fusion.all", {"schedule": "x"}, "fusion.all.schedule: 'x' is not a list"),
        ("fusion.all", {}, "fusion.all: {}: exactly one of r, total, schedule is allowed"),
        ("fusion.all", {"r": 1, "total": 2}, "fusion.all: {'r': 1, 'total': 2}: exactly one of r, total, schedule is "),
        ("fusion.all", {"schedule": [1], "last_layer": 2}, "fusion.all.last_layer: 2: must be left out beside sch"),
        ("fusion.A-b", {"r": 1}, "fusion.A-b: 'A-b': String should match pattern '^[a-z][a-z0-9_]{0,39}$'"),
        ("extra", {}, "extra: unknown key; allowed: ablation, claims, data, fusion, model, options, profile, "),
        ("profiles.default", None, "profiles.default: None is not a section of `key: value` lines"),
        ("profiles.default", {"dta": {}}, "profiles.default.dta: 'dta': Input should be 'data', 'model', 'options', "),
        ("profiles.default", {"data": {"lmit": 1}}, "profiles.default.data.lmit: unknown key; allowed: augment, "),
        ("profiles.default", {"fusion": {"all": {"r": "x"}}}, "profiles.default.fusion.all.r: 'x': Input should be a "),
        ("profiles.default", {"fusion": {"most": {}}}, "profiles.default.fusion: 'most' is not one of fusion's: adap"),
        # what would be ignored, crash, hang or exhaust the machine
        ("data.root", "images", "data.root: 'images': must be null with data.dataset: digits"),
        ("data.root", "a\0b", r"data.root: 'a\x00b': String should match pattern"),
        ("data.img_size", 10**6, "data.img_size: 1000000: Input should be less than or equal to 4096"),
        ("train.lr_batch", 10**6, "train.min_lr: 1e-05: must be at most train.lr, which train.lr_batch may scale, 1.6"),
        # sections of several runs
        (
            "fusion.adaptive",
            {"memory": 0.5, "total": 3},
            "fusion.adaptive: {'memory': 0.5, 'total': 3}: exactly one of ",
        ),
        ("sweep.seeds", [2**32], "sweep.seeds.0: 4294967296: Input should be less than 4294967296"),
        ("sweep.seeds", [0, 1, 0], "sweep.seeds: [0, 1, 0]: each may be named only once"),
        ("sweep.strategies", ["none", "most"], "sweep.strategies: 'most' is not one of all, "),
        ("ablation.options", {"seeds": [0]}, "ablation.options.strategies: missing"),
        ("ablation.options", ABLATION | {"varied": ["most"]}, "ablation.options.varied: 'most' is not one of all, "),
        ("ablation.options", ABLATION | {"changes": {"A": {}}}, "ablation.options.changes.A: 'A': String should match"),
        (
            "ablation.options",
            ABLATION | {"varied": ["all"], "changes": {"r1": {"fusion.all.r": 1}}},
            "ablation.tokens_per_layer.changes.r1: {'fusion.upper.r': 1} has the name of another ablation's change, ",
        ),
        ("claims.x", CLAIM | {"against": ["most"]}, "claims.x.against: 'most' is not one of all, "),
        ("claims.x", CLAIM | {"ablation": "most"}, "claims.x.ablation: 'most' is not one of calibration, "),
        ("claims.x", CLAIM | {"ablation": "options", "against": ["all_x"]}, "claims.x.against: 'all_x' is"),
        ("claims.x", CLAIM | {"at_same": "memory_ratio"}, "claims.x.at_same: 'memory_ratio': only for top1_p"),
        ("claims.x", CLAIM | {"above": 1.0}, "claims.x: {'above': 1.0, 'below': 1.0, 'quantity': 'time"),
        ("claims.x", CLAIM | {"below": 0}, "claims.x.below: 0: a ratio is compared with a positive number"),
    ],
)
def test_a_bad_value_is_named_in_one_line_with_its_key_and_what_is_allowed(edited, key, value, message):
    path = edited(*key.split("."), to=value)
    loads = {"fusion.adaptive": config.load_adaptive, "sweep": config.load_sweep}
    loads |= {"ablation": config.load_ablations, "claims": config.load_claims}
    load = next((load for start, load in loads.items() if key.startswith(start)), partial(config.load, strategy="all"))
    assert refusal(lambda: load(path=path)).startswith(f"params.yaml: {message}")


@pytest.mark.parametrize("key", ["data.shift", "sweep"])
def test_what_is_missing_is_named(edited, key):
    path = edited(*key.split("."), delete=True)
    assert refusal(lambda: config.load(strategy="all", path=path)) == f"params.yaml: {key}: missing"
    document, (*top, last) = json.loads(path.read_text()), f"{key}s".split(".")
    (document[top[0]] if top else document)[last] = 1  # a misspelt key is what is missing
    path.write_text(json.dumps(document))
    assert refusal(lambda: config.load(strategy="all", path=path)).startswith(f"params.yaml: {key}s: unknown key")


def test_an_unknown_strategy_or_profile_is_named_with_those_that_there_are():
    message = refusal(lambda: config.load(strategy="most", path=FILE))
    assert message == f"strategy: 'most' is not one of {', '.join(STRATEGY_NAMES)}"
    assert refusal(lambda: config.load(strategy="most", path=FILE, given={"fusion.upper.r": 3})) == message
    message = refusal(lambda: config.load("big", strategy="all", path=FILE))
    assert message == f"params.yaml: profile: 'big' is not one of {', '.join(PROFILES)}"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"- 1\n",
        b"data: [1\n",
        b"data: !!python/object:os.system {}\n",
        b"data: 2026-13-01\n",
        b"\xff\xfe\x00",
        b"data: &d {dataset: *d}\n",
        b"data: " + b"[" * 1000,
        b"data: " + b"9" * 5000,
        TEXT.replace("img_size: 8 ", "img_size: 0x" + "f" * 5000).encode(),
        b"a0: &a0 {k: 1}\n" + b"".join(b"a%d: &a%d {<<: [*a%d, *a%d]}\n" % (k, k, k - 1, k - 1) for k in range(1, 40)),
        b"data: {dataset: " + b"x" * 10**6 + b"}\n",
    ],
    ids=range(12),
)
def test_a_file_that_is_no_yaml_mapping_is_named_in_one_line(tmp_path, raw):
    path = tmp_path / "params.yaml"
    path.write_bytes(raw)
    message = refusal(lambda: config.load(strategy="all", path=path))
    assert message.startswith("params.yaml: ")
    assert len(message) < 400


def test_a_file_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "none.yaml"
    said = refusal(lambda: config.load(strategy="all", path=path))
    assert said == f"{path}: cannot be read (No such file or directory)"


# weights to start from


def test_the_weights_to_start_from_are_a_file_in_the_repository_known_by_its_content(repository):
    p = config.load("finetune", strategy="all", path=FILE)
    assert p.train.init_from is not None
    own = dataclasses.replace(p, train=dataclasses.replace(p.train, init_from="runs/of {seed}/{name}"))
    path = repository / "runs" / "of 4" / "{name}"
    assert config.init_path(own, 4) == path
    assert refusal(lambda: config.init_sha256(own, 4)) == f"{path}: cannot be read (No such file or directory)"
    path.parent.mkdir(parents=True)
    for content in (b"weights", b"other weights"):
        path.write_bytes(content)
        assert config.init_sha256(own, 4) == hashlib.sha256(content).hexdigest()
    assert config.init_sha256(config.load("default", strategy="all", path=FILE), 4) is None


# dataclasses and the root


def test_values_that_code_changes_are_checked_in_the_same_words():
    train = config.load("default", strategy="all", path=FILE).train
    said = refusal(lambda: dataclasses.replace(train, device="cpu:7"))
    assert said == "train.device: 'cpu:7': must be auto, cpu, cuda or cuda:N"
    assert refusal(lambda: dataclasses.replace(train, device_batch=5)).startswith("train.batch_size: 32: must be a mul")


def test_the_root_is_the_nearest_folder_above_that_holds_both_files(repository, monkeypatch):
    inner = repository / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "params.yaml").touch()  # alone it makes no root
    monkeypatch.chdir(inner)
    assert config.root() == repository


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
        ("fusion.upper.first_layer=3", "fusion", "r", 8),
        ("fusion.upper.total=9", "fusion", "r", None),
        ("fusion.upper.schedule=[0,1]", "fusion", "schedule", (0, 1)),
    ],
)
def test_a_setting_replaces_one_value_of_the_profile(setting, section, field, value):
    p = config.load("smoke", strategy="upper", given=config.parse_settings([setting]))
    assert getattr(getattr(p, section), field) == value


def test_a_setting_of_a_rule_that_is_none_is_refused(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(FILE.read_text().replace("  all: {r: 3}", "  all: 3", 1))
    said = refusal(lambda: config.load("default", strategy="all", given={"fusion.all.r": 3}, path=path))
    assert said == "params.yaml with fusion.all.r=3: fusion.all: 3 is not a section of `key: value` lines"


def test_settings_can_make_a_strategy_which_fuses_in_every_layer_from_first_to_last():
    given = {"fusion.mine.r": 4, "fusion.mine.first_layer": 5}
    assert config.load(strategy="mine", given=given).schedule(10) == [0] * 4 + [4] * 6
    given = {"fusion.mine.schedule": [0] * 9 + [5]}
    assert config.load(strategy="mine", given=given).schedule(10) == given["fusion.mine.schedule"]
    said = refusal(lambda: config.load(strategy="all", given={"fusion.all.r": 1, "fusion.all.total": 9}))
    assert said.endswith("exactly one of r, total, schedule is allowed")
    late = config.load(strategy="mine", given={"fusion.mine.r": 2, "fusion.mine.first_layer": 11})
    said = refusal(lambda: late.schedule(10))
    assert said == "fusion.mine: first_layer = 11; must be in 1..10"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.epochs", "--set: 'train.epochs' is not KEY=VALUE"),
        ("epochs=3", "params.yaml with epochs=3: 'epochs' is not data, model, options or train and a key"),
        ("fusion.all.r=3", "params.yaml with fusion.all.r=3: strategy 'upper' is trained; must be fusion.upper.r"),
        ("train.lr=x", "params.yaml with train.lr='x': train.lr: 'x': Input should be a valid number"),
        ("train.epochs=[", "train.epochs = '[': not readable as YAML"),
    ],
)
def test_a_setting_that_says_nothing_is_refused(setting, said):
    message = refusal(lambda: config.load(strategy="upper", given=config.parse_settings([setting])))
    assert message.startswith(said)

"""params.yaml as frozen dataclasses: the default, the profiles laid over it, and what is allowed.

One section of the file is one dataclass here. A profile names only what it changes. Nothing in this module
imports torch, so the pipeline and the notebooks can read parameters in milliseconds.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from ruamel.yaml import YAML, YAMLError

from famba.errors import InputError
from famba.fusion import strategies
from famba.fusion.options import Factor, FusionOptions
from famba.fusion.strategies import ADAPTIVE, STRATEGIES, Strategy

# Per channel, of ImageNet's training images.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy's generators take

_Rule = TypeVar("_Rule", "FusionRule", "AdaptiveRule")
_strict = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, config=_strict)
class DataParams:
    """Which images, and how they are split and varied.

    Attributes:
        dataset: a name that `data.load` knows, or `hub:<owner>/<name>`, an image-classification set of the Hugging Face
            hub.
        root: folder of the data set, relative to the repository root. `folder` and `parquet` need it; for a set of the
            hub it is a local copy that is read instead.
        img_size: height and width that the images are brought to, pixels.
        val_fraction: share of the training images held out to choose by.
        split_seed: seed of the held-out choice; the same for every run, so that runs compare.
        limit: use only this many training images (after the split); null is all.
        eval_crop: share of an image's side that validation and test see, at its centre.
        normalise: channels are brought to mean 0 and deviation 1 by the numbers of the training images, or of ImageNet.
        augment: `tensor` varies whole batches on the training device; `timm` varies image by image on the CPU, as the
            reference's recipe does, and mixes as it does.
        shift: training images are moved by up to this many pixels each way, zeros move in; `tensor` only.
        flip: training images are mirrored left-right half of the time.
        erase: share of the training images in which a rectangle is replaced by noise.
        mixup, cutmix: parameter of the Beta distribution that mixes two training images and their labels, as a whole
            or by a rectangle; 0 never does. With both above 0, each is taken half of the time.
        rand_augment: a policy in timm's words, such as rand-m9-mstd0.5-inc1; `timm` only.
        color_jitter: of brightness, contrast and saturation, `timm` only, and of no effect there beside a policy.
        workers: processes that decode and vary images which stream; has no effect on what they give.
        memory_mib: a data set that takes more than this as uint8 streams; a smaller one lies on the training device.
        folds: the data set is divided into so many parts with the same share of each class, and a run's seed chooses
            the one that is its test split; null keeps the data set's own test split.
    """

    dataset: str
    root: str | None
    img_size: PositiveInt
    val_fraction: Annotated[float, Field(gt=0, lt=1)]
    split_seed: Seed
    limit: PositiveInt | None
    eval_crop: Share
    normalise: Literal["train", "imagenet"]
    augment: Literal["tensor", "timm"]
    shift: Annotated[int, Field(ge=0)]
    flip: bool
    erase: Probability
    mixup: Annotated[float, Field(ge=0)]
    cutmix: Annotated[float, Field(ge=0)]
    rand_augment: Annotated[str, Field(min_length=1)] | None
    color_jitter: Annotated[float, Field(ge=0)]
    workers: Annotated[int, Field(ge=0)]
    memory_mib: PositiveInt
    folds: Annotated[int, Field(ge=2)] | None = None


@dataclass(frozen=True, config=_strict)
class ModelParams:
    """The Vision Mamba; null takes the value of the named model.

    Attributes:
        name: a name that `model.create_model` knows.
        patch_size, stride: pixels; a stride below the patch size overlaps the patches.
        depth: layers.
        d_model: width of a token.
        d_state: states per channel of the scan.
        cls_position: where the class token stands in the sequence.
        pool: what the head sees: the class token or the mean of all tokens.
        average_directions: average the two scan directions, as released; false sums them.
    """

    name: str
    patch_size: PositiveInt | None
    stride: PositiveInt | None
    depth: PositiveInt | None
    d_model: PositiveInt | None
    d_state: PositiveInt | None
    cls_position: Literal["middle", "head", "none"]
    pool: Literal["cls", "mean"]
    average_directions: bool


@dataclass(frozen=True, config=_strict)
class FusionRule:
    """How many tokens one strategy removes: by each of its layers, or in all; layers count from 1.

    Attributes:
        r: tokens removed by each fusing layer.
        total: tokens removed by all layers together; the r that comes nearest is taken.
        schedule: tokens removed by each layer, outright. Exactly one of r, total and schedule.
        first_layer, last_layer: the layers among which the strategy fuses; null is the strategy's own choice.
    """

    r: Annotated[int, Field(ge=0)] | None = None
    total: Annotated[int, Field(ge=0)] | None = None
    schedule: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)] | None = None
    first_layer: PositiveInt | None = None
    last_layer: PositiveInt | None = None


@dataclass(frozen=True, config=_strict)
class AdaptiveRule:
    """The budget of the schedule that calibration makes; exactly one of the three.

    Attributes:
        total: tokens removed by all layers together.
        memory: peak memory of a training step, at most this share of the unfused model's; by formula.
        flops: FLOPs of a forward pass, scans included, at most this share of the unfused model's; they stand for time.
    """

    total: Annotated[int, Field(ge=0)] | None = None
    memory: Share | None = None
    flops: Share | None = None


@dataclass(frozen=True, config=_strict)
class TrainParams:
    """The optimisation.

    Attributes:
        init_from: file of the weights to start from, relative to the repository root, `{seed}` standing for the run's
            seed: the model.safetensors of a run, or a released Vim checkpoint. Null draws new ones.
        epochs: passes over the training images; 0 evaluates the weights of `init_from` as they are.
        batch_size: images per step, of all processes together.
        device_batch: images that a process takes at once; it sums the gradients of as many such parts as its share of a
            step needs. Null takes the share at once.
        processes: that train together, each on its device, if nothing else (torchrun) has started them.
        lr: peak learning rate, after warm-up.
        lr_batch: the batch size that lr is meant for; the rate is scaled by batch_size / lr_batch. Null leaves it.
        min_lr: learning rate at the end of the cosine.
        warmup_epochs: epochs of linear rise from 0.
        weight_decay: AdamW's, on matrices only.
        betas: AdamW's.
        label_smoothing: share of the target spread over all classes.
        clip_grad_norm: gradients are scaled down to this norm; null leaves them.
        ema_decay: decay of the moving average of the weights per step; null keeps none.
        choose: whose weights are tested: those of the epoch that did `best` in validation, or those of the `last`.
            Between the weights and their moving average, validation decides in either.
        precision: fp32, or bf16 for the matrix products (SSM parameters and states stay fp32).
        device: auto takes CUDA where it is, else the CPU.
        backend: of the selective scan; auto takes the fastest that runs.
        cuda_graph: replay forward and backward of a step as one CUDA graph, which is faster where a model is so small
            that Python's calls take longer than its work.
        threads: CPU threads; part of what makes a run repeatable bit for bit. Null takes torch's choice.
        tensorboard: write TensorBoard events while the run goes on, under build/tensorboard.
    """

    init_from: Annotated[str, Field(min_length=1)] | None
    epochs: Annotated[int, Field(ge=0)]
    batch_size: PositiveInt
    device_batch: PositiveInt | None
    processes: PositiveInt
    lr: Annotated[float, Field(gt=0)]
    lr_batch: PositiveInt | None
    min_lr: Annotated[float, Field(ge=0)]
    warmup_epochs: Annotated[int, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)]
    label_smoothing: Fraction
    clip_grad_norm: Annotated[float, Field(gt=0)] | None
    ema_decay: Fraction | None
    choose: Literal["best", "last"]
    precision: Literal["fp32", "bf16"]
    device: str
    backend: str
    cuda_graph: bool
    threads: PositiveInt | None
    tensorboard: bool


@dataclass(frozen=True, config=_strict)
class SweepParams:
    """The runs of the pipeline: every strategy with every seed, each named once."""

    strategies: Annotated[tuple[Strategy, ...], Field(min_length=1, strict=False)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, strict=False)]


@dataclass(frozen=True, config=_strict)
class AblationParams:
    """Which options of fusion are varied, and for whom; what is not varied stays as the profile has it.

    Attributes:
        strategy: trained with every combination of the factors' values.
        strategies: trained with one factor changed at a time.
        factors: fields of `FusionOptions`, combined for `strategy`.
        controls: further fields, changed one at a time for every strategy.
        seeds: of each of those runs.
        epochs: instead of the profile's, to end sooner; null keeps them.
        jobs: runs trained at the same time, each on one thread.
    """

    strategy: Strategy
    strategies: Annotated[tuple[Strategy, ...], Field(strict=False)]
    factors: Annotated[tuple[Factor, ...], Field(min_length=1, strict=False)]
    controls: Annotated[tuple[Factor, ...], Field(strict=False)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, strict=False)]
    epochs: PositiveInt | None
    jobs: PositiveInt


# How a run is carried out; it makes the same of it, to rounding.
EXECUTION: dict[str, tuple[str, ...]] = {"data": ("workers", "memory_mib"), "train": ("processes", "tensorboard")}


@dataclass(frozen=True, config=_strict)
class PhotographsParams:
    """The sweep's strategies once more, on other images.

    Attributes:
        profile: that the runs have.
        seeds: of each strategy.
        jobs: runs trained at the same time.
    """

    profile: str
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, strict=False)]
    jobs: PositiveInt


@dataclass(frozen=True)
class Params:
    """Everything that determines one run but its seed."""

    profile: str
    strategy: str
    data: DataParams
    model: ModelParams
    fusion: FusionRule
    options: FusionOptions
    train: TrainParams

    def schedule(self, depth: int) -> list[int]:
        """Tokens removed by each layer of a model of that depth; errors as in `famba.schedule`."""
        rule = self.fusion
        if rule.schedule is None:
            return strategies.schedule(
                self.strategy,
                depth=depth,
                r=rule.r,
                total=rule.total,
                first_layer=rule.first_layer,
                last_layer=rule.last_layer,
            )
        if len(rule.schedule) != depth:
            raise InputError(
                f"fusion.{self.strategy}.schedule: {list(rule.schedule)} has {len(rule.schedule)} layers; the model "
                f"has {depth}"
            )
        return list(rule.schedule)

    def as_dict(self) -> dict[str, Any]:
        """The resolved configuration as plain data, the form in which a run records it."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def digest(self, seed: int) -> str:
        """Hexadecimal name of this configuration with this seed: another value anywhere is another name.

        But not of `EXECUTION`, so that a run may go on with other numbers of processes or workers.
        """
        text = json.dumps(identity(self.as_dict()) | {"seed": seed}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    def init_path(self, seed: int) -> Path | None:
        """The file of the weights that a run starts from."""
        name = self.train.init_from
        return None if name is None else root() / name.replace("{seed}", str(seed))

    def init_sha256(self, seed: int) -> str | None:
        """What that file holds, in hexadecimal: the weights are part of what determines a run, not their name alone.

        Raises:
            InputError: it cannot be read.
        """
        path = self.init_path(seed)
        if path is None:
            return None
        stat = _stat(path)
        return _sha256(path, stat.st_mtime_ns, stat.st_size)


# The sections that a profile may change, and the type of each. `fusion` holds one rule for each strategy.
_SECTIONS: dict[str, Any] = {
    "data": DataParams,
    "model": ModelParams,
    "options": FusionOptions,
    "train": TrainParams,
}
_TOP_LEVEL = {"profile", "profiles", "sweep", "ablation", "photographs", "fusion", *_SECTIONS}


def identity(described: Mapping[str, Any]) -> dict[str, Any]:
    """What tells one run from another, of `Params.as_dict()` or of what a run's params.json holds: no `EXECUTION`."""
    told = dict(described)
    for section, keys in EXECUTION.items():
        told[section] = {key: value for key, value in described[section].items() if key not in keys}
    return told


def root() -> Path:
    """The repository root: the nearest folder above the working directory that holds params.yaml and dvc.yaml.

    Papermill runs a notebook in the caller's folder, nbval and JupyterLab in the notebook's own, so no path may be
    relative to the working directory. From anywhere else, the root is the checkout that this package lies in.

    Raises:
        InputError: there is neither.
    """
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parent.parent):
        if (folder / "params.yaml").is_file() and (folder / "dvc.yaml").is_file():
            return folder
    raise InputError(f"{here}: no params.yaml and dvc.yaml here or above; run inside a checkout of famba")


def load(
    profile: str | None = None, *, strategy: str, processes: int | None = None, path: Path | None = None
) -> Params:
    """The parameters of one strategy under a profile.

    Args:
        profile: a key of `profiles`; None is the one that the file names itself.
        strategy: one of `STRATEGIES`.
        processes: instead of train.processes, which does not change what a run is; None keeps it.
        path: the file; None is params.yaml at the repository root.

    Raises:
        InputError: an unknown key, a wrong type or value, an unknown profile or strategy; names it and what is allowed.
    """
    if strategy not in STRATEGIES:
        raise InputError(f"strategy: {strategy!r} is not one of {', '.join(STRATEGIES)}")
    document, name, chosen, changes = _under_profile(profile, path)
    resolved: dict[str, Any] = {}
    for section, kind in _SECTIONS.items():
        base = _mapping(document.get(section), f"{name}: {section}")
        change = _mapping(changes.get(section, {}), f"{name}: profiles.{chosen}.{section}")
        _known(change, {f.name for f in dataclasses.fields(kind)}, f"{name}: profiles.{chosen}.{section}")
        where = dict.fromkeys(change, f"profiles.{chosen}.{section}")
        if section == "train" and processes is not None:
            change, where = change | {"processes": processes}, where | {"processes": section}
        resolved[section] = _validated(kind, {**base, **change}, name, section, where)
    train: TrainParams = resolved["train"]
    if train.epochs == 0 and train.init_from is None:
        raise InputError(f"{name}: train.epochs: 0 trains nothing; give train.init_from, the weights to evaluate")
    if train.warmup_epochs > train.epochs > 0:
        raise InputError(
            f"{name}: train.warmup_epochs: {train.warmup_epochs}: must be at most train.epochs, {train.epochs}"
        )
    if train.min_lr > train.lr:
        raise InputError(f"{name}: train.min_lr: {train.min_lr}: must be at most train.lr, {train.lr}")
    if train.batch_size % (share := train.processes * (train.device_batch or 1)):
        raise InputError(
            f"{name}: train.batch_size: {train.batch_size}: must be a multiple of train.processes "
            f"times train.device_batch, {share}"
        )
    data: DataParams = resolved["data"]
    for key, off in (("rand_augment", None), ("color_jitter", 0)):
        if data.augment != "timm" and getattr(data, key) != off:
            raise InputError(f"{name}: data.{key}: {getattr(data, key)!r}: only data.augment: timm does that")
    if data.augment == "timm" and data.shift:
        raise InputError(f"{name}: data.shift: {data.shift}: must be 0 with data.augment: timm, which crops by itself")
    rule = _rule(document, name, chosen, changes, strategy, FusionRule)
    return Params(profile=chosen, strategy=strategy, fusion=rule, **resolved)


def read_resolved(path: str | Path) -> Params:
    """The parameters of a run as `as_dict` gives them and a run's params.json holds them.

    Args:
        path: if relative, from the repository root.

    Raises:
        InputError: a file that cannot be read, an unknown or missing key, a wrong type or value.
    """
    path = root() / path
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from None
    kinds = {**_SECTIONS, "fusion": FusionRule}
    document = _mapping(document, str(path))
    _known(document, {"profile", "strategy", *kinds}, str(path))
    sections = {
        key: _validated(kind, _mapping(document.get(key), f"{path}: {key}"), str(path), key, {})
        for key, kind in kinds.items()
    }
    for key in ("profile", "strategy"):
        if not isinstance(document.get(key), str):
            raise InputError(f"{path}: {key}: {document.get(key)!r} is not text")
    return Params(profile=document["profile"], strategy=document["strategy"], **sections)


def load_adaptive(profile: str | None = None, *, path: Path | None = None) -> AdaptiveRule:
    """The budget of the adaptive schedule under a profile: `fusion.adaptive`; arguments and errors as in `load`."""
    return _rule(*_under_profile(profile, path), ADAPTIVE, AdaptiveRule)


def load_sweep(path: Path | None = None, *, seeds: Sequence[int] | None = None) -> SweepParams:
    """The runs that params.yaml asks for; errors as in `load`.

    Args:
        seeds: instead of the file's.
    """
    name = "params.yaml" if path is None else path.name
    values = _mapping(_read(path).get("sweep"), f"{name}: sweep") | ({} if seeds is None else {"seeds": list(seeds)})
    sweep = _validated(SweepParams, values, name, "sweep", {})
    _once(sweep, ("strategies", "seeds"), f"{name}: sweep")
    return sweep


def load_ablation(path: Path | None = None, **changes: Any) -> AblationParams:
    """The ablation that params.yaml asks for; errors as in `load`.

    Args:
        changes: values to have instead of the file's, under the same keys.
    """
    name = "params.yaml" if path is None else path.name
    values = _mapping(_read(path).get("ablation"), f"{name}: ablation") | changes
    ablation = _validated(AblationParams, values, name, "ablation", {})
    _once(ablation, ("strategies", "factors", "controls", "seeds"), f"{name}: ablation")
    for key, chosen in {"strategy": (ablation.strategy,), "strategies": ablation.strategies}.items():
        if "none" in chosen:
            raise InputError(f"{name}: ablation.{key}: 'none' fuses nothing, so that no option of fusion matters to it")
    if ablation.strategy in ablation.strategies:
        raise InputError(f"{name}: ablation.strategies: {ablation.strategy!r} is ablation.strategy already")
    return ablation


def load_photographs(path: Path | None = None) -> PhotographsParams:
    """The runs on photographs that params.yaml asks for; errors as in `load`."""
    name = "params.yaml" if path is None else path.name
    asked = _validated(
        PhotographsParams, _mapping(_read(path).get("photographs"), f"{name}: photographs"), name, "photographs", {}
    )
    _once(asked, ("seeds",), f"{name}: photographs")
    return asked


def _once(section: Any, keys: tuple[str, ...], where: str) -> None:
    for key in keys:
        values = getattr(section, key)
        if len(set(values)) < len(values):
            raise InputError(f"{where}.{key}: {list(values)}: each may be named only once")


def _under_profile(profile: str | None, path: Path | None) -> tuple[dict[str, Any], str, str, dict[str, Any]]:
    """The file's content and name, the profile that holds, and what that changes."""
    document, name = _read(path), "params.yaml" if path is None else path.name
    chosen = document.get("profile") if profile is None else profile
    profiles = _mapping(document.get("profiles"), f"{name}: profiles")
    if not all(isinstance(key, str) for key in profiles):
        raise InputError(f"{name}: profiles: {list(profiles)}: every name of a profile must be a string; quote it")
    if not isinstance(chosen, str) or chosen not in profiles:
        raise InputError(f"{name}: profile: {chosen!r} is not one of {', '.join(profiles)}")
    changes = _mapping(profiles[chosen], f"{name}: profiles.{chosen}")
    _known(changes, {"fusion", *_SECTIONS}, f"{name}: profiles.{chosen}")
    return document, name, chosen, changes


# What a rule is given by: exactly one of these.
_WAYS: dict[type, tuple[str, ...]] = {
    FusionRule: ("r", "total", "schedule"),
    AdaptiveRule: ("total", "memory", "flops"),
}


def _rule(
    document: dict[str, Any], name: str, profile: str, changes: dict[str, Any], strategy: str, kind: type[_Rule]
) -> _Rule:
    """One strategy's rule; a profile's rule replaces the default's whole, since its ways exclude each other."""
    rules = _mapping(document.get("fusion"), f"{name}: fusion")
    changed = _mapping(changes.get("fusion", {}), f"{name}: profiles.{profile}.fusion")
    _known(rules, {*STRATEGIES, ADAPTIVE}, f"{name}: fusion")
    _known(changed, {*STRATEGIES, ADAPTIVE}, f"{name}: profiles.{profile}.fusion")
    ways = _WAYS[kind]
    if strategy in changed:
        section, rule = f"profiles.{profile}.fusion.{strategy}", changed[strategy]
    elif strategy in rules:
        section, rule = f"fusion.{strategy}", rules[strategy]
    else:
        raise InputError(f"{name}: fusion.{strategy}: missing; give {' or '.join(f'{{{way}: ...}}' for way in ways)}")
    rule = _validated(kind, _mapping(rule, f"{name}: {section}"), name, section, {})
    given = {key: getattr(rule, key) for key in ways if getattr(rule, key) is not None}
    if len(given) != 1:
        raise InputError(f"{name}: {section}: {given or 'nothing'} given; exactly one of {', '.join(ways)} is allowed")
    return rule


def _read(path: Path | None) -> dict[str, Any]:
    path = root() / "params.yaml" if path is None else path
    stat = _stat(path)
    return _parse(path, stat.st_mtime_ns, stat.st_size)


def _stat(path: Path):
    try:
        return path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


@functools.lru_cache(maxsize=16)
def _sha256(path: Path, mtime_ns: int, size: int) -> str:
    del mtime_ns, size  # they key the cache
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


@functools.lru_cache(maxsize=4)
def _parse(path: Path, mtime_ns: int, size: int) -> dict[str, Any]:
    """Read with a YAML 1.2 reader, DVC's own: PyYAML takes 1e-3 for a string and `no` for False."""
    del mtime_ns, size  # they key the cache
    try:
        document = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (YAMLError, ValueError, OSError) as error:  # ValueError: not UTF-8, or a date such as 2026-13-01
        raise InputError(f"{path.name}: not readable as YAML: {' '.join(str(error).split())}") from None
    document = _mapping(document, path.name)
    _known(document, _TOP_LEVEL, path.name)
    return document


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: {value!r} is not a section of `key: value` lines")
    return dict(value)


def _known(section: Mapping[str, Any], allowed: set[str], where: str) -> None:
    for key in section:
        if key not in allowed:
            raise InputError(f"{where}: unknown key {key!r}; allowed: {', '.join(sorted(allowed))}")


def _validated(kind: type, values: dict[str, Any], name: str, section: str, where: Mapping[str, str]) -> Any:
    """Build the dataclass, or say in one line which key holds which value and what is allowed."""
    _known(values, {f.name for f in dataclasses.fields(kind)}, f"{name}: {section}")
    try:
        # FusionOptions is no pydantic dataclass, so that a model needs no pydantic.
        return TypeAdapter(kind).validate_python(values) if kind is FusionOptions else kind(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = [str(part) for part in first["loc"]]
        key = path[0] if path else ""
        said = f"{name}: {where.get(key, section)}.{key}"
        if key not in values:
            raise InputError(f"{said}: missing") from None
        reason = "too few values" if first["type"] == "missing" else first["msg"]
        raise InputError(f"{said}: {values.get(key)!r}: {reason}") from None

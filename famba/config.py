"""params.yaml as frozen dataclasses: the default, the profiles laid over it, and what is allowed.

One section of the file is one dataclass here. A profile names only what it changes. Nothing in this module
imports torch, so the pipeline and the notebooks can read parameters in milliseconds.

Upper bounds are far above any experiment's values. They refuse a slip of the pen in one line, before it exhausts the
machine's memory, starts a thousand processes or overflows a float.
"""

import dataclasses
import functools
import hashlib
import json
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, Strict, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.nodes import Node, ScalarNode

from famba.errors import InputError
from famba.fusion import strategies
from famba.fusion.options import FusionOptions
from famba.fusion.strategies import ADAPTIVE, STRATEGIES

# Per channel, of ImageNet's training images.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

T = TypeVar("T")


def _unique(values: tuple[T, ...]) -> tuple[T, ...]:
    if len(set(values)) < len(values):
        raise ValueError("each may be named only once")
    return values


Int = Annotated[int, Strict()]
Float = Annotated[float, Strict()]
Bool = Annotated[bool, Strict()]
Text = Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[^\x00-\x1f]*$")]
Positive = Annotated[Int, Field(ge=1, le=1_000_000)]
NotNegative = Annotated[Int, Field(ge=0, le=1_000_000)]
Pixels = Annotated[Int, Field(ge=1, le=4096)]
Jobs = Annotated[Int, Field(ge=1, le=256)]
Layer = Annotated[Int, Field(ge=1, le=1000)]
Fraction = Annotated[Float, Field(ge=0, lt=1)]
Probability = Annotated[Float, Field(ge=0, le=1)]
Share = Annotated[Float, Field(gt=0, le=1)]
Beta = Annotated[Float, Field(ge=0, le=100)]  # beyond 100 every mixture is half and half
Seed = Annotated[Int, Field(ge=0, lt=2**32)]  # what NumPy's generators take
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1, max_length=1000), AfterValidator(_unique)]
Strategy = Annotated[str, Field(pattern="^[a-z][a-z0-9_]{0,39}$")]  # part of the names of folders
Strategies = Annotated[tuple[Strategy, ...], Field(max_length=100), AfterValidator(_unique)]


def _is_device(name: str) -> str:
    if not re.fullmatch("auto|cpu|cuda(:[0-9]{1,2})?", name):
        raise ValueError("must be auto, cpu, cuda or cuda:N")
    return name


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def section(cls: type[T]) -> type[T]:
    """A frozen dataclass of validated values; one made or changed by code raises InputError, as params.yaml does."""
    made: Any = dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))(cls)
    init = made.__init__

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except ValidationError as error:
            raise _refusal(
                error, made, "", lambda *keys: (cls.__name__.removesuffix("Params").lower(), *keys)
            ) from None

    made.__init__ = checked
    return made


@section
class DataParams:
    """Which images, and how they are split and varied."""

    dataset: Text  # a name that `data.load` knows, or `hub:<owner>/<name>`, a set of the Hugging Face hub
    # Its folder, from the repository root: of `folder` and `parquet`, or a copy of a hub's set. Null: the copy in
    # data/<dataset> if there is one, else the hub.
    root: Text | None
    img_size: Pixels  # height and width that the images are brought to
    val_fraction: Annotated[Float, Field(gt=0, lt=1)]  # share of the training images held out to choose by
    split_seed: Seed  # of the held-out choice; the same for every run, so that runs compare
    limit: Annotated[Int, Field(ge=1, le=10**9)] | None  # use only so many training images (after the split)
    # Share of an image's side that validation and test see, at its centre.
    eval_crop: Annotated[Float, Field(ge=0.1, le=1)]
    normalise: Literal["train", "imagenet"]  # to mean 0 and deviation 1, by the training images' numbers or ImageNet's
    # `tensor` varies whole batches on the training device; `timm` image by image on the CPU, as the reference does.
    augment: Literal["tensor", "timm"]
    shift: Annotated[Int, Field(ge=0, le=4096)]  # moved by up to so many pixels, zeros move in; `tensor` only
    flip: Bool  # mirrored left-right half of the time
    erase: Probability  # share of the training images in which a rectangle is replaced by noise
    # Parameter of the Beta distribution that mixes two images and their labels, as a whole (mixup) or by a rectangle
    # (cutmix); 0 never does. With both above 0, each is taken half of the time.
    mixup: Beta
    cutmix: Beta
    rand_augment: Text | None  # a policy in timm's words, such as rand-m9-mstd0.5-inc1; `timm` only
    color_jitter: Annotated[Float, Field(ge=0, le=10)]  # `timm` only, and of no effect there beside a policy
    workers: Annotated[Int, Field(ge=0, le=256)]  # processes that load images which stream; no effect on what they give
    memory_mib: Annotated[Int, Field(ge=1, le=2**24)]  # a larger data set (as uint8) streams, another is kept in memory
    folds: Annotated[Int, Field(ge=2, le=1000)] | None = None  # a run's seed tests one of so many parts; null: its own

    @model_validator(mode="after")
    def _check(self) -> "DataParams":
        if self.dataset == "digits" and self.root is not None:
            raise ValueError("root: must be null with data.dataset: digits, which scikit-learn brings along")
        for key, off in (("rand_augment", None), ("color_jitter", 0)):
            if self.augment != "timm" and getattr(self, key) != off:
                raise ValueError(f"{key}: only data.augment: timm does that")
        if self.augment == "timm" and self.shift:
            raise ValueError("shift: must be 0 with data.augment: timm, which crops by itself")
        return self


@section
class ModelParams:
    """The Vision Mamba; null takes the value of the named model."""

    name: Text  # that `create_model` knows
    patch_size: Pixels | None
    stride: Pixels | None  # below the patch size the patches overlap
    depth: Layer | None
    d_model: Annotated[Int, Field(ge=1, le=8192)] | None
    d_state: Annotated[Int, Field(ge=1, le=256)] | None
    cls_position: Literal["middle", "head", "none"]  # of the class token
    pool: Literal["cls", "mean"]  # what the head sees: the class token or the mean of all tokens
    average_directions: Bool  # of the scan, as released; false sums them


@section
class FusionRule:
    """How many tokens one strategy removes: exactly one of r, total and schedule. Layers count from 1."""

    r: NotNegative | None = None  # by each fusing layer
    total: NotNegative | None = None  # by all layers together; the r that comes nearest is taken
    schedule: Annotated[tuple[NotNegative, ...], Field(max_length=1000)] | None = None  # by each layer, outright
    first_layer: Layer | None = None  # among which the strategy fuses; null is the strategy's own choice
    last_layer: Layer | None = None

    @model_validator(mode="after")
    def _check(self) -> "FusionRule":
        return _check_one_given(self, "r", "total", "schedule")


@section
class AdaptiveRule:
    """The budget of the schedule that calibration makes: exactly one of the three."""

    total: NotNegative | None = None  # tokens removed by all layers together
    memory: Share | None = None  # of the unfused model's peak memory in a training step, by formula
    flops: Share | None = None  # of the unfused model's forward pass, scans included; they stand for time

    @model_validator(mode="after")
    def _check(self) -> "AdaptiveRule":
        return _check_one_given(self, "total", "memory", "flops")


def _check_one_given(rule: T, *keys: str) -> T:
    if sum(getattr(rule, key) is not None for key in keys) != 1:
        raise ValueError(f"exactly one of {', '.join(keys)} is allowed")
    return rule


@section
class TrainParams:
    """The optimisation."""

    # File of the weights to start from, from the repository root, `{seed}` standing for the run's seed: the
    # model.safetensors of a run, or a released Vim checkpoint. Null draws new ones.
    init_from: Text | None
    epochs: NotNegative  # passes over the training images; 0 evaluates the weights of init_from as they are
    batch_size: Positive  # images per step, of all processes together
    # Images that a process takes at once; it sums the gradients of as many such parts as its share of a step needs.
    device_batch: Positive | None
    processes: Jobs  # that train together, each on its device, unless torchrun has started them
    lr: Annotated[Float, Field(gt=0, le=1000)]  # peak, after warm-up
    lr_batch: Positive | None  # the batch size that lr is meant for; it is scaled by batch_size / lr_batch
    min_lr: Annotated[Float, Field(ge=0, le=1000)]  # at the end of the cosine
    warmup_epochs: NotNegative  # of linear rise from 0
    weight_decay: Annotated[Float, Field(ge=0, le=1000)]  # AdamW's, on matrices only
    betas: tuple[Fraction, Fraction]  # AdamW's
    label_smoothing: Fraction  # share of the target spread over all classes
    clip_grad_norm: Annotated[Float, Field(gt=0)] | None  # gradients are scaled down to this norm
    ema_decay: Fraction | None  # of the moving average of the weights, per step; null keeps none
    # Whose weights are tested: those of the epoch that did best in validation, or of the last. Between the weights and
    # their moving average, validation decides in either.
    choose: Literal["best", "last"]
    precision: Literal["fp32", "bf16"]  # bf16 for the matrix products; SSM parameters and states stay fp32
    device: Annotated[str, AfterValidator(_is_device)]  # auto: CUDA where it is, else the CPU
    backend: Text  # of the selective scan; auto takes the fastest that runs
    cuda_graph: Bool  # replay a step's forward and backward pass as one CUDA graph: faster for small models
    threads: Annotated[Int, Field(ge=1, le=1024)] | None  # of the CPU; part of what makes a run repeatable bit for bit
    tensorboard: Bool  # write TensorBoard events under build/tensorboard

    @model_validator(mode="after")
    def _check(self) -> "TrainParams":
        if self.epochs == 0 and self.init_from is None:
            raise ValueError("epochs: trains nothing; give train.init_from, the weights to evaluate")
        if self.warmup_epochs > self.epochs > 0:
            raise ValueError(f"warmup_epochs: must be at most train.epochs, {self.epochs}")
        peak = self.lr * self.batch_size / (self.lr_batch or self.batch_size)
        if self.min_lr > peak:
            raise ValueError(f"min_lr: must be at most train.lr, which train.lr_batch may scale, {peak}")
        if self.batch_size % (share := self.processes * (self.device_batch or 1)):
            raise ValueError(f"batch_size: must be a multiple of train.processes times train.device_batch, {share}")
        return self


@section
class SweepParams:
    """Runs: every variant with every seed. Variants are strategies, and some of them with one change at a time."""

    strategies: Annotated[Strategies, Field(min_length=1)]  # as the profile has them
    seeds: Seeds
    varied: Strategies = dataclasses.field(default=(), kw_only=True)  # those with each of the changes, too
    # By name, as `given` of `load`.
    changes: dict[Strategy, dict[str, Any]] = dataclasses.field(default_factory=dict, kw_only=True)

    @property
    def variants(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Strategy and change of each variant, whose name is that of the strategy or `<strategy>_<change>`."""
        named: dict[str, tuple[str, dict[str, Any]]] = {
            name: (name, {}) for name in strategies.ordered(self.strategies)
        }
        return named | {f"{x}_{change}": (x, given) for x in self.varied for change, given in self.changes.items()}

    def params(self, profile: str | None) -> "dict[str, Params]":
        """The parameters of each variant under a profile; errors as in `load`."""
        return {name: load(profile, strategy=x, given=given) for name, (x, given) in self.variants.items()}


@section
class AblationParams(SweepParams):
    """A sweep of its own, beside the sweep's runs."""

    profile: Text | None = dataclasses.field(default=None, kw_only=True)  # null: the one that is asked for

    def params(self, profile: str | None) -> "dict[str, Params]":
        return SweepParams.params(self, self.profile or profile)


@section
class ClaimParams:
    """A claim, stated before its runs: an effect of each of `strategies` against each of `against`, beyond a bound."""

    says: Text
    source: Text
    # Difference in top-1 (points), ratio of training time or of peak memory.
    quantity: Literal["top1_percent_diff", "time_ratio", "memory_ratio"]
    strategies: Annotated[Strategies, Field(min_length=1)]
    against: Annotated[Strategies, Field(min_length=1)] = ("none",)
    ablation: Text | None = None  # whose variants are compared; null: the sweep's strategies
    # Compared at the same of this: interpolated between two variants of `against`, the next below and above in it.
    at_same: Literal["time_ratio", "memory_ratio"] | None = None
    below: Float | None = None  # exactly one of the two
    above: Float | None = None  # -1.0: worse by less than a margin of one point

    @model_validator(mode="after")
    def _check(self) -> "ClaimParams":
        for key in ("below", "above"):
            if self.quantity != "top1_percent_diff" and (bound := getattr(self, key)) is not None and bound <= 0:
                raise ValueError(f"{key}: a ratio is compared with a positive number")
        if self.at_same and (self.quantity != "top1_percent_diff" or len(self.against) < 2):
            raise ValueError("at_same: only for top1_percent_diff, against two variants or more")
        return _check_one_given(self, "below", "above")


# How a run is carried out; it makes the same of it, to rounding.
EXECUTION: dict[str, tuple[str, ...]] = {"data": ("workers", "memory_mib"), "train": ("processes", "tensorboard")}


@section
class Params:
    """Everything that determines one run but its seed."""

    profile: str
    strategy: Strategy
    data: DataParams
    model: ModelParams
    fusion: FusionRule
    options: FusionOptions
    train: TrainParams

    def schedule(self, depth: int) -> list[int]:
        """Tokens removed by each layer of a model of that depth; errors as in `famba.schedule`.

        A strategy whose name is none of the paper's fuses in every layer from first_layer to last_layer.
        """
        rule = dataclasses.asdict(self.fusion)
        given = rule.pop("schedule")
        if given is None:
            name = self.strategy if self.strategy in STRATEGIES else "all"
            try:
                return strategies.schedule(name, depth=depth, **rule)
            except InputError as error:
                raise InputError(f"fusion.{self.strategy}: {error}") from None
        if len(given) != depth:
            raise InputError(
                f"fusion.{self.strategy}.schedule: {list(given)} has {len(given)} layers; the model has {depth}"
            )
        return list(given)

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
        """SHA-256 of that file: the weights are part of what determines a run, not their name alone.

        Raises:
            InputError: it cannot be read.
        """
        path = self.init_path(seed)
        return None if path is None else _sha256(path, *_version(path))


def identity(params: Mapping[str, Any]) -> dict[str, Any]:
    """What tells one run from another, of `Params.as_dict()` or of what a run's params.json holds: no `EXECUTION`."""
    kept = dict(params)
    for section, keys in EXECUTION.items():
        kept[section] = {key: value for key, value in params[section].items() if key not in keys}
    return kept


def root() -> Path:
    """The repository root: the nearest folder above the working directory that holds params.yaml and dvc.yaml.

    Papermill runs a notebook in the caller's folder, nbval and JupyterLab in the notebook's own, so no path may be
    relative to the working directory. From anywhere else, the root is the checkout that this package lies in; installed
    without one, the working directory.
    """
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parent.parent):
        if (folder / "params.yaml").is_file() and (folder / "dvc.yaml").is_file():
            return folder
    return here


Section = dict[str, Any]
Profile = dict[Literal["data", "model", "options", "fusion", "train"], Section]


@section
class _File:
    """params.yaml, whose sections are checked when they are asked for; `fusion` has one rule for each strategy."""

    profile: str
    data: Section
    model: Section
    options: Section
    fusion: dict[Strategy, Any]
    train: Section
    sweep: Section
    ablation: Annotated[dict[Text, Section], Field(min_length=1)]
    claims: Annotated[dict[Text, Section], Field(min_length=1)]
    profiles: dict[str, Profile]

    @property
    def strategies(self) -> list[str]:
        """Those that can be trained."""
        return [name for name in self.fusion if name != ADAPTIVE]


def load(
    profile: str | None = None,
    *,
    strategy: str,
    processes: int | None = None,
    given: Mapping[str, Any] = MappingProxyType({}),
    path: Path | None = None,
) -> Params:
    """The parameters of one strategy under a profile.

    Args:
        profile: a key of `profiles`; None is the one that the file names itself.
        strategy: a key of `fusion`; `none`, `all`, `interleaved`, `lower` and `upper` are the paper's.
        processes: instead of train.processes, which does not change what a run is; None keeps it.
        given: values instead of the file's and the profile's, such as {"train.epochs": 3}; `fusion.<name>.<key>` may
            make a new strategy.
        path: the file; None is params.yaml at the repository root, or the package's where there is none.

    Raises:
        InputError: an unknown key, a wrong type or value, an unknown profile or strategy; names it and what is allowed.
    """
    file, name, chosen, place = _under_profile(profile, path)
    for key, value in given.items():
        section, *keys = key.split(".")
        if (section, len(keys)) not in {("data", 1), ("model", 1), ("options", 1), ("train", 1), ("fusion", 2)}:
            allowed = "data, model, options or train and a key; fusion, a strategy and a key"
            raise InputError(f"--set: {_short(key)} is not {allowed}, with dots between")
        if section == "fusion":
            ways = {way: None for way in ("r", "total", "schedule") if keys[1] in ("r", "total", "schedule")}
            rule = file.fusion.get(keys[0]) or {}
            if not isinstance(rule, Mapping):
                raise InputError(f"{name}: fusion.{keys[0]}: {_short(rule)} is not a section of `key: value` lines")
            value = {**rule, **ways, keys[1]: value}
        file = dataclasses.replace(file, **{section: getattr(file, section) | {keys[0]: value}})
    if strategy not in file.strategies:
        raise InputError(f"strategy: {_short(strategy)} is not one of {', '.join(file.strategies)}")
    train = file.train if processes is None else file.train | {"processes": processes}
    values = {"data": file.data, "model": file.model, "options": file.options, "train": train}
    return validated(
        Params,
        {"profile": chosen, "strategy": strategy, "fusion": file.fusion[strategy], **values},
        name,
        lambda section, *keys: place(section, strategy, *keys) if section == "fusion" else place(section, *keys),
    )


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` as the `given` of `load`."""
    found = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set: {_short(setting)} is not KEY=VALUE")
        found[key] = parse_value(key, text)
    return found


def parse_value(name: str, text: str) -> Any:
    """A value given on the command line as YAML 1.2, so that `no` and `1e-3` mean what they mean in params.yaml."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{name} = {_short(text)}: not readable as YAML: {' '.join(str(error).split())}") from None


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
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from None
    return validated(Params, document, str(path))


def load_adaptive(profile: str | None = None, *, path: Path | None = None) -> AdaptiveRule:
    """The budget of the adaptive schedule under a profile: `fusion.adaptive`; arguments and errors as in `load`."""
    file, name, _, place = _under_profile(profile, path)
    return validated(AdaptiveRule, file.fusion.get(ADAPTIVE), name, lambda *keys: place("fusion", ADAPTIVE, *keys))


def load_sweep(path: Path | None = None, *, seeds: Sequence[int] | None = None) -> SweepParams:
    """The runs that params.yaml asks for; errors as in `load`.

    Args:
        seeds: instead of the file's.
    """
    return _load(SweepParams, "sweep", path, {} if seeds is None else {"seeds": seeds})


def load_ablations(path: Path | None = None) -> dict[str, AblationParams]:
    """The ablations that params.yaml asks for, by name; errors as in `load`.

    Those of one profile share their runs, so a change that two of them name is the same.
    """
    (file, name), settings = _read(path), {}
    found = {entry: _load(AblationParams, f"ablation.{entry}", path, {}) for entry in file.ablation}
    for entry, asked in found.items():
        for change, given in asked.changes.items():
            if (other := settings.setdefault((asked.profile, change), given)) != given:
                where = f"{name}: ablation.{entry}.changes.{change}"
                raise InputError(f"{where}: {given} has the name of another ablation's change, {other}")
    return found


def load_claims(path: Path | None = None) -> dict[str, ClaimParams]:
    """The claims that params.yaml states, by name; errors as in `load`."""
    return {name: _load(ClaimParams, f"claims.{name}", path, {}) for name in _read(path)[0].claims}


def _load(kind: type[T], section: str, path: Path | None, changes: Mapping[str, Any]) -> T:
    file, name = _read(path)
    top, _, entry = section.partition(".")
    values = getattr(file, top)[entry] if entry else getattr(file, top)
    found = validated(kind, values | changes, name, lambda *keys: (section, *keys))
    known: list[str] = file.strategies
    if ablation := getattr(found, "ablation", None):
        if ablation not in file.ablation:
            raise InputError(f"{name}: {section}.ablation: {ablation!r} is not one of {', '.join(file.ablation)}")
        known = list(_load(AblationParams, f"ablation.{ablation}", path, {}).variants)
    for key in ("strategies", "against", "varied"):
        for strategy in getattr(found, key, ()):
            if strategy not in known:
                raise InputError(f"{name}: {section}.{key}: {strategy!r} is not one of {', '.join(known)}")
    return found


def _under_profile(profile: str | None, path: Path | None) -> tuple[_File, str, str, Callable[..., tuple[Any, ...]]]:
    """The file as it is under a profile, its name, the profile's, and where the file has a value.

    A strategy's rule is replaced whole, since the ways to give one exclude each other.
    """
    file, name = _read(path)
    chosen = file.profile if profile is None else profile
    if chosen not in file.profiles:
        raise InputError(f"{name}: profile: {_short(chosen)} is not one of {', '.join(file.profiles)}")
    changes: Any = file.profiles[chosen]
    for strategy in changes.get("fusion", {}):
        if strategy not in file.fusion:
            allowed = ", ".join(file.fusion)
            raise InputError(f"{name}: profiles.{chosen}.fusion: {_short(strategy)} is not one of fusion's: {allowed}")

    def place(section: str, *keys: Any) -> tuple[Any, ...]:
        changed = keys and keys[0] in changes.get(section, {})
        return ("profiles", chosen, section, *keys) if changed else (section, *keys)

    laid = {section: getattr(file, section) | change for section, change in changes.items()}
    return dataclasses.replace(file, **laid), name, chosen, place


def _read(path: Path | None) -> tuple[_File, str]:
    """The file's content and name."""
    if path is None and not (path := root() / "params.yaml").is_file():
        path = Path(__file__).with_name("params.yaml")  # a wheel's copy
    return _parse(path, *_version(path)), path.name


def _version(path: Path) -> tuple[int, int]:
    """Modification time and size, by which a file that changed is read again."""
    try:
        stat = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=16)
def _sha256(path: Path, mtime_ns: int, size: int) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


_MAX_BYTES, _MAX_VALUES = 2**18, 100_000


@functools.lru_cache(maxsize=4)
def _parse(path: Path, mtime_ns: int, size: int) -> _File:
    """Read with a YAML 1.2 reader, DVC's own: PyYAML takes 1e-3 for a string and `no` for False."""
    if size > _MAX_BYTES:
        raise InputError(f"{path.name}: {size} bytes; at most {_MAX_BYTES} are read")
    yaml = YAML(typ="safe", pure=True)
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"))
        if _count_values(node, {}) > _MAX_VALUES:
            raise ValueError(f"its aliases expand to more than {_MAX_VALUES} values")
        document = None if node is None else yaml.constructor.construct_document(node)
    except (YAMLError, ValueError, OSError, RecursionError) as error:  # ValueError: not UTF-8, or a date: 2026-13-01
        raise InputError(f"{path.name}: not readable as YAML: {' '.join(str(error).split())}") from None
    return validated(_File, document, path.name)


def _count_values(node: Node | None, counts: dict[int, int]) -> int:
    """Values that a node stands for, aliases expanded. A few lines of aliases of aliases may stand for billions."""
    if node is None or isinstance(node, ScalarNode):
        return 1
    if id(node) not in counts:
        counts[id(node)] = _MAX_VALUES + 1  # as long as it is being counted: an alias of what holds it never ends
        children = [child for entry in node.value for child in (entry if isinstance(entry, tuple) else [entry])]
        counts[id(node)] = 1 + sum(_count_values(child, counts) for child in children)
    return counts[id(node)]


_adapter = functools.cache(TypeAdapter)
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 120


def _short(value: Any) -> str:
    try:
        return _repr.repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return f"{type(value).__name__} of thousands of digits"


def validated(kind: type[T], values: Any, name: str, place: Callable[..., tuple[Any, ...]] = lambda *keys: keys) -> T:
    """Build a dataclass, or say in one line which key of which file holds which value, and what is allowed.

    Args:
        kind: a dataclass or TypedDict. A ValueError of its validators may start with the key at fault and a colon.
        name: of the file.
        place: where the file has the key that `kind` has under these names.

    Raises:
        InputError: an unknown or missing key, a wrong type or value.
    """
    try:
        return _adapter(kind).validate_python(values)
    except ValidationError as error:
        raise _refusal(error, kind, name, place) from None


def _refusal(error: ValidationError, kind: type, name: str, place: Callable[..., tuple[Any, ...]]) -> InputError:
    first = error.errors(include_url=False)[0]
    keys = [key for key in first["loc"] if key != "[key]"]
    value, reason = first["input"], first["msg"]
    if first["type"] == "value_error":
        reason = str(first.get("ctx", {})["error"])
        if ": " in reason:
            key, _, reason = reason.partition(": ")
            keys, value = [*keys, key], getattr(value, "kwargs", value)[key]
    where = [name, ".".join(map(_plain, place(*keys)))]
    if first["type"] in ("unexpected_keyword_argument", "invalid_key"):
        owner: Any = kind
        for key in keys[:-1]:
            owner = get_type_hints(owner)[str(key)]
        reason = f"unknown key; allowed: {', '.join(sorted(field.name for field in dataclasses.fields(owner)))}"
    elif first["type"] == "missing":
        reason = "missing"
    elif first["type"] in ("dict_type", "dataclass_type"):
        reason = f"{_short(value)} is not a section of `key: value` lines"
    else:
        reason = f"{_short(value)}: {reason}"
    return InputError(": ".join([part for part in where if part] + [reason]))


def _plain(key: Any) -> str:
    return key if isinstance(key, str) and key.isprintable() and len(key) < 80 else _short(key)

"""params.yaml: the default, the profiles laid over it, the runs that it asks for and the claims that it states.

Nothing here imports torch, so the pipeline and the notebooks can read parameters in milliseconds.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, model_validator
from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.nodes import Node, ScalarNode

from famba.errors import InputError
from famba.fusion import strategies
from famba.fusion.strategies import ADAPTIVE
from famba.params import AdaptiveRule, Params, Seeds, Strategies, Strategy, Text
from famba.validation import Float, one_given, section, shortened, validated

T = TypeVar("T")


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
        return one_given(self, "below", "above")


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


def init_path(p: Params, seed: int) -> Path | None:
    """The file of the weights that a run starts from."""
    name = p.train.init_from
    return None if name is None else root() / os.path.expanduser(name.replace("{seed}", str(seed)))


def init_sha256(p: Params, seed: int) -> str | None:
    """SHA-256 of that file: the weights are part of what determines a run, not their name alone.

    Raises:
        InputError: it cannot be read.
    """
    path = init_path(p, seed)
    return None if path is None else _sha256(path, *_version(path))


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
        given: values instead of the file's and the profile's, such as {"train.epochs": 3}; `fusion.<strategy>.<key>`
            may make a new strategy.
        path: the file; None is params.yaml at the repository root, or the package's where there is none.

    Raises:
        InputError: an unknown key, a wrong type or value, an unknown profile or strategy; names it and what is allowed.
    """
    file, name, chosen, place = _under_profile(profile, path)
    if given:  # so that what is refused is not looked for in the file
        name += f" with {', '.join(f'{key}={shortened(value)}' for key, value in given.items())}"
    rule, others = {}, []
    for key, value in given.items():
        section, *keys = key.split(".")
        if (section, len(keys)) not in {("data", 1), ("model", 1), ("options", 1), ("train", 1), ("fusion", 2)}:
            allowed = "data, model, options or train and a key; fusion, a strategy and a key"
            raise InputError(f"{name}: {shortened(key)} is not {allowed}, with dots between")
        if section != "fusion":
            file = dataclasses.replace(file, **{section: getattr(file, section) | {keys[0]: value}})
        elif keys[0] == strategy:
            rule[keys[1]] = value
        else:
            others.append(keys[1])
    if rule:
        before = file.fusion.get(strategy) or {}
        if not isinstance(before, Mapping):
            raise InputError(f"{name}: fusion.{strategy}: {shortened(before)} is not a section of `key: value` lines")
        ways = {"r", "total", "schedule"}  # of which one is given: a new one takes the place of the file's
        replaced = ways & rule.keys() and ways | ({"first_layer", "last_layer"} if "schedule" in rule else set())
        kept = {key: value for key, value in before.items() if key not in replaced}
        file = dataclasses.replace(file, fusion=file.fusion | {strategy: kept | rule})
    if strategy not in file.strategies:
        raise InputError(f"strategy: {shortened(strategy)} is not one of {', '.join(file.strategies)}")
    if others:
        raise InputError(f"{name}: strategy {strategy!r} is trained; must be fusion.{strategy}.{others[0]}")
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
            raise InputError(f"--set: {shortened(setting)} is not KEY=VALUE")
        found[key] = parse_value(key, text)
    return found


def parse_value(name: str, text: str) -> Any:
    """A value given on the command line as YAML 1.2, so that `no` and `1e-3` mean what they mean in params.yaml."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{name} = {shortened(text)}: not readable as YAML: {' '.join(str(error).split())}") from None


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
        raise InputError(f"{name}: profile: {shortened(chosen)} is not one of {', '.join(file.profiles)}")
    changes: Any = file.profiles[chosen]
    for strategy in changes.get("fusion", {}):
        if strategy not in file.fusion:
            allowed = ", ".join(file.fusion)
            raise InputError(
                f"{name}: profiles.{chosen}.fusion: {shortened(strategy)} is not one of fusion's: {allowed}"
            )

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

"""What a finished run is on disk: results that must not change and measurements that always do, in different files.

    metrics.json        accuracy and loss; the same bytes for the same commit, machine and seed. Written last: where
                        it is, the run is complete
    cost.json           times, memory, device, versions, command; measured
    history.csv         one line per epoch; deterministic, so without times
    schedule.json       tokens removed by each layer, and the token counts that the model's trace showed
    params.json         the resolved configuration
    model.safetensors   the chosen weights

Nothing here imports torch: results can be read where it is not installed.
"""

import contextlib
import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from famba import config
from famba.errors import InputError
from famba.storage.files import claimed, json_bytes, write_atomic
from famba.validation import Float, Int, validated

# What is checked of a run's files; they may hold more.
_CONFIG = ConfigDict(extra="ignore", allow_inf_nan=False)
_Count = Annotated[Int, Field(ge=0)]
_Measured = Annotated[Float, Field(ge=0)]
_Percent = Annotated[Float, Field(ge=0, le=100)]


@dataclass(config=_CONFIG)
class _Scores:
    top1_percent: _Percent
    top5_percent: _Percent
    loss: Float


@dataclass(config=_CONFIG)
class _EpochScores(_Scores):
    epoch: Int


@dataclass(config=_CONFIG)
class _Validation:
    last: _EpochScores
    best: _EpochScores


@dataclass(config=_CONFIG)
class _Chosen:
    weights: Literal["raw", "ema"]
    epoch: Int


@dataclass(config=_CONFIG)
class _Metrics(_Scores):
    strategy: str
    seed: Int
    profile: str
    chosen: _Chosen
    validation: dict[Literal["raw", "ema"], _Validation | None]  # null where no moving average is kept

    @model_validator(mode="after")
    def _check(self) -> "_Metrics":
        if set(self.validation) != {"raw", "ema"} or self.validation[self.chosen.weights] is None:
            raise ValueError(f"validation: must hold raw and ema, and scores of the chosen {self.chosen.weights}")
        return self


@dataclass(config=_CONFIG)
class _Cost:
    train_time_s: _Measured
    step_time_ms: _Measured
    data_time_ms: _Measured
    peak_memory_mib: _Measured
    throughput_img_s: _Measured
    flops_per_image: _Measured
    params_count: _Count
    threads: _Count
    device: str
    versions: dict[str, str]
    command: str
    kernels: dict[str, str]
    nondeterministic: list[str]
    epoch_time_s: list[_Measured]


@dataclass(config=_CONFIG)
class _Schedule:
    strategy: str
    schedule: list[_Count]
    token_counts: list[_Count]

    @model_validator(mode="after")
    def _check(self) -> "_Schedule":
        if len(self.token_counts) != len(self.schedule) + 1:
            raise ValueError(f"token_counts: must be {len(self.schedule) + 1} numbers")
        for layer, r in enumerate(self.schedule, start=1):
            before, after = self.token_counts[layer - 1 : layer + 1]
            if after != before - r:
                raise ValueError(f"token_counts: layer {layer} made {after} of {before} tokens, though r = {r}")
        return self


@dataclass(config=ConfigDict(extra="forbid", allow_inf_nan=False))
class _Epoch:
    """A line of history.csv; numbers may be text. The last two are empty in a run without a moving average."""

    epoch: int
    lr: float
    train_loss: float
    train_top1_percent: float
    val_loss: float
    val_top1_percent: float
    val_top5_percent: float
    ema_val_loss: float | None
    ema_val_top1_percent: float | None


HISTORY_COLUMNS = tuple(field.name for field in dataclasses.fields(_Epoch))
MODEL_FILE = "model.safetensors"
FILES = frozenset(
    ("metrics.json", "cost.json", "history.csv", "schedule.json", "params.json", "correct.txt", MODEL_FILE)
)  # all of a run


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A finished run, without its weights.

    Attributes:
        schedule: tokens removed by each layer, layer 1 first.
        token_counts: tokens at the input and after each layer, from the trace; one more than layers.
        metrics: `top1_percent`, `top5_percent`, `loss` on the test split with the chosen weights, `chosen`
            (`weights`: raw or ema, `epoch`), `validation` (`raw` and `ema`: `last` and `best` epoch; ema may be None).
            A run that started from a file of weights: `init_sha256`, that file's content.
        cost: `train_time_s`, `step_time_ms`, `data_time_ms`, `peak_memory_mib`, `throughput_img_s`,
            `flops_per_image` (by formula, of a forward pass with its scans), `params_count`, `threads`,
            `device`, `versions`, `command`, `kernels` (the backend that ran each function, and the native ones'
            `instruction_set`), `tf32` (whether fp32 products were rounded so), `nondeterministic` (what was, by name),
            `epoch_time_s` (one per epoch), `made_of` (parameters, seed and code, `training.fit.made_of`).
            Where nothing was trained (`train.epochs` 0), a step is a forward pass, and the epoch is number 0.
        history: one dict of `HISTORY_COLUMNS` per epoch; None in the ema columns of a run without. Empty where nothing
            was trained.
        correct: a character for each image of the data set, in its order: 1 if the image was tested and classified
            correctly, 0 if incorrectly, - if it was not tested; ends with the last tested image.
        params: the resolved configuration, `Params.as_dict()`.
    """

    strategy: str
    seed: int
    profile: str
    schedule: Sequence[int]
    token_counts: Sequence[int]
    metrics: Mapping[str, Any]
    cost: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    correct: str
    params: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Run(RunRecord):
    """A finished run with its weights, as training hands it over.

    Attributes:
        model_bytes: the content of model.safetensors.
    """

    model_bytes: bytes


def run_name(strategy: str, seed: int) -> str:
    """The name of a run's folder."""
    return f"{strategy}-{seed}"


def write(run: Run, run_dir: str | Path) -> Path:
    """Write a run into its folder, metrics.json last, and return the folder.

    A run that is already there is overwritten, and is incomplete from the first moment until the last. The folder,
    from the repository root if it is relative, is held meanwhile.

    Raises:
        InputError: a value that is missing, not finite or of the wrong kind (checked before any file is touched), or a
            folder that cannot be written to, or that another process holds.
    """
    folder = config.root() / run_dir
    schedule = {"strategy": run.strategy, "schedule": list(run.schedule), "token_counts": list(run.token_counts)}
    metrics = {"strategy": run.strategy, "seed": run.seed, "profile": run.profile, **run.metrics}
    files = {"schedule": schedule, "params": run.params, "cost": run.cost, "metrics": metrics}
    _check(folder, files, run.history, run.correct)
    if not run.model_bytes:
        raise InputError(f"{folder / MODEL_FILE}: no weights given")
    contents = {"history.csv": history_bytes(run.history), "correct.txt": f"{run.correct}\n".encode()}
    contents[MODEL_FILE] = run.model_bytes
    for name, value in files.items():
        try:
            contents[f"{name}.json"] = json_bytes(dict(value))
        except (ValueError, TypeError) as error:
            raise InputError(f"{folder / name}.json: {error}") from None
    with held(folder):
        try:
            (folder / "metrics.json").unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror})") from None
        for name, content in contents.items():
            write_atomic(folder / name, content)
    return folder


@contextlib.contextmanager
def held(run_dir: str | Path, *, wait: bool = False) -> Iterator[Path]:
    """Hold a run's folder as `claimed` does, best from before training: no other process writes a run there."""
    folder = config.root() / run_dir
    with claimed(folder / ".lock", f"{folder}: another process is making a run there", wait=wait):
        yield folder


def read(run_dir: str | Path) -> RunRecord:
    """Read a run and check all of it; a relative folder is from the repository root.

    Raises:
        InputError: a file that is missing or not readable, a key that is missing, a number that is not finite, token
            counts that do not follow from the schedule; names the file and the key.
    """
    folder = config.root() / run_dir
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run")
    if not (folder / "metrics.json").is_file():
        raise InputError(f"{folder / 'metrics.json'}: missing, so the run is not complete")
    files = {name: _object(folder / f"{name}.json") for name in ("metrics", "schedule", "cost", "params")}
    history, correct = read_history(folder / "history.csv"), _text(folder / "correct.txt").strip()
    _check(folder, files, history, correct)
    metrics, schedule = files["metrics"], files["schedule"]
    if not (folder / MODEL_FILE).is_file():
        raise InputError(f"{folder / MODEL_FILE}: missing")
    return RunRecord(
        **{key: metrics.pop(key) for key in ("strategy", "seed", "profile")},
        schedule=schedule["schedule"],
        token_counts=schedule["token_counts"],
        metrics=metrics,
        cost=files["cost"],
        history=history,
        correct=correct,
        params=files["params"],
    )


def history_bytes(history: Sequence[Mapping[str, Any]]) -> bytes:
    """What history.csv holds; numbers as Python writes them, the shortest text that reads back as the same number."""
    text = io.StringIO()
    writer = csv.DictWriter(text, HISTORY_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue().encode()


def _check(
    folder: Path, files: Mapping[str, Mapping[str, Any]], history: Sequence[Mapping[str, Any]], correct: str
) -> None:
    """What must hold of a run's files, written or read; those of JSON by name."""
    for name, kind in {"metrics": _Metrics, "schedule": _Schedule, "cost": _Cost}.items():
        validated(kind, files[name], str(folder / f"{name}.json"))
    metrics, params = files["metrics"], files["params"]
    for name, key in (("schedule", "strategy"), ("params", "strategy"), ("params", "profile")):
        if (found := files[name].get(key)) != metrics[key]:
            raise InputError(f"{folder / name}.json: {key}: {found!r}; metrics.json says {metrics[key]!r}")
    if not history and params.get("train", {}).get("epochs") != 0:
        raise InputError(f"{folder / 'history.csv'}: no epochs")
    _epochs(history, folder / "history.csv")
    path, right, tested = folder / "correct.txt", correct.count("1"), correct.count("1") + correct.count("0")
    if set(correct) - set("01-") or not tested:
        raise InputError(f"{path}: must hold 0, 1 or - for each image, and an image that was tested")
    if not math.isclose(100 * right / tested, metrics["top1_percent"]):
        raise InputError(f"{path}: {right} of {tested} correct; metrics.json says {metrics['top1_percent']}%")


def _epochs(history: Sequence[Mapping[str, Any]], path: Path) -> list[dict[str, Any]]:
    epochs = [
        validated(_Epoch, row, str(path), lambda *keys, number=number: (f"epoch {number}", *keys))
        for number, row in enumerate(history, start=1)
    ]
    for number, row in enumerate(epochs, start=1):
        if row.epoch != number:
            raise InputError(f"{path}: epoch: {row.epoch} in line {number} of the epochs; they count from 1")
    return [dataclasses.asdict(row) for row in epochs]


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path), parse_constant=_refuse_constant)
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a finite number")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as text: {error}") from None


def read_history(path: Path) -> list[dict[str, Any]]:
    try:
        lines = list(csv.reader(_text(path).splitlines()))
    except csv.Error as error:
        raise InputError(f"{path}: not readable as CSV: {error}") from None
    if not lines or tuple(lines[0]) != HISTORY_COLUMNS:
        raise InputError(f"{path}: its first line must be {','.join(HISTORY_COLUMNS)}")
    for number, line in enumerate(lines[1:], start=1):
        if len(line) != len(HISTORY_COLUMNS):
            raise InputError(f"{path}: epoch {number}: {len(line)} values; {len(HISTORY_COLUMNS)} columns")
    return _epochs(
        [dict(zip(HISTORY_COLUMNS, (text or None for text in line), strict=True)) for line in lines[1:]], path
    )

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
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from famba import config
from famba.errors import InputError
from famba.fusion import strategies
from famba.storage.files import claimed, json_bytes, write_atomic

HISTORY_COLUMNS: tuple[str, ...] = (
    "epoch",
    "lr",
    "train_loss",
    "train_top1_percent",
    "val_loss",
    "val_top1_percent",
    "val_top5_percent",
    "ema_val_loss",
    "ema_val_top1_percent",
)
# Empty in every line of a run that keeps no moving average of its weights.
_EMA_COLUMNS = ("ema_val_loss", "ema_val_top1_percent")
_NUMBERS_OF_COST = (
    "train_time_s",
    "step_time_ms",
    "data_time_ms",
    "peak_memory_mib",
    "throughput_img_s",
    "flops_per_image",
    "params_count",
    "threads",
)
MODEL_FILE = "model.safetensors"
_held: set[Path] = set()  # by this process


@dataclass(frozen=True)
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
            `epoch_time_s` (one per epoch).
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


@dataclass(frozen=True)
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

    A run that is already there is overwritten, and is incomplete from the first moment until the last. The folder is
    held meanwhile.

    Args:
        run_dir: if relative, from the repository root.

    Raises:
        InputError: a value that is missing, not finite or of the wrong kind (checked before any file is touched), or a
            folder that cannot be written to, or that another process holds.
    """
    folder = config.root() / run_dir
    identity = {"strategy": run.strategy, "seed": run.seed, "profile": run.profile}
    metrics = {**identity, **run.metrics}
    _check_schedule(run.schedule, run.token_counts, folder / "schedule.json")
    _check(run, metrics, folder)
    if not run.model_bytes:
        raise InputError(f"{folder / MODEL_FILE}: no weights given")
    contents = {
        "schedule.json": _json(
            {"strategy": run.strategy, "schedule": list(run.schedule), "token_counts": list(run.token_counts)},
            folder / "schedule.json",
        ),
        "params.json": _json(dict(run.params), folder / "params.json"),
        "cost.json": _json(dict(run.cost), folder / "cost.json"),
        "history.csv": history_bytes(run.history),
        "correct.txt": f"{run.correct}\n".encode(),
        MODEL_FILE: run.model_bytes,
        "metrics.json": _json(metrics, folder / "metrics.json"),
    }
    with held(folder):
        try:
            (folder / "metrics.json").unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror})") from None
        for name, content in contents.items():
            write_atomic(folder / name, content)
    return folder


@contextlib.contextmanager
def held(run_dir: str | Path) -> Iterator[Path]:
    """Hold a run's folder, so that no other process writes a run there: from before training, best.

    A process that holds it may do so again. A killed one leaves nothing that is in the way.

    Args:
        run_dir: if relative, from the repository root; made if need be.

    Raises:
        InputError: another process holds it, or it cannot be written to.
    """
    folder = config.root() / run_dir
    key = folder.resolve()
    if key in _held:
        yield folder
        return
    with claimed(folder / ".lock", f"{folder}: another process is making a run there"):
        _held.add(key)
        try:
            yield folder
        finally:
            _held.remove(key)


def read(run_dir: str | Path) -> RunRecord:
    """Read a run and check all of it.

    Args:
        run_dir: if relative, from the repository root.

    Raises:
        InputError: a file that is missing or not readable, a key that is missing, a number that is not finite, token
            counts that do not follow from the schedule; names the file and the key.
    """
    folder = config.root() / run_dir
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run")
    if not (folder / "metrics.json").is_file():
        raise InputError(f"{folder / 'metrics.json'}: missing, so the run is not complete")
    metrics = _object(folder / "metrics.json")
    fusion = _object(folder / "schedule.json")
    identity = {
        key: _value(metrics, key, kind, folder / "metrics.json")
        for key, kind in {"strategy": str, "seed": int, "profile": str}.items()
    }
    schedule, token_counts = (
        _value(fusion, key, list, folder / "schedule.json") for key in ("schedule", "token_counts")
    )
    _check_schedule(schedule, token_counts, folder / "schedule.json")
    record = RunRecord(
        **identity,
        schedule=schedule,
        token_counts=token_counts,
        metrics={key: value for key, value in metrics.items() if key not in identity},
        cost=_object(folder / "cost.json"),
        history=read_history(folder / "history.csv"),
        correct=_text(folder / "correct.txt").strip(),
        params=_object(folder / "params.json"),
    )
    _check(record, metrics, folder)
    strategy = _value(fusion, "strategy", str, folder / "schedule.json")
    if strategy != record.strategy:
        raise InputError(f"{folder / 'schedule.json'}: strategy: {strategy!r}; metrics.json says {record.strategy!r}")
    if not (folder / MODEL_FILE).is_file():
        raise InputError(f"{folder / MODEL_FILE}: missing")
    return record


def history_bytes(history: Sequence[Mapping[str, Any]]) -> bytes:
    """What history.csv holds; numbers as Python writes them, the shortest text that reads back as the same number."""
    text = io.StringIO()
    writer = csv.DictWriter(text, HISTORY_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue().encode()


def _check(run: RunRecord, metrics: Mapping[str, Any], folder: Path) -> None:
    """What must hold of a run, written or read; `metrics` is metrics.json whole."""
    allowed = (*strategies.STRATEGIES, strategies.ADAPTIVE)
    if run.strategy not in allowed:
        raise InputError(f"{folder / 'metrics.json'}: strategy: {run.strategy!r} is not one of {', '.join(allowed)}")
    _check_metrics(metrics, folder / "metrics.json")
    _check_cost(run.cost, folder / "cost.json")
    _check_correct(run.correct, metrics["top1_percent"], folder / "correct.txt")
    if run.history or not _trains_nothing(run):
        _check_history(run.history, folder / "history.csv")
    for key, value in {"strategy": run.strategy, "profile": run.profile}.items():
        if _value(run.params, key, str, folder / "params.json") != value:
            raise InputError(f"{folder / 'params.json'}: {key}: {run.params[key]!r}; metrics.json says {value!r}")


def _check_correct(correct: str, top1_percent: float, path: Path) -> None:
    right, wrong = correct.count("1"), correct.count("0")
    if set(correct) - set("01-") or not right + wrong:
        raise InputError(f"{path}: must hold 0, 1 or - for each image, and an image that was tested")
    if not math.isclose(100 * right / (right + wrong), top1_percent):
        raise InputError(f"{path}: {right} of {right + wrong} correct; metrics.json says {top1_percent}%")


def _trains_nothing(run: RunRecord) -> bool:
    train = run.params.get("train")
    return isinstance(train, Mapping) and train.get("epochs") == 0


def _check_metrics(metrics: Mapping[str, Any], path: Path) -> None:
    scores = ("top1_percent", "top5_percent", "loss")
    for key in scores:
        _number(metrics, key, path)
    chosen = _value(metrics, "chosen", Mapping, path)
    _value(chosen, "epoch", int, path, "chosen.")
    weights = _value(chosen, "weights", str, path, "chosen.")
    if weights not in ("raw", "ema"):
        raise InputError(f"{path}: chosen.weights: {weights!r} is neither 'raw' nor 'ema'")
    validation = _value(metrics, "validation", Mapping, path)
    _value(validation, "raw", Mapping, path, "validation.")
    if "ema" not in validation:
        raise InputError(f"{path}: validation.ema: missing; null in a run that keeps no moving average")
    for kind in [kind for kind in ("raw", "ema") if validation[kind] is not None]:
        for which in ("last", "best"):
            where = f"validation.{kind}."
            entry = _value(_value(validation, kind, Mapping, path, "validation."), which, Mapping, path, where)
            _value(entry, "epoch", int, path, f"{where}{which}.")
            for key in scores:
                _number(entry, key, path, f"{where}{which}.")
    if validation[weights] is None:
        raise InputError(f"{path}: chosen.weights: {weights!r}, but validation.{weights} is null")


def _check_cost(cost: Mapping[str, Any], path: Path) -> None:
    for key in _NUMBERS_OF_COST:
        if _number(cost, key, path) < 0:
            raise InputError(f"{path}: {key}: {cost[key]!r} is below 0")
    kinds = {"device": str, "versions": Mapping, "command": str, "kernels": Mapping, "nondeterministic": list}
    for key, kind in kinds.items():
        _value(cost, key, kind, path)
    for function in cost["kernels"]:
        _value(cost["kernels"], function, str, path, "kernels.")
    times = _value(cost, "epoch_time_s", list, path)
    for epoch in range(len(times)):
        _number(dict(enumerate(times)), epoch, path, "epoch_time_s.")


def _check_history(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    if not history:
        raise InputError(f"{path}: no epochs")
    for number, row in enumerate(history, start=1):
        unknown = sorted(set(row) - set(HISTORY_COLUMNS))
        if unknown:
            raise InputError(f"{path}: unknown column {unknown[0]!r}; allowed: {', '.join(HISTORY_COLUMNS)}")
        for key in HISTORY_COLUMNS:
            if key not in _EMA_COLUMNS or row.get(key) is not None:
                _number(row, key, path, f"epoch {number}: ")
        if row["epoch"] != number:
            raise InputError(f"{path}: epoch: {row['epoch']!r} in line {number} of the epochs; they count from 1")


def _check_schedule(schedule: Sequence[Any], token_counts: Sequence[Any], path: Path) -> None:
    for key, values in {"schedule": schedule, "token_counts": token_counts}.items():
        if any(type(value) is not int or value < 0 for value in values):
            raise InputError(f"{path}: {key}: {list(values)!r} must be whole numbers, none below 0")
    if len(token_counts) != len(schedule) + 1:
        raise InputError(f"{path}: token_counts: {len(token_counts)} numbers for {len(schedule)} layers; one more")
    for layer, r in enumerate(schedule, start=1):
        before, after = token_counts[layer - 1], token_counts[layer]
        if after != before - r:
            raise InputError(f"{path}: token_counts: layer {layer} made {after} of {before} tokens, though r = {r}")


def _value(mapping: Mapping[Any, Any], key: Any, kind: Any, path: Path, prefix: str = "") -> Any:
    if key not in mapping:
        raise InputError(f"{path}: {prefix}{key}: missing")
    value = mapping[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        name = {Mapping: "an object", list: "a list", str: "text", int: "a whole number"}.get(kind, "a number")
        raise InputError(f"{path}: {prefix}{key}: {value!r} is not {name}")
    return value


def _number(mapping: Mapping[Any, Any], key: Any, path: Path, prefix: str = "") -> int | float:
    value = _value(mapping, key, (int, float), path, prefix)
    if not math.isfinite(value):
        raise InputError(f"{path}: {prefix}{key}: {value!r} is not finite")
    if isinstance(key, str) and key.endswith("_percent") and not 0 <= value <= 100:
        raise InputError(f"{path}: {prefix}{key}: {value!r} is not within 0..100")
    return value


def _json(value: Any, path: Path) -> bytes:
    try:
        return json_bytes(value)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: {error}") from None


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise InputError(f"{path}: missing") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as text: {error}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a finite number")


def read_history(path: Path) -> list[dict[str, Any]]:
    try:
        lines = list(csv.reader(_text(path).splitlines()))
    except csv.Error as error:
        raise InputError(f"{path}: not readable as CSV: {error}") from None
    if not lines or tuple(lines[0]) != HISTORY_COLUMNS:
        raise InputError(f"{path}: its first line must be {','.join(HISTORY_COLUMNS)}")
    return [_history_row(line, number, path) for number, line in enumerate(lines[1:], start=1)]


def _history_row(line: list[str], number: int, path: Path) -> dict[str, Any]:
    if len(line) != len(HISTORY_COLUMNS):
        raise InputError(f"{path}: epoch {number}: {len(line)} values; {len(HISTORY_COLUMNS)} columns")
    row: dict[str, Any] = {}
    for key, text in zip(HISTORY_COLUMNS, line, strict=True):
        try:
            row[key] = None if text == "" else int(text) if key == "epoch" else float(text)
        except ValueError:
            raise InputError(f"{path}: epoch {number}: {key}: {text!r} is not a number") from None
    return row

"""What is fast here and what is not: ratios of things measured in turn, in one process, on this machine.

`python -m famba bench` and notebooks/benchmark.ipynb call the same `run`. Times are medians over rounds, and with
`_least` the least of them, which a busy machine disturbs less. A result is tables as lists of rows, and what they
depend on: `setting`, device, instruction set, threads, versions, command.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from famba import config
from famba.bench import gpu
from famba.bench.fusing import bench_layer, bench_schedules, break_even
from famba.bench.loading import bench_loading, left_out
from famba.bench.memory import bench_memory
from famba.bench.model import able, bench_model, bench_profile
from famba.bench.precision import bench_curves, bench_precision
from famba.bench.scan import bench_scan
from famba.bench.setting import FULL, QUICK, Setting
from famba.bench.table import table
from famba.errors import InputError
from famba.kernels.cpu import runtime
from famba.kernels.precision import configure
from famba.profiling import environment
from famba.storage.files import json_bytes, write_atomic

_Tables = dict[str, list[dict[str, Any]]]
_PARTS: dict[str, Callable[[Setting], _Tables]] = {
    "scan": lambda s: {"scan": bench_scan(s.scans, rounds=3 * s.rounds, slow_s=s.slow_s)},
    "model": lambda s: {"model": bench_model(s), "profile": bench_profile(s)},
    "fusion": lambda s: {"layer": bench_layer(s), **bench_schedules(s)},
    "memory": lambda s: {"memory": bench_memory(s)},
    "precision": lambda s: {"precision": bench_precision(s), "curves": bench_curves(s)},
    "data": lambda s: {"data": bench_loading(s)},
}
PARTS = tuple(_PARTS)
TABLES = {
    "scan": "Selective scan, forward and backward, in units of the first contestant and of a matrix product",
    "model": "One training step, in units of its matrix products alone",
    "profile": "Where the time of a training step goes",
    "layer": "Fusing in one layer, forward and backward, in units of that layer",
    "lengths": "A training step without fusion, by tokens",
    "schedules": "A training step with fusion, in units of what its token counts predict and of the unfused step",
    "uniform": "A training step in which every layer removes r tokens, in units of the unfused one",
    "memory": "Peak memory of a training step, in units of the formula's and of the torch backend's",
    "precision": "A training step in fp32 and in bf16, and how many times faster than in fp32",
    "curves": "The loss of vim_nano on digits, by training step",
    "data": "Images loaded and varied, beside those that a training step takes, and in units of timm's",
}


def run(parts: Sequence[str] = PARTS, *, quick: bool = False) -> dict[str, Any]:
    """Measure; the whole of it takes minutes, and is worth something only on a machine that does nothing else.

    Args:
        parts: some of `PARTS`.
        quick: sizes that take seconds, to see that it works; their numbers mean nothing.

    Raises:
        InputError: an unknown part, or none.
    """
    for part in parts or ["none"]:
        if part not in PARTS:
            raise InputError(f"part: {part!r} is unknown; allowed: {', '.join(PARTS)}")
    setting = QUICK if quick else FULL
    configure()
    tables: _Tables = {}
    for part in PARTS:
        if part in parts:
            tables |= _PARTS[part](setting)
    chosen = "" if set(parts) == set(PARTS) else "".join(f" {part}" for part in PARTS if part in parts)
    return {
        **tables,
        **({"break_even_r": break_even(tables["uniform"])} if "uniform" in tables else {}),
        **({"data_left_out": left_out()} if "data" in tables else {}),
        "setting": dataclasses.asdict(setting),
        "command": f"python -m famba bench{chosen}{' --quick' if quick else ''}",
        "kernels": runtime.instruction_set() if able("native") else None,
        **environment.environment("cpu"),
    }


def write(result: Mapping[str, Any], path: str | Path) -> Path:
    """Write a result as JSON; a relative path is one from the repository root.

    Raises:
        InputError: it cannot be written there.
    """
    path = config.root() / path
    write_atomic(path, json_bytes(result))
    return path


def frames(result: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """The tables of a result, of this benchmark or of a GPU's, for figures and notebooks."""
    return {name: pd.DataFrame(result[name]) for name in TABLES | gpu.TABLES if name in result}


def gpu_frames(path: str | Path = gpu.PATH) -> dict[str, pd.DataFrame]:
    """The tables that `bench --gpu` or `gpu-check` has written, and `setting`: the device and what was installed.

    Of `gpu-check` also `checks`, a row for each. Empty where the file is not there.

    Raises:
        InputError: a file that is no JSON.
    """
    path = config.root() / path
    if not path.is_file():
        return {}
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from None
    versions = ", ".join(f"{name} {version}" for name, version in sorted(result["versions"].items()))
    checks = {"checks": pd.DataFrame(result["checks"])} if "checks" in result else {}
    return {**frames(result), **checks, "setting": pd.DataFrame([{"device": result["device"], "versions": versions}])}


def text(result: Mapping[str, Any]) -> str:
    """A result to be read in a terminal."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [f"{result['device']}, kernels {result['kernels']}, {result['threads']} threads; {versions}"]
    for name in TABLES:
        if name in result:
            lines += ["", TABLES[name], table(result[name])]
    if "break_even_r" in result:
        lines += ["", f"Smallest r with which fusing wins: {result['break_even_r']}"]
    if reason := result.get("data_left_out"):
        lines += ["", f"Without timm: {reason}"]
    return "\n".join(lines)

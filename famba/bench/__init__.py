"""Benchmarks: ratios of contestants that take turns in one process, on a CPU or a GPU.

`python -m famba bench` and notebooks/benchmark.ipynb call the same `run`. Times are medians over rounds; columns that
end with `_least` hold minima, which a busy machine disturbs less. A result is tables as lists of rows, with their
setting, device, threads, versions and command, and in `left_out` what could not run and why.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from famba import config
from famba.bench import gpu, timing
from famba.bench import loading as data_loading
from famba.bench import scan as scans
from famba.bench.fusing import bench_layer, bench_schedules, break_even
from famba.bench.model import (
    FULL,
    QUICK,
    Setting,
    available,
    bench_curves,
    bench_memory,
    bench_model,
    bench_precision,
)
from famba.bench.profile import bench_profile
from famba.errors import InputError
from famba.kernels import precision
from famba.kernels.cpu import runtime
from famba.profiling import environment
from famba.storage.files import json_bytes, write_atomic


class _Benchmark(NamedTuple):
    """A part makes tables of a setting and appends to the list of what it leaves out."""

    parts: Mapping[str, Callable[[Any, gpu.Left], dict[str, Any]]]
    titles: Mapping[str, str]
    full: Setting
    quick: Setting
    path: str


def _scan(setting: Setting, left: gpu.Left) -> dict[str, Any]:
    left += scans.left_out()
    return {"scan": scans.bench_scan(setting.scans, rounds=3 * setting.rounds, slow_s=setting.slow_s)}


def _fusion(setting: Setting, _: gpu.Left) -> dict[str, Any]:
    tables = bench_schedules(setting)
    return {"layer": bench_layer(setting), **tables, "break_even_r": break_even(tables["uniform"])}


def _data(setting: Setting, left: gpu.Left) -> dict[str, Any]:
    left += data_loading.left_out()
    return {"data": data_loading.bench_loading(setting)}


_CPU = _Benchmark(
    {
        "scan": _scan,
        "model": lambda s, _: {"model": bench_model(s), "profile": bench_profile(s)},
        "fusion": _fusion,
        "memory": lambda s, _: {"memory": bench_memory(s)},
        "precision": lambda s, _: {"precision": bench_precision(s), "curves": bench_curves(s)},
        "data": _data,
    },
    {
        "scan": "Selective scan, forward and backward, relative to the first contestant and to a matrix product",
        "model": "One training step, relative to its matrix products alone",
        "profile": "Where the time of a training step goes",
        **gpu.FUSION_TITLES,
        "memory": "Peak memory of a training step, relative to the formula and to the torch backend",
        "precision": "A training step in fp32 and in bf16, and the speed-up over fp32",
        "curves": "Training loss of vim_nano on digits, by step",
        "data": "Loading and augmenting images, relative to the training step that takes them and to timm",
    },
    FULL,
    QUICK,
    "results/benchmark.json",
)
_GPU = _Benchmark(gpu.PARTS, gpu.TITLES, gpu.FULL, gpu.QUICK, "results/benchmark_gpu.json")
TITLES = dict(_CPU.titles)


def run(
    parts: Sequence[str] = (),
    *,
    quick: bool = False,
    on_gpu: bool = False,
    device: str = "cuda",
    path: Path | None = None,
) -> dict[str, Any]:
    """Measure; a full benchmark takes minutes and needs an idle machine.

    Args:
        parts: those to measure; none is all.
        quick: small sizes that take seconds; their numbers mean nothing.
        on_gpu: the benchmark of a GPU.
        device: of that: cuda, cuda:N, or cpu with `quick`.
        path: where the result is written after each part.

    Raises:
        InputError: an unknown part or device, or a device that is not here.
    """
    benchmark = _GPU if on_gpu else _CPU
    for part in parts:
        if part not in benchmark.parts:
            raise InputError(f"part: {part!r} is unknown; allowed: {', '.join(benchmark.parts)}")
    if on_gpu:
        gpu.check_device(device, quick)
    device = device if on_gpu else "cpu"
    setting = dataclasses.replace(benchmark.quick if quick else benchmark.full, device=device)
    precision.configure()
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
    chosen = [part for part in benchmark.parts if not parts or part in parts]
    words = [
        "python -m famba bench",
        *(["--gpu"] if on_gpu else []),
        *(chosen if len(chosen) < len(benchmark.parts) else []),
    ]
    words += ["--quick"] * quick + [f"--device {device}"] * (on_gpu and device != "cuda")
    result: dict[str, Any] = {
        "setting": dataclasses.asdict(setting),
        "command": " ".join(words),
        "kernels": runtime.instruction_set() if available("native") else None,
        "left_out": [],
        **environment.environment(device),
    }
    for part in chosen:
        result |= benchmark.parts[part](setting, result["left_out"])
        if path is not None:
            write_atomic(path, json_bytes(result))
    return result


def main(
    parts: Sequence[str], *, quick: bool, on_gpu: bool, device: str, path: Path | None, figure: Path | None
) -> None:
    """Measure, print, write and draw; a full benchmark is written to results/ and drawn in figures/ by default."""
    from famba import plots

    whole = not quick and not parts
    default = config.root() / (_GPU if on_gpu else _CPU).path if whole else None
    result = run(parts, quick=quick, on_gpu=on_gpu, device=device, path=path.absolute() if path else default)
    print(text(result, on_gpu=on_gpu))
    if figure is None and whole and not on_gpu:
        figure = config.root() / "figures/benchmark.png"
    if figure is not None:
        plots.save((plots.gpu_benchmark if on_gpu else plots.benchmark)(frames(result)), figure.absolute())


def frames(result: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """The tables of a result, for figures and notebooks."""
    return {name: pd.DataFrame(result[name]) for name in TITLES | gpu.TITLES if name in result}


def gpu_frames(path: str | Path = _GPU.path) -> dict[str, pd.DataFrame]:
    """The tables written by `bench --gpu` or `gpu-check`, with device and versions as `setting`; {} without the file.

    `gpu-check` has `checks`, one row per check.

    Raises:
        InputError: the file is not JSON.
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


def text(result: Mapping[str, Any], *, on_gpu: bool = False) -> str:
    """A result for a terminal."""
    shown = timing.text(result, gpu.TITLES if on_gpu else TITLES)
    return shown + (
        f"\nSmallest r with which fusing is faster: {result['break_even_r']}" if "break_even_r" in result else ""
    )

"""Benchmarks: ratios of contestants that take turns in one process, on a CPU or a GPU.

`python -m famba bench` and notebooks/benchmark.ipynb call the same `run`. Times are medians over rounds; columns that
end with `_least` hold minima, which a busy machine disturbs less. A result is tables as lists of rows, with their
setting, device, threads, versions and command, and in `left_out` what could not run and why.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from famba import config
from famba.bench import fusing, gpu, loading, model, profile, scan, timing
from famba.bench.model import Setting
from famba.errors import InputError
from famba.kernels import precision
from famba.kernels.cpu import runtime
from famba.profiling import environment
from famba.storage.files import json_bytes, write_atomic


def _fusion(setting: Setting, _: timing.Left) -> dict[str, Any]:
    tables = fusing.bench_schedules(setting)
    return {"layer": fusing.bench_layer(setting), **tables, "break_even_r": fusing.break_even(tables["uniform"])}


# A part makes tables of a setting and appends to the list of what it leaves out.
_PARTS: dict[str, Callable[[Setting, timing.Left], dict[str, Any]]] = {
    "scan": lambda s, left: {"scan": scan.bench_scan(s.scans, left, rounds=3 * s.rounds, slow_s=s.slow_s)},
    "model": lambda s, _: {"model": model.bench_model(s), "profile": profile.bench_profile(s)},
    "fusion": _fusion,
    "memory": lambda s, _: {"memory": model.bench_memory(s)},
    "precision": lambda s, _: {"precision": model.bench_precision(s), "curves": model.bench_curves(s)},
    "data": lambda s, left: {"data": loading.bench_loading(s, left)},
}
TITLES = {
    "scan": "Selective scan, forward and backward, relative to the first contestant and to a matrix product",
    "model": "One training step, relative to its matrix products alone",
    "profile": "Where the time of a training step goes",
    **gpu.FUSION_TITLES,
    "memory": "Peak memory of a training step, relative to the formula and to the torch backend",
    "precision": "A training step in fp32 and in bf16, and the speed-up over fp32",
    "curves": "Training loss of vim_nano on digits, by step",
    "data": "Loading and augmenting images, relative to the training step that takes them and to timm",
}
_PATH, _GPU_PATH = "results/benchmark.json", "results/benchmark_gpu.json"


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
    known, sizes = (gpu.PARTS, gpu) if on_gpu else (_PARTS, model)
    for part in parts:
        if part not in known:
            raise InputError(f"part: {part!r} is unknown; allowed: {', '.join(known)}")
    if on_gpu:
        gpu.check_device(device, quick)
    device = device if on_gpu else "cpu"
    setting = dataclasses.replace(sizes.QUICK if quick else sizes.FULL, device=device)
    precision.configure()
    if (where := torch.device(device)).type == "cuda" and where.index is not None:
        torch.cuda.set_device(where)
    chosen = [part for part in known if not parts or part in parts]
    words = ["python -m famba bench", *["--gpu"] * on_gpu, *(chosen if len(chosen) < len(known) else [])]
    words += ["--quick"] * quick + [f"--device {device}"] * (on_gpu and device != "cuda")
    result: dict[str, Any] = {
        "setting": dataclasses.asdict(setting),
        "command": " ".join(words),
        "kernels": runtime.instruction_set() if "native" in model.available() else None,
        "left_out": [],
        **environment.environment(device),
    }
    for part in chosen:
        result |= known[part](setting, result["left_out"])
        if path is not None:
            write_atomic(path, json_bytes(result))
    return result


def main(parts: Sequence[str], *, quick: bool, on_gpu: bool, device: str, path: Path | None) -> None:
    """Measure, print and write; a full benchmark goes to results/ by default, and is drawn in figures/."""
    from famba import plots

    whole = not quick and not parts
    default = config.root() / (_GPU_PATH if on_gpu else _PATH) if whole else None
    result = run(parts, quick=quick, on_gpu=on_gpu, device=device, path=path.absolute() if path else default)
    print(text(result, on_gpu=on_gpu))
    if whole and not on_gpu:
        plots.save(plots.benchmark(frames(result)), "figures/benchmark.png")


def frames(result: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """The tables of a result, for figures and notebooks; device, threads and versions as `setting`."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(result["versions"].items()))
    setting = {"device": result["device"], "threads": result["threads"], "versions": versions}
    tables = {name: pd.DataFrame(result[name]) for name in TITLES | gpu.TITLES if name in result}
    return tables | {"setting": pd.DataFrame([setting])}


def gpu_frames(path: str | Path = _GPU_PATH) -> dict[str, pd.DataFrame]:
    """The tables of `bench --gpu` or of `gpu-check`, which has `checks`, one row per check; {} without the file."""
    path = config.root() / path
    if not path.is_file():
        return {}
    result = json.loads(path.read_bytes())
    return frames(result) | ({"checks": pd.DataFrame(result["checks"])} if "checks" in result else {})


def text(result: Mapping[str, Any], *, on_gpu: bool = False) -> str:
    """A result for a terminal: its tables under their titles, and what was left out."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [f"{result['device']}, {result['instruction_set']}, {result['threads']} threads; {versions}"]
    for name, title in (gpu.TITLES if on_gpu else TITLES).items():
        if name in result:
            lines += ["", title, timing.table(result[name])]
    lines += [f"left out: {row['what']}: {row['reason']}" for row in result["left_out"]]
    if "break_even_r" in result:
        lines.append(f"Smallest r with which fusing is faster: {result['break_even_r']}")
    return "\n".join(lines)

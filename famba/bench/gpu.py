"""What famba makes of a GPU: beside the bandwidth of its memory, mamba-ssm, the mixer as published, and torch.

`python -m famba bench --gpu`; `python -m famba gpu-check` measures training steps and fusion by it, too. Contestants
take turns in one process; times are medians over rounds, and with `_least` the least of them; warm-up is dropped and
the device waited for. A contestant that cannot run, or takes too much memory or time, is named with its reason in
`left_out`, and the others go on. After each part the result so far is written.

The unit is a copy in the device's memory, bytes read and written per second. A scan's `of_roofline` is its time in
units of what its bytes take at that rate.
"""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from famba import config
from famba.bench.fusing import bench_layer, bench_schedules
from famba.bench.model import Training, able
from famba.bench.published import as_published, with_norms_of
from famba.bench.scan import both_call, scan_call
from famba.bench.setting import FULL, QUICK, Setting
from famba.bench.table import table
from famba.bench.timing import ratio
from famba.errors import InputError
from famba.kernels import precision
from famba.kernels.triton.scan import scan_bytes
from famba.profiling import environment, memory
from famba.storage.files import json_bytes, write_atomic
from famba.training.cuda_graph import captured

PATH = "results/benchmark_gpu.json"
TABLES = {
    "copy": "A copy in the device's memory, GB read and written per second",
    "scan": "Selective scan, forward and backward, in units of the first contestant and of its bytes at a copy's rate",
    "steps": "A training step, time and memory in units of the first contestant",
    "layer": "Fusing in one layer, forward and backward, in units of that layer",
    "lengths": "A training step without fusion, by tokens",
    "schedules": "A training step with fusion, in units of what its token counts predict and of the unfused step",
    "uniform": "A training step in which every layer removes r tokens, in units of the unfused one",
    "graphs": "A training step of a small model: as Python calls it, captured as one CUDA graph, compiled",
}
# Of the scan's backends the fastest first, by the type of the device.
_BACKENDS = {"cuda": ("triton", "mamba_ssm"), "cpu": ("native",)}
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_MIB = 2**20
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class GpuSetting(Setting):
    """A benchmark of a GPU.

    Attributes:
        models: whose training steps are compared.
        small, small_batch, small_img_size: the model that is so small that Python's calls take longer than its work.
        copy_mib: what is copied.
        compile_s: seconds after which a compiler is given up.
    """

    models: tuple[str, ...]
    small: str
    small_batch: int
    small_img_size: int
    copy_mib: int
    compile_s: float


_FULL = GpuSetting(
    **{field.name: getattr(FULL, field.name) for field in dataclasses.fields(FULL)}
    | {"scans": ((128, 384, 197, 16),), "batch": 128, "precision": "bf16", "device": "cuda", "turn_s": 0.1},
    models=("vim_tiny", "vim_small"),
    small="vim_micro",
    small_batch=64,
    small_img_size=32,
    copy_mib=1024,
    compile_s=120.0,
)
_QUICK = GpuSetting(
    **{field.name: getattr(QUICK, field.name) for field in dataclasses.fields(QUICK)}
    | {"precision": "bf16", "device": "cuda", "slow_s": 30.0},
    models=("vim_nano",),
    small="vim_nano",
    small_batch=4,
    small_img_size=8,
    copy_mib=1,
    compile_s=0.0,
)
Left = list[dict[str, str]]
_PARTS: dict[str, Callable[[GpuSetting, Left], dict[str, list[dict[str, Any]]]]] = {
    "scan": lambda s, left: bench_scans(s, left),
    "steps": lambda s, left: {"steps": bench_steps(s, left)},
    "fusion": lambda s, left: bench_fusion(s, left),
    "graphs": lambda s, left: {"graphs": bench_graphs(s, left)},
}
PARTS = tuple(_PARTS)


def run(
    parts: Sequence[str] = PARTS, *, quick: bool = False, device: str = "cuda", path: Path | None = None
) -> dict[str, Any]:
    """Measure; the whole of it takes minutes, and is worth something only on a device that does nothing else.

    Args:
        parts: some of `PARTS`.
        quick: sizes that take seconds, to see that it works; their numbers mean nothing.
        device: cuda, cuda:N, or cpu, which only a quick benchmark takes.
        path: where the result is written after each part.

    Raises:
        InputError: an unknown part or device, or one that is not here.
    """
    for part in parts or ["none"]:
        if part not in PARTS:
            raise InputError(f"part: {part!r} is unknown; allowed: {', '.join(PARTS)}")
    _check_device(device, quick)
    setting = dataclasses.replace(_QUICK if quick else _FULL, device=device)
    precision.configure()
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
    chosen = "" if set(parts) == set(PARTS) else "".join(f" {part}" for part in PARTS if part in parts)
    options = f"{' --quick' if quick else ''}{'' if device == 'cuda' else f' --device {device}'}"
    result: dict[str, Any] = {
        "setting": dataclasses.asdict(setting),
        "command": f"python -m famba bench --gpu{chosen}{options}",
        "left_out": [],
        **environment.environment(device),
    }
    for part in PARTS:
        if part in parts:
            result |= _PARTS[part](setting, result["left_out"])
            if path is not None:
                write_atomic(path, json_bytes(result))
    return result


def text(result: Mapping[str, Any]) -> str:
    """A result to be read in a terminal."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [f"{result['device']}, {result['instruction_set']}; {versions}"]
    for name in TABLES:
        if name in result:
            lines += ["", TABLES[name], table(result[name])]
    lines += ["", *(f"left out: {row['what']}: {row['reason']}" for row in result["left_out"])]
    return "\n".join(lines).rstrip()


def one_scan_bytes(b: int, e: int, t: int, n: int, dtype: torch.dtype) -> int:
    """What forward and backward of a gated scan in one direction must read and write at least, each once.

    Forward reads u, delta, z, B and C and writes the output; backward reads those five and the output's gradient, and
    writes the gradients of the five. A, D and the bias, and the states that a kernel may keep, are not counted.
    """
    wide, narrow = b * e * t * dtype.itemsize, b * n * t * dtype.itemsize
    return (4 + 7) * wide + (2 + 4) * narrow


def bench_scans(setting: GpuSetting, left: Left) -> dict[str, list[dict[str, Any]]]:
    """The unit, and one row for each shape, precision, number of directions and backend.

    `median_ms` is a scan called from Python, `device_ms` the same replayed from a CUDA graph: what the device alone
    takes. `both, gated` is what a mixer asks for, from steps yet to be projected, as it lies there; its bytes are those
    of `famba.kernels.triton.scan`. Of `one` direction, which is what mamba-ssm's function does, the inputs lie as the
    contestant wants them: mamba-ssm's with tokens innermost, the others' with channels.
    """
    copy = _copy(setting)
    rows = [
        row
        for shape in setting.scans
        for precision in _DTYPES
        for both in (True, False)
        for row in _scans(setting, left, shape, precision, both, copy["gb_per_s"])
    ]
    return {"copy": [copy], "scan": rows}


def bench_steps(setting: GpuSetting, left: Left) -> list[dict[str, Any]]:
    """One row for each model and contestant: time, images per second and peak memory of a training step.

    `published` is the mixer as published, with the kernels of the backend that it names; `fused` is mamba-ssm's
    function for a whole direction. The norms are the fastest backend's in all rows but torch's, because mamba-ssm has
    one too. `times` and `memory` are in units of the model's first row.
    """
    return [row for name in setting.models for row in _steps(dataclasses.replace(setting, model=name), left)]


def bench_fusion(setting: GpuSetting, left: Left) -> dict[str, list[dict[str, Any]]]:
    """What fusing costs in one layer and in a whole step: `famba.bench.fusing`'s tables."""
    makes = {"layer": lambda: {"layer": bench_layer(setting)}, "schedules": lambda: bench_schedules(setting)}
    return {name: rows for tables in _tried(makes, left, "fusion, ").values() for name, rows in tables.items()}


def bench_graphs(setting: GpuSetting, left: Left) -> list[dict[str, Any]]:
    """Training steps of a small model: as called from Python, captured as one graph, compiled; plain and fused."""
    at = dataclasses.replace(
        setting, model=setting.small, batch=setting.small_batch, img_sizes=(setting.small_img_size,)
    )
    depth = at.create().depth
    schedules = {"": None, ", fused in all layers": [4] * depth}
    makes: dict[str, Callable[[], Callable[[], object]]] = {}
    for what, schedule in schedules.items():
        makes[f"called{what}"] = lambda schedule=schedule: _small_step(at, schedule)
        makes[f"captured{what}"] = lambda schedule=schedule: captured(_small_step(at, schedule), at.device)
    makes["compiled"] = lambda: _compiled_step(at)
    found = at.times(_tried(makes, left, f"{setting.small}, "), rounds=3 * setting.rounds)
    first = next(iter(found.values()), {})
    return [{"what": what, **row, **ratio(row, first, "times")} for what, row in found.items()]


def _copy(setting: GpuSetting) -> dict[str, Any]:
    x = torch.zeros(setting.copy_mib * _MIB, dtype=torch.uint8, device=setting.device)
    y = torch.ones_like(x)
    row = setting.times({"copy": lambda: y.copy_(x)}, rounds=3 * setting.rounds)["copy"]
    moved = 2 * x.numel()
    return {"mib": setting.copy_mib, **row, "gb_per_s": moved / row["median_ms"] / 1e6}


def _scans(
    setting: GpuSetting, left: Left, shape: tuple[int, int, int, int], precision: str, both: bool, gb_per_s: float
) -> list[dict[str, Any]]:
    dtype, fast = _DTYPES[precision], _fast(setting)
    what = "both, gated" if both else "one"
    of = f"scan {what} {precision}, "

    def make(name: str) -> Callable[[], object]:
        how: dict[str, Any] = {"device": setting.device, "dtype": dtype}
        if both:
            return _warm(both_call(shape, name, **how))
        return _warm(scan_call(shape, name, **how, channels_last=name != "mamba_ssm"))

    calls = _tried({name: partial(make, name) for name in (*fast, "torch")}, left, of)
    found = setting.times(calls, rounds=3 * setting.rounds, budget_s=setting.slow_s)
    # torch's thousands of calls would be too large a graph.
    replays = {name: partial(captured, call, setting.device) for name, call in calls.items() if name in fast}
    device = setting.times(_tried(replays, left, f"device_ms of {of}"), rounds=3 * setting.rounds)
    moved = (scan_bytes if both else one_scan_bytes)(*shape, dtype)
    bound_ms = moved / gb_per_s / 1e6
    first = next(iter(found.values()), {})
    return [
        {
            "shape": str(tuple(shape)),
            "directions": what,
            "precision": precision,
            "contestant": name,
            **row,
            **ratio(row, first, "times"),
            "device_ms": device[name]["median_ms"] if name in device else None,
            "mib": moved / _MIB,
            "of_roofline": device.get(name, row)["median_ms"] / bound_ms,
        }
        for name, row in found.items()
    ]


def _steps(setting: GpuSetting, left: Left) -> list[dict[str, Any]]:
    peaks: dict[str, float] = {}
    fast = _fast(setting)
    makes = {name: partial(_training_step, setting, name, peaks, name, norms=fast[0]) for name in fast}
    makes["torch"] = partial(_training_step, setting, "torch", peaks, "torch", norms="torch")
    for name in fast:
        for fused in (False, True) if name == "mamba_ssm" else (False,):
            what, change = f"published, {name}{', fused' if fused else ''}", partial(as_published, fused=fused)
            makes[what] = partial(_training_step, setting, name, peaks, what, norms=fast[0], change=change)
    calls = _tried(makes, left, f"{setting.model}, ")
    found = setting.times(calls, rounds=setting.rounds, warmup=0, budget_s=setting.slow_s)
    first = next(iter(found), "")
    return [
        {
            "model": setting.model,
            "contestant": what,
            **row,
            "img_per_s": 1e3 * setting.batch / row["median_ms"],
            **ratio(row, found[first], "times"),
            "peak_mib": peaks[what],
            "memory": peaks[what] / peaks[first],
        }
        for what, row in found.items()
    ]


def _training_step(
    setting: Setting,
    backend: str,
    peaks: dict[str, float],
    what: str,
    *,
    norms: str,
    change: Callable[[Any], object] = lambda model: None,
) -> Callable[[], None]:
    """A step, warm already; its peak memory goes to `peaks`, that of others not in it.

    Raises:
        TimeoutError: it takes longer than `slow_s`.
    """
    _free()
    device = torch.device(setting.device)
    training = Training(setting, backend)
    change(with_norms_of(training.model, norms))
    training.step()  # makes the optimiser's moments
    start = time.perf_counter()
    peaks[what] = memory.peak_memory(training.step, training.resident(), device) / _MIB
    if (took_s := time.perf_counter() - start) > setting.slow_s:
        raise TimeoutError(f"one step took {took_s:.0f} s")
    return training.step


def _small_step(setting: Setting, schedule: Sequence[int] | None) -> Callable[[], None]:
    training = Training(setting)
    return _warm(lambda: training.step(schedule))


def _compiled_step(setting: GpuSetting) -> Callable[[], None]:
    training = Training(setting)
    with _within(setting.compile_s, "torch.compile"):
        training.forward = torch.compile(training.model)
        return _warm(training.step)


@contextlib.contextmanager
def _within(seconds: float, what: str) -> Iterator[None]:
    """Give up after so long.

    Raises:
        TimeoutError: it took longer.
    """

    def give_up(*_: object) -> None:
        raise TimeoutError(f"{what} took more than {seconds:g} s")

    if not seconds:
        give_up()
    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _tried(makes: Mapping[str, Callable[[], _T]], left: Left, of: str) -> dict[str, _T]:
    """What each of these makes. One that raises is left out: the reason is kept, the memory is not."""
    found: dict[str, _T] = {}
    for name, make in makes.items():
        try:
            found[name] = make()
        except Exception as error:  # whatever kernels, compilers and drivers raise; the others shall go on
            said = (str(error).strip().splitlines() or [""])[0]
            left.append({"what": of + name, "reason": f"{type(error).__name__}: {said}"})
        _free()
    return found


def _warm(call: Callable[[], object]) -> Callable[[], Any]:
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # so that what fails, fails here
    return call


def _free() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _fast(setting: Setting) -> list[str]:
    return able(*_BACKENDS[torch.device(setting.device).type])


def _check_device(device: str, quick: bool) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in _BACKENDS:
        raise InputError(f"device: {device!r} is not one of cuda, cuda:N, cpu")
    if kind == "cpu" and not quick:
        raise InputError("device: 'cpu' takes only a quick benchmark of a GPU; add --quick, or leave out --gpu")
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device: {device!r}; torch sees {torch.cuda.device_count()} CUDA devices here; to see that it works, "
            "--quick --device cpu"
        )


def main(parts: Sequence[str], *, quick: bool, device: str, json: Path | None) -> None:
    """Measure, print and write; a whole benchmark goes to `PATH` if nothing else is said."""
    whole = set(parts or PARTS) == set(PARTS) and not quick
    path = json.absolute() if json else (config.root() / PATH if whole else None)
    print(text(run(parts or PARTS, quick=quick, device=device, path=path)))

"""The benchmark of a GPU: its memory's bandwidth, mamba-ssm, the mixer as published, and torch.

`python -m famba bench --gpu`; `python -m famba gpu-check` measures training steps and fusion with it. A contestant that
cannot run, or takes too much memory or time, is listed with its reason, and the others continue. The unit is a copy in
the device's memory, bytes read and written per second: `of_roofline` is a scan's time relative to that of its bytes.
"""

import contextlib
import dataclasses
import importlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from famba.bench import model
from famba.bench.fusing import bench_layer, bench_schedules
from famba.bench.model import Setting, Training, available
from famba.bench.scan import both_call, scan_call
from famba.bench.timing import Left, ratio, tried
from famba.errors import InputError
from famba.kernels.ops import causal_conv1d_silu
from famba.kernels.scan import selective_scan
from famba.kernels.triton.scan import scan_bytes
from famba.models.mixer import BidirectionalMixer
from famba.models.vim import VisionMamba
from famba.profiling import memory
from famba.training.cuda_graph import captured

FUSION_TITLES = {
    "layer": "Fusing in one layer, forward and backward, relative to that layer",
    "lengths": "A training step without fusion, by tokens",
    "schedules": "A training step with fusion, relative to the prediction of its token counts and to no fusion",
    "uniform": "A training step in which every layer removes r tokens, relative to no fusion",
}
TITLES = {
    "copy": "A copy in the device's memory, GB read and written per second",
    "scan": "Selective scan, forward and backward, relative to the first contestant and to a copy of its bytes",
    "steps": "A training step, time and memory relative to the first contestant",
    **FUSION_TITLES,
    "graphs": "A training step of a small model: called from Python, captured as one CUDA graph, compiled",
}
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_MIB = 2**20
_T = TypeVar("_T")
_GPU: dict[str, Any] = {"device": "cuda", "precision": "bf16"}
FULL = dataclasses.replace(
    model.FULL, **_GPU, scans=((128, 384, 197, 16),), batch=128, turn_s=0.1, models=("vim_tiny", "vim_small"),
    small=("vim_micro", 64, 32), copy_mib=1024, compile_s=120.0,
)  # fmt: skip
QUICK = dataclasses.replace(
    model.QUICK, **_GPU, slow_s=30.0, models=("vim_nano",), small=("vim_nano", 4, 8), copy_mib=1
)  # fmt: skip


def check_device(device: str, quick: bool) -> None:
    """Refuse a device that does not exist, or a full benchmark on a CPU, by an InputError that names it."""
    found = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    allowed = [*["cpu"] * quick, *["cuda"] * bool(found), *found]
    if device not in allowed:
        raise InputError(
            f"device: {device!r} is not one of those here ({', '.join(allowed) or 'none'}); torch sees {len(found)} "
            "CUDA devices; to try it without: --quick --device cpu"
        )


def bench_scans(setting: Setting, left: Left) -> dict[str, list[dict[str, Any]]]:
    """The copy, and one row for each shape, precision, number of directions and backend.

    `median_ms` is a scan called from Python, `device_ms` the same replayed from a CUDA graph: the device's time alone.
    `both, gated` is a mixer's scan, from unprojected steps, in the model's layout; its bytes are `scan_bytes`. `one` is
    a single direction, as mamba-ssm's function computes it, in the layout that suits the contestant.
    """
    x = torch.zeros(setting.copy_mib * _MIB, dtype=torch.uint8, device=setting.device)
    y = torch.ones_like(x)
    copy = setting.times({"copy": lambda: y.copy_(x)}, rounds=3 * setting.rounds)["copy"]
    gb_per_s = 2 * x.numel() / copy["median_ms"] / 1e6
    rows = [
        row
        for shape in setting.scans
        for precision in _DTYPES
        for both in (True, False)
        for row in _scans(setting, left, shape, precision, both, gb_per_s)
    ]
    return {"copy": [{"mib": setting.copy_mib, **copy, "gb_per_s": gb_per_s}], "scan": rows}


def one_scan_bytes(b: int, e: int, t: int, n: int, dtype: torch.dtype) -> int:
    """The least bytes that forward and backward of a gated scan in one direction read and write.

    Forward reads u, delta, z, B, C and writes y; backward reads those five and y's gradient and writes five gradients.
    A, D, the bias and stored states are not counted.
    """
    wide, narrow = b * e * t * dtype.itemsize, b * n * t * dtype.itemsize
    return (4 + 7) * wide + (2 + 4) * narrow


def _scans(
    setting: Setting, left: Left, shape: tuple[int, int, int, int], precision: str, both: bool, gb_per_s: float
) -> list[dict[str, Any]]:
    dtype, fast = _DTYPES[precision], _fast(setting)
    directions = "both, gated" if both else "one"
    of = f"scan {directions} {precision}, "

    def make(name: str) -> Callable[[], object]:
        call = both_call if both else partial(scan_call, channels_last=name != "mamba_ssm")
        return _warm(call(shape, name, device=setting.device, dtype=dtype))

    calls = tried({name: partial(make, name) for name in (*fast, "torch")}, left, of)
    found = setting.times(calls, rounds=3 * setting.rounds, budget_s=setting.slow_s)
    # The thousands of calls of torch's scan would be too large a graph.
    replays = {name: partial(captured, call, setting.device) for name, call in calls.items() if name in fast}
    device = setting.times(tried(replays, left, f"device_ms of {of}"), rounds=3 * setting.rounds)
    moved = (scan_bytes if both else one_scan_bytes)(*shape, dtype)
    first = next(iter(found.values()), {})
    return [
        {"shape": str(tuple(shape)), "directions": directions, "precision": precision, "contestant": name, **row}
        | ratio(row, first, "times")
        | {"device_ms": device[name]["median_ms"] if name in device else None, "mib": moved / _MIB}
        | {"of_roofline": device.get(name, row)["median_ms"] * gb_per_s * 1e6 / moved}
        for name, row in found.items()
    ]


def bench_steps(setting: Setting, left: Left) -> list[dict[str, Any]]:
    """One row for each model and contestant: time, images per second and peak memory of a training step.

    `published` is the mixer as published, with the kernels of the named backend; `fused` is mamba-ssm's function for a
    whole direction. All rows but torch's use the norm of the fastest backend. `times` and `memory` are relative to the
    model's first row.
    """
    return [row for name in setting.models for row in _steps(dataclasses.replace(setting, model=name), left)]


def _steps(setting: Setting, left: Left) -> list[dict[str, Any]]:
    fast, peaks = _fast(setting), dict[str, float]()
    contestants: dict[str, tuple[str, str, bool | None]] = {name: (name, fast[0], None) for name in fast}
    contestants["torch"] = "torch", "torch", None
    for name in fast:
        contestants[f"published, {name}"] = name, fast[0], False
    if "mamba_ssm" in fast:
        contestants["published, mamba_ssm, fused"] = "mamba_ssm", fast[0], True

    def make(what: str) -> Callable[[], None]:
        """A step after warm-up; its peak memory excludes that of the others."""
        backend, norms, fused = contestants[what]
        training = Training(setting, backend)
        set_norm_backend(training.model, norms)
        if fused is not None:
            for block in training.model.layers:
                mixer = block.get_submodule("mixer")
                assert isinstance(mixer, BidirectionalMixer)
                block.mixer = PublishedMixer(mixer, fused=fused)

        def timed(step: Callable[[], _T]) -> _T:
            start, made = time.perf_counter(), step()
            if (took_s := time.perf_counter() - start) > setting.slow_s:
                raise TimeoutError(f"one step took {took_s:.0f} s")
            return made

        # The first step creates the optimiser's moments and compiles kernels; torch has none to compile.
        timed(training.step) if what == "torch" else training.step()
        resident, device = training.resident(), torch.device(setting.device)
        peaks[what] = timed(lambda: memory.peak_memory(training.step, resident, device)) / _MIB
        return training.step

    calls = tried({what: partial(make, what) for what in contestants}, left, f"{setting.model}, ")
    found = setting.times(calls, rounds=setting.rounds, warmup=0, budget_s=setting.slow_s)
    first = next(iter(found), "")
    return [
        {"model": setting.model, "contestant": what, **row, "img_per_s": 1e3 * setting.batch / row["median_ms"]}
        | ratio(row, found[first], "times")
        | {"peak_mib": peaks[what], "memory": peaks[what] / peaks[first]}
        for what, row in found.items()
    ]


def bench_fusion(setting: Setting, left: Left) -> dict[str, list[dict[str, Any]]]:
    """The tables of `famba.bench.fusing`."""
    makes = {"layer": lambda: {"layer": bench_layer(setting)}, "schedules": lambda: bench_schedules(setting)}
    return {name: rows for tables in tried(makes, left, "fusion, ").values() for name, rows in tables.items()}


def bench_graphs(setting: Setting, left: Left) -> list[dict[str, Any]]:
    """Training steps of a small model: called from Python, captured as one graph, compiled; without and with fusion."""
    name, batch, img_size = setting.small
    small = dataclasses.replace(setting, model=name, batch=batch, img_sizes=(img_size,))

    def step(schedule: Sequence[int] | None) -> Callable[[], None]:
        training = Training(small)
        return _warm(lambda: training.step(schedule))

    def compiled() -> Callable[[], None]:
        training = Training(small)
        with _time_limit(small.compile_s, "torch.compile"):
            training.forward = torch.compile(training.model)
            return _warm(training.step)

    makes: dict[str, Callable[[], Callable[[], object]]] = {}
    for what, schedule in {"": None, ", fused in all layers": [4] * small.create().depth}.items():
        makes[f"called{what}"] = lambda schedule=schedule: step(schedule)
        makes[f"captured{what}"] = lambda schedule=schedule: captured(step(schedule), small.device)
    makes["compiled"] = compiled
    found = small.times(tried(makes, left, f"{name}, "), rounds=3 * setting.rounds)
    first = next(iter(found.values()), {})
    return [{"what": what, **row, **ratio(row, first, "times")} for what, row in found.items()]


PARTS: dict[str, Callable[[Setting, Left], dict[str, list[dict[str, Any]]]]] = {
    "scan": bench_scans,
    "steps": lambda s, left: {"steps": bench_steps(s, left)},
    "fusion": bench_fusion,
    "graphs": lambda s, left: {"graphs": bench_graphs(s, left)},
}


class PublishedMixer(nn.Module):
    """Vim's order of operations (arXiv:2401.09417, algorithm 1) on the weights of famba's mixer.

    Each direction flips the tokens, convolves, scans, gates and flips back, each as one operation. famba's reads them
    in reverse instead, gates once, and projects dt inside the scan.

    Args:
        fused: each direction by mamba-ssm's `mamba_inner_fn`, which stores less and recomputes more in backward.
    """

    def __init__(self, mixer: BidirectionalMixer, *, fused: bool = False) -> None:
        super().__init__()
        self.mixer, self.fused = mixer, fused

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        m = self.mixer
        xz = m.in_proj(x).mT
        run, token_axis = (self._fused_direction, 1) if self.fused else (self._direction, 2)
        left = run(xz, m.conv1d, m.x_proj, m.dt_proj, m.A_log, m.D)
        right = run(xz.flip(-1), m.conv1d_b, m.x_proj_b, m.dt_proj_b, m.A_b_log, m.D_b)
        total = left + right.flip(token_axis)
        total = total / 2 if m.average_directions else total
        return total if self.fused else m.out_proj(total.mT)

    def _direction(
        self, xz: Tensor, conv: nn.Conv1d, x_proj: nn.Linear, dt_proj: nn.Linear, A_log: Tensor, D: Tensor
    ) -> Float[Tensor, "b e t"]:
        m = self.mixer
        x, z = xz.chunk(2, dim=1)
        u = causal_conv1d_silu(x, conv.weight[:, 0], conv.bias, backend=m.backend)
        dt, B, C = x_proj(u.mT).split([m.dt_rank, m.d_state, m.d_state], dim=-1)
        delta, A = functional.linear(dt, dt_proj.weight).mT, -torch.exp(A_log.float())
        return selective_scan(u, delta, A, B.mT, C.mT, D, z, dt_proj.bias, delta_softplus=True, backend=m.backend)

    def _fused_direction(
        self, xz: Tensor, conv: nn.Conv1d, x_proj: nn.Linear, dt_proj: nn.Linear, A_log: Tensor, D: Tensor
    ) -> Float[Tensor, "b t d"]:
        """Output projection included, which is linear and shared by both directions."""
        interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        return interface.mamba_inner_fn(
            xz, conv.weight, conv.bias, x_proj.weight, dt_proj.weight, self.mixer.out_proj.weight, None,
            -torch.exp(A_log.float()), D=D.float(), delta_bias=dt_proj.bias.float(), delta_softplus=True,
        )  # fmt: skip


def set_norm_backend(model: VisionMamba, backend: str) -> None:
    """Change the backend of the norms alone."""
    for norm in (model.norm_f, *(block.get_submodule("norm") for block in model.layers)):
        norm._backend = backend  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]


@contextlib.contextmanager
def _time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds; at once for 0."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"{what} took more than {seconds:g} s")

    if not seconds:
        stop()
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _warm(call: Callable[[], object]) -> Callable[[], Any]:
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # so that a failure shows here
    return call


def _fast(setting: Setting) -> list[str]:
    return [name for name in available(setting.device) if name != "torch"]

"""Check the environment: which backends and extras work, why not, and how to fix it: `python -m famba doctor`.

A package is imported in a process of its own, which may fail, crash or hang, and torch here only after that process has
succeeded.
"""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from famba.kernels.cpu import build

_EXTRAS = ("datasets", "timm", "torchvision", "accelerate", "tensorboard")
_TIME_LIMIT_S = 120
_OTHER_TORCH = "make env TORCH_BACKEND=auto"


class Row(NamedTuple):
    """One thing that famba can use.

    Attributes:
        version: or a description; "" if it is missing.
        reason: why it cannot be used here; "" if it can.
        command: how to fix that; of several lines one is enough, the easiest first. "" if no command can.
    """

    name: str
    version: str = ""
    reason: str = ""
    command: str = ""

    @property
    def usable(self) -> bool:
        """It can be used here."""
        return not self.reason


def doctor() -> list[Row]:
    """One row for each thing, always in this order; the first call compiles the native kernels."""
    found = _imported(["torch", *_EXTRAS])
    torch = _imported_row("torch", found["torch"], "make env", "make env")
    broken = Row("", "", "torch does not import", torch.command)
    gpu = _gpu() if torch.usable else broken._replace(name="GPU")
    native = _native() if torch.usable else broken._replace(name="native kernels")
    return [torch, gpu, native, *_gpu_backends(gpu), *_extras(found, torch)]


def text(rows: Sequence[Row]) -> str:
    """torch's report of the system where torch imports, then the rows."""
    width = max(len(row.name) for row in rows)
    lines = []
    if any(row.name == "torch" and row.usable for row in rows):
        from torch.utils import collect_env

        lines += [collect_env.get_pretty_env_info(), ""]
    for row in rows:
        lines.append(f"{'yes' if row.usable else 'no ':<3}  {row.name:<{width}}  {row.version}".rstrip())
        details = [row.reason, *(f"$ {command}" for command in row.command.splitlines())] if row.reason else []
        lines += [f"     {'':<{width}}  {detail}" for detail in details]
    return "\n".join(lines)


def _imported(modules: Sequence[str]) -> dict[str, str | None]:
    """By module: "" if it imports, its error in one line, or None if there is no such package."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        errors = [error for error, _ in pool.map(_run, [f"import {module}" for module in modules])]
    absent = "ModuleNotFoundError: No module named {!r}".format
    return {name: None if error == absent(name) else error for name, error in zip(modules, errors, strict=True)}


def _run(code: str) -> tuple[str, str]:
    """The error of some code in one line, "" if there is none; and the last line that it printed."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIME_LIMIT_S, env=env)
    except subprocess.TimeoutExpired:
        return f"its import took more than {_TIME_LIMIT_S} s", ""
    if done.returncode < 0:
        return f"its import was ended by signal {-done.returncode}", ""
    return _last_line(done.stderr) if done.returncode else "", (done.stdout.splitlines() or [""])[-1]


def _last_line(output: str) -> str:
    """Where Python names the error."""
    return output.strip().splitlines()[-1] if output.strip() else "no reason given"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _imported_row(name: str, error: str | None, install: str, reinstall: str) -> Row:
    if error is None:
        return Row(name, "", "not installed", install)
    return Row(name, _version(name), f"does not import: {error}" if error else "", reinstall if error else "")


def _gpu() -> Row:
    import torch

    from famba.profiling import environment

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        try:
            torch.ones(1, device="cuda").add_(1).item()
        except RuntimeError as error:
            return Row("GPU", name, f"torch cannot compute on it: {str(error).partition(chr(10))[0]}", _OTHER_TORCH)
        return Row("GPU", name)
    if not (driver := environment.gpu_driver()):
        return Row("GPU", "", "there is no NVIDIA driver here")
    cuda = torch.version.cuda
    reason = f"torch, built for CUDA {cuda}, sees no device with this driver" if cuda else "torch is built without CUDA"
    return Row("GPU", f"driver {driver}", reason, _OTHER_TORCH)


def _native() -> Row:
    from famba.kernels.cpu import runtime

    if reason := build.unavailable():
        return Row("native kernels", "", reason)  # which names what to install
    return Row("native kernels", runtime.instruction_set())


def _gpu_backends(gpu: Row) -> list[Row]:
    """The easiest to install first; without a GPU nothing is recommended."""
    if not gpu.usable:
        return [Row(name, "", "it runs on a GPU, and none can be used") for name in ("triton", "hub", "mamba_ssm")]
    from famba.kernels import mamba_ssm

    ours = "from famba.kernels import mamba_ssm as m; print("
    backends = {  # the package whose version it has, what prints why it cannot run, and what to type where that fails
        "triton": ("triton", "import triton; from famba.kernels.triton import runtime; print(runtime.unavailable())",
                   "pip install triton"),
        "hub": ("kernels", f"import kernels, einops, transformers; {ours}m.hub_unavailable())", mamba_ssm.INSTALL_HUB),
        "mamba_ssm": ("mamba_ssm", f"{ours}m.unavailable() or m.conv_unavailable())", mamba_ssm.BUILD),
    }  # fmt: skip
    rows: list[Row] = []
    for name, (package, code, install) in backends.items():
        error, reason = _run(code)  # a reason names its command itself
        if name == "triton" and not (error or reason) and (error := _cannot_compile()):
            install = "apt-get install gcc python3-dev"
        needless = "not needed, for backend triton has all kernels: " if rows and rows[0].usable else ""
        shown = f"{needless}{error or reason}" if error or reason else ""
        rows.append(Row(name, _version(package), shown, install if error else ""))
    return rows


def _cannot_compile() -> str:
    """Why Triton, which imports, cannot launch a kernel; it builds a helper with a C compiler first."""
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:  # no compiler, no headers of Python, no driver that it knows
        return f"triton cannot build its helper: {_last_line(str(error))}"
    return ""


def _extras(found: dict[str, str | None], torch: Row) -> list[Row]:
    # Named in the same command, torch stays as it is.
    kept = f"torch=={_version('torch').split('+')[0]} " if torch.usable else ""
    rows = {}
    for name in _EXTRAS:
        reinstall = f"uv pip install --torch-backend=auto --reinstall-package {name} {kept}{name}"
        rows[name] = _imported_row(name, found[name], f"pip install {kept}{name}", reinstall)
    if found["timm"] and not (torchvision := rows["torchvision"]).usable:
        rows["timm"] = rows["timm"]._replace(reason="it imports torchvision", command=torchvision.command)
    return list(rows.values())

"""What works on this machine, what does not and why, and the command that mends it: `python -m famba doctor`.

Nothing that is broken breaks this: a package is imported in a process of its own, which may fail, crash or hang, and
torch itself only when its own process has come through.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from famba.errors import BackendError
from famba.kernels.cpu import build

_EXTRAS = ("datasets", "timm", "torchvision", "accelerate", "tensorboard")
# What each backend for a GPU imports, by the work that it takes a user: Triton comes with torch, the hub's kernels are
# downloaded, and the others are installed from a wheel, or built.
_GPU = {
    "triton": ("triton",),
    "hub": ("kernels", "einops", "transformers"),
    "mamba_ssm": (
        "mamba_ssm.ops.selective_scan_interface",
        "selective_scan_cuda",
        "causal_conv1d",
        "causal_conv1d_cuda",
    ),
}
_TIME_LIMIT_S = 120
_OTHER_TORCH = "make env TORCH_BACKEND=auto"


class Row(NamedTuple):
    """One thing that famba can use.

    Attributes:
        version: or what there is instead of one, such as a GPU's name; "" if there is nothing.
        usable: famba can use it here.
        reason: why not; "" if usable.
        command: what mends that, in one line or in several of which one does, the least work first; "" if usable, or if
            no command can.
    """

    name: str
    version: str
    usable: bool
    reason: str = ""
    command: str = ""


def doctor() -> list[Row]:
    """One row for each thing, in an order that does not change; a first call compiles the native kernels."""
    found = _imported(["torch", *(module for modules in _GPU.values() for module in modules), *_EXTRAS])
    torch = _torch(found["torch"])
    gpu = _gpu() if torch.usable else Row("GPU", "", False, "torch does not import", torch.command)
    return [
        Row("Python", platform.python_version(), True),
        torch,
        gpu,
        _compiler(),
        _native() if torch.usable else Row("native kernels", "", False, "torch does not import", torch.command),
        *_gpu_backends(found, gpu),
        *_extras(found, torch),
    ]


def text(rows: Iterable[Row]) -> str:
    """The rows to be read in a terminal: a reason below its thing, the commands below the reason."""
    rows = list(rows)
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{'yes' if row.usable else 'no ':<3}  {row.name:<{width}}  {row.version}".rstrip())
        below = [row.reason, *(f"$ {command}" for command in row.command.splitlines())] if row.reason else []
        lines += [f"     {'':<{width}}  {more}" for more in below]
    return "\n".join(lines)


def _imported(modules: Iterable[str]) -> dict[str, str | None]:
    """By module: "" if it imports, else what is said in one line; None if there is no such package."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        modules = list(modules)
        return dict(zip(modules, pool.map(_import, modules), strict=True))


def _import(module: str) -> str | None:
    package = module.split(".")[0]
    try:
        if importlib.util.find_spec(package) is None:
            return None
    except (ImportError, ValueError) as error:
        return _line(str(error))
    # An extension of torch finds torch's libraries only when torch is there.
    first = "" if module == "torch" or importlib.util.find_spec("torch") is None else "import torch; "
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"{first}import {module}"],
            capture_output=True,
            text=True,
            timeout=_TIME_LIMIT_S,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    except subprocess.TimeoutExpired:
        return f"its import took more than {_TIME_LIMIT_S} s"
    if done.returncode < 0:
        return f"its import was ended by signal {-done.returncode}"
    return _line(done.stderr) if done.returncode else ""


def _line(said: str) -> str:
    """The last line, where Python names the error."""
    return said.strip().splitlines()[-1] if said.strip() else "no reason given"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _torch(said: str | None) -> Row:
    version = _version("torch")
    if said is None:
        return Row("torch", "", False, "not installed", "make env")
    if said:
        return Row("torch", version, False, f"does not import: {said}", "make env")
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return Row("torch", f"{torch.__version__}, {built}", True)


def _gpu() -> Row:
    import torch

    from famba.profiling import environment

    driver = environment.gpu_driver()
    if not torch.cuda.is_available():
        if not driver:
            return Row("GPU", "", False, "there is no NVIDIA driver here")
        found = f"driver {driver}"
        if torch.version.cuda is None:
            return Row("GPU", found, False, "this torch is built without CUDA", _OTHER_TORCH)
        reason = f"torch, built for CUDA {torch.version.cuda}, sees no device with this driver"
        return Row("GPU", found, False, reason, _OTHER_TORCH)
    properties = torch.cuda.get_device_properties(0)
    parts = [
        properties.name,
        f"{properties.total_memory / 2**30:.0f} GiB",
        f"sm_{properties.major}{properties.minor}",
        *([f"driver {driver}"] if driver else []),
        *([f"one of {torch.cuda.device_count()}"] if torch.cuda.device_count() > 1 else []),
    ]
    try:
        torch.ones(1, device="cuda").add_(1).item()
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        return Row("GPU", ", ".join(parts), False, f"torch cannot compute on it: {said}", _OTHER_TORCH)
    return Row("GPU", ", ".join(parts), True)


def _compiler() -> Row:
    try:
        compiler = build._compiler()
        return Row("C++ compiler", build._run([*compiler, "--version"]).splitlines()[0], True)
    except BackendError as error:
        command = "unset CXX" if os.environ.get("CXX") else _installs_compiler()
        return Row("C++ compiler", "", False, str(error), command)


def _installs_compiler() -> str:
    known = {
        "apt-get": "apt-get install g++",
        "dnf": "dnf install gcc-c++",
        "apk": "apk add g++",
        "pacman": "pacman -S gcc",
        "brew": "xcode-select --install",
        "conda": "conda install -c conda-forge cxx-compiler",
    }
    return next((command for program, command in known.items() if shutil.which(program)), "")


def _native() -> Row:
    from famba.kernels.cpu import runtime

    if reason := build.unavailable():
        return Row("native kernels", "", False, reason, _compiler().command)
    return Row("native kernels", runtime.instruction_set(), True)


def _gpu_backends(found: dict[str, str | None], gpu: Row) -> list[Row]:
    """Without a GPU nothing is to be installed for it."""
    if not gpu.usable:
        return [Row(name, "", False, "it runs on a GPU, and none can be used") for name in _GPU]
    from famba.kernels import mamba_ssm

    commands = {
        "triton": "pip install triton",
        "hub": mamba_ssm.INSTALL_HUB,
        "mamba_ssm": f"{mamba_ssm.INSTALL}  # a wheel, if there is one for this torch\n"
        f"{mamba_ssm.BUILD}  # a build, with nvcc",
    }
    rows = []
    for name, modules in _GPU.items():
        wrong = {module: said for module in modules if (said := found[module]) != ""}
        version = _version({"hub": "kernels"}.get(name, name))
        if not wrong:
            rows.append(Row(name, version, True))
            continue
        module, said = next(iter(wrong.items()))
        reason = f"{module} is not installed" if said is None else f"{module} does not import: {said}"
        if rows and rows[0].usable:
            reason += "; not needed, for backend triton has all kernels"
        rows.append(Row(name, version, False, reason, commands[name]))
    return rows


def _extras(found: dict[str, str | None], torch: Row) -> list[Row]:
    # Named in the same command, torch stays what it is.
    kept = f"torch=={_version('torch').split('+')[0]} " if torch.usable else ""
    rows = {}
    for name in sorted(_EXTRAS, key=lambda name: name == "timm"):  # which imports torchvision
        said = found[name]
        again = f"uv pip install --torch-backend=auto --reinstall-package {name} {kept}{name}"
        if said is None:
            row = Row(name, "", False, "not installed", f"pip install {kept}{name}")
        elif said and name == "timm" and not rows["torchvision"].usable:
            row = Row(name, _version(name), False, "it imports torchvision", rows["torchvision"].command)
        elif said:
            row = Row(name, _version(name), False, f"does not import: {said}", again)
        else:
            row = Row(name, _version(name), True)
        rows[name] = row
    return [rows[name] for name in _EXTRAS]

"""The kernels of mamba-ssm and causal-conv1d, as published, for both directions of a scan: installed, or from the hub.

They scan and convolve from the first token to the last only: in reverse their input is flipped, and what they make
flipped back, each time a copy. Their rules on layout and types (selective_scan.cpp, causal_conv1d.cpp) are met here,
by a copy where need be. Nothing of either package is imported before it is asked for; without CUDA neither imports.

Backend `mamba_ssm` takes the installed packages. Backend `hub` takes builds of them for many releases of torch and
CUDA from the Hugging Face hub, through its package `kernels`: nothing is compiled. They are downloaded when the backend
first runs, never before. Which ones is fixed by kernels.lock (`kernels lock .` makes it) where there is one, else by
the versions in pyproject.toml's `[tool.kernels.dependencies]`.

Axes: b batch, e channels, t tokens in scan order, n states per channel, k taps.
"""

import functools
import importlib
import importlib.util
import os
import tomllib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from famba.errors import BackendError
from famba.kernels import dispatch

# pip takes the wheels that the releases pages have for this torch, CUDA and Python, and compiles where they have none.
# Without the variable mamba-ssm does neither since July 2026 (state-spaces/mamba#977), and lacks the kernel of Mamba-1.
INSTALL = "MAMBA_KEEP_CUDA_BUILD=TRUE pip install mamba-ssm causal-conv1d --no-build-isolation"
REINSTALL = f"{INSTALL} --no-cache-dir --force-reinstall --no-deps"
BUILD = f"MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE {REINSTALL}"
INSTALL_HUB = "pip install kernels einops transformers"  # mamba-ssm's build imports the last two
MOST_STATES = 256
_TAPS = range(2, 5)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_DEVICE = "cuda"
_PROJECT = Path(__file__).parents[2]  # holds pyproject.toml and kernels.lock
_INSTALLED = {  # by package: the function, its module, and the library of the kernels
    "mamba_ssm": ("selective_scan_fn", "mamba_ssm.ops.selective_scan_interface", "selective_scan_cuda"),
    "causal_conv1d": ("causal_conv1d_fn", "causal_conv1d", "causal_conv1d_cuda"),
}
_Found = tuple[str, Callable[..., Tensor] | None]  # the function, or the reason why it is not to be had


@dispatch.constant
def unavailable() -> str:
    """Why the scan cannot run here ("": it can)."""
    return _no_device() or _find("mamba_ssm", False)[0]


@dispatch.constant
def conv_unavailable() -> str:
    """Why the convolution cannot run here ("": it can)."""
    return _no_device() or _find("causal_conv1d", False)[0]


@dispatch.constant
def hub_unavailable() -> str:
    """Why the hub's kernels cannot run here, as far as it is known before they are downloaded ("": they may)."""
    if not (_PROJECT / "pyproject.toml").exists():
        return "famba is not installed from a checkout, whose pyproject.toml fixes the versions; pip install -e ."
    return _no_device() or ("" if importlib.util.find_spec("kernels") else f"kernels is not installed; {INSTALL_HUB}")


def unsuited(u, delta, A, B, C, D, z, delta_bias) -> str:
    """Why the scan cannot run on these tensors ("": it can)."""
    if reason := dispatch.unsuited(_DEVICE, _DTYPES, u):
        return reason
    for name, x in (("delta", delta), ("B", B), ("C", C), ("z", z)):
        if x is not None and x.dtype != u.dtype:
            return f"u, delta, B, C and z must have one type, got {u.dtype} and {name} of {x.dtype}"
    if any(x is not None and x.dtype == torch.float64 for x in (A, D, delta_bias)):
        return "A, D and delta_bias are float32 there, got torch.float64"
    if A.shape[1] > MOST_STATES:
        return f"it runs with at most {MOST_STATES} states per channel, got {A.shape[1]}"
    return ""


def conv_unsuited(x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """Why the convolution cannot run on these tensors ("": it can)."""
    if reason := dispatch.unsuited(_DEVICE, _DTYPES, x, weight, bias):
        return reason
    if weight.shape[1] not in _TAPS:
        return f"it runs with {_TAPS[0]} to {_TAPS[-1]} taps, got {weight.shape[1]}"
    return ""


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    *,
    hub: bool = False,
) -> Tensor:
    """`famba.kernels.scan.selective_scan` by mamba-ssm: the installed one, or the hub's."""
    run = _ready("mamba_ssm", hub)
    u, delta, B, C = (_tokens_innermost(x, reverse) for x in (u, delta, B, C))
    z = None if z is None else _tokens_innermost(z, reverse)
    D, delta_bias = (None if x is None else x.float() for x in (D, delta_bias))
    out = run(u, delta, A.float(), B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus)
    return _first_order(out.flip(-1) if reverse else out)


def causal_conv1d_silu(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, *, hub: bool = False) -> Tensor:
    """`famba.kernels.ops.causal_conv1d_silu` by causal-conv1d: the installed one, or the hub's."""
    run = _ready("causal_conv1d", hub)
    x = _either_innermost(x.flip(-1) if reverse else x)
    bias = None if bias is None else bias.to(weight.dtype)
    # Keywords only: other versions have other arguments in between.
    out = run(x=x, weight=weight.contiguous(), bias=bias, activation="silu")
    return _first_order(out.flip(-1) if reverse else out)


def _first_order(out: Tensor) -> Tensor:
    """Refuse to differentiate a gradient: torch would take what the packages' backward gives for a constant."""

    def refuse(grad: Tensor) -> None:
        if torch.is_grad_enabled():
            raise BackendError(
                "backends mamba_ssm and hub: create_graph=True needs differentiable gradients; allowed: torch, triton"
            )

    if out.requires_grad:
        out.register_hook(refuse)
    return out


def _tokens_innermost(x: Tensor, reverse: bool) -> Tensor:
    x = x.flip(-1) if reverse else x
    return x if x.stride(-1) == 1 else x.contiguous()


def _either_innermost(x: Tensor) -> Tensor:
    """Channels stay innermost where the kernel takes them so: eight at a time, aligned."""
    b_stride, e_stride, t_stride = x.stride()
    if e_stride == 1 and not (x.shape[1] % 8 or b_stride % 8 or t_stride % 8):
        return x
    # A clone, because what is contiguous but for an axis of length 1 keeps any stride along it.
    return x if t_stride == 1 else x.clone(memory_format=torch.contiguous_format)


def _no_device() -> str:
    return "" if torch.get_device_module(_DEVICE).is_available() else f"torch sees no {_DEVICE} device"


def _ready(package: str, hub: bool) -> Callable[..., Tensor]:
    reason, run = _find(package, hub)
    if run is None:
        raise BackendError(reason)
    return run


@functools.cache
def _find(package: str, hub: bool) -> _Found:
    function, module, kernels = _INSTALLED[package]
    if hub:
        return _downloaded(f"kernels-community/{package.replace('_', '-')}", function)
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed; {INSTALL}", None
    if importlib.util.find_spec(kernels) is None:
        return f"{package} is installed without its kernels, {kernels}; {REINSTALL}", None
    try:
        importlib.import_module(kernels)
        return "", getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever a package built for another torch or CUDA raises
        said = " ".join(str(error).split()) or type(error).__name__
        return f"{package} does not import: {said}; build it for this torch: {BUILD}", None


def _downloaded(repository: str, function: str) -> _Found:
    """The function of the repository's build for this torch and CUDA."""
    lock, project = _PROJECT / "kernels.lock", tomllib.loads((_PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    try:
        import kernels

        if lock.exists():
            build = kernels.get_locked_kernel(repository, lockfile=lock)
        else:
            build = kernels.get_kernel(repository, version=project["tool"]["kernels"]["dependencies"][repository])
        return "", getattr(build, function)
    except Exception as error:  # whatever the hub, its cache, the loader of libraries or a build's own code raises
        # A hub out of reach is reported as one not trusted, whose context tells. A second paragraph lists all builds.
        first, *rest = str(error.__context__ or error).split("\n\n")
        said = " ".join(" ".join([first, *rest[1:]]).split()) or type(error).__name__
        loading = hasattr(error, "__notes__")  # added by kernels where a build does not import
        if isinstance(error, ModuleNotFoundError) or (isinstance(error, ImportError) and not loading):
            helps = INSTALL_HUB
        elif loading or "snapshots" in said:  # the library does not load, or another file is not whole
            helps = f"to download it again: hf cache rm kernel/{repository}"
        elif "HF_HUB_OFFLINE" in os.environ and (isinstance(error, ValueError) or error.__context__):
            helps = "to download it: unset HF_HUB_OFFLINE"
        elif error.__context__:
            helps = "to use what was downloaded before: HF_HUB_OFFLINE=1"
        else:
            helps = f"this is torch {torch.__version__}; what there is: kernels versions {repository}"
        return f"backend 'hub': {repository}: {said}; {helps}", None

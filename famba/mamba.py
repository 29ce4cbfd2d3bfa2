"""The kernels of mamba-ssm and causal-conv1d, as those packages are published, for both directions of a scan.

They scan and convolve from the first token to the last only: in reverse their input is flipped, and what they make
flipped back, each time a copy. Their rules on layout and types (selective_scan.cpp, causal_conv1d.cpp) are met here,
by a copy where need be. Nothing of either package is imported before it is asked for; without CUDA neither imports.

Axes: b batch, e channels, t tokens in scan order, n states per channel, k taps.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from famba.errors import BackendError

# mamba-ssm's default build leaves the kernel of Mamba-1 out since July 2026.
INSTALL_SCAN = "MAMBA_KEEP_CUDA_BUILD=TRUE pip install mamba-ssm --no-build-isolation"
INSTALL_CONV = "pip install causal-conv1d --no-build-isolation"
MOST_STATES = 256
_TAPS = range(2, 5)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_DEVICE = "cuda"


@torch.compiler.assume_constant_result
def unavailable() -> str:
    """Why the scan cannot run here ("": it can)."""
    return no_device() or scan_missing()


@torch.compiler.assume_constant_result
def conv_unavailable() -> str:
    """Why the convolution cannot run here ("": it can)."""
    return no_device() or conv_missing()


def no_device() -> str:
    """Why no kernel of either package can run here ("": one can)."""
    return "" if torch.get_device_module(_DEVICE).is_available() else f"torch sees no {_DEVICE} device"


def scan_missing() -> str:
    """What mamba-ssm lacks for its scan, and the command that brings it ("": nothing)."""
    return _scan()[0]


def conv_missing() -> str:
    """What causal-conv1d lacks, and the command that brings it ("": nothing)."""
    return _conv()[0]


def unsuited(u, delta, A, B, C, D, z, delta_bias) -> str:
    """Why the scan cannot run on these tensors ("": it can)."""
    if u.device.type != _DEVICE:
        return f"it runs on {_DEVICE} tensors, got {u.device}"
    if u.dtype not in _DTYPES:
        return f"it runs on float32, float16 and bfloat16, got {u.dtype}"
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
    if x.device.type != _DEVICE:
        return f"it runs on {_DEVICE} tensors, got {x.device}"
    for tensor in (x, weight, bias):
        if tensor is not None and tensor.dtype not in _DTYPES:
            return f"it runs on float32, float16 and bfloat16, got {tensor.dtype}"
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
) -> Tensor:
    """`famba.scan.selective_scan` by mamba-ssm."""
    run = _ready(_scan)
    u, delta, B, C = (_tokens_innermost(x, reverse) for x in (u, delta, B, C))
    z = None if z is None else _tokens_innermost(z, reverse)
    D, delta_bias = (None if x is None else x.float() for x in (D, delta_bias))
    out = run(u, delta, A.float(), B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus)
    return out.flip(-1) if reverse else out


def causal_conv1d_silu(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    """`famba.ops.causal_conv1d_silu` by causal-conv1d."""
    run = _ready(_conv)
    x = _either_innermost(x.flip(-1) if reverse else x)
    bias = None if bias is None else bias.to(weight.dtype)
    # Keywords only: other versions have other arguments in between.
    out = run(x=x, weight=weight.contiguous(), bias=bias, activation="silu")
    return out.flip(-1) if reverse else out


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


def _ready(attempt: Callable[[], tuple[str, Callable[..., Tensor] | None]]) -> Callable[..., Tensor]:
    reason, run = attempt()
    if run is None:
        raise BackendError(reason)
    return run


@functools.cache
def _scan() -> tuple[str, Callable[..., Tensor] | None]:
    return _imported(
        "mamba_ssm", "mamba_ssm.ops.selective_scan_interface", "selective_scan_fn", "selective_scan_cuda", INSTALL_SCAN
    )


@functools.cache
def _conv() -> tuple[str, Callable[..., Tensor] | None]:
    return _imported("causal_conv1d", "causal_conv1d", "causal_conv1d_fn", "causal_conv1d_cuda", INSTALL_CONV)


def _imported(
    package: str, module: str, function: str, kernels: str, command: str
) -> tuple[str, Callable[..., Tensor] | None]:
    """The function, or the reason why it is not to be had and the command that helps."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed; {command}", None
    if importlib.util.find_spec(kernels) is None:
        return f"{package} is installed without its kernels, {kernels}; {command}", None
    try:
        importlib.import_module(kernels)
        return "", getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever a package built for another torch or CUDA raises
        said = " ".join(str(error).split()) or type(error).__name__
        return f"{package} does not import: {said}; build it for this torch: {command}", None

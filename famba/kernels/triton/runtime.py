"""What the GPU kernels share: Triton if it is there, the check of a tensor, the launch.

With TRITON_INTERPRET=1 in the environment before famba is imported, Triton's interpreter runs the kernels on CPU
tensors, slowly: so they are tested where there is no GPU.
"""

import contextlib
import functools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from famba.kernels import dispatch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton: Any = None
    tl: Any = SimpleNamespace(constexpr=None)


def _undecorated(function: Callable | None = None, **options: Any) -> Any:
    return (lambda function: function) if function is None else function


jit: Any = _undecorated if triton is None else triton.jit  # without Triton kernels are defined, and never called
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on")
DTYPES = (torch.float32, torch.bfloat16)
_OLDEST = (3, 3)  # of Triton; before, kernels could not append to tuples
_LEAST_CAPABILITY = (7, 0)  # as torch's compiler has it
PARAMETERS = (torch.float32, torch.bfloat16, torch.float16)  # taken as float32
DEVICE = "cpu" if INTERPRETED else "cuda"


@dispatch.constant
def unavailable() -> str:
    """Why the kernels cannot run here ("": they can)."""
    if triton is None:
        return "triton is missing; pip install triton"
    if tuple(map(int, triton.__version__.split(".")[:2])) < _OLDEST:
        needed = ".".join(map(str, _OLDEST))
        return f"triton {triton.__version__} cannot compile the kernels; they need {needed} (torch 2.7) or later"
    if INTERPRETED:
        return ""
    if not torch.cuda.is_available():
        return "no CUDA device; TRITON_INTERPRET=1 runs the kernels on a CPU, for tests"
    return _too_old(*range(torch.cuda.device_count()))


def unsuited(*tensors: Tensor | None, allowed: tuple[torch.dtype, ...] = DTYPES) -> str:
    """Why the kernels cannot run on tensors of such a device and type ("": they can)."""
    if (reason := dispatch.unsuited(DEVICE, allowed, *tensors)) or INTERPRETED:
        return reason
    return _too_old(*{x.device.index for x in tensors if x is not None})


@dispatch.constant
def _too_old(*devices: int) -> str:
    """Why Triton can compile for none of these CUDA devices ("": it can)."""
    newest = max(map(_capability, devices))
    if newest < _LEAST_CAPABILITY:
        return "compute capability {}.{}; Triton needs {}.{} or higher".format(*newest, *_LEAST_CAPABILITY)
    return ""


@functools.cache  # it is asked for at every choice of a kernel
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start a kernel on the device of its first argument; constants are compiled into it."""
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, **constants)


def power_of_two(number: int) -> int:
    """The least power of two that is not below a number."""
    return 1 << (number - 1).bit_length()


def blocks(number: int, block: int) -> int:
    return -(-number // block)


def channels_last(like: Tensor) -> Tensor:
    """An empty (b, e, t) tensor of that shape and type, with channels innermost in memory."""
    b, e, t = like.shape
    return like.new_empty(b, t, e).transpose(1, 2)

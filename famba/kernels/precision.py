"""Numbers and their precision: autocast, and where values stop being finite.

`b` batch, `h` and `w` pixels. Under autocast the matrix products, convolutions, scans and gates take and give bfloat16;
the scan's parameters and states, the residual stream, norms and losses stay float32.
"""

import contextlib
import ctypes
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

_log = logging.getLogger(__name__)
# Where torch rounds products to TF32, and the value with which it does not. It raises where old and new keys are mixed.
_TF32 = [(torch.backends.cuda.matmul, "allow_tf32", False), (torch.backends.cudnn, "allow_tf32", False)]
if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # from torch 2.9 on
    _cudnn: Any = torch.backends.cudnn
    _TF32 = [(part, "fp32_precision", "ieee") for part in (torch.backends.cuda.matmul, _cudnn.conv, _cudnn.rnn)]
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def configure() -> None:
    """Set what torch is to do with numbers, and the C library with memory, in all of this process."""
    if torch.get_num_threads() > 1 and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        _log.warning(
            "torch was imported before famba: its idle threads spin, which slows down other processes on these cores; "
            "import famba first, or set OMP_WAIT_POLICY=PASSIVE"
        )
    torch.set_flush_denormal(True)  # a decaying scan makes denormals, which a CPU is slow at
    # fp32 means fp32: by default cuDNN's convolutions would round their inputs to 10 bits.
    for part, key, exact in _TF32:
        setattr(part, key, exact)
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        # A step frees what the next one allocates. By default it goes back to the system, which zeroes it page by page.
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most there is; torch's larger tensors are few
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@contextlib.contextmanager
def settings_restored() -> Iterator[None]:
    """Afterwards torch has the settings of `configure`, the threads and the current GPU that it had before."""
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    threads, flushes = torch.get_num_threads(), (torch.tensor(2e-38) / 4).item() == 0  # torch does not tell
    before = [(part, key, getattr(part, key)) for part, key, _ in _TF32]
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(flushes)
        for part, key, value in before:
            setattr(part, key, value)
        if torch.cuda.is_initialized():
            # As torch.cuda.device does on exit: set_device would take memory of a GPU that nothing has run on yet.
            torch.cuda._maybe_exchange_device(gpu)


def uses_tf32() -> bool:
    """Whether products of float32 may be rounded to TF32."""
    return any(getattr(part, key) != exact for part, key, exact in _TF32)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """What a forward pass of that precision, `fp32` or `bf16`, runs under."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def exact(device: torch.device) -> contextlib.AbstractContextManager:
    """Around products that autocast would round: those of float32 are of float32 all the same."""
    if not torch.amp.is_autocast_available(device.type):  # meta tensors have none
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def nondeterministic(device: torch.device, backend: str) -> list[str]:
    """What of a training step adds up in an order that may change from run to run, by the scan's backend.

    On a CPU nothing does, nor do famba's own kernels on a GPU. There mamba-ssm and causal-conv1d add by atomics, as
    torch does where it fuses for them; and cuDNN may, in the gradient of the patch embedding.
    """
    if device.type == "cpu":
        return []
    found = [] if torch.backends.cudnn.deterministic else ["convolution_backward"]
    if backend != "triton":
        found.append("scatter_add")
    if backend in ("mamba_ssm", "hub"):
        found += ["causal_conv1d_bwd", "selective_scan_bwd"]
    return sorted(found)


@torch.no_grad()
def first_not_finite(model: nn.Module, images: Float[Tensor, "b 3 h w"]) -> str:
    """Where the first value that is not finite comes up: in a forward pass, else among the gradients there are.

    Forward it is the first module whose output has one; backward the module nearest to the loss, where gradients come
    from, whose parameter's gradient has one. Layers are counted from 1. Empty if all is finite.
    """
    if not _finite(images):
        return "the images"
    found: list[str] = []
    names = {module: name for name, module in model.named_modules() if name}

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        tensors = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        if not found and module in names and not all(map(_finite, tensors)):
            found.append(names[module])

    handle = register_module_forward_hook(hook)
    try:
        model(images)
    finally:
        handle.remove()
    if found:
        return f"the output of {_place(found[0])}"
    for name, weight in reversed(list(model.named_parameters())):
        if weight.grad is not None and not _finite(weight.grad):
            return f"the gradient of {_place(name)}"
    return ""


def _place(name: str) -> str:
    """layers.2.mixer.in_proj is layer 3, mixer.in_proj."""
    head, *rest = name.split(".")
    if head != "layers" or not rest:
        return name
    inside = ".".join(rest[1:])
    return f"layer {int(rest[0]) + 1}" + (f", {inside}" if inside else "")


def _finite(x: Tensor) -> bool:
    return bool(x.isfinite().all())

"""Which implementation of a function runs: for each function a table of backends by name, and one rule that picks.

The names are those of `famba.backends()`, which the selective scan has all of. Another function has an implementation
of those that gain by one, and plain torch.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from famba.errors import BackendError, InputError
from famba.kernels.reference import is_transformed

NAMES = ("reference", "torch", "native", "mamba_ssm", "hub", "triton")  # slowest first
# What "auto" tries on the tensors of a device, fastest first; torch runs everywhere. Not hub, which downloads.
_FASTEST = {"cpu": ("native", "torch"), "cuda": ("triton", "mamba_ssm", "torch")}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """How one implementation is run, and what may stand in its way.

    `unavailable` says why this machine cannot run it ("": it can), `unsuited` the same of the tensors that `choose` is
    given (None for those that are absent).

    Some do more in one call: `run_both` both directions of a convolution or scan, with the arguments of
    famba.kernels.ops.bidirectional_conv1d_silu and bidirectional_scan; `run_mixer` the convolutions and selections as
    well, with those of famba.kernels.cpu.mixer.mix.
    """

    run: Callable[..., Any]
    unavailable: Callable[[], str] = lambda: ""
    unsuited: Callable[..., str] = lambda *tensors: ""
    run_both: Callable[..., Any] | None = None
    run_mixer: Callable[..., Tensor] | None = None


def unsuited(device: str, allowed: tuple[torch.dtype, ...], *tensors: Tensor | None) -> str:
    """The reason why what runs on tensors of a device and of some types cannot run on these ("": it can)."""
    for x in tensors:
        if x is not None and x.device.type != device:
            return f"it runs on {device} tensors, got {x.device}"
        if x is not None and x.dtype not in allowed:
            *others, last = (str(dtype).removeprefix("torch.") for dtype in allowed)
            return f"it runs on {', '.join(others) + ' and ' * bool(others)}{last}, got {x.dtype}"
    return ""


def choose(table: Mapping[str, Backend], name: str, first: Tensor, *others: Tensor | None) -> Backend:
    """The implementation that goes with a backend's name, or the fastest ("auto"), for these tensors.

    A backend that has none in this table takes torch's: a scan of its own does not make a matching of its own. Inside
    torch.func's transforms and forward-mode differentiation torch's operations always run: they have all derivatives.

    Raises:
        InputError: an unknown backend.
        BackendError: it cannot run here or on these tensors.
    """
    key = chosen(table, name, first, *others)
    return table[("reference" if "reference" in table else "torch") if is_transformed() else key]


def chosen(table: Mapping[str, Backend], name: str, first: Tensor, *others: Tensor | None) -> str:
    """The key of what `choose` takes from the table; arguments and errors are the same."""
    if name == "auto":
        fastest = _FASTEST.get(first.device.type, ("torch",))
        for fast in fastest:
            if fast not in table:
                continue
            if missing := table[fast].unavailable():
                reason = f"{missing} (python -m famba doctor names the command)"
            elif not (reason := table[fast].unsuited(first, *others)):
                return fast
            if fast == fastest[0] and not torch.compiler.is_compiling():
                _warn(fast, first.device.type, reason)
        return "torch"
    if name not in table and name not in NAMES:
        names = [*NAMES, *(other for other in table if other not in NAMES)]
        raise InputError(f"backend: {name!r} is unknown; allowed: auto, {', '.join(names)}")
    key = name if name in table else "torch"
    if reason := table[key].unavailable() or table[key].unsuited(first, *others):
        raise BackendError(f"backend {name!r} cannot run here: {reason}")
    return key


@functools.cache  # once in a process
def _warn(backend: str, device: str, reason: str) -> None:
    _log.warning("backend auto: slower kernels than %s run on %s: %s", backend, device, reason)


def constant(function: Callable[..., str]) -> Callable[..., str]:
    """`torch.compiler.assume_constant_result`, which imports the compiler: it would double the import time of famba."""
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function

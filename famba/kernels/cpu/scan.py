"""The selective scan on a CPU as torch operators, `famba::scan` and `famba::scan_backward`, over scan.cpp.

Axes as in famba.kernels.scan: b batch, e channels, t tokens, n states. Activations may be float32 or bfloat16 and have
any strides; vectors run over channels, so the fast layout is (b, t, e) in memory seen as (b, e, t). The recurrence is
float32. Outputs and gradients lie as the tensors they belong to.
"""

from typing import Any

import torch
from torch import Tensor

from famba.kernels import dispatch, reference
from famba.kernels.cpu import build, runtime
from famba.kernels.cpu.runtime import float32, like, pointer, view
from famba.kernels.reference import register, register_gradient

_CHUNK = 16  # tokens between kept states, and _PAD channels: scan.cpp's CHUNK and PAD
_PAD = 16
MOST_STATES = 64

Scan = runtime.structure("Scan")


@dispatch.constant
def unavailable() -> str:
    """The reason why the native scan cannot run here ("": it can)."""
    return build.unavailable()


def unsuited(u, delta, A, B, C, D, z, delta_bias) -> str:
    """The reason why it cannot run on these tensors ("": it can)."""
    if reason := runtime.unsuited(u, delta, A, B, C, D, z, delta_bias):
        return reason
    return (
        "" if A.shape[1] <= MOST_STATES else f"it runs with at most {MOST_STATES} states per channel, got {A.shape[1]}"
    )


def selective_scan(*arguments: Any) -> Tensor:
    """`selective_scan_ref` by the native kernel; states are kept only if a gradient may be asked for."""
    return torch.ops.famba.scan(*arguments, reference.wants_gradient(*arguments[:8]))[0]


INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias"


def kept_states(
    x: Tensor, *leading: int | torch.SymInt, e: int | torch.SymInt, t: int | torch.SymInt, n: int | torch.SymInt
) -> Tensor:
    """Room for the states before each chunk of tokens but the first."""
    # Channels that only fill up a vector may not be written: zeros, so that equal inputs give equal outputs.
    make = x.new_zeros if e % _PAD else x.new_empty
    return make((*leading, (t - 1) // _CHUNK, -(-e // _PAD) * _PAD, n), dtype=torch.float32)


def _job(u, delta, A, B, C, D, z, delta_bias, softplus: bool, reverse: bool, states: Tensor, **views: Tensor | None):
    (b, e, t), n = u.shape, A.shape[1]
    return Scan(
        b, e, t, n, 0, softplus, reverse, 0, states.numel() > 0, 1, 1.0,
        *(view(x) for x in (u, delta, z, B, C)),
        A=A.data_ptr(), D=pointer(D), dt_bias=pointer(delta_bias), states=states.data_ptr(),
        **{name: view(x) for name, x in views.items()},
    )  # fmt: skip


def _scan(u, delta, A, B, C, D, z, delta_bias, softplus: bool, reverse: bool, keep: bool):
    out, states = _scan_fake(u, delta, A, B, C, D, z, delta_bias, softplus, reverse, keep)
    A, D, delta_bias = (float32(x) for x in (A, D, delta_bias))
    runtime.call("famba_scan_forward", _job(u, delta, A, B, C, D, z, delta_bias, softplus, reverse, states, out=out))
    return out, states


def _scan_backward(grad, u, delta, A, B, C, D, z, delta_bias, states, softplus: bool, reverse: bool):
    made = _scan_backward_fake(grad, u, delta, A, B, C, D, z, delta_bias, states, softplus, reverse)
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias = made
    summed = [x.float() for x in (grad_A, grad_D, grad_bias)]  # where the kernel writes: themselves if float32
    A, D, delta_bias = (float32(x) for x in (A, D, delta_bias))
    job = _job(
        u, delta, A, B, C, D, z, delta_bias, softplus, reverse, states, grad_out=grad, grad_u=grad_u,
        grad_delta=grad_delta, grad_B=grad_B, grad_C=grad_C, grad_z=None if z is None else grad_z,
    )  # fmt: skip
    job.grad_A, job.grad_D, job.grad_dt_bias = map(pointer, summed)
    runtime.call("famba_scan_backward", job)
    grad_A, grad_D, grad_bias = (
        found.to(x.dtype) for found, x in zip(summed, (grad_A, grad_D, grad_bias), strict=True)
    )
    return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias


def _scan_fake(u, delta, A, B, C, D, z, delta_bias, softplus, reverse, keep):
    b, e, t = u.shape
    return like(u), kept_states(u, b, e=e, t=t, n=A.shape[1]) if keep else u.new_empty(0, dtype=torch.float32)


def _scan_backward_fake(grad, u, delta, A, B, C, D, z, delta_bias, states, softplus, reverse):
    return reference.empty_gradients((u, delta, A, B, C, D, z, delta_bias), like)


register(f"scan({INPUTS}, bool softplus, bool reverse, bool keep) -> (Tensor, Tensor)", _scan, _scan_fake, "CPU")
register(
    f"scan_backward(Tensor grad, {INPUTS}, Tensor states, bool softplus, bool reverse) -> "
    f"({', '.join(8 * ['Tensor'])})",
    _scan_backward, _scan_backward_fake, "CPU",
)  # fmt: skip
register_gradient("scan", reference.selective_scan_ref, kept=1)

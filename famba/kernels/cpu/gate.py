"""The gate that joins a mixer's two directions as one torch operator, `famba::gate`, over gate.cpp.

Axes: b batch, e channels, t tokens. Strides, types and layout of the results are as in famba.kernels.cpu.scan.
"""

import ctypes
from functools import partial

import torch
from torch import Tensor

from famba.kernels import reference
from famba.kernels.cpu import runtime
from famba.kernels.cpu.runtime import View, like


class _Job(ctypes.Structure):
    """gate.h's Gate."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("b", "e", "t", "groups")),
        ("scale", ctypes.c_double),
        *((name, View) for name in ("left", "right", "gate", "out", "sum", "grad_out", "grad_sum", "grad_gate")),
    )


def unsuited(left: Tensor, right: Tensor, gate: Tensor) -> str:
    """Why the kernel cannot run on these tensors ("": it can)."""
    for x in (left, right, gate):
        if x.device.type != "cpu":
            return f"it runs on cpu tensors, got {x.device}"
        if x.dtype not in runtime.DTYPES:
            return f"it runs on float32 and bfloat16, got {x.dtype}"
    return "" if left.dtype == right.dtype == gate.dtype else "it runs on tensors of one type"


def gated_sum(left: Tensor, right: Tensor, gate: Tensor, scale: float) -> Tensor:
    """`famba.kernels.ops.gated_sum` by the native kernel; the sum is kept only if a gradient may be asked for."""
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (left, right, gate))
    return torch.ops.famba.gate(left, right, gate, scale, keep)[0]


_library = torch.library.Library("famba", "FRAGMENT")
_library.define("gate(Tensor left, Tensor right, Tensor gate, float scale, bool keep) -> (Tensor, Tensor)")
_library.define("gate_backward(Tensor grad, Tensor sum, Tensor gate, float scale) -> (Tensor, Tensor)")


def _job(gate: Tensor, scale: float, **views: Tensor | None) -> _Job:
    return _Job(*gate.shape, 0, scale, gate=View.of(gate), **{name: View.of(x) for name, x in views.items()})


def _gate(left: Tensor, right: Tensor, gate: Tensor, scale: float, keep: bool) -> tuple[Tensor, Tensor]:
    out, total = _gate_fake(left, right, gate, scale, keep)
    job = _job(gate, scale, left=left, right=right, out=out, sum=total if keep else None)
    runtime.call("famba_gate_forward", job)
    return out, total


def _gate_backward(grad: Tensor, total: Tensor, gate: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    to_sum, to_gate = _gate_backward_fake(grad, total, gate, scale)
    job = _job(gate, scale, sum=total, grad_out=grad, grad_sum=to_sum, grad_gate=to_gate)
    runtime.call("famba_gate_backward", job)
    return to_sum, to_gate


def _gate_fake(left, right, gate, scale, keep):
    return like(left), like(left) if keep else left.new_empty(0)


def _gate_backward_fake(grad, total, gate, scale):
    return like(total), like(gate)


def _setup_context(ctx, inputs, output) -> None:
    _, _, gate, ctx.scale, keep = inputs
    if not keep:
        raise RuntimeError("famba::gate was called with keep=False, and so kept no sum for the gradient")
    ctx.set_materialize_grads(False)  # of the sum there is none, and zeros in their place would be as large
    ctx.save_for_backward(output[1], gate)


def _backward(ctx, grad, grad_sum):
    total, gate = ctx.saved_tensors
    to_sum, to_gate = reference.gradients(
        lambda: torch.ops.famba.gate_backward(grad, total, gate, ctx.scale),
        partial(reference.gate, scale=ctx.scale),
        (total, gate),
        grad,
    )
    if grad_sum is not None:  # where the gradient itself is differentiated, the sum is used once more
        to_sum = grad_sum if to_sum is None else to_sum + grad_sum
    return to_sum, to_sum, to_gate, None, None


_library.impl("gate", _gate, "CPU")
_library.impl("gate_backward", _gate_backward, "CPU")
torch.library.register_fake("famba::gate", _gate_fake, lib=_library)
torch.library.register_fake("famba::gate_backward", _gate_backward_fake, lib=_library)
torch.library.register_autograd("famba::gate", _backward, setup_context=_setup_context, lib=_library)

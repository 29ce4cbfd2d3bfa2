"""The gate that joins a mixer's two directions as one torch operator, `famba::gate`, over gate.cpp.

Axes: b batch, e channels, t tokens. Strides, types and layout of the results are as in famba.native.scan.
"""

import ctypes

import torch
from torch import Tensor

from famba.native import runtime
from famba.native.runtime import View, like


class _Job(ctypes.Structure):
    """gate.h's Gate."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("b", "e", "t", "groups")),
        ("scale", ctypes.c_double),
        *((name, View) for name in ("left", "right", "gate", "out", "grad_out", "grad_sum", "grad_gate")),
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
    """`famba.ops.gated_sum` by the native kernel."""
    return torch.ops.famba.gate(left, right, gate, scale)


_library = torch.library.Library("famba", "FRAGMENT")
_library.define("gate(Tensor left, Tensor right, Tensor gate, float scale) -> Tensor")
_library.define("gate_backward(Tensor grad, Tensor left, Tensor right, Tensor gate, float scale) -> (Tensor, Tensor)")


def _job(left: Tensor, right: Tensor, gate: Tensor, scale: float, **views: Tensor) -> _Job:
    return _Job(
        *left.shape, 0, scale, View.of(left), View.of(right), View.of(gate),
        **{name: View.of(tensor) for name, tensor in views.items()},
    )  # fmt: skip


def _gate(left: Tensor, right: Tensor, gate: Tensor, scale: float) -> Tensor:
    out = like(left)
    runtime.call("famba_gate_forward", _job(left, right, gate, scale, out=out))
    return out


def _gate_backward(grad: Tensor, left: Tensor, right: Tensor, gate: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    to_sum, to_gate = like(left), like(gate)
    job = _job(left, right, gate, scale, grad_out=grad, grad_sum=to_sum, grad_gate=to_gate)
    runtime.call("famba_gate_backward", job)
    return to_sum, to_gate


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    to_sum, to_gate = torch.ops.famba.gate_backward(grad, *ctx.saved_tensors, ctx.scale)
    return to_sum, to_sum, to_gate, None


_library.impl("gate", _gate, "CPU")
_library.impl("gate_backward", _gate_backward, "CPU")
torch.library.register_fake("famba::gate", lambda left, right, gate, scale: like(left), lib=_library)
torch.library.register_fake(
    "famba::gate_backward", lambda grad, left, right, gate, scale: (like(left), like(gate)), lib=_library
)
torch.library.register_autograd("famba::gate", _backward, setup_context=_setup_context, lib=_library)

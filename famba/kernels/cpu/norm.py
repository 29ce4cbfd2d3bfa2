"""Add -> RMSNorm as one torch operator, `famba::norm`, over norm.cpp. All is float32; the inputs are cast first.

Axes: b batch, t tokens, d d_model.
"""

import torch
from torch import Tensor

from famba.kernels import reference
from famba.kernels.cpu import runtime
from famba.kernels.cpu.runtime import pointer
from famba.kernels.reference import register

Norm = runtime.structure("Norm")


def unsuited(x: Tensor, residual: Tensor | None, weight: Tensor) -> str:
    """The reason why the kernel cannot run on these tensors ("": it can)."""
    allowed = (torch.float32, torch.bfloat16, torch.float16)
    return runtime.unsuited(x, allowed=allowed) or runtime.unsuited(residual, weight, allowed=allowed[:1])


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`famba.kernels.ops.add_rms_norm` by the native kernel."""
    x = x.float()
    run = _AddNorm.apply if reference.wants_gradient(x, residual, weight) else torch.ops.famba.norm
    out, total, _ = run(x, residual, weight, eps)
    return out, x if residual is None else total


class _AddNorm(torch.autograd.Function):
    """Not torch's registration, which takes longer than the kernel of a small model."""

    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        out, total, scale = torch.ops.famba.norm(x, residual, weight, eps)
        ctx.added, ctx.eps = residual is not None, eps
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(scale)
        ctx.save_for_backward(total if ctx.added else x, scale, weight)
        return out, total, scale

    @staticmethod
    def backward(ctx, grad_out, grad_sum, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        grads = grad_out, grad_sum if ctx.added else None
        grad_x, grad_weight = reference.norm_gradients(ctx, torch.ops.famba.norm_backward, *grads)
        return grad_x, grad_x if ctx.added else None, grad_weight, None


def _norm_fake(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float):
    total = x.new_empty(0 if residual is None else x.shape)
    return x.new_empty(x.shape), total, x.new_empty(x.shape[:-1])


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float):
    out, total, scale = _norm_fake(x, residual, weight, eps)
    x, weight = x.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    job = Norm(
        scale.numel(), x.shape[-1], eps, x=x.data_ptr(), residual=pointer(residual),
        weight=weight.data_ptr(), out=out.data_ptr(), sum=total.data_ptr(), scale=scale.data_ptr(),
    )  # fmt: skip
    runtime.call("famba_norm_forward", job)
    return out, total, scale


def _norm_backward(grad_out: Tensor | None, grad_sum: Tensor | None, x: Tensor, scale: Tensor, weight: Tensor):
    grad_x, grad_weight = norm_backward_fake(grad_out, grad_sum, x, scale, weight)
    x, weight = x.contiguous(), weight.contiguous()
    grad_out, grad_sum = (g if g is None else g.contiguous() for g in (grad_out, grad_sum))
    job = Norm(
        scale.numel(), x.shape[-1], 0, x=x.data_ptr(), weight=weight.data_ptr(), scale=scale.data_ptr(),
        grad_out=pointer(grad_out), grad_sum=pointer(grad_sum),
        grad_x=grad_x.data_ptr(), grad_weight=grad_weight.data_ptr(),
    )  # fmt: skip
    runtime.call("famba_norm_backward", job)
    return grad_x, grad_weight


def norm_backward_fake(grad_out, grad_sum, x, scale, weight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


register(
    "norm(Tensor x, Tensor? residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)", _norm, _norm_fake, "CPU"
)
register(
    "norm_backward(Tensor? grad_out, Tensor? grad_sum, Tensor x, Tensor scale, Tensor weight) -> (Tensor, Tensor)",
    _norm_backward, norm_backward_fake, "CPU",
)  # fmt: skip

"""Depthwise causal convolution, bias and silu as one torch operator, `famba::conv`, over conv.cpp.

Axes: b batch, e channels, t tokens, k taps. Strides, types and layout of the results are as in famba.kernels.cpu.scan.
"""

import torch
from torch import Tensor

from famba.kernels import reference
from famba.kernels.cpu import runtime
from famba.kernels.cpu.runtime import float32, like, pointer, view
from famba.kernels.reference import register, register_gradient

MOST_TAPS = 8

Conv = runtime.structure("Conv")


def unsuited(x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """The reason why the kernel cannot run on these tensors ("": it can)."""
    if reason := runtime.unsuited(x, weight, bias):
        return reason
    return "" if weight.shape[1] <= MOST_TAPS else f"it runs with at most {MOST_TAPS} taps, got {weight.shape[1]}"


def causal_conv1d_silu(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    """`famba.kernels.ops.causal_conv1d_silu` by the native kernel."""
    return torch.ops.famba.conv(x, weight, bias, reverse)


def _job(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, **views: Tensor):
    return Conv(
        *x.shape, weight.shape[1], reverse, 0, 1, 0, view(x),
        weight=weight.data_ptr(),
        bias=pointer(bias),
        **{name: view(tensor) for name, tensor in views.items()},
    )  # fmt: skip


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    out = like(x)
    weight, bias = float32(weight), float32(bias)
    runtime.call("famba_conv_forward", _job(x, weight, bias, reverse, out=out))
    return out


def _conv_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool):
    grad_x, grad_weight, grad_bias = _conv_backward_fake(grad, x, weight, bias, reverse)
    taps, shift = float32(weight), float32(bias)  # the job has their addresses alone
    job = _job(x, taps, shift, reverse, grad_out=grad, grad_x=grad_x)
    found = [x.float() for x in (grad_weight, grad_bias)]  # where the kernel writes: themselves if float32
    job.grad_weight, job.grad_bias = map(pointer, found)
    runtime.call("famba_conv_backward", job)
    return grad_x, *(g.to(x.dtype) for g, x in zip(found, (grad_weight, grad_bias), strict=True))


def _conv_backward_fake(grad, x, weight, bias, reverse):
    return reference.empty_gradients((x, weight, bias), like)


register("conv(Tensor x, Tensor weight, Tensor? bias, bool reverse) -> Tensor", _conv, lambda x, *_: like(x), "CPU")
register(
    "conv_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, bool reverse) -> (Tensor, Tensor, Tensor)",
    _conv_backward, _conv_backward_fake, "CPU",
)  # fmt: skip
register_gradient("conv", reference.conv)

"""Add -> RMSNorm on a GPU as one torch operator, `famba::gpu_norm`. What is added may be bfloat16; the rest is float32.

Axes: b batch, t tokens, d d_model.
"""

import torch
from torch import Tensor

from famba.kernels import reference
from famba.kernels.cpu.norm import norm_backward_fake
from famba.kernels.reference import register, register_backward
from famba.kernels.triton import runtime
from famba.kernels.triton.runtime import jit, launch, tl

_TILE = 1024  # numbers of a tile, of one row or several
_PROGRAMS = 512  # that sum the weight's gradient: as many on every device, so that it is the same on all
MOST_WIDTH = 16384


def unsuited(x: Tensor, residual: Tensor | None, weight: Tensor) -> str:
    """Why the kernel cannot run on these tensors ("": it can)."""
    if reason := runtime.unsuited(x) or runtime.unsuited(residual, weight, allowed=(torch.float32,)):
        return reason
    return "" if x.shape[2] <= MOST_WIDTH else f"it runs on rows of at most {MOST_WIDTH}, got {x.shape[2]}"


@jit
def _forward_kernel(
    x, residual, weight, out, total, scale, rows, d, eps, R: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    column = tl.arange(0, D)[None, :]
    inside = (row[:, None] < rows) & (column < d)
    place = row[:, None] * d + column
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + place, mask=inside, other=0.0)
    tl.store(total + place, value, mask=inside)
    factor = 1 / tl.sqrt(tl.sum(value * value, axis=1) / d + eps)
    tl.store(scale + row, factor, mask=row < rows)
    weights = tl.load(weight + column, mask=column < d, other=0.0)
    tl.store(out + place, value * factor[:, None] * weights, mask=inside)


@jit
def _backward_kernel(
    total, scale, grad_out, grad_sum, weight, to_x, part, rows, d, tiles, programs, R: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    column = tl.arange(0, D)[None, :]
    weights = tl.load(weight + column, mask=column < d, other=0.0)
    summed = tl.zeros([R, D], dtype=tl.float32)
    for i in range(tl.program_id(0), tiles, programs):
        row = (i * R + tl.arange(0, R)).to(tl.int64)
        inside = (row[:, None] < rows) & (column < d)
        place = row[:, None] * d + column
        factor = tl.load(scale + row, mask=row < rows, other=0.0)[:, None]
        unit = tl.load(total + place, mask=inside, other=0.0) * factor
        made = tl.zeros([R, D], dtype=tl.float32)
        if grad_out is not None:
            g = tl.load(grad_out + place, mask=inside, other=0.0)
            summed += g * unit
            g *= weights
            made = factor * (g - unit * (tl.sum(g * unit, axis=1) / d)[:, None])
        if grad_sum is not None:
            made += tl.load(grad_sum + place, mask=inside, other=0.0)
        tl.store(to_x + place, made, mask=inside)
    tl.store(part + tl.program_id(0) * d + column, tl.sum(summed, axis=0)[None, :], mask=column < d)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`famba.kernels.ops.add_rms_norm` by the kernel."""
    out, total, _ = torch.ops.famba.gpu_norm(x, residual, weight, eps)
    return out, total


def _tiling(rows: int, d: int) -> tuple[int, int, int]:
    """Rows and width of a tile, and how many tiles there are."""
    width = runtime.power_of_two(d)
    height = max(1, _TILE // width)
    return height, width, runtime.blocks(rows, height)


def _norm_fake(x, residual, weight, eps):
    out, total = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for _ in range(2))
    return out, total, out.new_empty(x.shape[:-1])


def _norm(x, residual, weight, eps):
    out, total, scale = _norm_fake(x, residual, weight, eps)
    rows, d = scale.numel(), x.shape[-1]
    height, width, tiles = _tiling(rows, d)
    residual = None if residual is None else residual.contiguous()
    launch(
        _forward_kernel, (tiles,), x.contiguous(), residual, weight.contiguous(), out, total, scale, rows, d, eps,
        R=height, D=width, num_warps=4,
    )  # fmt: skip
    return out, total, scale


def _norm_backward(grad_out, grad_sum, total, scale, weight):
    to_x = total.new_empty(total.shape)
    rows, d = scale.numel(), total.shape[-1]
    height, width, tiles = _tiling(rows, d)
    programs = min(tiles, _PROGRAMS)
    part = total.new_empty(programs, d)
    grads = [g if g is None else g.contiguous() for g in (grad_out, grad_sum)]
    launch(
        _backward_kernel, (programs,), total, scale, *grads, weight.contiguous(), to_x, part, rows, d, tiles,
        programs, R=height, D=width, num_warps=4,
    )  # fmt: skip
    return to_x, part.sum(0)


def _setup_context(ctx, inputs, output) -> None:
    x, residual, weight, ctx.eps = inputs
    ctx.added, ctx.dtype = residual is not None, x.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], output[2], weight)


def _backward(ctx, grad_out, grad_sum, _):
    to_x, to_weight = reference.norm_gradients(ctx, torch.ops.famba.gpu_norm_backward, grad_out, grad_sum)
    return None if to_x is None else to_x.to(ctx.dtype), to_x if ctx.added else None, to_weight, None


register(
    "gpu_norm(Tensor x, Tensor? residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)", _norm, _norm_fake
)
register(
    "gpu_norm_backward(Tensor? grad_out, Tensor? grad_sum, Tensor total, Tensor scale, Tensor weight) -> "
    "(Tensor, Tensor)",
    _norm_backward, norm_backward_fake,
)  # fmt: skip
register_backward("gpu_norm", _backward, _setup_context)

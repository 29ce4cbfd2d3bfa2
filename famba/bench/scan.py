"""The scan's backends timed against each other and against what else there is, forward and backward.

Two more ways to scan stand beside the backends: a loop written kindly (time steps unbound once, so that its backward
indexes nothing), and a parallel scan of logarithmic depth in torch. A float32 product of two 2048 x 2048 matrices,
measured in the same rounds, is the unit that carries over to other machines.

Axes: b batch, e channels, t tokens, n states.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from famba.bench.model import able
from famba.bench.timing import interleaved, ratio, summary
from famba.errors import InputError
from famba.kernels.ops import Side, bidirectional_scan
from famba.kernels.scan import selective_scan

UNIT = "matmul 2048^3"
_TURN_S = 0.1  # about what one of those products takes


def bench_scan(
    shapes: Sequence[Sequence[int]], names: Sequence[str] | None = None, *, rounds: int, slow_s: float = math.inf
) -> list[dict[str, Any]]:
    """One row per shape and contestant, its time in units of two others.

    `times` is in units of the first contestant's time, `matmuls` in units of the matrix product.

    Args:
        shapes: (b, e, t, n) of each scan.
        names: contestants by name, the first the yardstick; all that can run here when absent, the fastest backend
            first.
        slow_s: seconds after which a slow contestant is measured no further.

    Raises:
        InputError: a contestant that does not exist or cannot run here.
    """
    known = [*able("native", "torch", "reference"), *_OTHERS]
    names = known if names is None else list(names)
    for name in names:
        if name not in known:
            raise InputError(f"contestant: {name!r} is unknown or cannot run here; allowed: {', '.join(known)}")
    left, right = torch.randn(2, 2048, 2048)
    rows = []
    for shape in shapes:
        calls: dict[str, Callable[[], object]] = {name: scan_call(shape, name) for name in names}
        calls[UNIT] = lambda: left @ right
        found = {
            name: summary(x) for name, x in interleaved(calls, rounds=rounds, turn_s=_TURN_S, budget_s=slow_s).items()
        }
        rows += [
            {
                "shape": str(tuple(shape)),
                "contestant": name,
                **row,
                **ratio(row, found[names[0]], "times"),
                **ratio(row, found[UNIT], "matmuls"),
            }
            for name, row in found.items()
        ]
    return rows


def scan_call(
    shape: Sequence[int],
    name: str,
    *,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
) -> Callable[[], None]:
    """Forward and backward of one scan with bias, softplus, D and gate.

    Args:
        dtype: of what each token has; A, D and the bias are float32.
        channels_last: tokens follow each other in memory, as in the model; else a channel's tokens do, as mamba-ssm
            wants them.
    """
    b, e, t, n = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    def lay(x: Tensor) -> Tensor:
        x = x.to(device, dtype)
        return x if channels_last else x.transpose(1, 2).contiguous().transpose(1, 2)

    A = -torch.arange(1.0, n + 1).repeat(e, 1)
    tokens = [lay(draw(b, t, k)) for k in (e, e, e, n, n)]
    inputs = [*tokens, *(x.to(device) for x in (A, draw(e), draw(e) - 3))]
    cotangent = lay(draw(b, t, e)).transpose(1, 2)
    for x in inputs:
        x.requires_grad_()

    def call() -> None:
        u, delta, z, B, C = (x.transpose(1, 2) for x in inputs[:5])
        A, D, bias = inputs[5:]
        if name in _OTHERS:
            step = F.softplus(delta + bias[:, None])
            out = (_OTHERS[name](u, step, A, B, C) + D[:, None] * u) * F.silu(z)
        else:
            out = selective_scan(u, delta, A, B, C, D, z, bias, delta_softplus=True, backend=name)
        torch.autograd.grad(out, inputs, cotangent)

    return call


def both_call(
    shape: Sequence[int], name: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Callable[[], None]:
    """Forward and backward of both directions of a mixer, from steps yet to be projected, joined and gated."""
    b, e, t, n = shape
    m = math.ceil(e / 32)  # as in a mixer, whose d_model is half of e
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, kind)

    def side() -> list[Tensor]:
        A = -torch.arange(1.0, n + 1, device=device).repeat(e, 1)
        tokens = [draw(b, t, k) for k in (e, m, n, n)]
        single = {"kind": torch.float32}
        return [*tokens, draw(e, m), A, draw(e, **single), draw(e, **single) - 3]

    left, right, gate = side(), side(), draw(b, t, e)
    inputs, cotangent = [*left, *right, gate], draw(b, t, e).mT
    for x in inputs:
        x.requires_grad_()

    def call() -> None:
        forward, backward = (
            Side(u.mT, step.mT, weight, A, B.mT, C.mT, D, bias) for u, step, B, C, weight, A, D, bias in (left, right)
        )
        out = bidirectional_scan(forward, backward, gate.mT, scale=0.5, backend=name)
        torch.autograd.grad(out, inputs, cotangent)

    return call


def _kind_loop(u: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    state = u.new_zeros(*u.shape[:2], A.shape[1])
    y = []
    for x, s, Bi, Ci in zip(u.unbind(2), step.unbind(2), B.unbind(2), C.unbind(2), strict=True):
        state = torch.exp(s[..., None] * A) * state + (s * x)[..., None] * Bi[:, None]
        y.append((state @ Ci[..., None]).squeeze(2))
    return torch.stack(y, dim=2)


def _parallel_scan(u: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    decay = torch.exp(step[..., None] * A[:, None])
    entry = (step * u)[..., None] * B.mT[:, None]
    states = _Parallel.apply(decay, entry)
    return torch.einsum("betn,bnt->bet", states, C)


class _Parallel(torch.autograd.Function):
    """h[t] = decay[t] h[t-1] + entry[t] along dim 2, in about 2 log2(t) sweeps (Brent and Kung's network)."""

    @staticmethod
    def forward(ctx, decay: Tensor, entry: Tensor) -> Tensor:
        states = _sweep(decay, entry)
        ctx.save_for_backward(decay, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        decay, states = ctx.saved_tensors
        following = F.pad(decay[:, :, 1:], (0, 0, 0, 1))
        to_entry = _sweep(following.flip(2), grads[0].flip(2)).flip(2)
        return to_entry * F.pad(states[:, :, :-1], (0, 0, 1, 0)), to_entry


def _sweep(decay: Tensor, entry: Tensor) -> Tensor:
    t = entry.shape[2]
    length = 1 << (t - 1).bit_length()
    a, x = (F.pad(tensor, (0, 0, 0, length - t)) for tensor in (decay, entry))
    if length == t:
        a, x = a.clone(), x.clone()

    def combine(into: slice, other: slice) -> None:
        x[:, :, into].addcmul_(a[:, :, into], x[:, :, other])
        a[:, :, into].mul_(a[:, :, other])

    stride = 1
    while stride < length:
        combine(slice(2 * stride - 1, None, 2 * stride), slice(stride - 1, None, 2 * stride))
        stride *= 2
    stride //= 4
    while stride:
        combine(slice(3 * stride - 1, None, 2 * stride), slice(2 * stride - 1, length - 1, 2 * stride))
        stride //= 2
    return x[:, :, :t]


_OTHERS: dict[str, Callable[..., Tensor]] = {"kind loop": _kind_loop, "parallel scan": _parallel_scan}

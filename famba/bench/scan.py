"""Backends of the selective scan timed against other implementations, forward and backward, in turn in one process.

Peers, where installed: mambapy's parallel scan, accelerated-scan's torch reference, what transformers runs without
kernels, and a loop in plain torch over time steps unbound once, so that its backward indexes nothing. A float32 product
of two 2048 x 2048 matrices in the same rounds is the unit that other machines can compare.

Axes: b batch, e channels, t tokens, n states, m dt_rank.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from famba.bench.model import available
from famba.bench.timing import Left, interleaved, ratio, summary, tried
from famba.kernels.ops import Side, bidirectional_scan
from famba.kernels.scan import selective_scan

UNIT = "matmul 2048^3"
_TURN_S = 0.1  # about the time of one such product


def bench_scan(
    shapes: Sequence[Sequence[int]], left_out: Left, *, rounds: int, slow_s: float = math.inf
) -> list[dict[str, Any]]:
    """One row per shape and contestant: `times` relative to the first contestant, `matmuls` to the matrix product.

    Contestants are all that can run here, the fastest backend first; peers that cannot go to `left_out`.

    Args:
        shapes: (b, e, t, n) of each scan.
        slow_s: seconds after which a slow contestant is measured no further.
    """
    peers = tried({name: partial(peer, name) for name in _PEERS}, left_out)
    names = [*available(), "reference", *peers]
    left, right = torch.randn(2, 2048, 2048)
    rows = []
    for shape in shapes:
        calls: dict[str, Callable[[], object]] = {name: scan_call(shape, name) for name in names}
        calls[UNIT] = lambda: left @ right
        times = interleaved(calls, rounds=rounds, turn_s=_TURN_S, budget_s=slow_s)
        found = {name: summary(x) for name, x in times.items()}
        rows += [
            {"shape": str(tuple(shape)), "contestant": name, **row}
            | ratio(row, found[names[0]], "times")
            | ratio(row, found[UNIT], "matmuls")
            for name, row in found.items()
        ]
    return rows


def scan_call(
    shape: Sequence[int],
    name: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
) -> Callable[[], None]:
    """Forward and backward of one scan with bias, softplus, D and gate.

    Args:
        dtype: of what each token has; A, D and the bias are float32.
        channels_last: the layout of the model, (b, t, e) in memory; False is (b, e, t), the layout of mamba-ssm.
    """
    b, e, t, n = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    def lay(x: Tensor) -> Tensor:
        x = x.to(device, dtype)
        return x if channels_last else x.transpose(1, 2).contiguous().transpose(1, 2)

    A = -torch.arange(1.0, n + 1).repeat(e, 1)
    tokens = [lay(draw(b, t, k)) for k in (e, e, e, n, n)]
    inputs = [*tokens, *(x.to(device) for x in (A, draw(e), draw(e) - 3))]
    cotangent = lay(draw(b, t, e)).mT
    for x in inputs:
        x.requires_grad_()
    scan = peer(name) if name in _PEERS else None

    def call() -> None:
        u, delta, z, B, C = (x.mT for x in inputs[:5])
        A, D, bias = inputs[5:]
        if scan is not None:
            out = (scan(u, F.softplus(delta + bias[:, None]), A, B, C) + D[:, None] * u) * F.silu(z)
        else:
            out = selective_scan(u, delta, A, B, C, D, z, bias, delta_softplus=True, backend=name)
        torch.autograd.grad(out, inputs, cotangent)

    return call


def both_call(
    shape: Sequence[int], name: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Callable[[], None]:
    """Forward and backward of both directions of a mixer: projected steps, two scans, sum and gate."""
    b, e, t, n = shape
    m = math.ceil(e / 32)  # as in a mixer, whose d_model is half of e
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, kind)

    def side() -> list[Tensor]:
        A = -torch.arange(1.0, n + 1, device=device).repeat(e, 1)
        tokens = [draw(b, t, k) for k in (e, m, n, n)]
        return [*tokens, draw(e, m), A, draw(e, kind=torch.float32), draw(e, kind=torch.float32) - 3]

    left, right, gate = side(), side(), draw(b, t, e)
    inputs, cotangent = [*left, *right, gate], draw(b, t, e).mT
    for x in inputs:
        x.requires_grad_()

    def call() -> None:
        sides = [Side(u.mT, dt.mT, weight, A, B.mT, C.mT, D, bias) for u, dt, B, C, weight, A, D, bias in (left, right)]
        torch.autograd.grad(bidirectional_scan(sides[0], sides[1], gate.mT, scale=0.5, backend=name), inputs, cotangent)

    return call


def peer(name: str) -> Callable[..., Tensor]:
    """An installed peer as a function of u, delta (b, e, t), A (e, n), B and C (b, n, t)."""
    module, adapt = _PEERS[name]
    return adapt(importlib.import_module(module))


def _of_states(scan: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The peer whose states h[t] = decay[t] h[t-1] + entry[t] are all made at once, as (b, t, e, n)."""

    def run(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        decay = torch.exp(delta.mT[..., None] * A)
        entry = (delta * u).mT[..., None] * B.mT[:, :, None]
        return (scan(decay, entry) @ C.mT[..., None]).squeeze(3).mT

    return run


def _loop(decay: Tensor, entry: Tensor) -> Tensor:
    h, states = torch.zeros_like(entry[:, 0]), []
    for a, x in zip(decay.unbind(1), entry.unbind(1), strict=True):
        h = a * h + x
        states.append(h)
    return torch.stack(states, 1)


def _accelerated_scan(module: Any, decay: Tensor, entry: Tensor) -> Tensor:
    channels_first = [x.flatten(2).mT.contiguous() for x in (decay, entry)]
    return module.scan(*channels_first).mT.reshape(entry.shape)


# By name the module, and the peer made of it.
_PEERS: dict[str, tuple[str, Callable[[Any], Callable[..., Tensor]]]] = {
    "loop in torch": ("torch", lambda _: _of_states(_loop)),
    "mambapy": ("mambapy.pscan", lambda module: _of_states(module.pscan)),
    "accelerated-scan": ("accelerated_scan.ref", lambda module: _of_states(partial(_accelerated_scan, module))),
    "transformers": ("transformers.models.mamba.modeling_mamba", lambda module: module.mamba_selective_scan),
}

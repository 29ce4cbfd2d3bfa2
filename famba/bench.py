"""The scan's backends timed against each other and against what else there is: `python -m famba.bench --help`.

All run in turn in one process, forward and backward, round after round, so that a busy machine slows all alike. Two
more ways to scan stand beside the backends: a loop written kindly (time steps unbound once, so that its backward
indexes nothing), and a parallel scan of logarithmic depth in torch. A float32 product of two 2048 x 2048 matrices,
measured in the same rounds, is the unit that carries over to other machines.

Axes: b batch, e channels, t tokens, n states.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from famba.errors import InputError
from famba.scan import backends, selective_scan

# (b, e, t, n): Vim-Ti's scan at 224 px, and two small ones
SHAPES = ((32, 384, 197, 16), (64, 192, 65, 16), (64, 128, 65, 16))
UNIT = "matmul 2048^3"


def bench_scan(
    shapes: Sequence[Sequence[int]] = SHAPES, names: Sequence[str] | None = None, *, rounds: int = 7
) -> list[dict[str, object]]:
    """One row per shape and contestant: median and least milliseconds, and two ratios.

    `speedup` is the time of the first contestant over this one's, `matmuls` this one's in units of the matrix product;
    both compare medians. `..._least` compares the least times, which a busy machine disturbs less.

    Args:
        names: contestants by name, the first the yardstick; all that can run here when absent.

    Raises:
        InputError: a contestant that does not exist or cannot run here.
    """
    able = [name for name, missing in backends().items() if not missing] + list(_OTHERS)
    names = able if names is None else list(names)
    for name in names:
        if name not in able:
            raise InputError(f"contestant: {name!r} is unknown or cannot run here; allowed: {', '.join(able)}")
    left, right = torch.randn(2, 2048, 2048)
    rows = []
    for shape in shapes:
        calls: dict[str, Callable[[], object]] = {name: scan_call(shape, name) for name in names}
        calls[UNIT] = lambda: left @ right
        times = interleaved(calls, rounds=rounds)
        median, least = ({name: f(x) for name, x in times.items()} for f in (statistics.median, min))
        rows += [
            {
                "shape": list(shape),
                "contestant": name,
                "median_ms": median[name] * 1e3,
                "least_ms": least[name] * 1e3,
                "speedup": median[names[0]] / median[name],
                "speedup_least": least[names[0]] / least[name],
                "matmuls": median[name] / median[UNIT],
                "matmuls_least": least[name] / least[UNIT],
                "rounds": rounds,
                "threads": torch.get_num_threads(),
            }
            for name in times
        ]
    return rows


def interleaved(calls: dict[str, Callable[[], object]], *, rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every call in every round: each round makes all calls once, in the order given."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(warmup + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def scan_call(shape: Sequence[int], name: str, *, seed: int = 0) -> Callable[[], None]:
    """Forward and backward of one scan with bias, softplus, D and gate, in the channels-last layout."""
    b, e, t, n = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    A = -torch.arange(1.0, n + 1).repeat(e, 1)
    inputs = [*(draw(b, t, e) for _ in range(3)), *(draw(b, t, n) for _ in range(2)), A, draw(e), draw(e) - 3]
    cotangent = draw(b, t, e).transpose(1, 2)
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time ways to scan against each other, in turn in one process.")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="contestants; the first is the yardstick")
    parser.add_argument("--shapes", nargs="+", metavar="b,e,t,n", default=[",".join(map(str, x)) for x in SHAPES])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    given = parser.parse_args(arguments)
    shapes = [tuple(int(x) for x in shape.split(",")) for shape in given.shapes]
    rows = bench_scan(shapes, given.names, rounds=given.rounds)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {given.rounds} interleaved rounds")
    print(f"{'(b, e, t, n)':>20} {'':>14} {'median ms':>10} {'least ms':>9} {'speed-up':>14} {UNIT + 's':>15}")
    for row in rows:
        print(
            f"{row['shape']!s:>20} {row['contestant']:>14} {row['median_ms']:10.2f} {row['least_ms']:9.2f}"
            f" {row['speedup']:6.1f} ({row['speedup_least']:5.1f}) {row['matmuls']:7.3f} ({row['matmuls_least']:5.3f})"
        )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

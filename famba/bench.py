"""Backends of the scan timed against each other: `python -m famba.bench --help` for the choices.

All of them run in turn in one process, forward and backward, round after round, so that a busy machine slows all alike;
the median over the rounds and the ratio to the slowest backend are printed, beside the time of one float32 2048^3
matrix product measured in the same rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from famba.scan import backends, selective_scan

# (b, e, t, n): Vim-Ti's scan at 224 px, and two small ones
SHAPES = ((32, 384, 197, 16), (64, 192, 65, 16), (64, 128, 65, 16))


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


def scan_call(shape: Sequence[int], backend: str, *, seed: int = 0) -> Callable[[], None]:
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
        out = selective_scan(u, delta, A, B, C, D, z, bias, delta_softplus=True, backend=backend)
        torch.autograd.grad(out, inputs, cotangent)

    return call


def bench_scan(
    shapes: Sequence[Sequence[int]] = SHAPES, names: Sequence[str] | None = None, *, rounds: int = 7
) -> list[dict]:
    """One row per shape and backend: median and least milliseconds, and how often the slowest median holds it."""
    names = [name for name, missing in backends().items() if not missing] if names is None else names
    left, right = torch.randn(2, 2048, 2048)
    rows = []
    for shape in shapes:
        calls = {name: scan_call(shape, name) for name in names}
        times = interleaved({**calls, "matmul 2048^3": lambda: left @ right}, rounds=rounds)
        median = {name: statistics.median(x) for name, x in times.items()}
        for name, x in times.items():
            rows.append(
                {
                    "shape": tuple(shape),
                    "backend": name,
                    "median_ms": median[name] * 1e3,
                    "least_ms": min(x) * 1e3,
                    "speedup": max(median.values()) / median[name],
                    "matmuls": median[name] / median["matmul 2048^3"],
                    "rounds": rounds,
                }
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time the scan's backends against each other, in turn in one process.")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="those that can run here")
    parser.add_argument("--shapes", nargs="+", metavar="b,e,t,n", default=[",".join(map(str, x)) for x in SHAPES])
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args(arguments)
    shapes = [tuple(int(x) for x in shape.split(",")) for shape in given.shapes]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median of {given.rounds} interleaved rounds")
    print(f"{'(b, e, t, n)':>20} {'backend':>14} {'median ms':>10} {'least ms':>9} {'speed-up':>9} {'matmuls':>8}")
    for row in bench_scan(shapes, given.backends, rounds=given.rounds):
        print(
            f"{row['shape']!s:>20} {row['backend']:>14} {row['median_ms']:10.2f} {row['least_ms']:9.2f}"
            f" {row['speedup']:8.1f}x {row['matmuls']:8.2f}"
        )


if __name__ == "__main__":
    main()

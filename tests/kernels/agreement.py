"""Outputs and all gradients of an operator by a backend against double precision; tensors that are given to it."""

import itertools
import math
from functools import cache, partial

import torch
from torch.nn.functional import silu

from famba.kernels.ops import Side, bidirectional_scan
from famba.kernels.scan import selective_scan, selective_scan_ref

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
# t and scale of `draw_scan`; where the steps are large, a state is forgotten within a few tokens
STEPS = [*itertools.product((1, 16, 17), (1e-6, 0.01, 1.0, 50.0, 1e4)), (1000, 1e-6), (1000, 0.01), (1000, 1.0)]


def leaves(tensors, device="cpu", dtype=None):
    return [x if x is None else x.detach().to(device, dtype or x.dtype).requires_grad_() for x in tensors]


def draw_tokens(b, rows, t, generator, layout="channels"):
    """Normal numbers of shape (b, rows, t) that lie in memory as `layout` says."""
    if layout == "channels":
        return torch.randn(b, t, rows, generator=generator).mT
    if layout == "tokens":
        return torch.randn(b, rows, t, generator=generator)
    if layout == "slices":  # of one projection, as the model has them
        return torch.randn(b, t, rows + 3, generator=generator)[..., 2:-1].mT
    return torch.randn(b, 2 * t, 3 * rows, generator=generator)[:, ::2, ::3].mT


def draw_scan(b, e, t, n, *, seed=0, dtype=torch.float32, layout="channels", optional=True, scale=0.3, device="cpu"):
    """Arguments of `selective_scan` in its order, as leaves; steps are about exp(normal) * scale after softplus."""
    generator = torch.Generator().manual_seed(seed)
    u, delta, B, C, z = (draw_tokens(b, rows, t, generator, layout).to(dtype) for rows in (e, e, n, n, e))
    delta = delta + (math.log(math.expm1(scale)) if scale < 30 else scale)
    A, D, bias = (torch.randn(*size, generator=generator) for size in ((e, n), (e,), (e,)))
    tensors = [u, delta, -A.exp(), B, C, *((D, z, bias) if optional else 3 * [None])]
    return leaves(tensors, device, dtype if dtype == torch.float64 else None)


def draw_sides(b, e, t, n, m, *, dtype=torch.float32, device="cpu"):
    """Both sides of `bidirectional_scan`, then z; slices of projections, as the model has them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    made = []
    for _ in range(2):
        dt, B, C = normal(b, t, m + 2 * n).to(dtype).split([m, n, n], dim=-1)
        made += [normal(b, t, e).mT.to(dtype), dt.mT, normal(e, m).to(dtype) / m, -torch.exp(normal(e, n)), B.mT, C.mT]
        made += [normal(e), normal(e) - 2]
    return leaves([*made, normal(b, t, 2 * e).to(dtype).chunk(2, dim=-1)[1].mT], device)


def results(function, tensors):
    """Outputs and all gradients for cotangents that are the same every time and lie in memory as the outputs do."""
    out = function(*tensors)
    out = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(1)
    # numbers that every type holds, so that none sees others than the rest
    cotangents = [torch.empty_like(x).copy_(torch.randn(x.shape, generator=generator).bfloat16()) for x in out]
    given = [x for x in tensors if x is not None]
    grads = torch.autograd.grad(out, given, cotangents, allow_unused=True, materialize_grads=True)
    return [*(x.detach() for x in out), *grads]


def assert_agree(function, tensors, tolerance, *, backend, expected=None, least=1e-30):
    """What a backend makes, which is returned, is near what `expected`, or else torch, makes in double precision.

    Errors are relative to a tensor's largest value, or to `least` if that is larger. `expected` is a function or its
    results.
    """
    found, want = results(partial(function, backend=backend), tensors), expected
    if not isinstance(want, list):
        want = results(want or partial(function, backend="torch"), leaves(tensors, dtype=torch.float64))
    assert len(found) == len(want) >= 2
    for i, (x, y) in enumerate(zip(found, want, strict=True)):
        error = (x.cpu().double() - y).abs().max() / y.abs().max().clamp_min(least)
        assert error <= tolerance, f"tensor {i}: relative error {error:.1e}"
    return found


def assert_scan_agrees(tensors, tolerance, *, backend, softplus=True, reverse=False, expected=None):
    how = {"delta_softplus": softplus, "reverse": reverse}
    expected = expected or partial(selective_scan_ref, **how)
    return assert_agree(partial(selective_scan, **how), tensors, tolerance, backend=backend, expected=expected)


@cache
def draw_steps(t, scale):
    """Arguments of the scan with steps of this size, and what it makes of them in double precision."""
    tensors = draw_scan(2, 20, t, 16, scale=scale)
    reference = partial(selective_scan_ref, delta_softplus=True)
    return tensors, results(reference, leaves(tensors, dtype=torch.float64))


def assert_both_scans_agree(tensors, tolerance, *, backend):
    def function(*tensors, backend):
        return bidirectional_scan(Side(*tensors[:8]), Side(*tensors[8:16]), tensors[16], scale=0.5, backend=backend)

    def expected(*tensors):
        total = 0
        for (u, dt, dt_proj, A, B, C, D, bias), reverse in ((tensors[:8], False), (tensors[8:16], True)):
            delta = torch.einsum("em,bmt->bet", dt_proj, dt)
            total = total + selective_scan_ref(u, delta, A, B, C, D, None, bias, True, reverse)
        return 0.5 * total * silu(tensors[16])

    return assert_agree(function, tensors, tolerance, backend=backend, expected=expected)

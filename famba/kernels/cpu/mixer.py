"""All that a mixer does between its projections on a CPU, both directions at once, in one node of autograd's graph.

Axes as in famba.kernels.cpu.scan, and m dt_rank. Convolutions and scans are operators over conv.cpp and scan.cpp, which
take the two directions one after another in each unit of work; between them are the two products with x_proj. Both
halves of the input's gradient are written where they belong, so that nothing is copied together or added up afterwards.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import baddbmm_flop, register_flop_formula

from famba.kernels import reference
from famba.kernels.cpu import conv, runtime, scan
from famba.kernels.cpu.runtime import View, float32


class Direction(NamedTuple):
    """The parameters of one direction of a mixer."""

    conv_weight: Tensor  # (e, k)
    conv_bias: Tensor
    x_proj: Tensor  # (m + 2 n, e)
    A: Tensor  # (e, n)
    D: Tensor
    dt_bias: Tensor
    dt_proj: Tensor  # (e, m)


def mix(xz: Tensor, forward: Direction, backward: Direction, scale: float) -> Tensor:
    """What `BidirectionalMixer.mix` makes of the input projection's output."""
    tensors = (xz, *forward, *backward)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return _Mix.apply(scale, *tensors)  # pyright: ignore[reportReturnType]
    return _forward(*tensors, scale=scale, keep=False)[0]


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale: float, *tensors: Tensor):
        out, *kept = _forward(*tensors, scale=scale, keep=True)
        ctx.scale = scale
        ctx.save_for_backward(*tensors, *kept)
        return out

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs, kept = ctx.saved_tensors[:15], ctx.saved_tensors[15:]
        kernel = partial(_backward, grad, *inputs, kept=kept, scale=ctx.scale)
        return None, *reference.gradients(kernel, partial(_by_torch, scale=ctx.scale), inputs, grad)


def _forward(xz: Tensor, *parameters: Tensor, scale: float, keep: bool) -> tuple[Tensor, ...]:
    """The output, and what is kept for backward: the scans' input, their dt, B and C, their sum, their states."""
    convs, x_projs, scans = _split(parameters)
    u = torch.ops.famba.convs(xz, convs)
    rows = torch.bmm(u.flatten(1, 2), torch.stack(x_projs).to(u.dtype).mT).unflatten(1, u.shape[1:3])
    out, total, states = torch.ops.famba.scans(xz, u, rows, scans, scale, keep)
    return out, u, rows, total, states


def _backward(grad: Tensor, xz: Tensor, *parameters: Tensor, kept: Sequence[Tensor], scale: float) -> list[Tensor]:
    convs, x_projs, scans = _split(parameters)
    u, *others = kept
    to_xz = torch.empty_like(xz)
    to_u, to_rows, *to_scans = torch.ops.famba.scans_backward(grad, xz, u, *others, scans, scale, to_xz)
    x_proj, flat = torch.stack(x_projs).to(u.dtype), to_rows.flatten(1, 2)
    to_x_proj = torch.bmm(flat.mT, u.flatten(1, 2)).to(x_projs[0].dtype)
    to_u.flatten(1, 2).baddbmm_(flat, x_proj)
    to_convs = torch.ops.famba.convs_backward(to_u, xz, convs, to_xz)
    parts = zip((to_convs[:2], to_convs[2:]), to_x_proj, (to_scans[:4], to_scans[4:]), strict=True)
    return [to_xz, *(g for conv, x_proj, scan in parts for g in (*conv, x_proj, *scan))]


def _by_torch(xz: Tensor, *parameters: Tensor, scale: float) -> Tensor:
    x, z = xz.mT.chunk(2, dim=1)
    y = torch.zeros_like(x)
    for reverse, given in enumerate((parameters[:7], parameters[7:])):
        p = Direction(*given)
        u = reference.conv(x, p.conv_weight, p.conv_bias, bool(reverse))
        n, m = p.A.shape[1], p.dt_proj.shape[1]
        dt, B, C = functional.linear(u.mT, p.x_proj.to(u.dtype)).split([m, n, n], dim=2)
        delta = functional.linear(dt, p.dt_proj.to(u.dtype)).mT
        y = y + reference.selective_scan_ref(u, delta, p.A, B.mT, C.mT, p.D, None, p.dt_bias, True, bool(reverse))
    return reference.gate(y, z, scale).mT


def _split(parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Those of both convolutions, of x_proj, and of both scans."""
    one, other = parameters[:7], parameters[7:]
    return [*one[:2], *other[:2]], [one[2], other[2]], [*one[3:], *other[3:]]


_library = torch.library.Library("famba", "FRAGMENT")
_library.define("convs(Tensor xz, Tensor[] parameters) -> Tensor")
_library.define(
    f"convs_backward(Tensor grad, Tensor xz, Tensor[] parameters, Tensor(a!) to_xz) -> ({', '.join(4 * ['Tensor'])})"
)
_library.define(
    "scans(Tensor xz, Tensor u, Tensor rows, Tensor[] parameters, float scale, bool keep) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "scans_backward(Tensor grad, Tensor xz, Tensor u, Tensor rows, Tensor sum, Tensor states, Tensor[] parameters, "
    f"float scale, Tensor(a!) to_xz) -> ({', '.join(10 * ['Tensor'])})"
)


def _view(x: Tensor, direction: int = 0, channel: int = 0) -> View:
    """From a channel of (b, t, c), or of (2, b, t, c), as (b, c, t)."""
    *first, batch, token, row = x.stride()
    offset = (direction * first[0] if first else 0) + channel * row
    return View(x.data_ptr() + offset * x.element_size(), batch, row, token, runtime.DTYPES.index(x.dtype))


def _conv_jobs(xz: Tensor, parameters: list[Tensor]):
    b, t, e2 = xz.shape
    k = parameters[0].shape[1]
    jobs = (conv._Job * 2)()
    for i in (0, 1):
        jobs[i] = conv._Job(b, e2 // 2, t, k, i, 0, 2, 0, _view(xz))
        jobs[i].weight, jobs[i].bias = (x.data_ptr() for x in parameters[2 * i : 2 * i + 2])
    return jobs


def _convs(xz: Tensor, parameters: list[Tensor]) -> Tensor:
    u = _convs_fake(xz, parameters)
    parameters = [float32(x) for x in parameters]
    jobs = _conv_jobs(xz, parameters)
    for i in (0, 1):
        jobs[i].out = _view(u, i)
    runtime.call("famba_conv_forward", jobs)
    return u


def _convs_fake(xz: Tensor, parameters: list[Tensor]) -> Tensor:
    b, t, e2 = xz.shape
    return xz.new_empty(2, b, t, e2 // 2)


def _convs_backward(grad: Tensor, xz: Tensor, parameters: list[Tensor], to_xz: Tensor):
    grads = [torch.empty_like(x, dtype=torch.float32) for x in parameters]
    kept = [float32(x) for x in parameters]
    jobs = _conv_jobs(xz, kept)
    for i in (0, 1):
        jobs[i].grad_out, jobs[i].grad_x, jobs[i].add = _view(grad, i), _view(to_xz), i
        jobs[i].grad_weight, jobs[i].grad_bias = (x.data_ptr() for x in grads[2 * i : 2 * i + 2])
    runtime.call("famba_conv_backward", jobs)
    return tuple(g.to(x.dtype) for g, x in zip(grads, parameters, strict=True))


def _scan_jobs(xz: Tensor, u: Tensor, rows: Tensor, states: Tensor, parameters: list[Tensor], scale: float):
    _, b, t, e = u.shape
    n, m = parameters[0].shape[1], parameters[3].shape[1]
    keep = states.numel() > 0
    jobs = (scan._Job * 2)()
    for i in (0, 1):
        A, D, bias, weight = (x.data_ptr() for x in parameters[4 * i : 4 * i + 4])
        jobs[i] = scan._Job(
            b, e, t, n, m, True, i, 0, keep, 2, scale,
            u=_view(u, i), delta=_view(rows, i), B=_view(rows, i, m), C=_view(rows, i, m + n),
            A=A, D=D, bias=bias, weight=weight, states=states.data_ptr() + i * states.stride(0) * 4,
        )  # fmt: skip
    return jobs


def _scans(xz: Tensor, u: Tensor, rows: Tensor, parameters: list[Tensor], scale: float, keep: bool):
    out, total, states = _scans_fake(xz, u, rows, parameters, scale, keep)
    first = torch.empty_like(out)
    kept = [float32(x) for x in parameters]
    jobs = _scan_jobs(xz, u, rows, states, kept, scale)
    jobs[0].out = jobs[1].other = _view(first)
    jobs[1].out, jobs[1].z = _view(out), _view(xz, channel=u.shape[-1])
    if keep:
        jobs[1].sum = _view(total)
    runtime.call("famba_scan_forward", jobs)
    return out, total, states


def _scans_fake(xz, u, rows, parameters, scale, keep):
    _, b, t, e = u.shape
    states = scan.kept_states(u, 2, b, e=e, t=t, n=parameters[0].shape[1]) if keep else u.new_empty(0)
    return u.new_empty(b, t, e), u.new_empty((b, t, e) if keep else (0,)), states


def _scans_backward(grad, xz, u, rows, total, states, parameters: list[Tensor], scale: float, to_xz: Tensor):
    to_u, to_rows = torch.empty_like(u), torch.empty_like(rows)
    e, n = parameters[0].shape
    m = parameters[3].shape[1]
    grads = [torch.empty_like(x, dtype=torch.float32) for x in parameters]
    kept = [float32(x) for x in parameters]
    jobs = _scan_jobs(xz, u, rows, states, kept, scale)
    for i, job in enumerate(jobs):
        job.z, job.grad_out = _view(xz, channel=e), _view(grad)
        job.grad_u, job.grad_delta = _view(to_u, i), _view(to_rows, i)
        job.grad_B, job.grad_C = _view(to_rows, i, m), _view(to_rows, i, m + n)
        job.grad_A, job.grad_D, job.grad_bias, job.grad_weight = (x.data_ptr() for x in grads[4 * i : 4 * i + 4])
    jobs[1].sum, jobs[1].grad_z = _view(total), _view(to_xz, channel=e)
    runtime.call("famba_scan_backward", jobs)
    return to_u, to_rows, *(g.to(x.dtype) for g, x in zip(grads, parameters, strict=True))


@register_flop_formula(torch.ops.famba.convs)
def _conv_flops(xz, parameters, **_) -> int:
    """A multiplication and an addition for each tap of each output, as torch counts its own; of shapes."""
    return 2 * math.prod(xz) * parameters[0][-1]


register_flop_formula(torch.ops.aten.baddbmm_, get_raw=True)(
    baddbmm_flop
)  # torch counts it only where it is not in place


@register_flop_formula(torch.ops.famba.scans)
def _projection_flops(xz, u, rows, parameters, *_, **__) -> int:
    """The projection of dt alone, as of a matrix product; a scan is none."""
    return 2 * math.prod(u) * parameters[3][1]


_library.impl("convs", _convs, "CPU")
_library.impl("convs_backward", _convs_backward, "CPU")
_library.impl("scans", _scans, "CPU")
_library.impl("scans_backward", _scans_backward, "CPU")
torch.library.register_fake("famba::convs", _convs_fake, lib=_library)
torch.library.register_fake("famba::scans", _scans_fake, lib=_library)
torch.library.register_fake(
    "famba::convs_backward",
    lambda grad, xz, parameters, to_xz: tuple(torch.empty_like(x) for x in parameters),
    lib=_library,
)
torch.library.register_fake(
    "famba::scans_backward",
    lambda grad, xz, u, rows, total, states, parameters, scale, to_xz: tuple(
        torch.empty_like(x) for x in (u, rows, *parameters)
    ),
    lib=_library,
)

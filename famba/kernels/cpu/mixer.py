"""A mixer between its input and output projection on a CPU, both directions at once, as one node of autograd's graph.

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
from famba.kernels.reference import register


class Direction(NamedTuple):
    """The parameters of one direction of a mixer, as they are stored."""

    conv_weight: Tensor  # (e, 1, k)
    conv_bias: Tensor
    x_proj: Tensor  # (m + 2 n, e)
    A_log: Tensor  # (e, n)
    D: Tensor
    dt_bias: Tensor
    dt_proj: Tensor  # (e, m)


def decay_rates(A_log: Tensor) -> Tensor:
    """A of the scan, at least in float32."""
    return -torch.exp(A_log.float() if A_log.dtype != torch.float64 else A_log)


def mix(xz: Tensor, forward: Direction, backward: Direction, scale: float) -> Tensor:
    """`BidirectionalMixer.mix` after the input projection."""
    tensors = (xz, *forward, *backward)
    if reference.wants_gradient(*tensors):
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
        saved = ctx.saved_tensors  # once: hooks may compute it again each time
        inputs, kept = saved[:15], saved[15:]
        kernel = partial(_backward, grad, *inputs, kept=kept, scale=ctx.scale)
        return None, *reference.gradients(kernel, partial(_by_torch, scale=ctx.scale), inputs, grad)


def _forward(xz: Tensor, *parameters: Tensor, scale: float, keep: bool) -> tuple[Tensor, ...]:
    """The output, and for backward the scans' u, x_dbl (dt, B and C), y (the sum of both) and states."""
    convs, x_projs, scans = _split(parameters)
    u = torch.ops.famba.convs(xz, convs)
    x_dbl = torch.bmm(u.flatten(1, 2), torch.stack(x_projs).to(u.dtype).mT).unflatten(1, u.shape[1:3])
    out, y, states = torch.ops.famba.scans(xz, u, x_dbl, scans, scale, keep)
    return out, u, x_dbl, y, states


def _backward(grad: Tensor, xz: Tensor, *parameters: Tensor, kept: Sequence[Tensor], scale: float) -> list[Tensor]:
    convs, x_projs, scans = _split(parameters)
    u, *others = kept
    grad_xz = torch.empty_like(xz)
    grad_u, grad_x_dbl, *grad_scans = torch.ops.famba.scans_backward(grad, xz, u, *others, scans, scale, grad_xz)
    x_proj, flat = torch.stack(x_projs).to(u.dtype), grad_x_dbl.flatten(1, 2)
    grad_x_proj = torch.bmm(flat.mT, u.flatten(1, 2)).to(x_projs[0].dtype)
    grad_u.flatten(1, 2).baddbmm_(flat, x_proj)
    grad_convs = torch.ops.famba.convs_backward(grad_u, xz, convs, grad_xz)
    gradients = [grad_xz]
    for i in (0, 1):
        (weight, bias), (grad_A, *others) = grad_convs[2 * i : 2 * i + 2], grad_scans[4 * i : 4 * i + 4]
        grad_A_log = (grad_A * scans[4 * i]).to(parameters[7 * i + 3].dtype)
        gradients += [weight[:, None], bias, grad_x_proj[i], grad_A_log, *others]
    return gradients


def _by_torch(xz: Tensor, *parameters: Tensor, scale: float) -> Tensor:
    x, z = xz.mT.chunk(2, dim=1)
    y = torch.zeros_like(x)
    for reverse, given in enumerate((parameters[:7], parameters[7:])):
        p = Direction(*given)
        u = reference.conv(x, p.conv_weight[:, 0], p.conv_bias, bool(reverse))
        n, m = p.A_log.shape[1], p.dt_proj.shape[1]
        dt, B, C = functional.linear(u.mT, p.x_proj.to(u.dtype)).split([m, n, n], dim=2)
        delta = functional.linear(dt, p.dt_proj.to(u.dtype)).mT
        A = decay_rates(p.A_log)
        y = y + reference.selective_scan_ref(u, delta, A, B.mT, C.mT, p.D, None, p.dt_bias, True, bool(reverse))
    return reference.gate(y, z, scale).mT


def _split(parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Those of both convolutions, of x_proj, and of both scans."""
    sides = Direction(*parameters[:7]), Direction(*parameters[7:])
    convs = [x for side in sides for x in (side.conv_weight[:, 0], side.conv_bias)]
    return convs, [side.x_proj for side in sides], [x for side in sides for x in (decay_rates(side.A_log), *side[4:])]


def _view(x: Tensor, direction: int = 0, channel: int = 0):
    """From a channel of (b, t, c), or of (2, b, t, c), as (b, c, t)."""
    *first, batch, token, row = x.stride()
    offset = (direction * first[0] if first else 0) + channel * row
    return View(x.data_ptr() + offset * x.element_size(), batch, row, token, runtime.DTYPES.index(x.dtype))


def _conv_jobs(xz: Tensor, parameters: list[Tensor]):
    b, t, e2 = xz.shape
    k = parameters[0].shape[1]
    jobs, x = (conv.Conv * 2)(), _view(xz)
    for i in (0, 1):
        jobs[i] = conv.Conv(b, e2 // 2, t, k, i, 0, 2, 0, x)
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


def _convs_backward(grad: Tensor, xz: Tensor, parameters: list[Tensor], grad_xz: Tensor):
    grads = [torch.empty_like(x, dtype=torch.float32) for x in parameters]
    kept = [float32(x) for x in parameters]
    jobs, grad_x = _conv_jobs(xz, kept), _view(grad_xz)
    for i in (0, 1):
        jobs[i].grad_out, jobs[i].grad_x, jobs[i].add = _view(grad, i), grad_x, i
        jobs[i].grad_weight, jobs[i].grad_bias = (x.data_ptr() for x in grads[2 * i : 2 * i + 2])
    runtime.call("famba_conv_backward", jobs)
    return tuple(g.to(x.dtype) for g, x in zip(grads, parameters, strict=True))


def _scan_jobs(u: Tensor, x_dbl: Tensor, states: Tensor, parameters: list[Tensor], scale: float):
    _, b, t, e = u.shape
    n, m = parameters[0].shape[1], parameters[3].shape[1]
    keep = states.numel() > 0
    jobs = (scan.Scan * 2)()
    for i in (0, 1):
        A, D, dt_bias, dt_proj = (x.data_ptr() for x in parameters[4 * i : 4 * i + 4])
        jobs[i] = scan.Scan(
            b, e, t, n, m, True, i, 0, keep, 2, scale,
            u=_view(u, i), delta=_view(x_dbl, i), B=_view(x_dbl, i, m), C=_view(x_dbl, i, m + n),
            A=A, D=D, dt_bias=dt_bias, dt_proj=dt_proj, states=states.data_ptr() + i * states.stride(0) * 4,
        )  # fmt: skip
    return jobs


def _scans(xz: Tensor, u: Tensor, x_dbl: Tensor, parameters: list[Tensor], scale: float, keep: bool):
    out, y, states = _scans_fake(xz, u, x_dbl, parameters, scale, keep)
    first = torch.empty_like(out)
    kept = [float32(x) for x in parameters]
    jobs = _scan_jobs(u, x_dbl, states, kept, scale)
    jobs[0].out = jobs[1].other = _view(first)
    jobs[1].out, jobs[1].z = _view(out), _view(xz, channel=u.shape[-1])
    if keep:
        jobs[1].y = _view(y)
    runtime.call("famba_scan_forward", jobs)
    return out, y, states


def _scans_fake(xz, u, x_dbl, parameters, scale, keep):
    _, b, t, e = u.shape
    states = scan.kept_states(u, 2, b, e=e, t=t, n=parameters[0].shape[1]) if keep else u.new_empty(0)
    return u.new_empty(b, t, e), u.new_empty((b, t, e) if keep else (0,)), states


def _scans_backward(grad, xz, u, x_dbl, y, states, parameters: list[Tensor], scale: float, grad_xz: Tensor):
    grad_u, grad_x_dbl = torch.empty_like(u), torch.empty_like(x_dbl)
    e, n = parameters[0].shape
    m = parameters[3].shape[1]
    grads = [torch.empty_like(x, dtype=torch.float32) for x in parameters]
    kept = [float32(x) for x in parameters]
    jobs = _scan_jobs(u, x_dbl, states, kept, scale)
    z, grad_out = _view(xz, channel=e), _view(grad)
    for i, job in enumerate(jobs):
        job.z, job.grad_out = z, grad_out
        job.grad_u, job.grad_delta = _view(grad_u, i), _view(grad_x_dbl, i)
        job.grad_B, job.grad_C = _view(grad_x_dbl, i, m), _view(grad_x_dbl, i, m + n)
        job.grad_A, job.grad_D, job.grad_dt_bias, job.grad_dt_proj = (x.data_ptr() for x in grads[4 * i : 4 * i + 4])
    jobs[1].y, jobs[1].grad_z = _view(y), _view(grad_xz, channel=e)
    runtime.call("famba_scan_backward", jobs)
    return grad_u, grad_x_dbl, *(g.to(x.dtype) for g, x in zip(grads, parameters, strict=True))


def _conv_flops(xz, parameters, **_) -> int:
    """A multiplication and an addition for each tap of each output, as torch counts its own; of shapes."""
    return 2 * math.prod(xz) * parameters[0][-1]


def _projection_flops(xz, u, x_dbl, parameters, *_, **__) -> int:
    """The projection of dt alone, as of a matrix product; a scan is none."""
    return 2 * math.prod(u) * parameters[3][1]


register("convs(Tensor xz, Tensor[] parameters) -> Tensor", _convs, _convs_fake, "CPU")
register(
    f"convs_backward(Tensor grad, Tensor xz, Tensor[] parameters, Tensor(a!) grad_xz) -> ({', '.join(4 * ['Tensor'])})",
    _convs_backward,
    lambda grad, xz, parameters, grad_xz: tuple(torch.empty_like(x) for x in parameters),
    "CPU",
)
register(
    "scans(Tensor xz, Tensor u, Tensor x_dbl, Tensor[] parameters, float scale, bool keep) -> (Tensor, Tensor, Tensor)",
    _scans,
    _scans_fake,
    "CPU",
)
register(
    "scans_backward(Tensor grad, Tensor xz, Tensor u, Tensor x_dbl, Tensor y, Tensor states, Tensor[] parameters, "
    f"float scale, Tensor(a!) grad_xz) -> ({', '.join(10 * ['Tensor'])})",
    _scans_backward,
    lambda grad, xz, u, x_dbl, y, states, parameters, scale, grad_xz: tuple(
        torch.empty_like(x) for x in (u, x_dbl, *parameters)
    ),
    "CPU",
)
register_flop_formula(torch.ops.famba.convs)(_conv_flops)
register_flop_formula(torch.ops.famba.scans)(_projection_flops)
# torch counts it only where it is not in place
register_flop_formula(torch.ops.aten.baddbmm_, get_raw=True)(baddbmm_flop)

"""Parts of a Mamba block that cost more time or memory than they compute: fused where a backend has a kernel.

Axes: b batch, e channels (d_inner), t tokens in scan order, k taps, n states per channel, m dt_rank.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from famba.errors import InputError
from famba.kernels import mamba_ssm, reference
from famba.kernels.cpu import conv, norm
from famba.kernels.cpu.scan import unavailable
from famba.kernels.dispatch import Backend, choose
from famba.kernels.scan import check
from famba.kernels.scan import choose as choose_scan
from famba.kernels.triton import conv as triton_conv
from famba.kernels.triton import norm as triton_norm
from famba.kernels.triton.runtime import unavailable as triton_unavailable


def causal_conv1d_silu(
    x: Float[Tensor, "b e t"],
    weight: Float[Tensor, "e k"],
    bias: Float[Tensor, "e"] | None = None,
    *,
    reverse: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "b e t"]:
    """Depthwise convolution over tokens, bias, then silu (Mamba, arXiv:2312.00752, section 3.4).

    A token sees itself and the k - 1 before it, as if zeros came before the first; with `reverse` those after it, the
    taps in the same order away from the token. Nothing is flipped or copied for it.

    Args:
        backend: a name from `famba.backends()`, or "auto": the fastest that can run on these tensors. One that has no
            kernel for this leaves it to plain torch; those of "native" (on a CPU) and "triton" (on a GPU) take float32
            and bfloat16.

    Raises:
        InputError: shapes that do not fit together, or an unknown backend.
        BackendError: the backend asked for cannot run here or on these tensors.
    """
    _check(x, weight, bias)
    return choose(_CONV, backend, x, weight, bias).run(x, weight, bias, reverse)


def bidirectional_conv1d_silu(
    x: Float[Tensor, "b e t"],
    forward: tuple[Float[Tensor, "e k"], Float[Tensor, "e"] | None],
    backward: tuple[Float[Tensor, "e k"], Float[Tensor, "e"] | None],
    *,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b e t"], Float[Tensor, "b e t"]]:
    """`causal_conv1d_silu` of x by one weight and bias, and in reverse by another; on a GPU by one read of x."""
    for weight, bias in (forward, backward):
        _check(x, weight, bias)
    one, other = (choose(_CONV, backend, x, *side) for side in (forward, backward))
    if one is other and one.run_both is not None and forward[0].shape == backward[0].shape:
        return one.run_both(x, forward, backward)
    return one.run(x, *forward, False), other.run(x, *backward, True)


class Side(NamedTuple):
    """What one direction of a mixer scans, with delta = softplus(dt_proj dt + dt_bias) (Mamba, section 3.6)."""

    u: Float[Tensor, "b e t"]
    dt: Float[Tensor, "b m t"]
    dt_proj: Float[Tensor, "e m"]
    A: Float[Tensor, "e n"]
    B: Float[Tensor, "b n t"]
    C: Float[Tensor, "b n t"]
    D: Float[Tensor, "e"] | None = None
    dt_bias: Float[Tensor, "e"] | None = None


def bidirectional_scan(
    forward: Side, backward: Side, z: Float[Tensor, "b e t"], *, scale: float = 1.0, backend: str = "auto"
) -> Float[Tensor, "b e t"]:
    """(y + y') silu(z) scale: y scans one side, y' the other in reverse; on a GPU both in one launch.

    Backends and errors are those of `famba.kernels.scan.selective_scan`.
    """
    for side in (forward, backward):
        check(side.u, side.u, side.A, side.B, side.C, side.D, z, side.dt_bias)  # delta will be as u is
        _check_projection(side.u, side.dt, side.dt_proj)
    one, other = (choose_scan(backend, s.u, s.dt, s.A, s.B, s.C, s.D, None, s.dt_bias) for s in (forward, backward))
    alike = [x is None for x in forward] == [x is None for x in backward] and forward.A.shape == backward.A.shape
    if one is other and one.run_both is not None and forward.u.dtype == z.dtype and alike:
        return one.run_both(forward, backward, z, scale)

    def scan(chosen: Backend, side: Side, reverse: bool) -> Tensor:
        u, dt, dt_proj, A, B, C, D, dt_bias = side
        delta = F.linear(dt.mT, dt_proj.to(dt.dtype)).mT
        return chosen.run(u, delta, A, B, C, D, None, dt_bias, True, reverse)

    return reference.gate(scan(one, forward, False) + scan(other, backward, True), z, scale)


def add_rms_norm(
    x: Float[Tensor, "b t d"],
    residual: Float[Tensor, "b t d"] | None,
    weight: Float[Tensor, "d"],
    *,
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b t d"]]:
    """The sum x + residual, divided by its root mean square over d and multiplied by weight; and the sum itself.

    Without a residual the sum is x. Both are float32, float64 where x is; the GPU's kernel reads an x of bfloat16 as it
    is, others make a copy of it first. Backends and errors are those of `causal_conv1d_silu` (Zhang and Sennrich 2019,
    arXiv:1910.07467).
    """
    if x.ndim != 3 or 0 in x.shape:
        raise InputError(f"x: shape {tuple(x.shape)}; allowed: (b, t, d), none of them zero")
    if residual is not None and residual.shape != x.shape:
        raise InputError(f"residual: shape {tuple(residual.shape)}; allowed: {tuple(x.shape)}, that of x")
    if tuple(weight.shape) != (x.shape[2],):
        raise InputError(f"weight: shape {tuple(weight.shape)}; allowed: ({x.shape[2]},)")
    return choose(_NORM, backend, x, residual, weight).run(x, residual, weight, eps)


_CONV = {
    "torch": Backend(reference.conv),
    "native": Backend(conv.causal_conv1d_silu, unavailable, conv.unsuited),
    "mamba_ssm": Backend(mamba_ssm.causal_conv1d_silu, mamba_ssm.conv_unavailable, mamba_ssm.conv_unsuited),
    "hub": Backend(partial(mamba_ssm.causal_conv1d_silu, hub=True), mamba_ssm.hub_unavailable, mamba_ssm.conv_unsuited),
    "triton": Backend(
        triton_conv.causal_conv1d_silu,
        triton_unavailable,
        triton_conv.unsuited,
        triton_conv.bidirectional_conv1d_silu,
    ),
}


@register_flop_formula(torch.ops.famba.conv)
def _conv_flops(x, weight, *_, **__) -> int:
    """A multiplication and an addition for each tap of each output, as torch counts its own; of shapes."""
    return 2 * math.prod(x) * weight[1]


@register_flop_formula(torch.ops.famba.gpu_conv)
def _both_conv_flops(x, weight0, _, weight1, *__, **___) -> int:
    return sum(_conv_flops(x, weight) for weight in (weight0, weight1) if weight is not None)


_NORM = {
    "torch": Backend(reference.norm),
    "native": Backend(norm.add_rms_norm, unavailable, norm.unsuited),
    "triton": Backend(triton_norm.add_rms_norm, triton_unavailable, triton_norm.unsuited),
}


def _check(x, weight, bias) -> None:
    if x.ndim != 3 or 0 in x.shape:
        raise InputError(f"x: shape {tuple(x.shape)}; allowed: (b, e, t), none of them zero")
    if weight.ndim != 2 or weight.shape[0] != x.shape[1] or weight.shape[1] == 0:
        raise InputError(f"weight: shape {tuple(weight.shape)}; allowed: ({x.shape[1]}, k), k at least 1")
    if bias is not None and tuple(bias.shape) != (x.shape[1],):
        raise InputError(f"bias: shape {tuple(bias.shape)}; allowed: ({x.shape[1]},)")


def _check_projection(u, dt, dt_proj) -> None:
    b, e, t = u.shape
    if dt_proj.ndim != 2 or dt_proj.shape[0] != e:
        raise InputError(f"dt_proj: shape {tuple(dt_proj.shape)}; allowed: ({e}, m), from u")
    if tuple(dt.shape) != (b, dt_proj.shape[1], t):
        raise InputError(f"dt: shape {tuple(dt.shape)}; allowed: {(b, dt_proj.shape[1], t)}, from u and dt_proj")

"""Parts of a Mamba block that cost more time or memory than they compute: fused on the CPU, plain torch elsewhere.

Axes: b batch, e channels (d_inner), t tokens in scan order, k taps, n states per channel, m dt_rank.
"""

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from famba.errors import BackendError, InputError
from famba.native import conv, norm
from famba.native import gate as gating
from famba.native.scan import unavailable
from famba.scan import check, choose

_BACKENDS = ("auto", "torch", "native")


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
        backend: "native" (float32 and bfloat16 on a CPU), "torch", or "auto": the first of them that can run.

    Raises:
        InputError: shapes that do not fit together, or an unknown backend.
        BackendError: the backend asked for cannot run here or on these tensors.
    """
    _check(x, weight, bias)
    if _runs_native(backend, conv.unsuited, x, weight, bias):
        return conv.causal_conv1d_silu(x, weight, bias, reverse)
    e, k = weight.shape
    padded = F.pad(x, (0, k - 1) if reverse else (k - 1, 0))
    kernel = (weight.flip(1) if reverse else weight).to(x.dtype)
    return F.silu(F.conv1d(padded, kernel[:, None], None if bias is None else bias.to(x.dtype), groups=e))


def gated_sum(
    left: Float[Tensor, "b e t"],
    right: Float[Tensor, "b e t"],
    gate: Float[Tensor, "b e t"],
    *,
    scale: float = 1.0,
    backend: str = "auto",
) -> Float[Tensor, "b e t"]:
    """(left + right) silu(gate) scale: both directions of a mixer joined, gated, and averaged where scale is 1/2.

    Backends and errors are those of `causal_conv1d_silu`.
    """
    for name, x in (("right", right), ("gate", gate)):
        if x.shape != left.shape:
            raise InputError(f"{name}: shape {tuple(x.shape)}; allowed: {tuple(left.shape)}, that of left")
    if left.ndim != 3 or 0 in left.shape:
        raise InputError(f"left: shape {tuple(left.shape)}; allowed: (b, e, t), none of them zero")
    if _runs_native(backend, gating.unsuited, left, right, gate):
        return gating.gated_sum(left, right, gate, scale)
    return (left + right) * F.silu(gate) * scale


def projected_scan(
    u: Float[Tensor, "b e t"],
    step: Float[Tensor, "b m t"],
    weight: Float[Tensor, "e m"],
    A: Float[Tensor, "e n"],
    B: Float[Tensor, "b n t"],
    C: Float[Tensor, "b n t"],
    D: Float[Tensor, "e"] | None = None,
    delta_bias: Float[Tensor, "e"] | None = None,
    *,
    reverse: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "b e t"]:
    """The selective scan whose delta is weight times step, after bias and softplus (Mamba, section 3.6).

    The native scan keeps step for backward, m numbers of a token, and projects it once more there; others keep delta,
    e numbers of a token. Other arguments, backends and errors are those of `famba.scan.selective_scan`.
    """
    check(u, u, A, B, C, D, None, delta_bias)  # delta will be as u is
    _check_projection(u, step, weight)
    chosen = choose(backend, u, step, A, B, C, D, None, delta_bias)
    if chosen.run_projected is not None:
        return chosen.run_projected(u, step, weight, A, B, C, D, delta_bias, reverse)
    delta = F.linear(step.mT, weight).mT
    return chosen.run(u, delta, A, B, C, D, None, delta_bias, True, reverse)


def add_rms_norm(
    x: Float[Tensor, "b t d"],
    residual: Float[Tensor, "b t d"] | None,
    weight: Float[Tensor, "d"],
    *,
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b t d"]]:
    """The sum x + residual, divided by its root mean square over d and multiplied by weight; and the sum itself.

    Without a residual the sum is x. The native kernel runs on float32 only; other backends and errors are those of
    `causal_conv1d_silu` (Zhang and Sennrich 2019, arXiv:1910.07467).
    """
    if x.ndim != 3 or 0 in x.shape:
        raise InputError(f"x: shape {tuple(x.shape)}; allowed: (b, t, d), none of them zero")
    if residual is not None and residual.shape != x.shape:
        raise InputError(f"residual: shape {tuple(residual.shape)}; allowed: {tuple(x.shape)}, that of x")
    if tuple(weight.shape) != (x.shape[2],):
        raise InputError(f"weight: shape {tuple(weight.shape)}; allowed: ({x.shape[2]},)")
    if _runs_native(backend, norm.unsuited, x, residual, weight):
        return norm.add_rms_norm(x, residual, weight, eps)
    total = x if residual is None else x + residual
    return F.rms_norm(total, weight.shape, weight, eps), total


def elementwise_backend(scan_backend: str) -> str:
    """The backend of these functions that goes with a backend of the selective scan: plain torch if it has none."""
    return scan_backend if scan_backend in ("auto", "native") else "torch"


def _runs_native(backend: str, unsuited: Callable[..., str], *tensors: Tensor | None) -> bool:
    if backend not in _BACKENDS:
        raise InputError(f"backend: {backend!r} is unknown; allowed: {', '.join(_BACKENDS)}")
    reason = "" if backend == "torch" else unavailable() or unsuited(*tensors)
    if backend == "native" and reason:
        raise BackendError(f"backend 'native' cannot run here: {reason}")
    return backend != "torch" and not reason


def _check(x, weight, bias) -> None:
    if x.ndim != 3 or 0 in x.shape:
        raise InputError(f"x: shape {tuple(x.shape)}; allowed: (b, e, t), none of them zero")
    if weight.ndim != 2 or weight.shape[0] != x.shape[1] or weight.shape[1] == 0:
        raise InputError(f"weight: shape {tuple(weight.shape)}; allowed: ({x.shape[1]}, k), k at least 1")
    if bias is not None and tuple(bias.shape) != (x.shape[1],):
        raise InputError(f"bias: shape {tuple(bias.shape)}; allowed: ({x.shape[1]},)")


def _check_projection(u, step, weight) -> None:
    b, e, t = u.shape
    if weight.ndim != 2 or weight.shape[0] != e:
        raise InputError(f"weight: shape {tuple(weight.shape)}; allowed: ({e}, m), from u")
    if tuple(step.shape) != (b, weight.shape[1], t):
        raise InputError(f"step: shape {tuple(step.shape)}; allowed: {(b, weight.shape[1], t)}, from u and weight")

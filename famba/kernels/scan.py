"""The selective scan of Mamba: a reference loop, and one entry point over explicit backends.

    h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t],    y[t] = C[t] . h[t] + D u[t],    out[t] = y[t] silu(z[t])

with one state h of n numbers per channel, h = 0 before the first token, and delta passed through softplus when asked.
The step is Mamba's: zero-order hold for A, Euler for B.

Axes: b batch, e channels (d_inner), t tokens in scan order, n states per channel (d_state).

Sources: Gu and Dao 2023, arXiv:2312.00752, algorithm 2 and section 3.3 (states recomputed in backward); the argument
order and layouts are those of mamba-ssm's `selective_scan_fn`.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from famba.errors import InputError
from famba.kernels import dispatch, mamba_ssm
from famba.kernels.cpu import scan as native
from famba.kernels.cpu.mixer import mix
from famba.kernels.dispatch import Backend
from famba.kernels.precision import exact
from famba.kernels.reference import (
    empty_gradients,
    register,
    register_gradient,
    selective_scan_ref,
    state_dtype,
    token_order,
    wants_gradient,
)
from famba.kernels.triton import runtime as gpu
from famba.kernels.triton import scan as triton


def selective_scan(
    u: Float[Tensor, "b e t"],
    delta: Float[Tensor, "b e t"],
    A: Float[Tensor, "e n"],
    B: Float[Tensor, "b n t"],
    C: Float[Tensor, "b n t"],
    D: Float[Tensor, "e"] | None = None,
    z: Float[Tensor, "b e t"] | None = None,
    delta_bias: Float[Tensor, "e"] | None = None,
    delta_softplus: bool = False,
    *,
    reverse: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "b e t"]:
    """Scan every channel's tokens with an input-dependent linear recurrence.

    Args:
        u: what is scanned.
        delta: step of each token and channel, before bias and softplus.
        A: decay rates; negative for a state that forgets.
        B: how a token enters the state.
        C: how the state is read.
        D: skip from u to the output; none when absent.
        z: gate; the output is multiplied by silu(z).
        delta_bias: added to delta.
        delta_softplus: pass delta through softplus, after the bias.
        reverse: scan from the last token to the first, without a copy.
        backend: a name from `backends()`, or "auto": the fastest that can run on these tensors.

    Returns:
        the gated output in u's dtype. The recurrence runs in float32, or in float64 where an input is float64.

    Raises:
        InputError: shapes or dtypes that do not fit together, or an unknown backend.
        BackendError: the backend asked for cannot run here or on these tensors.
    """
    check(u, delta, A, B, C, D, z, delta_bias)
    chosen = choose(backend, u, delta, A, B, C, D, z, delta_bias)
    return chosen.run(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)


def backends() -> dict[str, str]:
    """Every backend by name, slowest first: "" if it can run here, else the reason and what to install."""
    return {name: _BACKENDS[name].unavailable() for name in dispatch.NAMES}


# Tokens per chunk: one state is kept for each chunk and the others are recomputed in backward. Few tokens keep the
# recomputed states small, many keep the kept ones few.
_CHUNK = 16
# Numbers in one (tokens, batch, n, e) array of a chunk; about five are alive at once. On a CPU they should fit in its
# cache. Elsewhere each operation is a launch, which takes longer than a block of that size: there an array may have
# 256 MiB in float32, so that a batch of 128 is one block in all sizes of Vim, and a larger batch takes no more memory.
_BLOCK, _LAUNCHED_BLOCK = 1 << 19, 1 << 26


def _chunked_scan(*arguments: Any) -> Tensor:
    """`selective_scan_ref` by vectorised operations; states are kept only if a gradient may be asked for."""
    return torch.ops.famba.chunked_scan(*arguments, wants_gradient(*arguments[:8]))[0]


def _forward(u, delta, A, B, C, D, z, delta_bias, softplus: bool, reverse: bool, keep: bool):
    """In blocks of a few tokens and a few sequences, each block a handful of vectorised operations.

    Only the recurrence itself goes token by token, one in-place operation each. Nothing is ever divided by a decay and
    no product of decays is formed, so a dt of any size is safe. Kept for backward are the states before each chunk
    and, where the gradient of the gate asks for it, the ungated output.
    """
    dtype = state_dtype(u, delta, A, B, C, D, z, delta_bias)
    (b, e, t), n = u.shape, A.shape[1]
    At = A.to(dtype).t().contiguous()
    starts = _starts(u, A, dtype, keep)
    y = u.new_empty(b, t, e, dtype=dtype).transpose(0, 1)  # channels last in memory, as the model's are
    for rows in _slices(b, _rows(e, n, u.device)):
        state = y.new_zeros(rows.stop - rows.start, n, e)
        for chunk in _slices(t, _CHUNK, reverse):
            if keep:
                starts[chunk.start // _CHUNK, rows] = state
            x, dt, Bc, Cc = _block(u, delta, B, C, delta_bias, softplus, rows, chunk, dtype)
            _, states = _states(x, dt, At, Bc, state, reverse)
            with exact(u.device):
                y[chunk, rows] = torch.matmul(Cc[:, :, None], states).squeeze(2)
            state = states[0 if reverse else -1]
    y = y.permute(1, 2, 0)
    if D is not None:
        y.addcmul_(u.to(dtype), D.to(dtype)[:, None])
    if z is None:
        return y.to(u.dtype), y.new_empty(0), starts
    return (y * F.silu(z.to(dtype))).to(u.dtype), y if keep else y.new_empty(0), starts


def _starts(u: Tensor, A: Tensor, dtype: torch.dtype, keep: bool) -> Tensor:
    (b, e, t), n = u.shape, A.shape[1]
    return u.new_empty((-(-t // _CHUNK), b, n, e) if keep else (0,), dtype=dtype)


def _fake_forward(u, delta, A, B, C, D, z, delta_bias, softplus, reverse, keep):
    dtype = state_dtype(u, delta, A, B, C, D, z, delta_bias)
    y = gpu.channels_last(u).to(dtype) if keep and z is not None else u.new_empty(0, dtype=dtype)
    return gpu.channels_last(u), y, _starts(u, A, dtype, keep)


def _fake_backward(grad, u, delta, A, B, C, D, z, delta_bias, y, starts, softplus, reverse):
    return empty_gradients((u, delta, A, B, C, D, z, delta_bias), gpu.channels_last)


def _backward(grad, u, delta, A, B, C, D, z, delta_bias, y, starts, softplus: bool, reverse: bool):
    dtype = starts.dtype
    (b, e, t), n = u.shape, A.shape[1]
    At = A.to(dtype).t().contiguous()
    grad_y = grad.to(dtype)
    grad_z = grad_D = grad_delta_bias = None
    if z is not None:
        gate = torch.sigmoid(z.to(dtype))
        silu = z.to(dtype) * gate
        grad_z = (grad_y * y * (gate + silu * (1 - gate))).to(z.dtype)
        grad_y = grad_y * silu

    grad_u, grad_dt = (grad_y.new_empty(b, t, e).transpose(0, 1) for _ in range(2))
    grad_B, grad_C = (grad_y.new_empty(b, t, n).transpose(0, 1) for _ in range(2))
    grad_A = torch.zeros_like(At)
    for rows in _slices(b, _rows(e, n, u.device)):
        grad_h_next = At.new_zeros(rows.stop - rows.start, n, e)  # of a chunk's last state, from the tokens after it
        for chunk in _slices(t, _CHUNK, not reverse):
            h0 = starts[chunk.start // _CHUNK, rows]
            x, dt, Bc, Cc = _block(u, delta, B, C, delta_bias, softplus, rows, chunk, dtype)
            dtu = dt * x
            decay, states = _states(x, dt, At, Bc, h0, reverse)
            g = grad_y[rows, :, chunk].permute(2, 0, 1).contiguous()
            grad_C[chunk, rows] = torch.matmul(states, g[..., None]).squeeze(3)

            grad_h = Cc[..., None] * g[:, :, None]
            following = None
            for i in token_order(len(g), not reverse):
                if following is None:
                    grad_h[i].add_(grad_h_next)
                else:
                    grad_h[i].addcmul_(decay[following], grad_h[following])
                following = i
            grad_h_next = decay[following] * grad_h[following]

            grad_B[chunk, rows] = torch.matmul(grad_h, dtu[..., None]).squeeze(3)
            grad_dtu = torch.matmul(Bc[:, :, None], grad_h).squeeze(2)
            grad_u[chunk, rows] = grad_dtu * dt

            # of delta A, in place of the gradient of the states: times the decay, times the state before
            grad_h.mul_(decay)
            if reverse:
                grad_h[:-1].mul_(states[1:])
                grad_h[-1].mul_(h0)
            else:
                grad_h[1:].mul_(states[:-1])
                grad_h[0].mul_(h0)
            torch.mul(grad_h, dt[:, :, None], out=decay)
            grad_A += decay.sum((0, 1))
            grad_dt[chunk, rows] = grad_dtu.mul_(x).add_(grad_h.mul_(At).sum(2))

    grad_u, grad_dt = grad_u.permute(1, 2, 0), grad_dt.permute(1, 2, 0)
    if D is not None:
        grad_u.addcmul_(grad_y, D.to(dtype)[:, None])
        grad_D = torch.einsum("bet,bet->e", grad_y, u.to(dtype)).to(D.dtype)
    if softplus:
        biased = delta.to(dtype) if delta_bias is None else delta.to(dtype) + delta_bias.to(dtype)[:, None]
        grad_dt.mul_(torch.sigmoid(biased))
    if delta_bias is not None:
        grad_delta_bias = grad_dt.sum((0, 2)).to(delta_bias.dtype)
    grads = (
        grad_u.to(u.dtype),
        grad_dt.to(delta.dtype),
        grad_A.t().contiguous().to(A.dtype),
        grad_B.permute(1, 2, 0).to(B.dtype),
        grad_C.permute(1, 2, 0).to(C.dtype),
        grad_D,
        grad_z,
        grad_delta_bias,
    )
    return tuple(u.new_empty(0) if x is None else x for x in grads)


# Operators, so that nothing inside is traced, and their products do not count as the model's
register(
    f"chunked_scan({native.INPUTS}, bool softplus, bool reverse, bool keep) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
register(
    f"chunked_scan_backward(Tensor grad, {native.INPUTS}, Tensor y, Tensor starts, bool softplus, bool reverse) -> "
    f"({', '.join(8 * ['Tensor'])})",
    _backward,
    _fake_backward,
)
register_gradient("chunked_scan", selective_scan_ref, kept=2)


def _block(u, delta, B, C, delta_bias, delta_softplus: bool, rows: slice, chunk: slice, dtype: torch.dtype):
    """u, and dt after bias and softplus, as (t, b, e), B and C as (t, b, n), of one block and contiguous."""
    x, dt, Bc, Cc = (x[rows, :, chunk].permute(2, 0, 1).to(dtype).contiguous() for x in (u, delta, B, C))
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype)
    return x, (F.softplus(dt) if delta_softplus else dt), Bc, Cc


def _states(x, dt, At, Bc, h0, reverse: bool) -> tuple[Tensor, Tensor]:
    """Decays and states of one block, both (t, b, n, e), from the state before its first token."""
    decay = (dt[:, :, None] * At).exp_()
    states = (dt * x)[:, :, None] * Bc[..., None]
    for i in token_order(len(x), reverse):
        states[i].addcmul_(decay[i], h0)
        h0 = states[i]
    return decay, states


def _slices(count: int, size: int, reverse: bool = False) -> list[slice]:
    found = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    return found[::-1] if reverse else found


def _rows(e: int, n: int, device: torch.device) -> int:
    """Sequences of a block."""
    return max(1, (_BLOCK if device.type == "cpu" else _LAUNCHED_BLOCK) // (_CHUNK * e * n))


# A new backend is one more entry, and a name in famba.kernels.dispatch.
_BACKENDS: dict[str, Backend] = {
    "reference": Backend(selective_scan_ref),
    "torch": Backend(_chunked_scan),
    "native": Backend(native.selective_scan, native.unavailable, native.unsuited, run_mixer=mix),
    "mamba_ssm": Backend(mamba_ssm.selective_scan, mamba_ssm.unavailable, mamba_ssm.unsuited),
    "hub": Backend(partial(mamba_ssm.selective_scan, hub=True), mamba_ssm.hub_unavailable, mamba_ssm.unsuited),
    "triton": Backend(triton.selective_scan, gpu.unavailable, triton.unsuited, triton.bidirectional_scan),
}
choose = partial(dispatch.choose, _BACKENDS)  # of a backend's name, then u and the other tensors


def check(u, delta, A, B, C, D, z, delta_bias) -> None:
    """Raise InputError naming the first argument that does not fit."""
    if u.ndim != 3 or 0 in u.shape:
        raise InputError(f"u: shape {tuple(u.shape)}; allowed: (b, e, t), none of them zero")
    if A.ndim != 2 or A.shape[0] != u.shape[1] or A.shape[1] == 0:
        raise InputError(f"A: shape {tuple(A.shape)}; allowed: ({u.shape[1]}, n), n at least 1")
    (b, e, t), n = u.shape, A.shape[1]
    expected = {
        "delta": (delta, (b, e, t)),
        "B": (B, (b, n, t)),
        "C": (C, (b, n, t)),
        "D": (D, (e,)),
        "z": (z, (b, e, t)),
        "delta_bias": (delta_bias, (e,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise InputError(
                f"{name}: shape {tuple(tensor.shape)}; allowed: {shape}, from u {(b, e, t)} and A {(e, n)}"
            )
    for name, tensor in {"u": u, "A": A, **{k: v[0] for k, v in expected.items()}}.items():
        if tensor is not None and not tensor.is_floating_point():
            raise InputError(f"{name}: dtype {tensor.dtype}; allowed: a real floating-point type")
        if tensor is not None and tensor.device != u.device:
            raise InputError(f"{name}: on {tensor.device}; allowed: {u.device}, where u is")

"""Depthwise causal convolution, bias and silu on a GPU as one torch operator, `famba::gpu_conv`: one direction or both.

Axes: b batch, e channels, t tokens, k taps. Both directions come of one read of x. Strides, types and layout of the
results are as in famba.kernels.triton.scan. Backward computes again what went into silu, and sums the weights'
gradients over tiles of tokens in a fixed order.
"""

import torch
from torch import Tensor

from famba.kernels import reference
from famba.kernels.cpu.runtime import float32
from famba.kernels.reference import register, register_gradient
from famba.kernels.triton import runtime
from famba.kernels.triton.runtime import jit, launch, tl

MOST_TAPS = 8
_TOKENS = 16  # of a tile
_CHANNELS = 64


def unsuited(x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """Why the kernel cannot run on these tensors ("": it can)."""
    if reason := runtime.unsuited(x) or runtime.unsuited(weight, bias, allowed=runtime.PARAMETERS):
        return reason
    return "" if weight.shape[1] <= MOST_TAPS else f"it runs with at most {MOST_TAPS} taps, got {weight.shape[1]}"


@jit
def _side(xs, weight, bias, out, channel, inside, here, SIGN: tl.constexpr, K: tl.constexpr):
    total = tl.zeros_like(xs[0])
    if bias is not None:
        total += tl.load(bias + channel, mask=inside, other=0.0)
    for j in tl.static_range(K):  # pyright: ignore[reportGeneralTypeIssues]
        total += tl.load(weight + channel * K + j, mask=inside, other=0.0) * xs[(K - 1) + SIGN * (j - (K - 1))]
    tl.store(out, (total * tl.sigmoid(total)).to(out.dtype.element_ty), mask=here)


@jit
def _around(x, token, t, inside, x_t, K: tl.constexpr):
    """x at every distance from -(k - 1) to k - 1 of each token, zero outside the sequence."""
    xs = ()
    for o in tl.static_range(2 * K - 1):  # pyright: ignore[reportGeneralTypeIssues]
        at = token + (o - (K - 1))
        xs += (tl.load(x + at * x_t, mask=inside & (at >= 0) & (at < t), other=0.0).to(tl.float32),)
    return xs


@jit
def _forward_kernel(
    x, weight0, bias0, weight1, bias1, out0, out1, blocks, spans, e, t, x_b, x_e, x_t,
    BOTH: tl.constexpr, SIGN: tl.constexpr, K: tl.constexpr, T: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    batch = (program // (blocks * spans)).to(tl.int64)
    token = (program // blocks % spans) * T + tl.arange(0, T)[:, None]
    channel = (program % blocks) * E + tl.arange(0, E)[None, :]
    inside = channel < e
    xs = _around(x + batch * x_b + channel * x_e, token, t, inside, x_t, K)
    place = (batch * t + token) * e + channel
    _side(xs, weight0, bias0, out0 + place, channel, inside, inside & (token < t), SIGN, K)
    if BOTH:
        _side(xs, weight1, bias1, out1 + place, channel, inside, inside & (token < t), -SIGN, K)


@jit
def _side_backward(
    xs, grad, weight, bias, part, token, channel, inside, e, t, SIGN: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    to_x = tl.zeros_like(xs[0])
    for m in tl.static_range(K):  # pyright: ignore[reportGeneralTypeIssues]
        # the token m places on, which x of this one went into by the tap k - 1 - m
        total = tl.zeros_like(xs[0])
        if bias is not None:
            total += tl.load(bias + channel, mask=inside, other=0.0)
        for j in tl.static_range(K):  # pyright: ignore[reportGeneralTypeIssues]
            total += tl.load(weight + channel * K + j, mask=inside, other=0.0) * xs[(K - 1) + SIGN * (m + j - (K - 1))]
        at = token + SIGN * m
        g = tl.load(grad + at * e, mask=inside & (at >= 0) & (at < t), other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(total)
        g *= sigmoid + total * sigmoid * (1 - sigmoid)
        to_x += tl.load(weight + channel * K + (K - 1 - m), mask=inside, other=0.0) * g
        if m == 0:
            g = tl.where(token < t, g, 0.0)
            for j in tl.static_range(K):  # pyright: ignore[reportGeneralTypeIssues]
                tap = tl.sum(g * xs[(K - 1) + SIGN * (j - (K - 1))], axis=0)[None, :]
                tl.store(part + j * e, tap, mask=inside)
            tl.store(part + K * e, tl.sum(g, axis=0)[None, :], mask=inside)
    return to_x


# As if not aligned: with eight channels a thread would have but one token, and all sums over tokens were among threads.
@jit(do_not_specialize_on_alignment=["x", "grad0", "grad1", "to_x", "part"])
def _backward_kernel(
    x, grad0, grad1, weight0, bias0, weight1, bias1, to_x, part, blocks, spans, rows, e, t, x_b, x_e, x_t,
    BOTH: tl.constexpr, SIGN: tl.constexpr, K: tl.constexpr, T: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = program // blocks
    batch = (row // spans).to(tl.int64)
    token = (row % spans) * T + tl.arange(0, T)[:, None]
    channel = (program % blocks) * E + tl.arange(0, E)[None, :]
    inside = channel < e
    xs = _around(x + batch * x_b + channel * x_e, token, t, inside, x_t, K)
    start = batch * t * e + channel
    part += row.to(tl.int64) * (K + 1) * e + channel
    total = _side_backward(xs, grad0 + start, weight0, bias0, part, token, channel, inside, e, t, SIGN, K)
    if BOTH:
        part += tl.cast(rows, tl.int64) * (K + 1) * e
        total += _side_backward(xs, grad1 + start, weight1, bias1, part, token, channel, inside, e, t, -SIGN, K)
    tl.store(to_x + start + token * e, total.to(to_x.dtype.element_ty), mask=inside & (token < t))


def causal_conv1d_silu(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    """`famba.kernels.ops.causal_conv1d_silu` by the kernel."""
    return torch.ops.famba.gpu_conv(x, weight, bias, None, None, reverse)[0]


def bidirectional_conv1d_silu(
    x: Tensor, forward: tuple[Tensor, Tensor | None], backward: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor]:
    """`famba.kernels.ops.bidirectional_conv1d_silu` by the kernel."""
    return torch.ops.famba.gpu_conv(x, *forward, *backward, False)


def _grid(x: Tensor) -> tuple[int, int, int, int]:
    """Blocks of channels, tiles of tokens, and what each holds."""
    _, e, t = x.shape
    tokens, channels = min(_TOKENS, runtime.power_of_two(t)), min(_CHANNELS, runtime.power_of_two(e))
    return runtime.blocks(e, channels), runtime.blocks(t, tokens), tokens, channels


def _conv_fake(x, weight0, bias0, weight1, bias1, reverse):
    made = runtime.channels_last(x)
    return made, x.new_empty(0) if weight1 is None else runtime.channels_last(x)


def _conv(x, weight0, bias0, weight1, bias1, reverse):
    made = _conv_fake(x, weight0, bias0, weight1, bias1, reverse)
    (b, e, t), (blocks, spans, tokens, channels) = x.shape, _grid(x)
    launch(
        _forward_kernel, (blocks * spans * b,), x, *map(float32, (weight0, bias0, weight1, bias1)), *made,
        blocks, spans, e, t, *x.stride(),
        BOTH=weight1 is not None, SIGN=-1 if reverse else 1, K=weight0.shape[1], T=tokens, E=channels, num_warps=4,
    )  # fmt: skip
    return made


def _conv_backward(grad0, grad1, x, weight0, bias0, weight1, bias1, reverse):
    both = weight1 is not None
    (b, e, t), k, (blocks, spans, tokens, channels) = x.shape, weight0.shape[1], _grid(x)
    grads = [grad.mT.contiguous().mT for grad in ((grad0, grad1) if both else (grad0, grad0))]
    to_x = runtime.channels_last(x)
    part = x.new_empty(1 + both, b * spans, k + 1, e, dtype=torch.float32)
    launch(
        _backward_kernel, (blocks * spans * b,), x, *grads, *map(float32, (weight0, bias0, weight1, bias1)), to_x, part,
        blocks, spans, b * spans, e, t, *x.stride(),
        BOTH=both, SIGN=-1 if reverse else 1, K=k, T=tokens, E=channels, num_warps=4,
    )  # fmt: skip
    found = part.sum(1)
    gradients = []
    for taps, weight, bias in zip(found, (weight0, weight1), (bias0, bias1), strict=False):
        gradients.append(taps[:-1].mT.contiguous().to(weight.dtype))
        gradients.append(x.new_empty(0) if bias is None else taps[-1].to(bias.dtype, copy=True))
    gradients += [x.new_empty(0) for _ in range(4 - len(gradients))]
    return to_x, *gradients


def _conv_backward_fake(grad0, grad1, x, weight0, bias0, weight1, bias1, reverse):
    return reference.empty_gradients((x, weight0, bias0, weight1, bias1), runtime.channels_last)


def _by_torch(*inputs):
    x, weight0, bias0, weight1, bias1, reverse = inputs
    first = reference.conv(x, weight0, bias0, reverse)
    return first, first[0, 0, :0] if weight1 is None else reference.conv(x, weight1, bias1, not reverse)


_WEIGHTS = "Tensor weight0, Tensor? bias0, Tensor? weight1, Tensor? bias1"
register(f"gpu_conv(Tensor x, {_WEIGHTS}, bool reverse) -> (Tensor, Tensor)", _conv, _conv_fake)
register(
    f"gpu_conv_backward(Tensor grad0, Tensor grad1, Tensor x, {_WEIGHTS}, bool reverse) -> "
    f"({', '.join(5 * ['Tensor'])})",
    _conv_backward, _conv_backward_fake,
)  # fmt: skip
register_gradient("gpu_conv", _by_torch)

"""The selective scan on a GPU as torch operators, `famba::gpu_scan` and its backward: one direction, or both at once.

Axes as in famba.kernels.scan: b batch, e channels, t tokens, n states. Activations may be float32 or bfloat16 and have
any strides; the fast layout is (b, t, e) in memory seen as (b, e, t). The recurrence is float32. Results and gradients
lie channels last.

One warp scans a block of channels of one sequence, token by token. Its tile of states is (ER, NR, NL, EL): channels in
registers, states in registers, states across lanes, channels across lanes. A sum over states then takes log2(NL)
shuffles and one over channels log2(EL), and a token's channels are read as consecutive numbers. Both directions go one
after the other in forward, which adds, gates and scales them as it writes; side by side in backward. Forward sums over
states alone, and has as many of them as it can in registers.

How a tensor lies in a warp is Triton's choice, made anew in each release. Whole tiles are therefore read and written
as matrices of registers by lanes, of which every release makes the same; they become tiles by reshaping, which moves
nothing.

Backward recomputes: forward keeps the state before every 64th token, backward from it that before every 4th in scratch
memory, and from that the four states in between in registers. No product of decays is formed and nothing is divided by
one, so steps of any size are safe. What sums over blocks or sequences (A, D, bias; B, C) is written per block and added
up in a fixed order: the same bits every time.

Bytes that both directions' forward and backward must move for one channel of one token, activations of w bytes:

    forward     read u, delta twice each, z; write the sum y, the output                        7 w
                write the kept states, 4 n / 64 bytes for each direction                        n / 8
    backward    read u, delta twice each, z, y, the output's gradient; write gradients of z,
                of u and delta twice each                                                       12 w
                read the kept states                                                            n / 8

B and C, each read twice by both directions, and their gradients are 12 w n for all channels of a token, and are counted
too; what backward writes to scratch memory and adds up is the implementation's own. At (128, 384, 197, 16) in bf16 this
is 0.43 GB: 0.13 ms at 3.35 TB/s, 0.09 ms at 4.8 TB/s. Yet not memory is what limits, but how many instructions a
multiprocessor can issue: for compute capability 9.0 and n = 16 the loops have 370 of them in forward for a token and
both directions, and 668 in backward for each, for 32 channels at once (tests/kernels/test_sass.py counts them). Of 132
multiprocessors at 1.75 GHz, each of which starts four in a clock, that takes 0.56 ms at the very least.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from famba.kernels import reference
from famba.kernels.cpu.runtime import float32
from famba.kernels.reference import register, register_gradient
from famba.kernels.triton import runtime
from famba.kernels.triton.runtime import jit, launch, tl

MOST_STATES = 64
_CHUNK = 64  # tokens between kept states
_SUB = 4  # tokens whose states and decays are in registers at once; divides _CHUNK
_TILE = 16  # numbers of a tile that one thread holds
_LANES = 32
_LOG2_E = 1.4426950408889634


def scan_bytes(b: int, e: int, t: int, n: int, dtype: torch.dtype) -> int:
    """Bytes that forward and backward of both directions must move; the table above."""
    width = torch.finfo(dtype).bits // 8
    kept = 2 * 2 * 4 * b * e * n * runtime.blocks(t, _CHUNK)
    return 19 * width * b * e * t + 12 * width * b * n * t + kept


def kept_bytes(b: int, e: int, t: int, n: int) -> int:
    """Bytes of the states that forward keeps for backward, of one direction."""
    er, nr, nl, el = _shape(n)
    return 4 * b * runtime.blocks(e, er * el) * runtime.blocks(t, _CHUNK) * er * nr * nl * el


def scratch_bytes(b: int, e: int, t: int, n: int) -> int:
    """Bytes that backward of both directions writes for itself: states, and what it has yet to add up."""
    er, nr, nl, el = _shape(n)
    blocks, tile = runtime.blocks(e, er * el), er * nr * nl * el
    per_block = tile * (_CHUNK // _SUB + 1) + 2 * er * el + 2 * t * n
    return 4 * 2 * b * blocks * per_block


def unsuited(u, delta, A, B, C, D, z, delta_bias) -> str:
    """Why the kernels cannot run on these tensors ("": they can)."""
    if reason := runtime.unsuited(u, delta, B, C, z) or runtime.unsuited(A, D, delta_bias, allowed=runtime.PARAMETERS):
        return reason
    return "" if A.shape[1] <= MOST_STATES else f"it runs with at most {MOST_STATES} states, got {A.shape[1]}"


@jit
def _softplus(x):
    # log1p(v) = 2 atanh(v / (2 + v)): exact to the last bits where a logarithm of 1 + v would lose them
    v = tl.exp(-tl.abs(x))
    s = v / (2 + v)
    q = s * s
    series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
    return tl.where(x > 0, x, 0 * x) + 2 * s * series


@jit
def _parameters(
    A, D, bias, block, e, n, LOG2_E: tl.constexpr,
    ER: tl.constexpr, NR: tl.constexpr, NL: tl.constexpr, EL: tl.constexpr,
):  # fmt: skip
    """A block's channels and states, its numbers' places in memory, and its A times log2(e), D and bias."""
    register, lane = tl.arange(0, ER * NR)[:, None], tl.arange(0, NL * EL)[None, :]
    row, column = register % NR * NL + lane // EL, register // NR * EL + lane % EL
    tile = row * (ER * EL) + column  # whatever the pass: by states, then channels
    column += block * (ER * EL)
    rate = tl.load(A + row * e + column, mask=(row < n) & (column < e), other=0.0)
    rate = tl.reshape(rate * LOG2_E, [ER, NR, NL, EL])
    channel = block * (ER * EL) + tl.arange(0, ER)[:, None] * EL + tl.arange(0, EL)[None, :]
    state = tl.arange(0, NR)[:, None] * NL + tl.arange(0, NL)[None, :]
    skip = tl.zeros([ER, EL], dtype=tl.float32)
    shift = tl.zeros([ER, EL], dtype=tl.float32)
    if D is not None:
        skip += tl.load(D + channel, mask=channel < e, other=0.0)
    if bias is not None:
        shift += tl.load(bias + channel, mask=channel < e, other=0.0)
    return channel, state, tile, rate, skip, shift


@jit
def _as_matrix(x):
    return tl.reshape(x, [x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]])


@jit
def _sum_states(x):
    return tl.sum(tl.sum(x, axis=1), axis=1)


@jit
def _sum_channels(x):
    return tl.sum(tl.sum(x, axis=0), axis=2)


@jit
def _direction(
    u, delta, A, B, C, D, bias, z, y, out, states, batch, block, t, e, n, scale,
    u_b, u_e, u_t, delta_b, delta_e, delta_t, B_b, B_n, B_t, C_b, C_n, C_t, z_b, z_e, z_t,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, ADD: tl.constexpr, LAST: tl.constexpr, KEEP: tl.constexpr,
    KEEP_Y: tl.constexpr, ER: tl.constexpr, NR: tl.constexpr, NL: tl.constexpr, EL: tl.constexpr,
    CHUNK: tl.constexpr, LOG2_E: tl.constexpr,
):  # fmt: skip
    channel, state, tile, rate, skip, shift = _parameters(A, D, bias, block, e, n, LOG2_E, ER, NR, NL, EL)
    here, real = channel < e, state < n
    h = tl.zeros([ER, NR, NL, EL], dtype=tl.float32)

    u += batch * u_b + channel * u_e
    delta += batch * delta_b + channel * delta_e
    B += batch * B_b + state * B_n
    C += batch * C_b + state * C_n
    y += batch * t * e + channel
    out += batch * t * e + channel
    if z is not None:
        z += batch * z_b + channel * z_e
    chunks = tl.cdiv(t, CHUNK)
    states += ((batch * tl.cdiv(e, ER * EL) + block) * chunks) * (ER * NR * NL * EL) + tile

    token = (t - 1) if REVERSE else 0
    x = tl.load(u + token * u_t, mask=here, other=0.0)
    raw = tl.load(delta + token * delta_t, mask=here, other=0.0)
    entry = tl.load(B + token * B_t, mask=real, other=0.0)
    reading = tl.load(C + token * C_t, mask=real, other=0.0)
    for chunk in range(chunks):
        if KEEP:
            tl.store(states + chunk * (ER * NR * NL * EL), _as_matrix(h))
        for p in range(chunk * CHUNK, tl.minimum(t, (chunk + 1) * CHUNK)):
            token = (t - 1 - p) if REVERSE else p
            # the next token's numbers are on their way while this one's are used
            after = tl.maximum(token - 1, 0) if REVERSE else tl.minimum(token + 1, t - 1)
            next_x = tl.load(u + after * u_t, mask=here, other=0.0)
            next_raw = tl.load(delta + after * delta_t, mask=here, other=0.0)
            next_entry = tl.load(B + after * B_t, mask=real, other=0.0)
            next_reading = tl.load(C + after * C_t, mask=real, other=0.0)
            if ADD:
                before = tl.load(y + token * e, mask=here, other=0.0).to(tl.float32)
            if LAST and z is not None:
                gate = tl.load(z + token * z_t, mask=here, other=0.0).to(tl.float32)

            step = raw.to(tl.float32) + shift
            if SOFTPLUS:
                step = _softplus(step)
            wide = x.to(tl.float32)
            into = (step * wide)[:, None, None, :] * entry.to(tl.float32)[None, :, :, None]
            h = tl.exp2(step[:, None, None, :] * rate) * h + into
            total = _sum_states(h * reading.to(tl.float32)[None, :, :, None]) + skip * wide
            if ADD:
                total += before
            if KEEP_Y or not LAST:
                tl.store(y + token * e, total.to(y.dtype.element_ty), mask=here)
            if LAST:
                if z is not None:
                    total *= gate * tl.sigmoid(gate)
                tl.store(out + token * e, (total * scale).to(out.dtype.element_ty), mask=here)
            x, raw, entry, reading = next_x, next_raw, next_entry, next_reading


# As if not aligned: else wide loads and stores of whole tiles would decide how tiles lie, four channels to a thread.
@jit(do_not_specialize_on_alignment=["A0", "A1", "states"])
def _forward_kernel(
    u0, delta0, A0, B0, C0, D0, bias0, u1, delta1, A1, B1, C1, D1, bias1, z, y, out, states, blocks, b, t, e, n, scale,
    u_b, u_e, u_t, delta_b, delta_e, delta_t, B_b, B_n, B_t, C_b, C_n, C_t, z_b, z_e, z_t,
    BOTH: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, KEEP: tl.constexpr, KEEP_Y: tl.constexpr,
    ER: tl.constexpr, NR: tl.constexpr, NL: tl.constexpr, EL: tl.constexpr, CHUNK: tl.constexpr, LOG2_E: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % blocks
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    _direction(
        u0, delta0, A0, B0, C0, D0, bias0, z, y, out, states, batch, block, t, e, n, scale,
        u_b, u_e, u_t, delta_b, delta_e, delta_t, B_b, B_n, B_t, C_b, C_n, C_t, z_b, z_e, z_t,
        REVERSE, SOFTPLUS, False, not BOTH, KEEP, KEEP_Y, ER, NR, NL, EL, CHUNK, LOG2_E,
    )  # fmt: skip
    if BOTH:
        tl.debug_barrier()  # what the other direction adds to has been written
        more = tl.cast(b, tl.int64) * blocks * tl.cdiv(t, CHUNK) * (ER * NR * NL * EL)
        _direction(
            u1, delta1, A1, B1, C1, D1, bias1, z, y, out, states + more, batch, block, t, e, n, scale,
            u_b, u_e, u_t, delta_b, delta_e, delta_t, B_b, B_n, B_t, C_b, C_n, C_t, z_b, z_e, z_t,
            not REVERSE, SOFTPLUS, True, True, KEEP, KEEP_Y, ER, NR, NL, EL, CHUNK, LOG2_E,
        )  # fmt: skip


@jit(do_not_specialize_on_alignment=["A0", "A1", "states", "scratch", "to_A"])
def _backward_kernel(
    grad, u0, delta0, A0, B0, C0, D0, bias0, u1, delta1, A1, B1, C1, D1, bias1, z, y, states, scratch,
    to_u0, to_delta0, to_u1, to_delta1, to_z, to_A, to_D, to_bias, to_B, to_C, blocks, b, t, e, n, scale,
    grad_b, grad_e, grad_t, u_b, u_e, u_t, delta_b, delta_e, delta_t, B_b, B_n, B_t, C_b, C_n, C_t, z_b, z_e, z_t,
    BOTH: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr,
    ER: tl.constexpr, NR: tl.constexpr, NL: tl.constexpr, EL: tl.constexpr, CHUNK: tl.constexpr, SUB: tl.constexpr,
    LOG2_E: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = ER * NR * NL * EL
    block = tl.program_id(0) % blocks
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    side = tl.program_id(1)
    u, delta, A, B, C, D, bias = u0, delta0, A0, B0, C0, D0, bias0
    to_u, to_delta = to_u0, to_delta0
    backwards = side * 0 + REVERSE
    if BOTH:
        backwards = side
        if side == 1:
            u, delta, A, B, C, to_u, to_delta = u1, delta1, A1, B1, C1, to_u1, to_delta1
            if D is not None:
                D = D1
            if bias is not None:
                bias = bias1
    start = backwards * (t - 1)  # the token that is scanned first
    stride = 1 - 2 * backwards

    channel, state, tile, rate, skip, shift = _parameters(A, D, bias, block, e, n, LOG2_E, ER, NR, NL, EL)
    here, real = channel < e, state < n

    u += batch * u_b + channel * u_e
    delta += batch * delta_b + channel * delta_e
    B += batch * B_b + state * B_n
    C += batch * C_b + state * C_n
    grad += batch * grad_b + channel * grad_e
    dense = batch * t * e + channel
    if z is not None:
        z += batch * z_b + channel * z_e
        y += dense
        to_z += dense
    to_u += dense
    to_delta += dense
    summed = ((tl.cast(side, tl.int64) * blocks + block) * b + batch) * t * n + state
    to_B += summed
    to_C += summed
    program = (side * b + batch) * blocks + block
    chunks = tl.cdiv(t, CHUNK)
    states += program * chunks * TILE + tile
    scratch += program * (CHUNK // SUB) * TILE + tile

    later = tl.zeros([ER, NR, NL, EL], dtype=tl.float32)  # gradient that reaches a state from the tokens after it
    grad_rate = tl.zeros([ER, NR, NL, EL], dtype=tl.float32)
    grad_skip = tl.zeros([ER, EL], dtype=tl.float32)
    grad_shift = tl.zeros([ER, EL], dtype=tl.float32)
    for back in range(chunks):
        chunk = chunks - 1 - back
        h = tl.reshape(tl.load(states + chunk * TILE), [ER, NR, NL, EL])
        subs = tl.cdiv(tl.minimum(CHUNK, t - chunk * CHUNK), SUB)
        for sub in range(subs - 1):
            tl.store(scratch + sub * TILE, _as_matrix(h))
            for i in tl.static_range(SUB):  # pyright: ignore[reportGeneralTypeIssues]
                p = chunk * CHUNK + sub * SUB + i
                token = start + stride * tl.minimum(p, t - 1)
                x = tl.load(u + token * u_t, mask=here, other=0.0).to(tl.float32)
                step = tl.load(delta + token * delta_t, mask=here, other=0.0).to(tl.float32) + shift
                entry = tl.load(B + token * B_t, mask=real, other=0.0).to(tl.float32)
                if SOFTPLUS:
                    step = _softplus(step)
                step = tl.where(p < t, step, 0.0)  # beyond the last token nothing happens
                h = tl.exp2(step[:, None, None, :] * rate) * h + (step * x)[:, None, None, :] * entry[None, :, :, None]
        tl.store(scratch + (subs - 1) * TILE, _as_matrix(h))

        tl.debug_barrier()  # a state may be read by another thread than wrote it: for n = 1 it is
        for turn in range(subs):
            sub = subs - 1 - turn
            h = tl.reshape(tl.load(scratch + sub * TILE), [ER, NR, NL, EL])
            held, decays, xs, steps, slopes = (h,), (), (), (), ()
            for i in tl.static_range(SUB):  # pyright: ignore[reportGeneralTypeIssues]
                p = chunk * CHUNK + sub * SUB + i
                token = start + stride * tl.minimum(p, t - 1)
                x = tl.load(u + token * u_t, mask=here, other=0.0).to(tl.float32)
                step = tl.load(delta + token * delta_t, mask=here, other=0.0).to(tl.float32) + shift
                entry = tl.load(B + token * B_t, mask=real, other=0.0).to(tl.float32)
                slope = tl.full([ER, EL], 1.0, dtype=tl.float32)
                if SOFTPLUS:
                    slope = tl.sigmoid(step)
                    step = _softplus(step)
                step = tl.where(p < t, step, 0.0)
                decay = tl.exp2(step[:, None, None, :] * rate)
                h = decay * h + (step * x)[:, None, None, :] * entry[None, :, :, None]
                held += (h,)
                decays += (decay,)
                xs += (x,)
                steps += (step,)
                slopes += (slope,)

            for j in tl.static_range(SUB):  # pyright: ignore[reportGeneralTypeIssues]
                p = chunk * CHUNK + sub * SUB + SUB - 1 - j
                token = start + stride * tl.minimum(p, t - 1)
                inside = here & (p < t)
                entry = tl.load(B + token * B_t, mask=real, other=0.0).to(tl.float32)
                reading = tl.load(C + token * C_t, mask=real, other=0.0).to(tl.float32)
                g = tl.load(grad + token * grad_t, mask=inside, other=0.0).to(tl.float32) * scale
                if z is not None:
                    gate = tl.load(z + token * z_t, mask=inside, other=0.0).to(tl.float32)
                    sigmoid = tl.sigmoid(gate)
                    if side == 0:
                        total = tl.load(y + token * e, mask=inside, other=0.0).to(tl.float32)
                        slope_z = sigmoid + gate * sigmoid * (1 - sigmoid)
                        tl.store(to_z + token * e, (g * total * slope_z).to(to_z.dtype.element_ty), mask=inside)
                    g *= gate * sigmoid
                x, step = xs[SUB - 1 - j], steps[SUB - 1 - j]
                grad_h = later + g[:, None, None, :] * reading[None, :, :, None]
                wanted = real & (p < t)
                tl.store(to_C + token * n, _sum_channels(g[:, None, None, :] * held[SUB - j]), mask=wanted)
                tl.store(to_B + token * n, _sum_channels((step * x)[:, None, None, :] * grad_h), mask=wanted)
                grad_into = _sum_states(grad_h * entry[None, :, :, None])
                later = grad_h * decays[SUB - 1 - j]
                grad_decay = later * held[SUB - 1 - j]
                grad_step = grad_into * x + _sum_states(grad_decay * rate) * (1 / LOG2_E)
                grad_rate += grad_decay * step[:, None, None, :]
                grad_raw = tl.where(inside, grad_step * slopes[SUB - 1 - j], 0.0)
                grad_shift += grad_raw
                grad_skip += g * x
                tl.store(to_u + token * e, (grad_into * step + g * skip).to(to_u.dtype.element_ty), mask=inside)
                tl.store(to_delta + token * e, grad_raw.to(to_delta.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # all states have been read before the next chunk's take their place

    tl.store(to_A + program * TILE + tile, _as_matrix(grad_rate))
    place = program * (ER * EL) + tl.arange(0, ER)[:, None] * EL + tl.arange(0, EL)[None, :]
    tl.store(to_D + place, grad_skip)
    tl.store(to_bias + place, grad_shift)


def selective_scan(*arguments: Any) -> Tensor:
    """`selective_scan_ref` by the kernel; states are kept only if a gradient may be asked for."""
    *inputs, z, bias, softplus, reverse = arguments
    keep = reference.wants_gradient(*inputs, z, bias)
    return torch.ops.famba.gpu_scan(*inputs, bias, *_NONE, z, softplus, reverse, 1.0, keep)[0]


_NONE = 7 * (None,)


def bidirectional_scan(
    forward: tuple[Tensor | None, ...], backward: tuple[Tensor | None, ...], z: Tensor, scale: float
) -> Tensor:
    """`famba.kernels.ops.bidirectional_scan` by the kernel."""
    inputs = (*forward, *backward, z)
    if reference.wants_gradient(*inputs):
        return _BidirectionalScan.apply(*inputs, scale)  # pyright: ignore[reportReturnType]
    return torch.ops.famba.gpu_scan(*_with_delta(*inputs), True, False, scale, False)[0]


def _with_delta(*inputs):
    """The same as `gpu_scan` takes them: in each direction delta in place of dt and its projection."""
    made = []
    for u, dt, dt_proj, *others in (inputs[:8], inputs[8:16]):
        with torch.autocast(dt.device.type, enabled=False):  # active in forward only; both passes must make the same
            made += [u, functional.linear(dt.mT, dt_proj.to(dt.dtype)).mT, *others]
    return *made, inputs[16]


class _BidirectionalScan(torch.autograd.Function):
    """Backward projects dt again: a kept delta would be as large as u."""

    @staticmethod
    def forward(ctx, *inputs):
        *tensors, ctx.scale = inputs
        out, y, states = torch.ops.famba.gpu_scan(*_with_delta(*tensors), True, False, ctx.scale, True)
        ctx.save_for_backward(*tensors, y, states)
        return out

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        *tensors, y, states = ctx.saved_tensors

        def kernel():
            found = torch.ops.famba.gpu_scan_backward(grad, *_with_delta(*tensors), y, states, True, False, ctx.scale)
            gradients = []
            for (_, dt, dt_proj, *_), side in ((tensors[:8], found[:7]), (tensors[8:16], found[7:14])):
                grad_u, grad_delta, *others = side
                grad_delta = grad_delta.mT
                grad_dt = torch.matmul(grad_delta, dt_proj.to(grad_delta.dtype)).mT
                grad_proj = torch.matmul(grad_delta.flatten(0, 1).mT, dt.mT.flatten(0, 1)).to(dt_proj.dtype)
                gradients += [grad_u, grad_dt, grad_proj, *others]
            return [*gradients, found[14]]

        def function(*tensors):
            return _by_torch(*_with_delta(*tensors), True, False, ctx.scale)

        return *reference.gradients(kernel, function, tensors, grad), None


def _by_torch(*inputs):
    *sides, z, softplus, reverse, scale = inputs

    def scan(side, reverse: bool) -> Tensor:
        u, delta, A, B, C, D, bias = side
        return reference.selective_scan_ref(u, delta, A, B, C, D, None, bias, softplus, reverse)

    y = scan(sides[:7], reverse)
    if sides[7] is not None:
        y = y + scan(sides[7:], not reverse)
    return y if z is None else reference.gate(y, z, scale)


def _shape(n: int, forward: bool = False) -> tuple[int, int, int, int]:
    """ER, NR, NL, EL of a tile for n states; a block has the same channels in both passes."""
    padded = runtime.power_of_two(n)
    across = max(1, padded // _TILE) if forward else min(padded, 4)
    states = padded // across
    return max(1, _TILE // states), states, across, _LANES // across


def _scan_fake(*inputs):
    *tensors, z, _, _, _, keep = inputs
    u, A, both = tensors[0], tensors[2], tensors[7] is not None
    b, e, t = u.shape
    er, nr, nl, el = _shape(A.shape[1])
    out = runtime.channels_last(u)
    y = runtime.channels_last(u) if keep and z is not None else u.new_empty(0)
    kept = (1 + both, b, runtime.blocks(e, er * el), runtime.blocks(t, _CHUNK), nr * nl, er * el) if keep else (0,)
    return out, y, u.new_empty(kept, dtype=torch.float32)


def _alike(first: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both with the same strides, which one launch takes for both; they are copied only if they differ."""
    if second is None or first.stride() == second.stride():
        return first, second
    return first.mT.contiguous().mT, second.mT.contiguous().mT


def _prepared(sides) -> tuple[list[Tensor | None], list[int]]:
    """Both directions' tensors as the kernels take them, and the strides of u, delta, B and C."""
    (u0, delta0, A0, B0, C0, D0, bias0), (u1, delta1, A1, B1, C1, D1, bias1) = sides
    pairs = [_alike(x, other) for x, other in ((u0, u1), (delta0, delta1), (B0, B1), (C0, C1))]
    rates = [None if A is None else float32(A.t()) for A in (A0, A1)]
    shifts = [float32(x) for x in (D0, bias0, D1, bias1)]
    tensors = []
    for i in (0, 1):
        u, delta, B, C = (pair[i] for pair in pairs)
        tensors += [u, delta, rates[i], B, C, *shifts[2 * i : 2 * i + 2]]
    return tensors, [stride for first, _ in pairs for stride in first.stride()]


def _scan(*inputs):
    *tensors, z, softplus, reverse, scale, keep = inputs
    u, A, both = tensors[0], tensors[2], tensors[7] is not None
    out, y, states = _scan_fake(*inputs)
    (b, e, t), n = u.shape, A.shape[1]
    er, nr, nl, el = _shape(n, forward=True)
    blocks = runtime.blocks(e, er * el)
    sides, strides = _prepared((tensors[:7], tensors[7:]))
    launch(
        _forward_kernel, (blocks * b,), *sides, z, y if y.numel() else out, out, states, blocks, b, t, e, n, scale,
        *strides, *((0, 0, 0) if z is None else z.stride()),
        BOTH=both, REVERSE=reverse, SOFTPLUS=softplus, KEEP=keep, KEEP_Y=y.numel() > 0, ER=er, NR=nr, NL=nl, EL=el,
        CHUNK=_CHUNK, LOG2_E=_LOG2_E, num_warps=1,
    )  # fmt: skip
    return out, y, states


def _scan_backward(grad, *inputs):
    *tensors, z, y, states, softplus, reverse, scale = inputs
    if z is not None:
        y = y.mT.contiguous().mT  # what autograd keeps elsewhere meanwhile (save_on_cpu) comes back in another layout
    u, A, both = tensors[0], tensors[2], tensors[7] is not None
    (b, e, t), n, count = u.shape, A.shape[1], 1 + both
    er, nr, nl, el = _shape(n)
    blocks, tile = runtime.blocks(e, er * el), er * nr * nl * el
    sides, strides = _prepared((tensors[:7], tensors[7:]))
    to_u, to_delta = ([runtime.channels_last(x) for _ in range(count)] for x in tensors[:2])
    to_z = u.new_empty(0) if z is None else runtime.channels_last(z)
    scratch = u.new_empty(count * b * blocks * (_CHUNK // _SUB) * tile, dtype=torch.float32)
    to_A = u.new_empty(count, b, blocks, nr * nl, er * el, dtype=torch.float32)
    to_D, to_bias = (u.new_empty(count, b, blocks * er * el, dtype=torch.float32) for _ in range(2))
    to_B, to_C = (u.new_empty(count, blocks, b, t, n, dtype=torch.float32) for _ in range(2))
    launch(
        _backward_kernel, (blocks * b, count), grad, *sides, z, y, states, scratch,
        to_u[0], to_delta[0], to_u[-1], to_delta[-1], to_z, to_A, to_D, to_bias, to_B, to_C, blocks, b, t, e, n, scale,
        *grad.stride(), *strides, *((0, 0, 0) if z is None else z.stride()),
        BOTH=both, REVERSE=int(reverse), SOFTPLUS=softplus, ER=er, NR=nr, NL=nl, EL=el, CHUNK=_CHUNK, SUB=_SUB,
        LOG2_E=_LOG2_E, num_warps=1,
    )  # fmt: skip
    rates = to_A.sum(1).mT.flatten(1, 2)[:, :e, :n]
    skips, shifts, entries, readings = to_D.sum(1)[:, :e], to_bias.sum(1)[:, :e], to_B.sum(1), to_C.sum(1)
    gradients = []
    for i, given in enumerate((tensors[:7], tensors[7:])):
        if given[0] is None:
            gradients += [u.new_empty(0) for _ in given]
            continue
        small = (rates[i], entries[i], readings[i], skips[i], shifts[i])
        small = [
            u.new_empty(0)
            if x is None
            else found.to(x.dtype, copy=True, memory_format=torch.contiguous_format)  # of its own, as it must be
            for x, found in zip(given[2:], small, strict=True)
        ]
        gradients += [to_u[i], to_delta[i], small[0], small[1].mT, small[2].mT, *small[3:]]
    return *gradients, to_z


def _scan_backward_fake(grad, *inputs):
    *tensors, z, _, _, _, _, _ = inputs
    return reference.empty_gradients((*tensors, z), runtime.channels_last)


_SIDES = ", ".join(
    f"Tensor{absent} u{side}, Tensor{absent} delta{side}, Tensor{absent} A{side}, Tensor{absent} B{side}, "
    f"Tensor{absent} C{side}, Tensor? D{side}, Tensor? bias{side}"
    for side, absent in ((0, ""), (1, "?"))
)
register(
    f"gpu_scan({_SIDES}, Tensor? z, bool softplus, bool reverse, float scale, bool keep) -> (Tensor, Tensor, Tensor)",
    _scan, _scan_fake,
)  # fmt: skip
register(
    f"gpu_scan_backward(Tensor grad, {_SIDES}, Tensor? z, Tensor y, Tensor states, bool softplus, bool reverse, "
    f"float scale) -> ({', '.join(15 * ['Tensor'])})",
    _scan_backward, _scan_backward_fake,
)  # fmt: skip
register_gradient("gpu_scan", _by_torch, kept=2)

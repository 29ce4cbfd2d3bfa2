"""Fusing on a GPU as torch operators: `famba::gpu_plan`, where tokens go; `famba::gpu_fuse`, their means.

Axes: b batch, t tokens, r pairs, s = t - r tokens left, d width. What is fused is float32 or bfloat16, weights and
sizes float32, sums float32. Each output token gathers what joins it in the order of the pairs: the same bits every
time. Each input token's gradient is one row. Nothing waits for the host, which therefore does not look at positions:
those outside a sequence are passed over.
"""

import torch
from torch import Tensor

from famba.kernels import reference
from famba.kernels.cpu.fuse import fuse_backward_fake, fuse_fake, plan_fake
from famba.kernels.reference import register, register_backward
from famba.kernels.triton import runtime
from famba.kernels.triton.runtime import jit, launch, tl

_ROWS = 16
_COLUMNS = 256
_COMPARED = 4096  # positions with pairs, at once
MOST_TOKENS = 8192


def unsuited_plan(source: Tensor, target: Tensor, size: Tensor) -> str:
    """Why `plan` cannot run on these tensors ("": it can)."""
    integers = (torch.int64, torch.int32)
    if reason := runtime.unsuited(source, target, allowed=integers) or runtime.unsuited(size, allowed=(torch.float32,)):
        return reason
    return "" if size.shape[1] <= MOST_TOKENS else f"it runs on at most {MOST_TOKENS} tokens, got {size.shape[1]}"


def unsuited(weight: Tensor, *tensors: Tensor) -> str:
    """Why `fuse` cannot run on these tensors ("": it can)."""
    return runtime.unsuited(*tensors) or runtime.unsuited(weight, allowed=(torch.float32,))


@jit
def _pairs(source, target, size, start, t, r, PAIRS: tl.constexpr):
    # some pairs at once: who leaves, whom it joins, with what size; past the last one nobody does
    pair = start + tl.arange(0, PAIRS)
    leaves = tl.load(source + pair, mask=pair < r, other=-1)
    stays = tl.load(target + pair, mask=pair < r, other=-1)
    valid = (leaves >= 0) & (leaves < t)
    return leaves, stays, valid, tl.load(size + leaves, mask=valid, other=0.0)


@jit
def _plan_kernel(
    source, target, size, survivors, destination, weight, total, t, r,
    IN_ORDER: tl.constexpr, BY_SIZE: tl.constexpr, T: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, T)
    kept = position < t
    source += batch * r
    target += batch * r
    size += batch * t
    destination += batch * t
    own = tl.load(size + position, mask=kept, other=1.0)
    sum = own
    count = tl.full([T], 1.0, dtype=tl.float32)
    gone = tl.zeros([T], dtype=tl.int32)
    for start in range(0, r, PAIRS):
        leaves, stays, _, joined = _pairs(source, target, size, start, t, r, PAIRS)
        joins = position[:, None] == stays[None, :]
        sum += tl.sum(tl.where(joins, joined[None, :], 0.0), axis=1)
        count += tl.sum(tl.where(joins, 1.0, 0.0), axis=1)
        gone += tl.sum((position[:, None] == leaves[None, :]).to(tl.int32), axis=1)
    kept &= gone == 0
    if IN_ORDER:
        place = tl.cumsum(kept.to(tl.int32), 0) - 1
    else:
        even = position % 2 == 0
        first = tl.where(even, kept, 0).to(tl.int32)
        last = tl.where(even, 0, kept).to(tl.int32)
        place = tl.where(even, tl.cumsum(first, 0) - 1, tl.sum(first, axis=0) + tl.cumsum(last, 0) - 1)
    left = t - r
    kept &= place < left
    # rounded to nearest: approximate division makes x / x other than 1 for sizes such as 41
    share = tl.div_rn(own, sum) if BY_SIZE else tl.div_rn(1.0, count)
    weight += batch * t
    survivors += batch * left
    total += batch * left
    tl.store(survivors + place, position.to(tl.int64), mask=kept)
    tl.store(total + place, sum, mask=kept)
    tl.store(destination + position, place.to(tl.int64), mask=kept)
    tl.store(weight + position, share, mask=kept)
    divisor = (sum if BY_SIZE else count)[:, None]
    for start in range(0, r, PAIRS):
        leaves, stays, valid, joined = _pairs(source, target, size, start, t, r, PAIRS)
        joins = position[:, None] == stays[None, :]
        into = tl.sum(tl.where(joins, place[:, None], 0), axis=0)
        whole = tl.sum(tl.where(joins, divisor, 0.0), axis=0)
        part = tl.div_rn(joined if BY_SIZE else 1.0, tl.where(whole > 0, whole, 1.0))
        tl.store(destination + leaves, into.to(tl.int64), mask=valid)
        tl.store(weight + leaves, part, mask=valid)


@jit
def _gather(
    x, out, survivors, destination, weight, source, batch, row, column, t, s, r, d, ROWS: tl.constexpr
):  # fmt: skip
    inside = (row[:, None] < s) & (column < d)
    own = tl.load(survivors + batch * s + row, mask=row < s, other=0)
    share = tl.load(weight + batch * t + own, mask=row < s, other=0.0)[:, None]
    x += batch * t * d
    total = share * tl.load(x + own[:, None] * d + column, mask=inside, other=0.0).to(tl.float32)
    first = tl.min(row)
    for j in range(r):
        leaves = tl.load(source + batch * r + j)
        valid = (leaves >= 0) & (leaves < t)
        into = tl.load(destination + batch * t + leaves, mask=valid, other=-1)
        if (into >= first) & (into < first + ROWS):
            joined = tl.load(x + leaves * d + column, mask=column < d, other=0.0).to(tl.float32)
            joined *= tl.load(weight + batch * t + leaves)
            total += tl.where(row[:, None] == into, joined, 0.0)
    tl.store(out + (batch * s + row[:, None]) * d + column, total.to(out.dtype.element_ty), mask=inside)


@jit
def _forward_kernel(
    x, other, out, other_out, survivors, destination, weight, source, blocks, t, s, r, d, e,
    BOTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if tl.program_id(2) == 0:
        _gather(x, out, survivors, destination, weight, source, batch, row, column, t, s, r, d, ROWS)
    elif BOTH:
        _gather(other, other_out, survivors, destination, weight, source, batch, row, column, t, s, r, e, ROWS)


@jit
def _spread(grad, to_x, destination, weight, batch, row, column, t, s, d):
    into = tl.load(destination + batch * t + row, mask=row < t, other=0)[:, None]
    share = tl.load(weight + batch * t + row, mask=row < t, other=0.0)[:, None]
    inside = (row[:, None] < t) & (column < d)
    g = tl.load(grad + (batch * s + into) * d + column, mask=inside & (into >= 0) & (into < s), other=0.0)
    made = (g.to(tl.float32) * share).to(to_x.dtype.element_ty)
    tl.store(to_x + (batch * t + row[:, None]) * d + column, made, mask=inside)


@jit
def _backward_kernel(
    destination, weight, grad, other, to_x, to_other, blocks, t, s, d, e,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    # nested: what is absent is decided when this is compiled, which it is for the rest of the condition
    if grad is not None:  # noqa: SIM102
        if tl.program_id(2) == 0:
            _spread(grad, to_x, destination, weight, batch, row, column, t, s, d)
    if other is not None:  # noqa: SIM102
        if tl.program_id(2) == 1:
            _spread(other, to_other, destination, weight, batch, row, column, t, s, e)


def plan(source: Tensor, target: Tensor, size: Tensor, order: str, weighting: str) -> tuple[Tensor, ...]:
    """`famba.fusion.merge.plan` by the kernel: survivors, destination, weight, size."""
    source, target = source.to(torch.int64), target.to(torch.int64)
    return torch.ops.famba.gpu_plan(source, target, size.detach(), order == "scan", weighting == "size")


def fuse(
    x: Tensor, other: Tensor | None, survivors: Tensor, destination: Tensor, weight: Tensor, source: Tensor
) -> tuple[Tensor, Tensor]:
    """`famba.fusion.merge.apply` by the kernel, to one tensor or two."""
    return torch.ops.famba.gpu_fuse(x, other, survivors, destination, weight, source)


def _plan(source, target, size, in_order, by_size):
    made = plan_fake(source, target, size, in_order, by_size)
    (b, t), r = size.shape, source.shape[1]
    tokens = runtime.power_of_two(t)
    pairs = min(runtime.power_of_two(r), max(1, _COMPARED // tokens))
    launch(
        _plan_kernel, (b,), source.contiguous(), target.contiguous(), size.contiguous(), *made, t, r,
        IN_ORDER=in_order, BY_SIZE=by_size, T=tokens, PAIRS=pairs, num_warps=4,
    )  # fmt: skip
    return made


def _fuse_fake(x, other, survivors, destination, weight, source):
    return fuse_fake(x, other, destination, weight, survivors.shape[1])


def _fuse(x, other, survivors, destination, weight, source):
    made = _fuse_fake(x, other, survivors, destination, weight, source)
    (b, t, d), s, e = x.shape, survivors.shape[1], 1 if other is None else other.shape[2]
    rows, columns = _tile(max(d, e))
    blocks = runtime.blocks(s, rows)
    launch(
        _forward_kernel, (blocks * b, runtime.blocks(max(d, e), columns), 1 + (other is not None)),
        x.contiguous(), None if other is None else other.contiguous(), *made,
        *(x.contiguous() for x in (survivors, destination, weight, source)), blocks, t, s, source.shape[1], d, e,
        BOTH=other is not None, ROWS=rows, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return made


def _fuse_backward(grad, other, destination, weight):
    made = fuse_backward_fake(grad, other, destination, weight)
    given = [x if x is None else x.contiguous() for x in (grad, other)]
    present = [x for x in given if x is not None]
    if not present:
        return made
    b, t = weight.shape
    width = max(x.shape[2] for x in present)
    rows, columns = _tile(width)
    blocks = runtime.blocks(t, rows)
    launch(
        _backward_kernel, (blocks * b, runtime.blocks(width, columns), 2), destination.contiguous(),
        weight.contiguous(), *given, *made, blocks, t, present[0].shape[1],
        *(0 if x is None else x.shape[2] for x in given),
        ROWS=rows, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return made


def _tile(width: int) -> tuple[int, int]:
    return _ROWS, min(_COLUMNS, runtime.power_of_two(width))


def _setup_context(ctx, inputs, output) -> None:
    _, other, _, destination, weight, _ = inputs
    ctx.two = other is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(destination, weight)


def _backward(ctx, grad, other):
    return *reference.fuse_gradients(ctx, torch.ops.famba.gpu_fuse_backward, grad, other), *4 * [None]


register(
    "gpu_plan(Tensor source, Tensor target, Tensor size, bool in_order, bool by_size) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _plan, plan_fake,
)  # fmt: skip
register(
    "gpu_fuse(Tensor x, Tensor? other, Tensor survivors, Tensor destination, Tensor weight, Tensor source) -> "
    "(Tensor, Tensor)",
    _fuse, _fuse_fake,
)  # fmt: skip
register(
    "gpu_fuse_backward(Tensor? grad, Tensor? other, Tensor destination, Tensor weight) -> (Tensor, Tensor)",
    _fuse_backward, fuse_backward_fake,
)  # fmt: skip
register_backward("gpu_fuse", _backward, _setup_context)

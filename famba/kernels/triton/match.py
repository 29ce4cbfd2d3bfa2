"""Bipartite soft matching on a GPU as one torch operator, `famba::gpu_match`. float32 only, and no gradient.

Axes: b batch, t tokens, c numbers compared, r pairs. One kernel finds each even token's most similar odd one, a second
one counts how many of the others come before it: the place of a pair among the r is its rank, and nothing is sorted.
Nothing waits for the host, which therefore does not look at positions: those outside the sequence protect nothing.
"""

import torch
from torch import Tensor

from famba.kernels.cpu.match import match_fake
from famba.kernels.reference import register
from famba.kernels.triton import runtime
from famba.kernels.triton.runtime import jit, launch, tl

_EVENS = 32  # tokens of a tile, of both kinds
_NUMBERS = 32  # compared at once


def unsuited(feature: Tensor) -> str:
    """Why the kernel cannot run on these tensors ("": it can)."""
    return runtime.unsuited(feature, allowed=(torch.float32,))


@jit
def _lengths(rows, inside, c, NUMBERS: tl.constexpr, TOKENS: tl.constexpr):
    total = tl.zeros([TOKENS], dtype=tl.float32)
    for start in range(0, c, NUMBERS):
        column = start + tl.arange(0, NUMBERS)[None, :]
        x = tl.load(rows + column, mask=inside & (column < c), other=0.0)
        total += tl.sum(x * x, axis=1)
    return tl.maximum(tl.sqrt(total), 1e-12)[:, None]


@jit
def _best_kernel(
    feature, protected, best, odd, blocks, guards, t, c, EVENS: tl.constexpr, NUMBERS: tl.constexpr
):  # fmt: skip
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    index = (tl.program_id(0) % blocks) * EVENS + tl.arange(0, EVENS)
    feature += batch * t * c
    rows = feature + 2 * index[:, None] * c
    inside = 2 * index[:, None] < t
    length = _lengths(rows, inside, c, NUMBERS, EVENS)
    guarded = index < 0
    if protected is not None:
        for k in range(guards):
            guarded |= 2 * index == tl.load(protected + batch * guards + k)
    most = tl.full([EVENS], float("-inf"), dtype=tl.float32)
    which = tl.zeros([EVENS], dtype=tl.int32)
    for start in range(0, t // 2, EVENS):
        other = start + tl.arange(0, EVENS)
        columns = feature + (2 * other[:, None] + 1) * c
        there = 2 * other[:, None] + 1 < t
        other_length = _lengths(columns, there, c, NUMBERS, EVENS)
        score = tl.zeros([EVENS, EVENS], dtype=tl.float32)
        for first in range(0, c, NUMBERS):
            column = first + tl.arange(0, NUMBERS)[None, :]
            x = tl.load(rows + column, mask=inside & (column < c), other=0.0) / length
            y = tl.load(columns + column, mask=there & (column < c), other=0.0) / other_length
            score = tl.dot(x, tl.trans(y), score, input_precision="ieee")
        closed = 2 * other + 1 >= t
        if protected is not None:
            for k in range(guards):
                closed |= 2 * other + 1 == tl.load(protected + batch * guards + k)
        score = tl.where(guarded[:, None] | closed[None, :], float("-inf"), score)
        top = tl.max(score, axis=1)
        at = tl.argmax(score, axis=1)  # of equals the first
        which = tl.where(top > most, start + at, which)
        most = tl.where(top > most, top, most)
    place = batch * ((t + 1) // 2) + index
    tl.store(best + place, most, mask=2 * index < t)
    tl.store(odd + place, which, mask=2 * index < t)


@jit
def _rank_kernel(best, odd, source, target, similarity, blocks, evens, r, EVENS: tl.constexpr):
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    index = (tl.program_id(0) % blocks) * EVENS + tl.arange(0, EVENS)
    best += batch * evens
    mine = tl.load(best + index, mask=index < evens, other=float("-inf"))
    rank = tl.zeros([EVENS], dtype=tl.int32)
    for start in range(0, evens, EVENS):
        other = start + tl.arange(0, EVENS)
        theirs = tl.load(best + other, mask=other < evens, other=float("-inf"))
        sooner = (theirs[None, :] > mine[:, None]) | (
            (theirs[None, :] == mine[:, None]) & (other[None, :] < index[:, None])
        )
        rank += tl.sum((sooner & (other[None, :] < evens)).to(tl.int32), axis=1)
    chosen = (index < evens) & (rank < r)
    place = batch * r + rank
    tl.store(source + place, (2 * index).to(tl.int64), mask=chosen)
    tl.store(
        target + place, 2 * tl.load(odd + batch * evens + index, mask=chosen, other=0).to(tl.int64) + 1, mask=chosen
    )
    tl.store(similarity + place, mine, mask=chosen)


def match_tokens(feature: Tensor, protected: Tensor | None, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """`famba.fusion.matching.match_tokens` by the kernels: source, target, similarity.

    Args:
        protected: (b, k) positions.
    """
    positions = None if protected is None else protected.to(feature.device, torch.int64)
    return torch.ops.famba.gpu_match(feature.detach(), positions, r)


def _match(feature: Tensor, protected: Tensor | None, r: int) -> tuple[Tensor, Tensor, Tensor]:
    found = source, target, similarity = match_fake(feature, protected, r)
    (b, t, c), evens = feature.shape, (feature.shape[1] + 1) // 2
    best = feature.new_empty(b, evens)
    odd = feature.new_empty(b, evens, dtype=torch.int32)
    blocks, guards = runtime.blocks(evens, _EVENS), 0 if protected is None else protected.shape[1]
    protected = None if protected is None else protected.contiguous()
    launch(
        _best_kernel, (blocks * b,), feature.contiguous(), protected, best, odd, blocks, guards, t, c,
        EVENS=_EVENS, NUMBERS=_NUMBERS, num_warps=4,
    )  # fmt: skip
    launch(
        _rank_kernel, (blocks * b,), best, odd, source, target, similarity, blocks, evens, r, EVENS=_EVENS, num_warps=1
    )
    return found


register("gpu_match(Tensor feature, Tensor? protected, SymInt r) -> (Tensor, Tensor, Tensor)", _match, match_fake)

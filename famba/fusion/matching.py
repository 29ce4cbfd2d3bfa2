"""Bipartite soft matching: which tokens fuse (Token Merging, arXiv:2210.09461, section 3). Functions on tensors.

`b` batch, `t` tokens in sequence order, `r` tokens removed, `c` numbers compared. Written from the paper.

Every function has a backend, as those of famba.kernels.ops have: a name from `famba.backends()`, which leaves to plain
torch what it has no kernel for, or "auto", the fastest that can run.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from famba.errors import InputError
from famba.fusion.options import levels
from famba.fusion.strategies import is_whole
from famba.kernels.cpu import match as pairing
from famba.kernels.cpu.scan import unavailable
from famba.kernels.dispatch import Backend, choose
from famba.kernels.precision import exact
from famba.kernels.triton import match as triton_pairing
from famba.kernels.triton.runtime import unavailable as triton_unavailable


class Matching(NamedTuple):
    """r pairs for every sequence, the best match first: data, so that it can be stored and drawn.

    Attributes:
        source: positions of the tokens that disappear, each once.
        target: the position that each of them joins; never a source itself.
        similarity: cosine similarity of each pair, where tokens were matched by it.
    """

    source: Int[Tensor, "b r"]
    target: Int[Tensor, "b r"]
    similarity: Float[Tensor, "b r"] | None = None


def match_tokens(
    feature: Float[Tensor, "b t c"],
    r: int,
    *,
    protected: Sequence[int] | Int[Tensor, "b"] = (),
    kind: str = "similarity",
    backend: str = "auto",
) -> Matching:
    """Pair r tokens of each sequence, by default the most similar ones.

    Even positions are offered to odd ones, each to the most similar. Similarity is cosine, so only direction
    matters; a token of zero length is equally unlike every other (0). Equal similarities go by position.

    Args:
        feature: what is compared; detached, so matching carries no gradient.
        r: tokens removed from every sequence.
        protected: positions that neither disappear nor absorb: the same for all sequences, or a (b,) tensor with
            one for each, which leaves nothing to fuse at t = 3: it may be the one odd position.
        kind: `similarity`; or a control, of which only the feature's shape matters: `random` and `adjacent` pairs are
            the same for all sequences and steps, and follow from t. Controls are computed by torch.
        backend: "native" on a CPU and "triton" on a GPU compare in float32. Triton's does not look at a tensor of
            positions: it would have to wait for them.

    Raises:
        InputError: r is negative or exceeds (t - protected) // 2 (or what the protected positions leave on one
            side). Never clamped, unlike in Token Merging: a clamped r is another experiment under the same name.
    """
    if not isinstance(feature, Tensor) or feature.ndim != 3 or not feature.is_floating_point():
        raise InputError(f"feature: {told(feature)}; must be a floating-point tensor (b, t, c)")
    b, t, _ = feature.shape
    _check(r, t, protected, b)
    if kind not in levels("matching"):
        raise InputError(f"kind: {kind!r} is not one of {', '.join(levels('matching'))}")
    if feature.dtype in (torch.bfloat16, torch.float16):
        feature = feature.float()  # so that similarities that differ do not tie
    chosen = choose(_MATCH, backend, feature)
    if r == 0:
        empty = torch.empty(b, 0, dtype=torch.int64, device=feature.device)
        return Matching(empty, empty, feature.new_empty(b, 0))
    if kind != "similarity":
        scores = _control_scores(kind, t, feature.device).expand(b, -1, -1)
        return Matching(*_best_pairs(scores, _positions(protected, b), r)[:2])
    return Matching(*chosen.run(feature, _positions(protected, b), r))


def _match(feature: Tensor, protected: Tensor | None, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Matching by torch: source, target, similarity."""
    with torch.no_grad(), exact(feature.device):
        unit = functional.normalize(feature.detach(), dim=-1)
        return _best_pairs(unit[:, ::2] @ unit[:, 1::2].mT, protected, r)


def _best_pairs(
    scores: Float[Tensor, "b even odd"], protected: Int[Tensor, "b k"] | None, r: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Source, target and score of each sequence's r best pairs, where every even position offers itself once."""
    if protected is not None:
        b, t = scores.shape[0], sum(scores.shape[1:])
        guard = torch.zeros(b, t, dtype=torch.bool, device=scores.device)
        guard = guard.scatter(1, protected.to(scores.device, torch.int64), True)
        scores = scores.masked_fill(guard[:, ::2, None] | guard[:, None, 1::2], -torch.inf)
    best, odd = scores.max(dim=-1)
    best, even = best.sort(dim=-1, descending=True, stable=True)
    even, best = even[:, :r], best[:, :r]
    return 2 * even, 2 * odd.gather(1, even) + 1, best


def _control_scores(kind: str, t: int, device: torch.device) -> Float[Tensor, "1 even odd"]:
    """What stands for similarity where tokens are not compared; the same bits on every device and in every step.

    `random` is a hash of the pair and of t, which no two fusing layers share (SplitMix64's finaliser, Steele et al.,
    2014). `adjacent` prefers the nearest odd position, and takes even positions in the order of the fractional parts of
    multiples of the golden ratio, which spreads them over the sequence.
    """
    even, odd = torch.arange(0, t, 2, device=device)[:, None], torch.arange(1, t, 2, device=device)
    if kind == "random":
        bits = (t * t + even) * t + odd
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
            bits = (bits ^ (bits >> shift)) * factor
        return ((bits ^ (bits >> 31)) & 0xFFFFFF).float()[None]
    return (even * 0x9E3779B9 % 2**32 / 2**32 - (even - odd).abs())[None]


def told(value: object) -> str:
    """What an argument is, for the message that refuses it."""
    if isinstance(value, Tensor):
        return f"{value.dtype}, shape {tuple(value.shape)}"
    return " ".join(repr(value).split())[:80]


def _check(r: int, t: int, protected: Sequence[int] | Tensor, b: int) -> None:
    """Refuse what cannot be fused. A tensor is not read, for which the host would wait: the worst is assumed of it."""
    if not is_whole(r):
        raise InputError(f"r: {r!r}; must be a whole number")
    if isinstance(protected, Tensor):
        if protected.shape != (b,) or protected.dtype not in (torch.int64, torch.int32):
            raise InputError(f"protected: {told(protected)}; must be int64 or int32 of shape ({b},), or a list")
        fixed, evens, odds = 1, (t - 1) // 2, t // 2 - 1
    else:
        if not isinstance(protected, Sequence):
            raise InputError(f"protected: {told(protected)}; must be a list of positions, or a tensor ({b},)")
        for position in protected:
            if not is_whole(position) or not 0 <= position < t:
                raise InputError(f"protected: position {position!r}; must be in 0..{t - 1}")
        fixed = len(set(protected))
        evens = (t + 1) // 2 - len({p for p in protected if p % 2 == 0})
        odds = t // 2 - len({p for p in protected if p % 2})
    most = min((t - fixed) // 2, evens if odds > 0 else 0)
    if not 0 <= r <= most:
        raise InputError(f"r = {r} of t = {t} tokens, {fixed} of them protected; allowed: 0..{most}")


def _positions(protected: Sequence[int] | Tensor, b: int) -> Int[Tensor, "b k"] | None:
    """The protected positions of each sequence; None if there are none."""
    if isinstance(protected, Tensor):
        return protected.view(b, 1)
    return torch.tensor(list(protected)).expand(b, -1) if protected else None


_MATCH = {
    "torch": Backend(_match),
    "native": Backend(pairing.match_tokens, unavailable, pairing.unsuited),
    "triton": Backend(triton_pairing.match_tokens, triton_unavailable, triton_pairing.unsuited),
}

"""Token fusion: which tokens become one, and how. Functions on tensors.

`b` batch, `t` tokens in sequence order, `r` tokens removed, `s` = t - r tokens left, `d` width. The matching is
bipartite soft matching (Token Merging, arXiv:2210.09461, section 3); fusing it inside Vision Mamba is
Famba-V (arXiv:2409.09808, section 3.1). Written from the papers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from famba.errors import InputError


class Matching(NamedTuple):
    """r pairs for every sequence, the most similar first: data, so that it can be stored and drawn.

    Attributes:
        source: positions of the tokens that disappear, each once.
        target: the position that each of them joins; never a source itself.
        similarity: cosine similarity of each pair, if it is known.
    """

    source: Int[Tensor, "b r"]
    target: Int[Tensor, "b r"]
    similarity: Float[Tensor, "b r"] | None = None


def match_tokens(
    feature: Float[Tensor, "b t c"], r: int, *, protected: Sequence[int] | Int[Tensor, "b"] = ()
) -> Matching:
    """Pair each sequence's r most similar tokens.

    Even positions are offered to odd ones, each to the most similar. Similarity is cosine, so only direction
    matters; a token of zero length is equally unlike every other (0). Equal similarities go by position.

    Args:
        feature: what is compared; detached, so matching carries no gradient.
        r: tokens removed from every sequence.
        protected: positions that neither disappear nor absorb: the same for all sequences, or a (b,) tensor with
            one for each.

    Raises:
        InputError: r is negative or exceeds (t - protected) // 2 (or what the protected positions leave on one
            side). Never clamped, unlike in Token Merging: a clamped r is another experiment under the same name.
    """
    b, t, _ = feature.shape
    guard = _protected_mask(protected, b, t, feature.device)
    _check_r(r, t, protected)
    if r == 0:
        empty = torch.empty(b, 0, dtype=torch.int64, device=feature.device)
        return Matching(empty, empty, feature.new_empty(b, 0))

    # Under autocast the product would be rounded to bf16, and similarities that differ would tie.
    with torch.no_grad(), torch.autocast(feature.device.type, enabled=False):
        unit = functional.normalize(feature.detach(), dim=-1)
        scores = unit[:, ::2] @ unit[:, 1::2].mT
        if guard is not None:
            scores = scores.masked_fill(guard[:, ::2, None] | guard[:, None, 1::2], -torch.inf)
        best, odd = scores.max(dim=-1)
        best, even = best.sort(dim=-1, descending=True, stable=True)
        even, best = even[:, :r], best[:, :r]
        return Matching(source=2 * even, target=2 * odd.gather(1, even) + 1, similarity=best)


class Plan(NamedTuple):
    """A matching worked out for one sequence length, to be applied to several tensors (normed tokens, residual).

    Attributes:
        survivors: input position of each output token.
        destination: output position of each input token: the two of a pair share one.
        keep: weight of the survivor in its group's mean.
        join: weight of each source in its group's mean.
        source: positions of the tokens that disappear.
        size: patches that each output token stands for.
    """

    survivors: Int[Tensor, "b s"]
    destination: Int[Tensor, "b t"]
    keep: Float[Tensor, "b s"]
    join: Float[Tensor, "b r"]
    source: Int[Tensor, "b r"]
    size: Float[Tensor, "b s"]


def plan(matching: Matching, size: Float[Tensor, "b t"], *, order: str = "scan", weighting: str = "size") -> Plan:
    """Where every token goes and with which weight, for at least one pair. Arguments as in `fuse`."""
    source, target, _ = matching
    b, t = size.shape
    stays = torch.ones(b, t, dtype=torch.bool, device=size.device).scatter_(1, source, False)
    if order == "scan":
        place = stays.cumsum(1) - 1
    else:  # even survivors ascending, then all the odd ones
        even = torch.zeros(t, dtype=torch.bool, device=size.device)
        even[::2] = True
        first = stays & even
        last = stays & ~even
        place = torch.where(even, first.cumsum(1) - 1, first.sum(1, keepdim=True) + last.cumsum(1) - 1)
    into = place.gather(1, target)
    destination = place.scatter(1, source, into)
    positions = torch.arange(t, device=size.device).expand(b, t)
    # Every survivor writes its position to its place; what disappears writes to one more place that is cut off.
    left = t - source.shape[1]
    survivors = positions.new_empty(b, left + 1).scatter_(1, place.masked_fill(~stays, left), positions)[:, :left]

    total = size.gather(1, survivors).scatter_add(1, into, size.gather(1, source))
    weight = size if weighting == "size" else torch.ones_like(size)
    kept = weight.gather(1, survivors)
    joined = weight.gather(1, source)
    whole = kept.scatter_add(1, into, joined)
    return Plan(survivors, destination, kept / whole, joined / whole.gather(1, into), source, total)


def apply(plan: Plan, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b s d"]:
    """Each group's weighted mean. A token that nothing joins comes through bit for bit."""
    b, t, d = x.shape
    s = plan.survivors.shape[1]
    row = torch.arange(b, device=x.device)[:, None]
    rows = x.reshape(b * t, d)
    kept = rows.index_select(0, (row * t + plan.survivors).flatten()) * plan.keep.to(x.dtype).reshape(-1, 1)
    joined = rows.index_select(0, (row * t + plan.source).flatten()) * plan.join.to(x.dtype).reshape(-1, 1)
    into = (row * s + plan.destination.gather(1, plan.source)).flatten()
    return kept.index_add(0, into, joined).view(b, s, d)


def fuse(
    x: Float[Tensor, "b t d"],
    matching: Matching,
    *,
    size: Float[Tensor, "b t"] | Float[Tensor, "b t 1"] | None = None,
    order: str = "scan",
    weighting: str = "size",
) -> tuple[Float[Tensor, "b s d"], Float[Tensor, "b s"] | Float[Tensor, "b s 1"]]:
    """A token and all that join it become their mean, in one step (not pair by pair).

    Args:
        x: the tokens; gradients reach every one of them.
        size: patches that each token stands for; None is one each. With a trailing axis of 1, so is the result.
        order: of the result, where anything is fused: `scan` keeps the survivors in sequence order, because a scan
            reads its tokens in order; `append` puts the unmerged even positions first, ascending, then the odd ones.
        weighting: `size` weighs each token of a group by its size; `mean` counts each once.

    Returns:
        The fused tokens and the patches that each stands for; the sizes' sum never changes.

    Raises:
        InputError: unknown order or weighting.
    """
    b, t, _ = x.shape
    ones = torch.ones(b, t, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)
    flat = ones if size is None else size.reshape(b, t)
    _known_option("order", order, ("scan", "append"))
    _known_option("weighting", weighting, ("size", "mean"))
    if matching.source.shape[1] == 0:
        return x, flat if size is None else size
    worked_out = plan(matching, flat, order=order, weighting=weighting)
    fused = worked_out.size if size is None or size.dim() == 2 else worked_out.size[..., None]
    return apply(worked_out, x), fused


def _check_r(r: int, t: int, protected: Sequence[int] | Tensor) -> None:
    """Refuse what cannot be fused; looks at a tensor's values only where they can matter, at 3 tokens."""
    if isinstance(protected, Tensor):
        fixed = 1
        evens, odds = (t - 1) // 2, t // 2 - 1  # what is left at worst, whichever position is protected
        if t == 3:
            odds = 1 - int((protected == 1).any())
    else:
        fixed = len(set(protected))
        evens = (t + 1) // 2 - len({p for p in protected if p % 2 == 0})
        odds = t // 2 - len({p for p in protected if p % 2})
    most = min((t - fixed) // 2, evens if odds > 0 else 0)
    if not 0 <= r <= most:
        raise InputError(f"r = {r} of t = {t} tokens, {fixed} of them protected; allowed: 0..{most}")


def _protected_mask(protected, b: int, t: int, device: torch.device) -> Tensor | None:
    if isinstance(protected, Tensor):
        return torch.zeros(b, t, dtype=torch.bool, device=device).scatter_(1, protected.view(b, 1), True)
    if not protected:
        return None
    for position in protected:
        if not 0 <= position < t:
            raise InputError(f"protected: position {position}; must be in 0..{t - 1}")
    mask = torch.zeros(b, t, dtype=torch.bool, device=device)
    mask[:, list(protected)] = True
    return mask


def _known_option(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name}: {value!r} is not one of {', '.join(allowed)}")

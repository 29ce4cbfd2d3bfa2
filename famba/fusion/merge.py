"""Merging matched tokens: a plan says where each token goes and with what weight; applying it takes the means.

`b` batch, `t` tokens in sequence order, `r` tokens removed, `s` = t - r tokens left, `d` width. Fusion inside Vision
Mamba is Famba-V (arXiv:2409.09808, section 3.1). Written from the papers.

Every function has a backend, as those of famba.kernels.ops have: a name from `famba.backends()`, which leaves to plain
torch what it has no kernel for, or "auto", the fastest that can run.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from famba.errors import InputError
from famba.fusion.matching import Matching, told
from famba.fusion.options import levels
from famba.kernels import reference
from famba.kernels.cpu import fuse as fusing
from famba.kernels.cpu.scan import unavailable
from famba.kernels.dispatch import Backend, choose
from famba.kernels.triton import fuse as triton_fusing
from famba.kernels.triton.runtime import unavailable as triton_unavailable


class Plan(NamedTuple):
    """A matching worked out for one sequence length, to be applied to several tensors (normed tokens, residual).

    Attributes:
        survivors: input position of each output token.
        destination: output position of each input token: the two of a pair share one.
        weight: of each input token in its group's mean; 1 where it is alone, 0 where it is dropped.
        source: positions of the tokens that disappear.
        size: patches that each output token stands for.
    """

    survivors: Int[Tensor, "b s"]
    destination: Int[Tensor, "b t"]
    weight: Float[Tensor, "b t"]
    source: Int[Tensor, "b r"]
    size: Float[Tensor, "b s"]


def plan(
    matching: Matching,
    size: Float[Tensor, "b t"],
    *,
    order: str = "scan",
    weighting: str = "size",
    reduction: str = "mean",
    backend: str = "auto",
) -> Plan:
    """Where every token goes and with which weight, for at least one pair. Arguments as in `fuse`."""
    source, target, _ = matching
    b = size.shape[0]
    if source.shape != target.shape or source.shape[0] != b:
        raise InputError(
            f"matching: {tuple(source.shape)} and {tuple(target.shape)}; allowed: ({b}, r), twice the same"
        )
    survivors, destination, weight, total = choose(_PLAN, backend, source, target, size).run(
        source, target, size, order, weighting
    )
    if reduction == "drop":
        weight = torch.ones_like(weight).scatter(1, source.long(), 0)
    return Plan(survivors, destination, weight, source, total)


def apply(plan: Plan, x: Float[Tensor, "b t d"], *, backend: str = "auto") -> Float[Tensor, "b s d"]:
    """Each group's weighted mean. A token that nothing joins comes through bit for bit."""
    _check_planned(plan, x)
    return choose(_APPLY, backend, plan.weight, x).run(plan, x, None)[0]


def apply_both(
    plan: Plan, x: Float[Tensor, "b t d"], other: Float[Tensor, "b t e"], *, backend: str = "auto"
) -> tuple[Float[Tensor, "b s d"], Float[Tensor, "b s e"]]:
    """`apply` to two tensors, by a kernel in one call."""
    _check_planned(plan, x, other)
    return choose(_APPLY, backend, plan.weight, x, other).run(plan, x, other)


def fuse(
    x: Float[Tensor, "b t d"],
    matching: Matching,
    *,
    size: Float[Tensor, "b t"] | Float[Tensor, "b t 1"] | None = None,
    order: str = "scan",
    weighting: str = "size",
    reduction: str = "mean",
    backend: str = "auto",
) -> tuple[Float[Tensor, "b s d"], Float[Tensor, "b s"] | Float[Tensor, "b s 1"]]:
    """A token and all that join it become their mean, in one step (not pair by pair).

    Args:
        x: the tokens; gradients reach every one of them.
        size: patches that each token stands for; None is one each. With a trailing axis of 1, so is the result.
        order: of the result, where anything is fused: `scan` keeps the survivors in sequence order, because a scan
            reads its tokens in order; `append` puts the unmerged even positions first, ascending, then the odd ones.
        weighting: `size` weighs each token of a group by its size; `mean` counts each once.
        reduction: `drop` leaves the target as it is, whatever joins it; its size counts what joins it all the same.

    Returns:
        The fused tokens and the patches that each stands for; the sizes' sum never changes.
    """
    if not isinstance(x, Tensor) or x.ndim != 3 or not x.is_floating_point():
        raise InputError(f"x: {told(x)}; must be a floating-point tensor (b, t, d)")
    b, t, _ = x.shape
    if not isinstance(matching, Matching) or matching.source.ndim != 2:
        raise InputError(f"matching: {told(matching)}; must be a Matching of {b} sequences")
    if size is not None and (not isinstance(size, Tensor) or size.shape not in ((b, t), (b, t, 1))):
        raise InputError(f"size: {told(size)}; must have shape ({b}, {t}) or ({b}, {t}, 1)")
    ones = torch.ones(b, t, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)
    flat = ones if size is None else size.reshape(b, t)
    for option, value in {"order": order, "weighting": weighting, "reduction": reduction}.items():
        if value not in levels(option):
            raise InputError(f"{option}: {value!r} is not one of {', '.join(levels(option))}")
    if matching.source.shape[1] == 0:
        return x, flat if size is None else size
    worked_out = plan(matching, flat, order=order, weighting=weighting, reduction=reduction, backend=backend)
    fused = worked_out.size if size is None or size.dim() == 2 else worked_out.size[..., None]
    return apply(worked_out, x, backend=backend), fused


def _plan(source: Tensor, target: Tensor, size: Tensor, order: str, weighting: str) -> tuple[Tensor, ...]:
    """The plan by torch: survivors, destination, weight, size."""
    b, t = size.shape
    stays = torch.ones(b, t, dtype=torch.bool, device=size.device).scatter(1, source, False)
    if order == "scan":
        place = stays.cumsum(1) - 1
    else:  # even survivors ascending, then all the odd ones
        even = torch.zeros(t, dtype=torch.bool, device=size.device)
        even[::2] = True
        first = stays & even
        last = stays & ~even
        place = torch.where(even, first.cumsum(1) - 1, first.sum(1, keepdim=True) + last.cumsum(1) - 1)
    traced = type(source) is not Tensor or torch.compiler.is_compiling() or reference.is_transformed()
    if (
        size.device.type == "cpu"
        and not traced
        and (stays.sum() != b * (t - source.shape[1]) or not stays.gather(1, target).all())
    ):
        raise InputError("matching: a source comes up twice or as a target; allowed: once, as a source")
    into = place.gather(1, target)
    destination = place.scatter(1, source, into)
    positions = torch.arange(t, device=size.device).expand(b, t)
    # Every survivor writes its position to its place; what disappears writes to one more place that is cut off.
    left = t - source.shape[1]
    survivors = positions.new_zeros(b, left + 1).scatter(1, place.masked_fill(~stays, left), positions)[:, :left]

    total = size.gather(1, survivors).scatter_add(1, into, size.gather(1, source))
    if weighting == "size":
        return survivors, destination, size / total.gather(1, destination), total
    count = torch.ones_like(total).scatter_add(1, into, torch.ones_like(source, dtype=size.dtype))
    return survivors, destination, 1 / count.gather(1, destination), total


def _apply(plan: Plan, x: Tensor, other: Tensor | None) -> tuple[Tensor, Tensor | None]:
    place = plan.destination, plan.weight, plan.survivors.shape[1]
    return reference.fuse(x, *place), None if other is None else reference.fuse(other, *place)


def _check_planned(plan: Plan, *tensors: Tensor) -> None:
    b, t = plan.destination.shape
    for x in tensors:
        if x.ndim != 3 or x.shape[:2] != (b, t):
            raise InputError(f"x: shape {tuple(x.shape)}; allowed: ({b}, {t}, d), what the plan was made for")


@register_flop_formula([torch.ops.famba.match, torch.ops.famba.gpu_match])
def _match_flops(feature, *_, **__) -> int:
    """Those of the product of the even positions with the odd ones, as in torch; of shapes."""
    b, t, c = feature
    return 2 * b * (t - t // 2) * (t // 2) * c


_PLAN = {
    "torch": Backend(_plan),
    "native": Backend(fusing.plan, unavailable, fusing.unsuited_plan),
    "triton": Backend(triton_fusing.plan, triton_unavailable, triton_fusing.unsuited_plan),
}


_APPLY = {
    "torch": Backend(_apply),
    "native": Backend(
        lambda plan, x, other: fusing.fuse(x, other, plan.destination, plan.weight, plan.survivors.shape[1]),
        unavailable,
        fusing.unsuited,
    ),
    "triton": Backend(
        lambda plan, x, other: triton_fusing.fuse(x, other, *plan[:4]), triton_unavailable, triton_fusing.unsuited
    ),
}

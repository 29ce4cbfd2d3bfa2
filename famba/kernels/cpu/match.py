"""Bipartite soft matching as one torch operator, `famba::match`, over match.cpp. float32 only, and no gradient.

Axes: b batch, t tokens, c numbers compared, r pairs.
"""

import torch
from torch import Tensor

from famba.errors import InputError
from famba.kernels.cpu import runtime
from famba.kernels.reference import register

Match = runtime.structure("Match")


def unsuited(feature: Tensor) -> str:
    """The reason why the kernel cannot run on this tensor ("": it can)."""
    return runtime.unsuited(feature, allowed=(torch.float32,))


def match_tokens(feature: Tensor, protected: Tensor | None, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """`famba.fusion.matching.match_tokens` by the native kernel: source, target, similarity.

    Args:
        protected: (b, k) positions.
    """
    positions = None if protected is None else protected.to(torch.int64)
    return torch.ops.famba.match(feature.detach(), positions, r)


def match_fake(feature: Tensor, protected: Tensor | None, r: int) -> tuple[Tensor, Tensor, Tensor]:
    b = feature.shape[0]
    source, target = (feature.new_empty(b, r, dtype=torch.int64) for _ in range(2))
    return source, target, feature.new_empty(b, r)


def _match(feature: Tensor, protected: Tensor | None, r: int) -> tuple[Tensor, Tensor, Tensor]:
    found = match_fake(feature, protected, r)
    feature = feature.contiguous()
    protected = None if protected is None else protected.contiguous()
    if runtime.refuses(
        "famba_match", Match, *feature.shape, r, 0 if protected is None else protected.shape[1],
        *map(runtime.pointer, (feature, protected, *found)),
    ):  # fmt: skip
        raise InputError(f"protected: not all positions are in 0..{feature.shape[1] - 1}, or not {r} pairs are left")
    return found


register("match(Tensor feature, Tensor? protected, SymInt r) -> (Tensor, Tensor, Tensor)", _match, match_fake, "CPU")

"""How tokens fuse: the options of fusion, each independent of the others. No torch."""

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints

from famba.errors import InputError


@dataclass(frozen=True)
class FusionOptions:
    """How two tokens become one.

    Attributes:
        order: `scan` keeps the survivors in scan order; `append` puts the unmerged even tokens first, then the
            odd ones (ToMe's order, and that of the public Famba-V code).
        weighting: `size` weighs a token by the patches it stands for; `mean` counts each token once.
        feature: what similarity compares: the normed tokens, the residual stream, or the scan's step, B or C.
        position: fuse before the mixer, or after the scan and gate, before the output projection (Famba-V figure 1).
        matching: pair tokens by `similarity`; or, as controls that ignore the features, at `random` or with the
            `adjacent` token.
        reduction: a pair becomes its `mean`; or, as a control, the source token is dropped (`drop`) and the target
            stays as it is. In both the target's size counts the source's patches.

    Raises:
        InputError: a value that is not allowed; names the option, the value and what is allowed.
    """

    order: Literal["scan", "append"] = "scan"
    weighting: Literal["size", "mean"] = "size"
    feature: Literal["normed", "residual", "delta", "B", "C"] = "normed"
    position: Literal["before_mixer", "after_scan"] = "before_mixer"
    matching: Literal["similarity", "random", "adjacent"] = "similarity"
    reduction: Literal["mean", "drop"] = "mean"

    def __post_init__(self) -> None:
        for option in fields(self):
            value, allowed = getattr(self, option.name), levels(option.name)
            if value not in allowed:
                raise InputError(f"{option.name}: {value!r} is not one of {', '.join(allowed)}")


_LEVELS = {name: get_args(hint) for name, hint in get_type_hints(FusionOptions).items()}


def levels(factor: str) -> tuple[str, ...]:
    """The values that an option of fusion can take."""
    return _LEVELS[factor]

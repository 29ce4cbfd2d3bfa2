"""Cross-layer fusion strategies (Famba-V section 3.2): a strategy's name becomes a schedule, a list of ints.

A schedule holds the tokens removed by each layer. The model takes a schedule and never sees a name. Layers count
from 1, as in the paper. Here `t` is a number of tokens and `r` the tokens removed by one layer. Ints only, no torch.
"""

from collections.abc import Sequence

from famba.errors import InputError
from famba.params import STRATEGIES, FusionRule

# The paper's lower and upper strategies fuse in 19 of 24 layers; at another depth the same share is the default.
_FUSED_SHARE = 19 / 24


def schedule(
    strategy: str,
    *,
    depth: int,
    r: int | None = None,
    total: int | None = None,
    first_layer: int | None = None,
    last_layer: int | None = None,
) -> list[int]:
    """Tokens removed by each layer, layer 1 first.

    `all` fuses in every layer, `interleaved` in every second one (2, 4, ..), `lower` in the first 19/24 of the
    layers, `upper` in the last 19/24, `none` nowhere. With r = 7, 14, 9, 9 at depth 24 these are the schedules of
    the paper's Table 1.

    Args:
        r: tokens removed by each fusing layer.
        total: instead of r, tokens removed by all layers together: the one r whose sum comes nearest is taken
            (the smaller of two equally near).
        first_layer, last_layer: fuse only among these layers, both included.

    Raises:
        InputError: unknown strategy; not exactly one of r and total (`none` needs neither); a layer outside
            1..depth; no layer left to fuse in.
    """
    layers = fused_layers(strategy, depth=depth, first_layer=first_layer, last_layer=last_layer)
    if strategy == "none":
        if r or total:
            raise InputError(f"strategy 'none' removes no tokens; r = {r}, total = {total} must be 0 or left out")
        return [0] * depth
    if (r is None) == (total is None):
        raise InputError(f"strategy {strategy!r}: r = {r}, total = {total}; exactly one of the two must be given")
    for key, value in {"r": r, "total": total}.items():
        if value is not None and value < 0:
            raise InputError(f"strategy {strategy!r}: {key} = {value}; must be 0 or more")
    if not layers:
        raise InputError(
            f"strategy {strategy!r}: no layer to fuse in among {first_layer or 1}..{last_layer or depth} of {depth}"
        )
    if r is None:
        assert total is not None
        low = total // len(layers)
        r = min((low, low + 1), key=lambda candidate: abs(candidate * len(layers) - total))
    return [r if layer in layers else 0 for layer in range(1, depth + 1)]


def fused_layers(
    strategy: str, *, depth: int, first_layer: int | None = None, last_layer: int | None = None
) -> list[int]:
    """The layers in which a strategy fuses: the one place where a name means anything. Errors as in `schedule`."""
    if strategy not in STRATEGIES:
        raise InputError(f"strategy: {strategy!r} is not one of {', '.join(STRATEGIES)}")
    if depth < 1:
        raise InputError(f"depth: {depth}; must be 1 or more")
    for key, layer in {"first_layer": first_layer, "last_layer": last_layer}.items():
        if layer is not None and not 1 <= layer <= depth:
            raise InputError(f"strategy {strategy!r}: {key} = {layer}; must be in 1..{depth}")
    if strategy == "none":
        return []
    share = max(1, round(depth * _FUSED_SHARE))
    first = first_layer if first_layer is not None else (depth - share + 1 if strategy == "upper" else 1)
    last = last_layer if last_layer is not None else (share if strategy == "lower" else depth)
    step = 2 if strategy == "interleaved" else 1
    return [layer for layer in range(step, depth + 1, step) if first <= layer <= last]


def from_rule(strategy: str, rule: FusionRule, *, depth: int) -> list[int]:
    """The schedule of one entry of params.yaml's `fusion` section; errors as in `schedule`."""
    if rule.schedule is not None:
        if len(rule.schedule) != depth:
            raise InputError(
                f"fusion.{strategy}.schedule: {list(rule.schedule)} has {len(rule.schedule)} layers; the model {depth}"
            )
        return list(rule.schedule)
    return schedule(
        strategy,
        depth=depth,
        r=rule.r,
        total=rule.total,
        first_layer=rule.first_layer,
        last_layer=rule.last_layer,
    )


def token_counts(schedule: Sequence[int], tokens: int, *, protected: int = 1) -> list[int]:
    """Tokens at the input and after each layer's fusion: depth + 1 numbers.

    Args:
        schedule: tokens removed by each layer.
        tokens: sequence length at the input, class token included.
        protected: tokens that are never fused (the class token: 1).

    Raises:
        InputError: a layer would remove more than (t - protected) // 2 tokens, or fewer than none; names the
            layer, t and r. Never clamped: a clamped r is another experiment under the same name.
    """
    if not 0 <= protected <= tokens:
        raise InputError(f"protected: {protected}; must be in 0..{tokens}, the number of tokens")
    counts = [tokens]
    for layer, r in enumerate(schedule, start=1):
        t = counts[-1]
        most = (t - protected) // 2
        if not 0 <= r <= most:
            raise InputError(f"layer {layer}: r = {r} of t = {t} tokens; allowed: 0..{most}")
        counts.append(t - r)
    return counts

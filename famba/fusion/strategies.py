"""Cross-layer fusion strategies (Famba-V section 3.2): a strategy's name becomes a schedule, a list of ints.

A schedule holds the tokens removed by each layer. The model takes a schedule and never sees a name. Layers count
from 1, as in the paper. Here `t` is a number of tokens and `r` the tokens removed by one layer. No torch.

One strategy is not the paper's: `adaptive` spends a budget where a table says that fusing costs least
(famba.analysis.calibration measures such tables). Its `costs` hold one row for each layer, whose entry r is what fusing
r tokens there costs.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from famba.errors import InputError

Strategy = Literal["none", "all", "interleaved", "lower", "upper"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
ADAPTIVE = "adaptive"  # made from calibration data, so no strategy that a name alone gives a schedule to

Costs = Sequence[Sequence[float | int]]
# The paper's lower and upper strategies fuse in 19 of 24 layers; at another depth the same share is the default.
_FUSED_SHARE = 19 / 24


def is_whole(value: object) -> bool:
    """Asked in two ways: torch.compile knows an int's type where its value is open, but not its methods."""
    return not isinstance(value, bool) and (isinstance(value, int) or hasattr(value, "__index__"))


def ordered(names: Collection[str]) -> list[str]:
    """Each name once: the paper's strategies in their fixed order, then a user's own as they come."""
    own = [name for name in dict.fromkeys(names) if name not in STRATEGIES]
    return [*(name for name in STRATEGIES if name in set(names)), *own]


def schedule(
    strategy: str,
    *,
    depth: int,
    r: int | None = None,
    total: int | None = None,
    first_layer: int | None = None,
    last_layer: int | None = None,
    costs: Costs | None = None,
    tokens: int | None = None,
) -> list[int]:
    """Tokens removed by each layer, layer 1 first.

    `all` fuses in every layer, `interleaved` in every second one (2, 4, ..), `lower` in the first 19/24 of the
    layers, `upper` in the last 19/24, `none` nowhere. With r = 7, 14, 9, 9 at depth 24 these are the schedules of
    the paper's Table 1. `adaptive` removes exactly `total` tokens at the least cost, as `adaptive` below says.

    Args:
        r: tokens removed by each fusing layer.
        total: instead of r, tokens removed by all layers together: the one r whose sum comes nearest is taken
            (the smaller of two equally near).
        first_layer, last_layer: fuse only among these layers, both included.
        costs, tokens: of `adaptive` alone, which needs them: the table, and the sequence's length at the input.

    Raises:
        InputError: arguments that the strategy does not take, or that leave no layer to fuse in.
    """
    numbers = {"depth": depth, "r": r, "total": total, "first_layer": first_layer, "last_layer": last_layer}
    for key, value in numbers.items():
        if value is not None and not is_whole(value):
            raise InputError(f"{key}: {value!r}; must be a whole number")
    if strategy == ADAPTIVE:
        given = {"r": r, "first_layer": first_layer, "last_layer": last_layer}
        if wrong := [key for key, value in given.items() if value is not None]:
            raise InputError(f"strategy 'adaptive': {wrong[0]} = {given[wrong[0]]}; its layers and r follow from costs")
        if costs is None or tokens is None or total is None:
            needed = {"total": total, "costs": costs, "tokens": tokens}
            missing = next(key for key, value in needed.items() if value is None)
            raise InputError(f"strategy 'adaptive': {missing}: missing; it needs total, costs and tokens")
        if len(costs) != depth:
            raise InputError(f"strategy 'adaptive': costs: {len(costs)} rows; must be one for each of {depth} layers")
        return adaptive(costs, total=total, tokens=tokens)
    if costs is not None or tokens is not None:
        raise InputError(f"strategy {strategy!r}: costs and tokens are given; only 'adaptive' takes them")
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


def adaptive(costs: Costs, *, total: int, tokens: int, protected: int = 1) -> list[int]:
    """The schedule that removes `total` tokens at the least sum of its layers' costs.

    Exact, by dynamic programming over layers and tokens removed so far: a greedy choice would need costs that rise with
    every token, and could use up tokens early that a cheaper layer then lacks. What a layer costs is taken to depend on
    its own r alone, not on what was fused before it. Of equally cheap schedules, the one that fuses earlier.

    Args:
        costs: by layer and r; a layer is never asked for more than its row has.
        total: tokens removed by all layers together.
        tokens, protected: as in `token_counts`, whose limit holds at every layer.
    """
    if total < 0:
        raise InputError(f"strategy 'adaptive': total = {total}; must be 0 or more")
    best, taken = _tabulate(costs, [0] * len(costs), tokens, protected)
    reached = np.flatnonzero(np.isfinite(best[:, 0]))
    if total not in reached:
        raise InputError(
            f"strategy 'adaptive': total = {total}; of {tokens} tokens these costs let at most {reached[-1]} go"
        )
    return _traced_back(taken, [0] * len(costs), total, 0)


def frontier(costs: Costs, *, tokens: int, protected: int = 1) -> Iterator[list[int]]:
    """The schedules that no other beats in both cost and work, the cheapest and least saving first.

    Work is the sum over layers of the tokens that each leaves to its mixer, to which time and memory are nearly
    proportional; so it counts where a token goes, not only that it goes. Exact, as `adaptive`; other arguments and
    errors are its own.
    """
    depth = len(costs)
    weights = list(range(depth, 0, -1))  # a token that goes in layer 1 is missing in all layers
    best, taken = _tabulate(costs, weights, tokens, protected)
    cheapest = best.min(axis=0)
    # the least cost of saving more than that
    beyond = np.append(np.minimum.accumulate(cheapest[::-1])[::-1][1:], np.inf)
    for saved in np.flatnonzero(cheapest < beyond):
        yield _traced_back(taken, weights, int(best[:, saved].argmin()), int(saved))


def _tabulate(
    costs: Costs, weights: Sequence[int], tokens: int, protected: int
) -> tuple[Float[np.ndarray, "removed saved"], list[Int[np.ndarray, "removed saved"]]]:
    """The least cost of every number of tokens removed and of work saved, and what each layer takes for it.

    Args:
        weights: work saved by each token that a layer removes.
    """
    for layer, row in enumerate(costs, start=1):
        if not len(row) or not all(map(math.isfinite, row)):
            raise InputError(f"costs: layer {layer}: {list(row)} must be finite numbers, one for each r from 0")
    most = max(0, tokens - protected)
    best = np.full((most + 1, most * max(weights, default=0) + 1), np.inf)
    best[0, 0] = 0
    taken: list[np.ndarray] = []
    for row, weight in zip(costs, weights, strict=True):
        following, take = best + row[0], np.zeros(best.shape, dtype=np.int32)
        for r in range(1, min(len(row) - 1, most // 2) + 1):
            # r of t = tokens - removed fit where removed <= tokens - protected - 2 r, and t = 3 allows none
            fits, shift = most - 2 * r + (r > 1 or protected != 1), r * weight
            candidate = best[:fits, : best.shape[1] - shift] + row[r]
            there = (slice(r, r + fits), slice(shift, None))
            better = candidate < following[there]
            following[there][better] = candidate[better]
            take[there][better] = r
        best = following
        taken.append(take)
    return best, taken


def _traced_back(taken: Sequence[np.ndarray], weights: Sequence[int], removed: int, saved: int) -> list[int]:
    schedule = []
    for take, weight in zip(reversed(taken), reversed(weights), strict=True):
        r = int(take[removed, saved])
        schedule.append(r)
        removed, saved = removed - r, saved - r * weight
    return schedule[::-1]


def token_counts(schedule: Sequence[int], tokens: int, *, protected: int = 1) -> list[int]:
    """Tokens at the input and after each layer's fusion: depth + 1 numbers.

    Args:
        tokens: sequence length at the input, class token included.
        protected: tokens that are never fused (the class token: 1).

    Raises:
        InputError: a layer would remove more than (t - protected) // 2 tokens, or fewer than none; names the
            layer, t and r. Never clamped: a clamped r is another experiment under the same name. Of 3 tokens none can
            go where one is protected: it may stand between the others, which leaves no pair of even and odd.
    """
    if not 0 <= protected <= tokens:
        raise InputError(f"protected: {protected}; must be in 0..{tokens}, the number of tokens")
    counts = [tokens]
    for layer, r in enumerate(schedule, start=1):
        t = counts[-1]
        most = 0 if t == 3 and protected else (t - protected) // 2
        if not is_whole(r):
            raise InputError(f"layer {layer}: r = {r}; must be a whole number")
        if not 0 <= r <= most:
            raise InputError(f"layer {layer}: r = {r} of t = {t} tokens; allowed: 0..{most}")
        counts.append(t - r)
    return counts

"""Times of calls that take turns, so that a busy machine slows all alike; and what is reported of them."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    turn_s: float = 0.0,
    budget_s: float = math.inf,
    finish: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every call in every round: in each round all calls have a turn, every other round in reverse order.

    What runs before a call leaves its mark on caches and heap; in reverse it is another.

    Args:
        turn_s: a call that is over sooner is made again until its turn has lasted this long, and its mean counts:
            what is called over and over in use does not start with another's caches and heap each time.
        budget_s: a call that has used up this much, the warm-up apart, sits out the rounds after its second.
        finish: waits for what calls have only started, as on a GPU. Calls of one turn are then made in rows, each as
            long as all before it, and waited for at the end of a row: as in use, the next is started meanwhile.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(warmup + rounds):
        for name, call in list(calls.items())[:: -1 if i % 2 else 1]:
            if len(times[name]) >= 2 and sum(times[name]) > budget_s:
                continue
            start, made, lasted = time.perf_counter(), 0, 0.0
            while not made or lasted < turn_s:
                row = max(1, made) if finish else 1
                for _ in range(row):
                    call()
                if finish:
                    finish()
                made, lasted = made + row, time.perf_counter() - start
            if i >= warmup:
                times[name].append(lasted / made)
    return times


def summary(seconds: Sequence[float]) -> dict[str, float | int]:
    """Median, least and number of times; the least is what a busy machine disturbs less."""
    return {
        "median_ms": statistics.median(seconds) * 1e3,
        "least_ms": min(seconds) * 1e3,
        "rounds": len(seconds),
    }


def ratio(one: Mapping[str, float | int], other: Mapping[str, float | int], name: str) -> dict[str, float]:
    """One summary in units of another, under this name: of the medians, and of the least times."""
    return {
        name: one["median_ms"] / other["median_ms"],
        f"{name}_least": one["least_ms"] / other["least_ms"],
    }

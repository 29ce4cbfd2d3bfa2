"""Times of calls that take turns, so that a busy machine slows all of them equally, and tables of the results."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch

from famba.errors import InputError

_T = TypeVar("_T")
Left = list[dict[str, str]]  # what was left out, each with its reason


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    turn_s: float = 0.0,
    budget_s: float = math.inf,
    finish: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every call in every round: each round gives all calls a turn, every other round in reverse order.

    A call leaves caches and heap to the next one; reversing the order changes which one gets them.

    Args:
        turn_s: a shorter call is repeated until its turn has lasted this long, and its mean counts, because repeated
            calls in use do not start with another call's caches each time.
        budget_s: a call that has used more, warm-up excluded, is skipped after its second round.
        finish: waits for asynchronous work, as on a GPU. A turn then doubles the number of calls between two waits, so
            that the next call is launched while the device works, as in use.
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
    """Median, minimum (least sensitive to a busy machine) and number of times."""
    return {"median_ms": statistics.median(seconds) * 1e3, "least_ms": min(seconds) * 1e3, "rounds": len(seconds)}


def ratio(one: Mapping[str, float | int], other: Mapping[str, float | int], name: str) -> dict[str, float]:
    """One summary over another under this name: of the medians, and of the minima."""
    return {name: one["median_ms"] / other["median_ms"], f"{name}_least": one["least_ms"] / other["least_ms"]}


def tried(makes: Mapping[str, Callable[[], _T]], left: Left, of: str = "") -> dict[str, _T]:
    """What each of these makes; one that raises goes to `left` with its reason."""
    found: dict[str, _T] = {}
    for name, make in makes.items():
        try:
            found[name] = make()
        except Exception as error:  # whatever kernels, compilers and drivers raise; the others continue
            message = (str(error).strip().splitlines() or [""])[0]
            left.append({"what": of + name, "reason": f"{type(error).__name__}: {message}"})
        torch.cuda.empty_cache()
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows for a terminal, without the columns of minima in ms."""
    frame = pd.DataFrame(rows)
    frame = frame[[name for name in frame if not str(name).endswith("_least_ms")]]
    floats: Any = lambda x: f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}"  # noqa: E731 (typed as a string by pandas' stubs)
    return frame.to_string(index=False, na_rep="", float_format=floats)


def predicted_ms(counts: Sequence[int], unfused_ms: Mapping[int, float]) -> float:
    """Time of a step with these token counts by layer, from the times of steps without fusion by length.

    Each layer costs 1 / depth of a step of its length, interpolated between the two nearest measured lengths. What does
    not depend on the length, mostly the optimiser, is thus counted once; the patch embedding slightly less.

    Raises:
        InputError: a length outside the measured ones.
    """
    lengths = sorted(unfused_ms)
    for t in counts:
        if not lengths[0] <= t <= lengths[-1]:
            raise InputError(f"counts: {t} tokens; measured were {lengths[0]}..{lengths[-1]}")
    return float(np.mean(np.interp(counts, lengths, [unfused_ms[t] for t in lengths])))

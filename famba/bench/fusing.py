"""What fusing costs: of one layer's time, and of a whole step's beyond what the token counts alone promise."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from famba.bench.model import Training
from famba.bench.setting import Setting
from famba.bench.timing import ratio
from famba.errors import InputError
from famba.fusion import merge
from famba.fusion.matching import Matching, match_tokens
from famba.kernels import precision


def bench_layer(setting: Setting) -> list[dict[str, Any]]:
    """Matching, planning and fusing normed tokens and residual in one layer, and that layer without it.

    Forward and backward at the model's full length; `layer` is the time in units of the layer's. One row for each
    step of fusing and each number of tokens that a strategy removes.
    """
    training = Training(setting)
    block, t = training.model.layers[0], training.model.tokens
    norm, mixer = block.get_submodule("norm"), block.get_submodule("mixer")
    d = training.model.head.in_features
    hidden, residual, to_hidden, to_residual = torch.randn(4, setting.batch, t, d, device=setting.device).unbind()
    inputs = [hidden.requires_grad_(), residual.requires_grad_()]
    weights = list(block.parameters())
    at = training.model.cls_index
    cls_index = None if at is None else torch.full((setting.batch,), at, device=setting.device)
    size = torch.ones(setting.batch, t, device=setting.device)

    def layer() -> None:
        with precision.autocast(hidden.device, setting.precision):
            normed, total = norm(hidden, residual)
            mixed = mixer(normed)
        torch.autograd.grad((mixed, total), [*inputs, *weights], (to_hidden.to(mixed.dtype), to_residual))

    def steps(r: int) -> dict[str, Callable[[], object]]:
        def match() -> Matching:
            return match_tokens(hidden, r, protected=() if cls_index is None else cls_index)

        def apply(plan: merge.Plan) -> None:
            fused = merge.apply_both(plan, hidden, residual)
            torch.autograd.grad(fused, inputs, to_fused)

        def whole() -> None:
            plan = merge.plan(match(), size)
            apply(plan)
            if cls_index is not None:
                plan.destination.gather(1, cls_index[:, None])

        to_fused = [x[:, r:].contiguous() for x in (to_hidden, to_residual)]  # dense, as a layer's gradients are
        matching = match()
        plan = merge.plan(matching, size)
        return {
            f"match, r = {r}": match,
            f"plan, r = {r}": lambda: merge.plan(matching, size),
            f"apply, r = {r}": lambda: apply(plan),
            f"all of it, r = {r}": whole,
        }

    calls: dict[str, Callable[[], object]] = {"layer": layer}
    for r in sorted(set(setting.removed.values())):
        calls |= steps(r)
    found = setting.times(calls, rounds=4 * setting.rounds, warmup=3)
    return [{"what": name, **row, **ratio(row, found["layer"], "layer")} for name, row in found.items()]


def bench_schedules(setting: Setting) -> dict[str, list[dict[str, Any]]]:
    """Training steps with tokens fused, in turn with steps that fuse nothing at several image sizes.

    Returns:
        three tables. `lengths`: a step's time by its number of tokens, nothing fused. `schedules`: for each strategy
        the step's time, and in units of what `predicted_ms` says of its token counts. `uniform`: where all layers
        remove the same few tokens, the step's time in units of the unfused one's.
    """
    lengths = [Training(setting, img_size=size) for size in sorted(setting.img_sizes, reverse=True)]
    full = lengths[0]
    schedules = setting.schedules(full.model.depth)
    uniform = {r: [r] * full.model.depth for r in setting.uniform}

    calls: dict[str, Callable[[], object]] = {f"{x.model.tokens} tokens": x.step for x in lengths}
    for name, schedule in [*schedules.items(), *((f"r = {r}", x) for r, x in uniform.items())]:
        calls[name] = lambda schedule=schedule: full.step(schedule)
    found = setting.times(calls, rounds=setting.rounds)

    unfused = {x.model.tokens: found[f"{x.model.tokens} tokens"] for x in lengths}
    rows = []
    for name, schedule in schedules.items():
        full.model.set_fusion(schedule, full.model.options)
        counts = full.model.token_counts[1:]
        predicted = {key: predicted_ms(counts, {t: x[key] for t, x in unfused.items()}) for key in _TIMES}
        rows.append(
            {
                "strategy": name,
                "r": setting.removed[name],
                "mean_tokens": float(np.mean(counts)),
                **found[name],
                "predicted_median_ms": predicted["median_ms"],
                "predicted_least_ms": predicted["least_ms"],
                **ratio(found[name], predicted, "of_predicted"),
                **ratio(found[name], unfused[full.model.tokens], "of_unfused"),
            }
        )
    return {
        "lengths": [{"tokens": t, **x} for t, x in unfused.items()],
        "schedules": rows,
        "uniform": [
            {"r": r, **found[f"r = {r}"], **ratio(found[f"r = {r}"], unfused[full.model.tokens], "of_unfused")}
            for r in uniform
        ],
    }


_TIMES = ("median_ms", "least_ms")


def predicted_ms(counts: Sequence[int], unfused_ms: Mapping[int, float]) -> float:
    """The time of a step that mixes so many tokens in each layer, from that of steps that fuse nothing.

    Each layer costs its share, one in depth, of a step that has its number of tokens throughout: between two measured
    lengths on a straight line. What does not depend on the length, the optimiser above all, is so counted once; the
    embedding of all patches a little less than once.

    Raises:
        InputError: a length outside those that were measured.
    """
    lengths = sorted(unfused_ms)
    for t in counts:
        if not lengths[0] <= t <= lengths[-1]:
            raise InputError(f"counts: {t} tokens; measured were {lengths[0]}..{lengths[-1]}")
    return float(np.mean(np.interp(counts, lengths, [unfused_ms[t] for t in lengths])))


def break_even(uniform: Sequence[Mapping[str, Any]]) -> int | None:
    """The fewest tokens, removed by every layer, with which a step is faster than without; None if none is."""
    return min((row["r"] for row in uniform if row["of_unfused"] < 1), default=None)

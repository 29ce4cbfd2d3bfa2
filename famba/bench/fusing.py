"""What fusing costs: relative to one layer, and in a whole step beyond what the token counts alone predict."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from famba.bench.model import Setting, Training
from famba.bench.timing import predicted_ms, ratio
from famba.fusion import merge
from famba.fusion.matching import Matching, match_tokens
from famba.kernels import precision


def bench_layer(setting: Setting) -> list[dict[str, Any]]:
    """Matching, planning and merging of normed tokens and residual, forward and backward, at full length.

    One row for each step of fusing and each r of a strategy; `layer` is relative to the layer without fusion.
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
            torch.autograd.grad(merge.apply_both(plan, hidden, residual), inputs, to_fused)

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
            f"all steps, r = {r}": whole,
        }

    calls: dict[str, Callable[[], object]] = {"layer": layer}
    for r in sorted(set(setting.removed.values())):
        calls |= steps(r)
    found = setting.times(calls, rounds=4 * setting.rounds, warmup=3)
    return [{"what": name, **row, **ratio(row, found["layer"], "layer")} for name, row in found.items()]


def bench_schedules(setting: Setting) -> dict[str, list[dict[str, Any]]]:
    """Training steps with fusion, in turn with steps without fusion at several image sizes.

    Returns:
        three tables. `lengths`: time by number of tokens, without fusion. `schedules`: time of each strategy, relative
        to the prediction and to the step without fusion. `uniform`: the same number of tokens removed by each layer,
        relative to the step without fusion.
    """
    lengths = {x.model.tokens: x for x in (Training(setting, img_size=size) for size in setting.img_sizes)}
    full = lengths[max(lengths)]
    schedules = setting.schedules(full.model.depth)
    uniform = {f"r = {r}": [r] * full.model.depth for r in setting.uniform}
    calls: dict[str, Callable[[], object]] = {str(t): x.step for t, x in lengths.items()}
    for name, schedule in (schedules | uniform).items():
        calls[name] = lambda schedule=schedule: full.step(schedule)
    found = setting.times(calls, rounds=setting.rounds)

    def of_unfused(name: str) -> dict[str, Any]:
        return {**found[name], **ratio(found[name], found[str(max(lengths))], "of_unfused")}

    rows = []
    for name, schedule in schedules.items():
        full.model.set_fusion(schedule, full.model.options)
        counts = full.model.token_counts[1:]
        predicted = {
            key: predicted_ms(counts, {t: found[str(t)][key] for t in lengths}) for key in ("median_ms", "least_ms")
        }
        row = {"strategy": name, "r": setting.removed[name], "mean_tokens": float(np.mean(counts))}
        row |= {f"predicted_{key}": x for key, x in predicted.items()}
        rows.append(row | of_unfused(name) | ratio(found[name], predicted, "of_predicted"))
    return {
        "lengths": [{"tokens": t, **found[str(t)]} for t in sorted(lengths, reverse=True)],
        "schedules": rows,
        "uniform": [{"r": r, **of_unfused(f"r = {r}")} for r in setting.uniform],
    }


def break_even(uniform: Sequence[Mapping[str, Any]]) -> int | None:
    """The smallest r per layer with which a step is faster than without fusion; None if there is none."""
    return min((row["r"] for row in uniform if row["of_unfused"] < 1), default=None)

"""What fusing costs at each layer of a trained model, and the schedule that a budget buys there.

`b` images, `t` tokens, `r` tokens fused by one layer. Costs are measured on models that were trained without fusion,
each layer alone: its tokens are fused, all other layers' are not. What a layer costs when those before it have fused
too is not known from that; the schedule takes the costs to add up. Nothing here is random.

Two measures: how unlike the matched tokens are (Token Merging, arXiv:2210.09461, fuses the most similar ones), and what
fusing them does to the model's answer.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from famba import data
from famba.analysis import trained
from famba.errors import InputError
from famba.fusion import strategies
from famba.fusion.options import FusionOptions
from famba.fusion.strategies import ADAPTIVE
from famba.models.vim import VisionMamba
from famba.params import AdaptiveRule, DataParams
from famba.profiling import flops
from famba.profiling.flops import Cost

KINDS = ("similarity", "logits")  # what fusing costs: the measures
_BATCH = 128  # images at a time
_Step = Callable[[Sequence[int]], Cost]  # what a training step with a schedule takes


@dataclass(frozen=True)
class Plan:
    """A schedule and where it comes from.

    Attributes:
        kind: the measure of what fusing costs, one of `KINDS`.
        rule: the budget.
        schedule: tokens removed by each layer, layer 1 first.
        memory_share, flops_share: predicted peak memory of a training step, and FLOPs of a forward pass with its scans,
            in units of the unfused model's.
        costs: by layer and r.
        runs: the name of the folder of the run that it was measured on.
        images: how many of its validation images.
    """

    kind: str
    rule: AdaptiveRule
    schedule: list[int]
    memory_share: float
    flops_share: float
    costs: list[list[float]]
    runs: list[str]
    images: int


def plan(folder: str | Path, rule: AdaptiveRule, *, kind: str, count: int) -> Plan:
    """The schedule that a budget buys by the costs of a finished run.

    The images are of the run's own validation split; the test split is not touched.

    Args:
        folder: of a run or of a published model, as `trained.load` takes it.
        kind: one of `KINDS`; `fusing_costs` says what they are.
        count: images, evenly spread over the split; the whole split if it has fewer.

    Raises:
        InputError: a run that is missing or spoilt, or was trained with fusion; a budget that no schedule keeps.
    """
    model, known = trained.load(folder)
    if any(known["schedule"]):
        raise InputError(f"{folder}: strategy {known['strategy']!r} fuses tokens; calibration needs one of 'none'")
    params, asked = known["params"], known["params"]["train"]
    if asked["threads"]:
        torch.set_num_threads(asked["threads"])  # sums in another order could tip a choice
    split = data.load(DataParams(**params["data"]), seed=known["seed"]).val
    chosen = torch.linspace(0, len(split) - 1, min(count, len(split))).round().long()
    images = data.normalise(split.images[chosen], known["mean"], known["std"])
    costs = fusing_costs(model, images, kind=kind)
    options = {"options": FusionOptions(**params["options"]), "precision": asked["precision"]}
    # By formula, with the memory of the plain torch scan: every machine makes the same schedule.
    step = functools.partial(flops.analyse, model.config, batch=asked["batch_size"], **options)
    schedule = within(rule, costs, step, protected=int(model.cls_index is not None))
    shares = {f"{key}_share": share(step, key, schedule) for key in ("memory", "flops")}
    return Plan(kind, rule, schedule, costs=costs, runs=[Path(folder).name], images=len(chosen), **shares)


def markdown(plans: Sequence[Plan], schedules: Mapping[str, Sequence[int]]) -> str:
    """What each schedule costs by each plan's table, and whether params.yaml has the schedules that the plans found.

    Args:
        schedules: by the strategy's name.
    """
    found = {f"found by {plan.kind}": plan.schedule for plan in plans}
    named = {**schedules, **{name: x for name, x in found.items() if list(x) not in map(list, schedules.values())}}
    rows = [
        {
            "schedule": name,
            "tokens removed by each layer": " ".join(map(str, removed)),
            **{
                f"cost by {plan.kind}": f"{sum(x[r] for x, r in zip(plan.costs, removed, strict=True)):.3f}"
                for plan in plans
            },
        }
        for name, removed in named.items()
    ]
    said, first = [], plans[0]
    for plan in plans:
        name = f"by_{plan.kind}"
        same = "which is" if list(schedules[name]) == plan.schedule else "not"
        said.append(f"By {plan.kind}, calibration finds {' '.join(map(str, plan.schedule))}, {same} `{name}`.")
    asked = {key: value for key, value in dataclasses.asdict(first.rule).items() if value is not None}
    budget = ", ".join(f"`{key}: {value}`" for key, value in asked.items())
    basis = f"Budget: {budget}. Costs: of {first.images} validation images, in {', '.join(first.runs)}."
    table = pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
    return "\n\n".join([table, "\n".join(said), basis]) + "\n"


@torch.no_grad()
def fusing_costs(model: VisionMamba, images: Float[Tensor, "b 3 h w"], *, kind: str) -> list[list[float]]:
    """For each layer, what fusing r = 0, 1, .. of the unfused sequence's tokens there costs, mean over images.

    `similarity`: the sum over the r best pairs of 1 - cosine similarity, so that a pair's own is the price of one token
    more; one forward pass for each layer. `logits`: the Kullback-Leibler divergence, in nats, of the class
    probabilities from those without fusion; r = 1, 2, 3, 4, 6, 8, 11, 16, .. and the most are measured, those between
    interpolated.

    Args:
        model: its weights, and how it fuses (`options`); its schedule does not matter. It is left as it is.
        images: normalised, and not those that it was trained on.

    Raises:
        InputError: `similarity` of a model that matches tokens by something else.
    """
    if kind == "similarity" and model.options.matching != "similarity":
        raise InputError(f"kind: 'similarity': options.matching {model.options.matching!r} compares no tokens")
    measure = _unlike if kind == "similarity" else _answer_changes
    model = copy.deepcopy(model).eval()
    most = (model.tokens - int(model.cls_index is not None)) // 2
    return [[0.0, *measure(model, images, layer, most)] for layer in range(model.depth)]


def within(rule: AdaptiveRule, costs: strategies.Costs, step: _Step, *, protected: int) -> list[int]:
    """The cheapest schedule within a budget.

    Tokens are spent to the last one. A share of memory or FLOPs is kept by the cheapest schedule of
    `strategies.frontier` whose predicted share is within it.

    Args:
        costs: as from `fusing_costs`.
        protected: tokens that are never fused.

    Raises:
        InputError: a budget that no schedule keeps; names it and the nearest.
    """
    tokens = step([0] * len(costs)).token_counts[0]
    if rule.total is not None:
        return strategies.adaptive(costs, total=rule.total, tokens=tokens, protected=protected)
    key, limit = ("memory", rule.memory) if rule.memory is not None else ("flops", rule.flops)
    assert limit is not None
    least = 1.0
    for schedule in strategies.frontier(costs, tokens=tokens, protected=protected):
        predicted = share(step, key, schedule)
        if predicted <= limit:
            return schedule
        least = min(least, predicted)
    raise InputError(f"fusion.{ADAPTIVE}.{key}: {limit}; the least that fusing can reach here is {least:.3f}")


def share(step: _Step, key: str, schedule: Sequence[int]) -> float:
    """Of the unfused step's peak `memory`, or of its forward `flops`, scans included, what a schedule leaves."""
    fused, unfused = step(schedule), step([0] * len(schedule))
    return fused.peak_bytes / unfused.peak_bytes if key == "memory" else fused.flops / unfused.flops


def _unlike(model: VisionMamba, images: Tensor, layer: int, most: int) -> list[float]:
    """1 - similarity, summed over the 1, 2, .. best pairs: fusing as many as there are shows them all, best first."""
    _fuse_at(model, layer, most)
    total = torch.zeros(most, dtype=torch.float64)
    for batch in images.split(_BATCH):
        _, trace = model.forward_with_trace(batch)
        matching = trace.matchings[layer]
        assert matching is not None
        assert matching.similarity is not None
        total += (1 - matching.similarity.double()).sum(0).cpu()
    return (total.cumsum(0) / len(images)).tolist()


def _answer_changes(model: VisionMamba, images: Tensor, layer: int, most: int) -> list[float]:
    measured = [0, *sorted({min(most, round(2 ** (power / 2))) for power in range(2 * most.bit_length() + 1)})]
    answers: list[Tensor] = []
    for r in measured:
        _fuse_at(model, layer, r)
        answers.append(torch.cat([model(batch).double().log_softmax(-1) for batch in images.split(_BATCH)]))
    change = [functional.kl_div(x, answers[0], reduction="batchmean", log_target=True).item() for x in answers]
    return np.interp(range(1, most + 1), measured, change).tolist()


def _fuse_at(model: VisionMamba, layer: int, r: int) -> None:
    model.set_fusion([r if at == layer else 0 for at in range(model.depth)], model.options)

"""Costs of fusing are those that a forward pass shows, and budgets are kept by the cheapest schedule."""

import dataclasses
import functools

import pytest
import torch
from test_tokens import untrained

from famba import config, create_model, data
from famba.analysis import calibration, trained
from famba.errors import InputError
from famba.fusion import strategies
from famba.params import AdaptiveRule
from famba.profiling import flops

SIZES = {"depth": 3, "d_model": 8, "d_state": 2, "num_classes": 5, "backend": "torch"}
TOKENS, MOST = 37, 18  # of vim_nano: 6 x 6 patches and the class token


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("vim_nano", schedule=[4, 0, 0], **SIZES)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def seen(model, images, schedule):
    again = create_model("vim_nano", schedule=schedule, **SIZES)
    again.load_state_dict(model.state_dict())
    return again.eval().forward_with_trace(images)


def test_similarity_costs_are_what_the_best_pairs_lack_of_being_alike(model, images):
    costs = calibration.fusing_costs(model, images, kind="similarity")
    assert [len(row) for row in costs] == [1 + MOST] * 3
    for layer in range(3):
        for r in (1, 5, MOST):
            _, trace = seen(model, images, [r if at == layer else 0 for at in range(3)])
            lacking = (1 - trace.matchings[layer].similarity).sum(1).mean().item()
            assert costs[layer][r] == pytest.approx(lacking, abs=1e-5)
    assert all(row[0] == 0 for row in costs)


def test_costs_by_the_logits_are_divergences_from_the_unfused_answer(model, images):
    costs = calibration.fusing_costs(model, images, kind="logits")
    unfused = seen(model, images, [0, 0, 0])[0].double().softmax(-1)
    for layer in range(3):
        for r in (1, 2, 3, 4, 6, 8, 11, 16, MOST):
            fused = seen(model, images, [r if at == layer else 0 for at in range(3)])[0].double().log_softmax(-1)
            divergence = (unfused * (unfused.log() - fused)).sum(1).mean().item()
            assert costs[layer][r] == pytest.approx(divergence, rel=1e-3, abs=1e-9)
            assert divergence > 0
        assert costs[layer][7] == pytest.approx((costs[layer][6] + costs[layer][8]) / 2)


def test_calibration_leaves_the_model_alone_and_repeats_itself(model, images):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    first = calibration.fusing_costs(model, images, kind="similarity")
    assert calibration.fusing_costs(model, images, kind="similarity") == first
    assert model.schedule == [4, 0, 0]
    assert model.training
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


COSTS = [[r * (1 + layer) ** 0.5 + r * r / 50 for r in range(1 + MOST)] for layer in range(3)]


def within(rule: AdaptiveRule, model) -> list[int]:
    step = functools.partial(flops.analyse, model.config, batch=4)
    return calibration.within(rule, COSTS, step, protected=1)


def price(schedule) -> float:
    return sum(row[r] for row, r in zip(COSTS, schedule, strict=True))


def test_a_budget_of_tokens_is_the_adaptive_strategys(model):
    expected = strategies.schedule("adaptive", depth=3, total=20, costs=COSTS, tokens=TOKENS)
    assert within(AdaptiveRule(total=20), model) == expected


@pytest.mark.parametrize("share", [1.0, 0.7])
def test_a_share_of_the_memory_is_kept_by_the_cheapest_schedule_of_the_frontier(model, share):
    schedule = within(AdaptiveRule(memory=share), model)

    def peak(removed) -> int:
        return flops.analyse(model.config, removed, batch=4).peak_bytes

    most = share * peak([0, 0, 0]) * (1 + 1e-12)
    kept = [plan for plan in strategies.frontier(COSTS, tokens=TOKENS) if peak(plan) <= most]
    assert schedule in kept
    assert price(schedule) == min(map(price, kept))
    assert (schedule == [0, 0, 0]) == (share == 1)


def test_a_share_of_the_flops_counts_the_scans_too(model):
    schedule = within(AdaptiveRule(flops=0.75), model)
    fused, whole = (flops.analyse(model.config, removed) for removed in (schedule, [0, 0, 0]))
    assert 0.7 < fused.flops / whole.flops <= 0.75


def test_a_share_that_no_schedule_keeps_is_refused_with_the_nearest(model):
    said = r"fusion\.adaptive\.memory: 0\.01; the least that fusing can reach here is 0\.\d"
    with pytest.raises(InputError, match=said):
        within(AdaptiveRule(memory=0.01), model)


def test_the_precision_of_training_counts_for_a_share_of_the_memory(model):
    steps = [functools.partial(flops.analyse, model.config, batch=4, precision=x) for x in ("fp32", "bf16")]
    shares = [calibration.share(step, "memory", [10, 5, 0]) for step in steps]
    assert shares[0] != shares[1]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("run"), "none", seed=0, weights=0)


def test_a_plan_says_what_it_was_made_from_and_what_it_saves(run_dir):
    plan = calibration.plan(run_dir, AdaptiveRule(total=20), kind="similarity", count=7)
    assert (plan.kind, plan.runs, plan.images) == ("similarity", ["none-0"], 7)
    assert sum(plan.schedule) == 20
    assert 0 < plan.memory_share < 1
    assert 0 < plan.flops_share < 1


def test_calibration_looks_at_validation_images_and_never_at_the_test_split(run_dir, monkeypatch):
    whole = data.load(config.load("smoke", strategy="none").data)
    blind = dataclasses.replace(whole, test=data.Split(whole.test.images[:0], whole.test.labels[:0]), train=whole.test)
    expected = calibration.plan(run_dir, AdaptiveRule(total=20), kind="similarity", count=9)
    monkeypatch.setattr(data, "load", lambda _, seed: blind)
    assert calibration.plan(run_dir, AdaptiveRule(total=20), kind="similarity", count=9) == expected


def test_a_run_that_fuses_is_no_ground_for_calibration(run_dir, monkeypatch):
    model, known = trained.load(run_dir)
    monkeypatch.setattr(trained, "load", lambda _: (model, known | {"schedule": [2, 0, 0, 0]}))
    with pytest.raises(InputError, match="needs one of 'none'"):
        calibration.plan(run_dir, AdaptiveRule(total=2), kind="similarity", count=2)


def test_the_table_prices_every_schedule_and_says_whether_params_yaml_has_the_one_that_was_found():
    costs = [[0.0, 1.0, 2.0, 3.0, 4.5], [0.0, 0.0, 0.5, 1.0, 2.0]]
    plan = calibration.Plan("logits", AdaptiveRule(total=4), [0, 4], 0.8, 0.9, costs, ["none-0"], 9)
    schedules = {"none": [0, 0], "lower": [3, 1], "by_logits": [0, 4]}
    text = " ".join(calibration.markdown([plan], schedules).split())
    assert "| lower | 3 1 | 3.000 |" in text
    assert "By logits, calibration finds 0 4, which is `by_logits`." in text
    assert "found by" not in text
    assert text.endswith("Budget: `total: 4`. Costs: of 9 validation images, in none-0.")
    text = " ".join(calibration.markdown([plan], schedules | {"by_logits": [1, 3]}).split())
    assert "By logits, calibration finds 0 4, not `by_logits`." in text
    assert "| by_logits | 1 3 | 2.000 |" in text
    assert "| found by logits | 0 4 | 2.000 |" in text

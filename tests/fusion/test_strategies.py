"""Strategy names become schedules: the paper's own, the same at other depths, and what is refused."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from refusals import refusal

from famba import config
from famba.errors import InputError
from famba.fusion.strategies import adaptive, frontier, fused_layers, schedule, token_counts
from famba.params import FusionRule


def test_the_papers_schedules_are_those_of_its_table_1():
    assert schedule("none", depth=24) == [0] * 24
    assert schedule("all", depth=24, r=7) == [7] * 24
    assert schedule("interleaved", depth=24, r=14) == [0, 14] * 12
    for layers in ({}, {"first_layer": 1, "last_layer": 19}):
        assert schedule("lower", depth=24, r=9, **layers) == [9] * 19 + [0] * 5
    for layers in ({}, {"first_layer": 6, "last_layer": 24}):
        assert schedule("upper", depth=24, r=9, **layers) == [0] * 5 + [9] * 19


@given(st.sampled_from(["all", "interleaved", "lower", "upper"]), st.integers(2, 60), st.integers(0, 500))
def test_no_other_r_comes_nearer_to_a_budget(strategy, depth, total):
    removed = schedule(strategy, depth=depth, total=total)
    assert len(removed) == depth
    layers = fused_layers(strategy, depth=depth)
    r = max(removed)
    assert removed == schedule(strategy, depth=depth, r=r)
    assert sum(removed) == r * len(layers), "layers that exist, each once"
    for other in (r - 1, r + 1):
        assert abs(other * len(layers) - total) >= abs(sum(removed) - total)


def test_first_and_last_layer_narrow_every_strategy():
    assert schedule("all", depth=6, r=1, first_layer=2, last_layer=4) == [0, 1, 1, 1, 0, 0]
    assert schedule("interleaved", depth=6, r=1, first_layer=3) == [0, 0, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"strategy": "middle", "depth": 4, "r": 1}, "'middle' is not one of none, all, interleaved, lower, upper"),
        ({"strategy": "all", "depth": 4}, "exactly one of the two"),
        ({"strategy": "all", "depth": 4, "r": 1, "total": 4}, "exactly one of the two"),
        ({"strategy": "all", "depth": 4, "r": -1}, "r = -1; must be 0 or more"),
        ({"strategy": "all", "depth": 4, "r": True}, "r: True; must be a whole number"),
        ({"strategy": "none", "depth": 4, "r": 2}, "removes no tokens"),
        ({"strategy": "upper", "depth": 4, "r": 2, "first_layer": 5}, "first_layer = 5; must be in 1..4"),
        ({"strategy": "all", "depth": 4, "r": 2, "first_layer": 3, "last_layer": 2}, "no layer to fuse in among 3..2"),
        ({"strategy": "all", "depth": 0, "r": 1}, "depth: 0"),
        ({"strategy": "adaptive", "depth": 1, "total": 1}, "costs: missing; it needs total, costs and tokens"),
        ({"strategy": "adaptive", "depth": 1, "r": 1}, "r = 1; its layers and r follow from costs"),
        ({"strategy": "adaptive", "depth": 2, "costs": [[0]], "tokens": 3, "total": 0}, "1 rows; must be one for each"),
        ({"strategy": "adaptive", "depth": 1, "costs": [[0, 1]], "tokens": 9, "total": 2}, "at most 1 go"),
        ({"strategy": "adaptive", "depth": 1, "costs": [[0, 1]], "tokens": 9, "total": -1}, "-1; must be 0 or more"),
        ({"strategy": "adaptive", "depth": 1, "costs": [[0, math.nan]], "tokens": 9, "total": 1}, "layer 1"),
        ({"strategy": "upper", "depth": 1, "r": 1, "costs": [[0, 1]]}, "only 'adaptive' takes them"),
    ],
)
def test_what_makes_no_schedule_is_refused_in_one_line(arguments, said):
    assert said in refusal(lambda: schedule(**arguments))


def test_an_r_that_is_too_large_names_layer_t_and_r():
    with pytest.raises(InputError, match=r"layer 2: r = 4 of t = 7 tokens; allowed: 0\.\.3"):
        token_counts([3, 4], 10)
    assert token_counts([3, 3], 10) == [10, 7, 4]
    with pytest.raises(InputError, match=r"layer 1: r = 1 of t = 3 tokens; allowed: 0\.\.0"):
        token_counts([1], 3)
    assert token_counts([1], 3, protected=0) == [3, 2]
    with pytest.raises(InputError, match="layer 1: r = True; must be a whole number"):
        token_counts([True], 10)


def test_the_parameters_give_a_schedule_outright_or_by_budget():
    p = config.load("smoke", strategy="all")
    outright = dataclasses.replace(p, fusion=FusionRule(schedule=(0, 2, 5)))
    assert outright.schedule(3) == [0, 2, 5]
    with pytest.raises(InputError, match=r"fusion\.all\.schedule: .* has 3 layers; the model has 4"):
        outright.schedule(4)
    assert dataclasses.replace(p, fusion=FusionRule(total=9)).schedule(3) == [3, 3, 3]


TABLES = st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=1, max_size=4)


def possible(costs, tokens: int) -> list[list[int]]:
    """Every schedule that the rows and the tokens allow, by trying them all."""
    found = []
    for plan in itertools.product(*(range(len(row)) for row in costs)):
        try:
            token_counts(plan, tokens)
        except InputError:
            continue
        found.append(list(plan))
    return found


def price(costs, plan) -> float:
    return sum(row[r] for row, r in zip(costs, plan, strict=True))


def work(plan, tokens: int) -> int:
    return sum(token_counts(plan, tokens)[1:])


def test_adaptive_spends_its_tokens_where_they_cost_least_and_earlier_where_they_cost_the_same():
    costs = [[0, 5, 10, 15], [0, 1, 2, 9], [0, 2, 4, 6]]
    assert schedule("adaptive", depth=3, total=3, costs=costs, tokens=20) == [0, 2, 1]
    assert adaptive([[0, 1, 2]] * 3, total=3, tokens=20) == [2, 1, 0]


@given(TABLES, st.integers(2, 12), st.integers(0, 8))
@example([[0, 1, 2]] * 2, 3, 2)  # one of 3 tokens can go, and then none of 2
@example([[0, 9, 1]] * 3, 7, 4)
@example([[0, 1], [0, 9, 3]], 5, 2)  # layer 1's is the cheapest, and leaves layer 2 too few for its cheap pair
def test_no_schedule_of_as_many_tokens_is_cheaper_than_the_adaptive_one(costs, tokens, total):
    allowed = [plan for plan in possible(costs, tokens) if sum(plan) == total]
    if not allowed:
        with pytest.raises(InputError, match="at most"):
            adaptive(costs, total=total, tokens=tokens)
        return
    plan = adaptive(costs, total=total, tokens=tokens)
    assert plan in allowed
    assert price(costs, plan) == min(price(costs, other) for other in allowed)


@given(TABLES, st.integers(2, 12))
@example([[0, 1, 2]] * 2, 3)
def test_the_frontier_is_what_no_schedule_beats_in_cost_and_work(costs, tokens):
    points = {(price(costs, plan), work(plan, tokens)) for plan in possible(costs, tokens)}
    front = {(c, w) for c, w in points if not any(a <= c and b <= w and (a, b) != (c, w) for a, b in points)}
    plans = list(frontier(costs, tokens=tokens))
    found = [(price(costs, plan), work(plan, tokens)) for plan in plans]
    assert set(found) == front
    assert len(found) == len(front)
    assert found == sorted(found)


def test_a_table_of_a_released_models_size_is_worked_out_in_seconds():
    rises = np.arange(99)
    costs = [list((rises * (1 + layer / 24)) ** 1.5) for layer in range(24)]
    plan = adaptive(costs, total=171, tokens=197)
    assert token_counts(plan, 197)[-1] == 26
    assert plan == sorted(plan, reverse=True)  # later layers cost more in this table

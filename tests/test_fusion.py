"""Fusion: worked by hand, against the independent reference, and what must hold for any input."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from famba.errors import InputError
from famba.fusion import Matching, fuse, match_tokens, plan

GOLDEN = Path(__file__).parent / "golden"
TENSORS = load_file(GOLDEN / "fusion.safetensors")
CASES = json.loads((GOLDEN / "fusion.json").read_text())
SINGLE = [name for name, case in CASES.items() if f"{name}/metric" in TENSORS and not case["no_op"]]


def of(case: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{case}/"): t for key, t in TENSORS.items() if key.startswith(f"{case}/")}


def protected(case: str) -> tuple[int, ...]:
    return (0,) * CASES[case]["class_token"] + (1,) * CASES[case]["distill_token"]


def test_a_case_worked_by_hand():
    # Positions 0, 2, 4 look along x, y, x; 1 and 3 along y and (almost) x: 2 joins 1 exactly, 0 and 4 join 3.
    feature = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [0.0, 1.0], [3.0, 0.1], [2.0, 0.0]]])
    matching = match_tokens(feature, 2)
    assert matching.source.tolist() == [[2, 0]]  # 4 is as like 3 as 0 is: the earlier position goes
    assert matching.target.tolist() == [[1, 3]]
    x = torch.tensor([[[10.0], [20.0], [40.0], [80.0], [160.0]]])
    fused, size = fuse(x, matching)
    assert fused.tolist() == [[[30.0], [45.0], [160.0]]]  # (20 + 40) / 2, (10 + 80) / 2, untouched
    assert size.tolist() == [[2.0, 2.0, 1.0]]
    appended, _ = fuse(x, matching, order="append")
    assert appended.tolist() == [[[160.0], [30.0], [45.0]]]
    weighted, size = fuse(x, matching, size=torch.tensor([[1.0, 3.0, 1.0, 1.0, 2.0]]))
    assert weighted.tolist() == [[[25.0], [45.0], [160.0]]]  # (3 * 20 + 40) / 4
    assert size.tolist() == [[4.0, 2.0, 2.0]]


def test_all_that_join_a_token_become_one_mean_in_one_step():
    x = torch.tensor([[[1.0], [5.0], [3.0], [0.0], [8.0]]])
    everything = Matching(torch.tensor([[0, 2, 4]]), torch.tensor([[1, 1, 1]]))
    fused, size = fuse(x, everything)
    torch.testing.assert_close(fused, torch.tensor([[[17 / 4], [0.0]]]))
    assert size.tolist() == [[4.0, 1.0]]


def test_the_reference_cases_are_there():
    assert len(SINGLE) >= 8


@pytest.mark.parametrize("case", SINGLE)
def test_matching_agrees_with_the_reference(case):
    golden = of(case)
    matching = match_tokens(golden["metric"], CASES[case]["r_effective"], protected=protected(case))
    torch.testing.assert_close(matching.source, golden["src_pos"].long())
    torch.testing.assert_close(matching.target, golden["dst_pos"].long())


@pytest.mark.parametrize("case", SINGLE)
@pytest.mark.parametrize(
    ("weighting", "golden_size", "merged", "size_out"),
    [
        ("mean", "size_in", "merged_mean", "size_out"),
        ("size", "size_in", "merged_wavg", "size_out"),
        ("size", None, "merged_wavg_unit", "size_out_unit"),
    ],
)
def test_fusing_agrees_with_the_reference(case, weighting, golden_size, merged, size_out):
    golden = of(case)
    matching = Matching(golden["src_pos"].long(), golden["dst_pos"].long())
    size = None if golden_size is None else golden[golden_size]
    fused, sizes = fuse(golden["x"], matching, size=size, order="append", weighting=weighting)
    order = reference_order(golden)
    torch.testing.assert_close(fused, golden[merged].gather(1, order.expand_as(golden[merged])))
    torch.testing.assert_close(sizes.reshape(order.shape), golden[size_out].gather(1, order))


@pytest.mark.parametrize("case", SINGLE)
@pytest.mark.parametrize(("weighting", "grad"), [("mean", "grad_x_mean"), ("size", "grad_x_wavg")])
def test_gradients_agree_with_the_reference(case, weighting, grad):
    golden = of(case)
    x = golden["x"].clone().requires_grad_()
    matching = Matching(golden["src_pos"].long(), golden["dst_pos"].long())
    fused, _ = fuse(x, matching, size=golden["size_in"], order="append", weighting=weighting)
    order = reference_order(golden).expand_as(fused)
    (fused * golden["cotangent"].gather(1, order)).sum().backward()
    torch.testing.assert_close(x.grad, golden[grad])


@pytest.mark.parametrize("case", SINGLE)
def test_groups_agree_with_the_reference(case):
    golden = of(case)
    matching = Matching(golden["src_pos"].long(), golden["dst_pos"].long())
    b, s, t = golden["assign"].shape
    destination = plan(matching, torch.ones(b, t), order="append").destination
    assigned = torch.zeros(b, s, t).scatter_(1, destination[:, None], 1.0)
    order = reference_order(golden).expand(b, s, t)
    torch.testing.assert_close(assigned, golden["assign"].float().gather(1, order))


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("chain")])
@pytest.mark.parametrize("weighting", ["size", "mean"])
def test_several_fusions_in_a_row_agree_with_the_reference(case, weighting):
    golden = of(case)
    x, size, steps = golden["x"], None, 0
    while f"step{steps}/src_pos" in golden:
        step = {key.split("/", 1)[1]: t for key, t in golden.items() if key.startswith(f"step{steps}/")}
        matching = Matching(step["src_pos"].long(), step["dst_pos"].long())
        x, size = fuse(x, matching, size=size, order="append", weighting=weighting)
        order = torch.cat([step["unm_pos"].long().argsort(1), odd_places(step["unm_pos"], x.shape[1])], 1)[..., None]
        expected = step["x"] if weighting == "size" else golden[f"mean_step{steps}/x"]
        torch.testing.assert_close(x, expected.gather(1, order.expand_as(x)))
        torch.testing.assert_close(size[..., None], step["size"].gather(1, order))
        x, size = expected, step["size"][..., 0]  # the reference goes on in its own order
        steps += 1
    assert steps >= 3


def odd_places(unmerged, s):
    return torch.arange(unmerged.shape[1], s).expand(len(unmerged), -1)


def reference_order(golden) -> torch.Tensor:
    """Where in the reference's output our token stands: it leaves even ones as sorted, or a second token up front."""
    b, t, _ = golden["x"].shape
    ours = torch.cat([golden["unm_pos"].long().sort(1).values, torch.arange(1, t, 2).expand(b, -1)], 1)
    return (ours[:, :, None] == golden["out_pos"][:, None, :]).int().argmax(-1, keepdim=True)


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.get("no_op")])
def test_a_request_that_the_reference_clamps_is_refused_or_the_identity(case):
    golden, r = of(case), CASES[case]["r_requested"]
    if r == 0:
        x = golden["x"]
        fused, _ = fuse(x, match_tokens(golden["metric"], 0, protected=protected(case)))
        assert torch.equal(fused, x)
    else:
        with pytest.raises(InputError, match=f"r = {r} of t = {golden['x'].shape[1]} tokens"):
            match_tokens(golden["metric"], r, protected=protected(case))


def test_an_r_beyond_half_the_tokens_is_refused_not_clamped():
    feature = torch.randn(1, 9, 4)
    assert match_tokens(feature, 4).source.shape == (1, 4)
    with pytest.raises(InputError, match=r"r = 5 of t = 9 tokens, 0 of them protected; allowed: 0\.\.4"):
        match_tokens(feature, 5)
    with pytest.raises(InputError, match="r = -1"):
        match_tokens(feature, -1)


def test_protected_positions_that_leave_nobody_to_absorb_are_refused():
    feature = torch.randn(2, 3, 4)
    with pytest.raises(InputError, match=r"r = 1 of t = 3 tokens, 1 of them protected; allowed: 0\.\.0"):
        match_tokens(feature, 1, protected=(1,))
    with pytest.raises(InputError, match="r = 1 of t = 3"):
        match_tokens(feature, 1, protected=torch.tensor([0, 1]))
    assert match_tokens(feature, 1, protected=torch.tensor([0, 2])).source.tolist() == [[2], [0]]
    with pytest.raises(InputError, match=r"position 7; must be in 0\.\.2"):
        match_tokens(feature, 1, protected=(7,))


@pytest.mark.parametrize(("key", "value"), [("order", "reverse"), ("weighting", "max")])
@pytest.mark.parametrize("r", [0, 1])
def test_an_unknown_option_is_refused(key, value, r):
    x = torch.randn(1, 4, 2)
    with pytest.raises(InputError, match=f"{key}: '{value}' is not one of"):
        fuse(x, match_tokens(x, r), **{key: value})


def test_a_token_of_zero_length_does_not_poison_the_matching():
    feature = torch.randn(2, 8, 4)
    feature[0, 2] = 0
    feature[1, 3] = 1e-30
    matching = match_tokens(feature, 3)
    assert torch.isfinite(matching.similarity).all()
    assert (matching.similarity.abs() <= 1 + 1e-6).all()


def test_autocast_does_not_round_the_similarities():
    feature = torch.randn(2, 40, 8)
    expected = match_tokens(feature, 12)
    with torch.autocast("cpu", torch.bfloat16):
        matching = match_tokens(feature, 12)
    assert matching.similarity.dtype == torch.float32
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(matching, expected, strict=True))


def test_matching_carries_no_gradient():
    x = torch.randn(1, 6, 4, requires_grad=True)
    assert not match_tokens(x, 2).similarity.requires_grad


@st.composite
def fusions(draw):
    b, t, d = draw(st.integers(1, 3)), draw(st.integers(4, 23)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(b, t, d, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 9, (b, t), generator=generator).double()
    guard = torch.randint(0, t, (b,), generator=generator) if draw(st.booleans()) else ()
    r = draw(st.integers(0, (t - 1) // 2))
    options = {"order": draw(st.sampled_from(["scan", "append"])), "weighting": draw(st.sampled_from(["size", "mean"]))}
    return x, size, guard, r, options


@settings(max_examples=150, deadline=None)
@given(fusions())
def test_patches_are_conserved_and_so_is_the_weighted_sum(case):
    x, size, guard, r, options = case
    fused, sizes = fuse(x, match_tokens(x, r, protected=guard), size=size, **options)
    assert fused.shape[1] == x.shape[1] - r
    torch.testing.assert_close(sizes.sum(1), size.sum(1))
    if options["weighting"] == "size":
        torch.testing.assert_close((fused * sizes[..., None]).sum(1), (x * size[..., None]).sum(1))


@settings(max_examples=100, deadline=None)
@given(fusions())
def test_the_protected_token_comes_through_untouched_and_alone(case):
    x, size, guard, r, options = case
    if isinstance(guard, tuple) or r == 0:
        return
    matching = match_tokens(x, r, protected=guard)
    assert not (matching.source == guard[:, None]).any()
    assert not (matching.target == guard[:, None]).any()
    fused, sizes = fuse(x, matching, size=size, **options)
    rows = torch.arange(len(x))
    now = plan(matching, size, **options).destination[rows, guard]
    assert torch.equal(fused[rows, now], x[rows, guard])
    assert torch.equal(sizes[rows, now], size[rows, guard])


@settings(max_examples=100, deadline=None)
@given(fusions())
def test_scan_order_is_kept(case):
    x, size, guard, r, options = case
    if r == 0:
        return
    worked_out = plan(match_tokens(x, r, protected=guard), size, order="scan", weighting=options["weighting"])
    assert (worked_out.survivors.diff(dim=1) > 0).all()
    own = worked_out.destination.gather(1, worked_out.survivors)
    assert torch.equal(own, torch.arange(own.shape[1]).expand_as(own))


@settings(max_examples=60, deadline=None)
@given(fusions())
def test_a_pair_agrees_with_the_plain_loop(case):
    x, size, guard, r, options = case
    if r == 0:
        return
    matching = match_tokens(x, r, protected=guard)
    fused, sizes = fuse(x, matching, size=size, **options)
    for row in range(len(x)):
        joins = dict(zip(matching.source[row].tolist(), matching.target[row].tolist(), strict=True))
        assert len(joins) == r
        left = [p for p in range(x.shape[1]) if p not in joins]
        if options["order"] == "append":
            left = [p for p in left if p % 2 == 0] + [p for p in left if p % 2]
        for place, survivor in enumerate(left):
            group = [survivor] + [source for source, target in joins.items() if target == survivor]
            weight = size[row, group] if options["weighting"] == "size" else torch.ones(len(group)).double()
            mean = (weight[:, None] * x[row, group]).sum(0) / weight.sum()
            torch.testing.assert_close(fused[row, place], mean)
            assert sizes[row, place] == size[row, group].sum()


@settings(max_examples=40, deadline=None)
@given(fusions())
def test_no_even_token_left_behind_was_more_similar_than_one_that_went(case):
    x, _, _, r, _ = case
    if r == 0:
        return
    matching = match_tokens(x, r)
    unit = x / x.norm(dim=-1, keepdim=True)
    cosine = unit[:, ::2] @ unit[:, 1::2].mT
    best = cosine.max(-1).values
    went = torch.zeros_like(best, dtype=torch.bool).scatter_(1, matching.source // 2, True)
    assert (matching.similarity.diff(dim=1) <= 1e-12).all()
    lowest_gone = best.masked_fill(~went, 2).min(1).values
    highest_left = best.masked_fill(went, -2).max(1).values
    assert (lowest_gone >= highest_left - 1e-12).all()


@settings(max_examples=40, deadline=None)
@given(fusions())
def test_batch_rows_do_not_affect_each_other(case):
    x, size, _, r, options = case
    together, _ = fuse(x, match_tokens(x, r), size=size, **options)
    alone = [
        fuse(x[i : i + 1], match_tokens(x[i : i + 1], r), size=size[i : i + 1], **options)[0] for i in range(len(x))
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(fusions())
def test_gradients_reach_every_token(case):
    x, size, _, r, options = case
    x = x.clone().requires_grad_()
    fused, _ = fuse(x, match_tokens(x, r), size=size, **options)
    fused.sum().backward()
    assert (x.grad > 0).all()


def test_r_of_zero_is_the_identity_bit_for_bit():
    x, size = torch.randn(2, 7, 3), torch.rand(2, 7)
    for order in ("scan", "append"):
        fused, sizes = fuse(x, match_tokens(x, 0), size=size, order=order)
        assert torch.equal(fused, x)
        assert torch.equal(sizes, size)

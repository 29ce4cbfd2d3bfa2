"""Fusion: by hand, against the independent reference, what holds for any input, and the native kernels."""

from functools import partial

import jaxtyping
import pytest
import torch
from agreement import leaves, results
from goldens import golden_json, golden_tensors
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from famba.errors import BackendError, InputError
from famba.fusion import matching
from famba.fusion.matching import Matching, match_tokens
from famba.fusion.merge import apply, apply_both, fuse, plan
from famba.fusion.options import FusionOptions, levels
from famba.kernels.cpu import build
from famba.kernels.triton import runtime as gpu
from famba.models.vim import create_model

TENSORS = golden_tensors("fusion")
CASES = golden_json("fusion")
KINDS = levels("matching")
BACKENDS = ["torch"] if build.unavailable() else ["torch", "native"]
# Those of the GPU: on it, or where test_triton.py has Triton's interpreter run these tests.
ON_GPU_TOO = [*BACKENDS, *([] if gpu.unavailable() else [pytest.param("triton", marks=pytest.mark.gpu)])]
needs_native = pytest.mark.skipif("native" not in BACKENDS, reason=build.unavailable())
SINGLE = [name for name, case in CASES.items() if f"{name}/metric" in TENSORS and not case["no_op"]]
assert len(SINGLE) >= 8


def of(case: str, backend: str = "torch") -> dict[str, torch.Tensor]:
    return golden_tensors("fusion", f"{case}/", gpu.DEVICE if backend == "triton" else "cpu")


def protected(case: str) -> tuple[int, ...]:
    return (0,) * CASES[case]["class_token"] + (1,) * CASES[case]["distill_token"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_case_worked_by_hand(backend):
    # Positions 0, 2, 4 look along x, y, x; 1 and 3 along y and (almost) x: 2 joins 1 exactly, 0 and 4 join 3.
    feature = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [0.0, 1.0], [3.0, 0.1], [2.0, 0.0]]])
    matching = match_tokens(feature, 2, backend=backend)
    assert matching.source.tolist() == [[2, 0]]  # 4 is as like 3 as 0 is: the earlier position goes
    assert matching.target.tolist() == [[1, 3]]
    x = torch.tensor([[[10.0], [20.0], [40.0], [80.0], [160.0]]])
    fused, size = fuse(x, matching, backend=backend)
    assert fused.tolist() == [[[30.0], [45.0], [160.0]]]  # (20 + 40) / 2, (10 + 80) / 2, untouched
    assert size.tolist() == [[2.0, 2.0, 1.0]]
    appended, _ = fuse(x, matching, order="append", backend=backend)
    assert appended.tolist() == [[[160.0], [30.0], [45.0]]]
    weighted, size = fuse(x, matching, size=torch.tensor([[1.0, 3.0, 1.0, 1.0, 2.0]]), backend=backend)
    assert weighted.tolist() == [[[25.0], [45.0], [160.0]]]  # (3 * 20 + 40) / 4
    assert size.tolist() == [[4.0, 2.0, 2.0]]


@pytest.mark.parametrize("backend", ON_GPU_TOO)
@pytest.mark.parametrize("case", SINGLE)
def test_matching_agrees_with_the_reference(case, backend):
    golden = of(case, backend)
    matching = match_tokens(golden["metric"], CASES[case]["r_effective"], protected=protected(case), backend=backend)
    torch.testing.assert_close(matching.source, golden["src_pos"].long())
    torch.testing.assert_close(matching.target, golden["dst_pos"].long())


@pytest.mark.parametrize("backend", ON_GPU_TOO)
@pytest.mark.parametrize("case", SINGLE)
@pytest.mark.parametrize(("weighting", "name"), [("mean", "mean"), ("size", "wavg")])
def test_fusing_and_its_gradient_agree_with_the_reference(case, weighting, name, backend):
    golden = of(case, backend)
    x, matching = golden["x"].clone().requires_grad_(), Matching(golden["src_pos"].long(), golden["dst_pos"].long())
    fused, sizes = fuse(x, matching, size=golden["size_in"], order="append", weighting=weighting, backend=backend)
    order = reference_order(golden)
    torch.testing.assert_close(fused, golden[f"merged_{name}"].gather(1, order.expand_as(fused)))
    torch.testing.assert_close(sizes, golden["size_out"].gather(1, order))
    (fused * golden["cotangent"].gather(1, order.expand_as(fused))).sum().backward()
    torch.testing.assert_close(x.grad, golden[f"grad_x_{name}"])


def reference_order(golden) -> torch.Tensor:
    """Where in the reference's output our token stands: it leaves even ones as sorted, or a second token up front."""
    b, t, _ = golden["x"].shape
    ours = torch.cat(
        [golden["unm_pos"].long().sort(1).values, torch.arange(1, t, 2, device=golden["x"].device).expand(b, -1)], 1
    )
    return (ours[:, :, None] == golden["out_pos"][:, None, :]).int().argmax(-1, keepdim=True)


def test_an_r_beyond_half_the_tokens_is_refused_not_clamped():
    feature = torch.randn(1, 9, 4, requires_grad=True)
    matching = match_tokens(feature, 4)
    assert matching.source.shape == (1, 4)
    assert not matching.similarity.requires_grad
    with pytest.raises(InputError, match=r"r = 5 of t = 9 tokens, 0 of them protected; allowed: 0\.\.4"):
        match_tokens(feature, 5)
    with pytest.raises(InputError, match="r = -1"):
        match_tokens(feature, -1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_protected_positions_that_leave_nobody_to_absorb_are_refused(backend):
    feature = torch.randn(2, 3, 4)
    with pytest.raises(InputError, match=r"r = 1 of t = 3 tokens, 1 of them protected; allowed: 0\.\.0"):
        match_tokens(feature, 1, protected=(1,), backend=backend)
    assert match_tokens(feature, 1, protected=(2,), backend=backend).source.tolist() == [[0], [0]]
    with pytest.raises(InputError, match=r"position 7; must be in 0\.\.2"):
        match_tokens(feature, 1, protected=(7,), backend=backend)


X = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("action", "said"),
    [
        (lambda: match_tokens(X[0], 2), r"feature: torch\.float32, shape \(9, 4\); must be a floating-point tensor"),
        (lambda: match_tokens(X.int(), 2), r"feature: torch\.int32"),
        (lambda: match_tokens(X, 2.0), "r: 2.0; must be a whole number"),
        (lambda: match_tokens(X, True), "r: True; must be a whole number"),
        (lambda: match_tokens(X, 0, kind="nearest"), "kind: 'nearest' is not one of similarity, random, adjacent"),
        (lambda: match_tokens(X, 2, protected=[True, False]), "protected: position True; must be in 0..8"),
        (lambda: match_tokens(X, 2, protected=[0.5]), r"protected: position 0\.5; must be"),
        (lambda: match_tokens(X, 2, protected=0), "protected: 0; must be a list of positions"),
        (lambda: match_tokens(X, 2, protected=torch.tensor([0])), r"protected: torch\.int64, shape \(1,\); must be"),
        (lambda: match_tokens(X, 2, protected=torch.ones(2)), r"protected: torch\.float32, shape \(2,\)"),
        (lambda: fuse(X[0], match_tokens(X, 2)), r"x: torch\.float32, shape \(9, 4\); must be a floating-point tensor"),
        (lambda: fuse(X, tuple(match_tokens(X, 2))), r"matching: .*; must be a Matching of 2 sequences"),
        (
            lambda: fuse(X, match_tokens(X, 2), size=torch.ones(9, 2)),
            r"size: .* shape \(9, 2\); must have shape \(2, 9\)",
        ),
        (lambda: fuse(X, match_tokens(X, 2), size=torch.ones(18)), r"size: .* shape \(18,\); must have"),
    ],
)
def test_what_is_no_tensor_of_that_shape_no_number_and_no_position_is_refused(monkeypatch, action, said):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # outside of tests nothing checks the types
    with pytest.raises(InputError, match=f"^{said}"):
        action()


@pytest.mark.parametrize(("t", "most"), [(2, 0), (3, 0), (4, 1), (5, 2)])
def test_what_positions_in_a_tensor_leave_to_fuse_is_known_without_reading_them(t, most):
    with FakeTensorMode():
        feature, protected = torch.randn(2, t, 4), torch.zeros(2, dtype=torch.int64)
        assert match_tokens(feature, most, protected=protected, backend="torch").source.shape == (2, most)
        with pytest.raises(InputError, match=rf"t = {t} tokens, 1 of them protected; allowed: 0\.\.{most}"):
            match_tokens(feature, most + 1, protected=protected, backend="torch")


@pytest.mark.parametrize("key", ["order", "weighting", "reduction"])
def test_an_unknown_option_is_refused_even_where_nothing_is_fused(key):
    x = torch.randn(1, 4, 2)
    with pytest.raises(InputError, match=f"{key}: 'max' is not one of"):
        fuse(x, match_tokens(x, 0), **{key: "max"})


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_of_zero_length_does_not_poison_the_matching(backend):
    feature = torch.randn(2, 8, 4)
    feature[0, 2] = 0
    feature[1, 3] = 1e-30
    matching = match_tokens(feature, 3, backend=backend)
    assert torch.isfinite(matching.similarity).all()
    assert (matching.similarity.abs() <= 1 + 1e-6).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_compared_in_float32_whatever_their_type_and_under_autocast(backend, dtype):
    feature = torch.randn(2, 40, 8).to(dtype)
    expected = match_tokens(feature.float(), 12, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        matching = match_tokens(feature, 12, backend=backend)
    assert matching.similarity.dtype == torch.float32
    assert all(map(torch.equal, matching, expected))


@st.composite
def fusions(draw, most_tokens=90):
    """A feature, two tensors to fuse, their tokens' sizes, protected positions, r and options."""
    b, t, c = draw(st.integers(1, 4)), draw(st.integers(4, most_tokens)), draw(st.integers(2, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    feature, x, other = torch.randn(3, b, t, c, generator=generator).unbind()
    other = other[..., : draw(st.integers(1, c))]  # not dense, and of another width
    size = torch.randint(1, 9, (b, t), generator=generator).float()
    positions = torch.randint(0, t, (b,), generator=generator)
    guard = draw(st.sampled_from([(), (0,), (t - 1, 0), positions]))
    r = draw(st.integers(1, (t - 2) // 2))
    options = {"order": draw(st.sampled_from(["scan", "append"])), "weighting": draw(st.sampled_from(["size", "mean"]))}
    return feature, x, other, size, guard, r, options


def guarded(guard, row: int) -> set[int]:
    return {guard[row].item()} if isinstance(guard, torch.Tensor) else set(guard)


@given(fusions(23), st.sampled_from(KINDS))
def test_dropping_leaves_every_survivor_as_it_was_and_conserves_the_patches(case, kind):
    feature, x, _, size, guard, r, options = case
    pairs = match_tokens(feature, r, protected=guard, kind=kind)
    fused, sizes = fuse(x, pairs, size=size, reduction="drop", **options, backend="torch")
    survivors, _, _, _, total = plan(pairs, size, **options)
    assert torch.equal(fused, x.gather(1, survivors[..., None].expand_as(fused)))
    assert torch.equal(sizes, total)
    assert torch.equal(sizes.sum(1), size.sum(1))


@given(fusions(23), st.sampled_from([kind for kind in KINDS if kind != "similarity"]))
def test_controls_pair_distinct_unprotected_tokens_whatever_the_features(case, kind):
    feature, x, _, _, guard, r, _ = case
    pairs = match_tokens(feature, r, protected=guard, kind=kind)
    other = match_tokens(x, r, protected=guard, kind=kind)
    assert torch.equal(pairs.source, other.source)
    assert torch.equal(pairs.target, other.target)
    assert (pairs.source % 2 == 0).all()
    assert (pairs.target % 2 == 1).all()
    for row, (source, target) in enumerate(zip(pairs.source.tolist(), pairs.target.tolist(), strict=True)):
        held = guarded(guard, row)
        assert len(set(source)) == r
        assert not held & {*source, *target}
        if kind == "adjacent":
            far = [(p, q) for p, q in zip(source, target, strict=True) if abs(p - q) > 1]
            last = x.shape[1] - 1
            assert far == [] or (far[0][0], *held) in ((0, 1), (last, last - 1)), "no free neighbour"


def test_adjacent_pairs_are_spread_over_the_sequence_and_random_ones_differ_from_length_to_length():
    source = match_tokens(torch.empty(1, 65, 2), 8, kind="adjacent").source[0].sort().values
    assert source.diff().max() <= 16
    assert source[0] < 16
    assert source[-1] > 48
    drawn = [match_tokens(torch.empty(1, t, 2), 20, kind="random") for t in (60, 61)]
    assert not torch.equal(drawn[0].source, drawn[1].source)
    scores = matching._control_scores("random", 400, torch.device("cpu"))[0] / 2**24
    assert abs(scores.mean() - 0.5) < 0.01, "uniform"
    assert abs(scores.std() - 12**-0.5) < 0.01
    neighbours = torch.corrcoef(torch.stack([scores[:-1].flatten(), scores[1:].flatten()]))[0, 1]
    assert abs(neighbours) < 0.02
    with pytest.raises(InputError, match="kind: 'nearest' is not one of similarity, random, adjacent"):
        match_tokens(torch.empty(1, 5, 2), 1, kind="nearest")


@given(fusions(23))
def test_fusing_agrees_with_the_plain_loop_and_leaves_protected_tokens_alone(case):
    feature, x, _, size, guard, r, options = case
    x, size = x.double(), size.double()
    matching = match_tokens(feature, r, protected=guard, backend="torch")
    fused, sizes = fuse(x, matching, size=size, **options)
    destination = plan(matching, size, **options).destination
    for row in range(len(x)):
        joins = dict(zip(matching.source[row].tolist(), matching.target[row].tolist(), strict=True))
        assert len(joins) == r
        held = guarded(guard, row)
        assert not held & {*joins, *joins.values()}
        left = [p for p in range(x.shape[1]) if p not in joins]
        if options["order"] == "append":
            left.sort(key=lambda p: p % 2)
        for place, survivor in enumerate(left):
            group = [survivor] + [source for source, target in joins.items() if target == survivor]
            weight = size[row, group] if options["weighting"] == "size" else torch.ones(len(group)).double()
            mean = (weight[:, None] * x[row, group]).sum(0) / weight.sum()
            torch.testing.assert_close(fused[row, place], mean)
            assert sizes[row, place] == size[row, group].sum()
            assert (destination[row, group] == place).all()
            assert survivor not in held or torch.equal(fused[row, place], x[row, survivor])


@pytest.mark.parametrize("backend", BACKENDS)
def test_r_of_zero_is_the_identity_bit_for_bit(backend):
    x, size = torch.randn(2, 7, 3), torch.rand(2, 7)
    fused, sizes = fuse(x, match_tokens(x, 0, backend=backend), size=size, backend=backend)
    assert torch.equal(fused, x)
    assert torch.equal(sizes, size)


# The native kernels, against torch


@given(case=fusions())
def test_the_kernel_matches_as_torch_does_in_double_precision(instruction_set, case):
    feature, _, _, _, guard, r, _ = case
    found = match_tokens(feature, r, protected=guard, backend="native")
    expected = match_tokens(feature.double(), r, protected=guard)
    assert found.similarity.dtype == torch.float32
    torch.testing.assert_close(found.similarity.double(), expected.similarity, rtol=0, atol=1e-6)
    # Who is paired may differ only where two similarities are as good as equal
    unit = torch.nn.functional.normalize(feature.double(), dim=-1)
    pairs = [(unit.gather(1, x[..., None].expand(-1, -1, unit.shape[2]))) for x in (found.source, found.target)]
    torch.testing.assert_close((pairs[0] * pairs[1]).sum(-1), expected.similarity, rtol=0, atol=1e-6)
    distinct = (expected.similarity.diff(dim=1) < -1e-5).all()
    assert not distinct or torch.equal(found.source, expected.source)
    assert (found.source % 2 == 0).all()
    assert (found.target % 2 == 1).all()


@given(case=fusions())
def test_the_kernel_plans_as_torch_does_bit_for_bit(instruction_set, case):
    feature, _, _, size, guard, r, options = case
    matching = match_tokens(feature, r, protected=guard)
    found = plan(matching, size, **options, backend="native")
    assert all(map(torch.equal, found, plan(matching, size, **options, backend="torch")))


@given(case=fusions(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_kernel_fuses_as_torch_does_in_double_precision_and_so_do_its_gradients(instruction_set, case, dtype):
    feature, x, other, size, guard, r, options = case
    worked_out = plan(match_tokens(feature, r, protected=guard), size, **options)
    tensors = leaves([x, other.to(dtype)])
    found = results(partial(apply_both, worked_out, backend="native"), tensors)
    expected = results(partial(apply_both, worked_out, backend="torch"), leaves(tensors, dtype=torch.float64))
    for ours, theirs, kind in zip(found, expected, [torch.float32, dtype] * 2, strict=True):
        assert ours.dtype == kind
        assert (ours - theirs).abs().max() <= (2**-8 if kind == torch.bfloat16 else 1e-6) * theirs.abs().max()
    assert torch.equal(apply(worked_out, tensors[1], backend="native"), found[1])
    # with the processor set to flush the smallest numbers, too, a token that is alone is what it was
    tiny = torch.full_like(x, 1e-40)
    single = worked_out.weight.gather(1, worked_out.survivors) == 1
    assert torch.equal(apply(worked_out, tiny, backend="native")[single], tiny[:, : single.shape[1]][single])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_result_that_is_not_used_brings_no_gradient(backend):
    tensors = leaves(torch.randn(2, 2, 9, 3, generator=torch.Generator().manual_seed(0)))
    worked_out = plan(match_tokens(tensors[0], 3), torch.ones(2, 9))
    destination, weight = (x[..., None].expand(-1, -1, 3) for x in (worked_out.destination, worked_out.weight))
    for used in (0, 1):
        fused = apply_both(worked_out, *tensors, backend=backend)[used]
        grads = torch.autograd.grad(fused.square().sum(), tensors, allow_unused=True)
        assert grads[1 - used] is None
        torch.testing.assert_close(grads[used], 2 * weight * fused.detach().gather(1, destination))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_tokens_go_by_position(backend):
    """All the same: every similarity ties, at any number of tokens and so in any block of the kernel."""
    for t in (5, 11, 18, 37, 64):
        feature = torch.randn(7, generator=torch.Generator().manual_seed(t)).expand(2, t, 7)
        matching = match_tokens(feature, t // 2, backend=backend)
        assert torch.equal(matching.source, torch.arange(0, t - 1, 2).expand(2, -1))
        assert torch.equal(matching.target, torch.ones(2, t // 2, dtype=torch.int64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_number_is_seen_first_and_paired_with_a_token_that_exists(backend):
    feature = torch.randn(1, 12, 5, generator=torch.Generator().manual_seed(0))
    feature[0, 6, 2] = torch.nan
    matching = match_tokens(feature, 3, protected=(1,), backend=backend)
    assert matching.similarity.isnan().tolist() == [[True, False, False]]
    assert (matching.source[0, 0], matching.target[0, 0]) == (6, 3)
    feature[0, 7, 2] = torch.inf
    matching = match_tokens(feature, 3, protected=(1,), backend=backend)
    assert matching.similarity.isnan().all()
    assert matching.source.tolist() == [[0, 2, 4]]
    assert matching.target.tolist() == [[7, 7, 7]]


@needs_native
def test_the_thread_count_changes_no_bit_of_matching_or_fusing(threads):
    tensors, size = leaves(torch.randn(2, 5, 67, 40)), torch.rand(5, 67) + 1

    def everything():
        matching = match_tokens(tensors[0], 20, backend="native")
        worked_out = plan(matching, size, backend="native")
        return [*matching, *worked_out, *results(partial(apply_both, worked_out, backend="native"), tensors)]

    threads(1)
    alone = everything()
    threads(3)
    assert all(map(torch.equal, alone, everything()))


@needs_native
def test_matching_and_fusing_pass_torchs_own_checks():
    x, other = torch.randn(2, 2, 9, 4, generator=torch.Generator().manual_seed(0)).unbind()
    check = torch.library.opcheck
    check(torch.ops.famba.match.default, (x, torch.tensor([[4], [1]]), 3))
    source, target, _ = match_tokens(x, 3)
    check(torch.ops.famba.plan.default, (source, target, torch.rand(2, 9), True, False))
    _, destination, weight, _, _ = plan(match_tokens(x, 3), torch.ones(2, 9))
    for tensors in ((x, other[..., :3].bfloat16()), (x, None)):
        check(torch.ops.famba.fuse.default, (*tensors, destination, weight, 6))
    grads = [torch.randn(2, 6, 4), torch.randn(2, 6, 3)]
    for tensors in (grads, [grads[0], None], [None, grads[1]]):
        check(torch.ops.famba.fuse_backward.default, (*tensors, destination, weight))


@needs_native
@pytest.mark.parametrize("options", [FusionOptions(matching=x, reduction=y) for x in KINDS for y in ("mean", "drop")])
def test_every_control_gives_other_logits_the_same_on_each_backend_and_the_same_token_counts(options):
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    logits, traces = {}, {}
    for backend in ("native", "torch", "default"):
        torch.manual_seed(0)
        fusion, scan = (FusionOptions(), "torch") if backend == "default" else (options, backend)
        model = create_model("vim_nano", depth=3, schedule=[9, 0, 9], fusion=fusion, backend=scan)
        logits[backend], traces[backend] = model.forward_with_trace(images)
    torch.testing.assert_close(logits["native"], logits["torch"], rtol=1e-4, atol=1e-5)
    assert torch.equal(logits["torch"], logits["default"]) == (options == FusionOptions())
    assert traces["native"].token_counts == traces["default"].token_counts
    torch.testing.assert_close(traces["native"].sizes[-1].sum(1), torch.full((2,), 37.0))


@needs_native
def test_what_the_kernels_cannot_run_on_is_refused_by_name_and_left_to_torch():
    x, size = torch.randn(1, 8, 4).double(), torch.ones(1, 8)
    matching = match_tokens(x, 2)
    worked_out = plan(matching, size)
    of_doubles = worked_out._replace(weight=worked_out.weight.double())
    for call, types in (
        (partial(match_tokens, x, 2), "float32"),
        (partial(plan, matching, size.double()), "float32"),
        (partial(apply, worked_out, x), "float32 and bfloat16"),
        (partial(apply, of_doubles, x.float()), "float32"),
    ):
        with pytest.raises(BackendError, match=f"'native' cannot run here: it runs on {types}, got torch.float64"):
            call(backend="native")
    assert torch.equal(apply(worked_out, x), apply(worked_out, x, backend="torch"))


@needs_native
def test_positions_that_do_not_exist_are_refused_before_memory_is_touched():
    x, size = torch.randn(1, 8, 4), torch.ones(1, 8)
    for guard in (8, -1):
        with pytest.raises(InputError, match=r"protected: not all positions are in 0\.\.7"):
            match_tokens(x, 2, protected=torch.tensor([guard]), backend="native")
    for source, target in (([0, 8], [1, 1]), ([0, 2], [1, -1])):
        matching = Matching(torch.tensor([source]), torch.tensor([target]))
        with pytest.raises(InputError, match=r"matching: a source or target is outside 0\.\.7, or"):
            plan(matching, size, backend="native")
    worked_out = plan(match_tokens(x, 2), size)
    for place in (6, -1):
        wrong = worked_out._replace(destination=torch.full((1, 8), place))
        with pytest.raises(InputError, match=r"destination: not all places are in 0\.\.5"):
            apply(wrong, x, backend="native")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("source", "target"), [([0, 0], [1, 3]), ([0, 2], [1, 0])])
def test_a_source_that_comes_up_again_is_refused(source, target, backend):
    matching = Matching(torch.tensor([source]), torch.tensor([target]))
    with pytest.raises(InputError, match=r"matching: .*a source comes up twice or as a target; allowed: once"):
        fuse(torch.randn(1, 8, 4), matching, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_matching_or_a_plan_of_other_tokens_is_refused(backend):
    x, size = torch.randn(2, 8, 4), torch.ones(2, 8)
    matching = match_tokens(x, 2)
    with pytest.raises(InputError, match=r"matching: \(2, 2\) and \(2, 2\); allowed: \(3, r\)"):
        plan(matching, torch.ones(3, 8), backend=backend)
    worked_out = plan(matching, size)
    for wrong in (x[:1], x[:, 1:]):
        with pytest.raises(InputError, match=r"x: shape \(.*\); allowed: \(2, 8, d\)"):
            apply(worked_out, wrong, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_may_be_of_any_integer_type(backend):
    x = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    guard = torch.tensor([3, 4])
    expected = match_tokens(x, 2, protected=guard)
    assert torch.equal(match_tokens(x, 2, protected=guard.int(), backend=backend).source, expected.source)

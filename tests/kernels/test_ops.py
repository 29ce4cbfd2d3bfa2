"""Fused convolution, gate and norm: by hand, against double precision, threads, checks of torch, refusals."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from famba.errors import BackendError, InputError
from famba.kernels.cpu import build
from famba.kernels.ops import _check, _check_projection, add_rms_norm, causal_conv1d_silu, gated_sum, projected_scan
from famba.kernels.scan import selective_scan_ref

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FAST = ["torch"] if build.unavailable() else ["torch", "native"]


def draw(b, e, t, k, *, seed=0, layout="channels", bias=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    if layout == "channels":
        x = normal(b, t, e).mT
    elif layout == "tokens":
        x = normal(b, e, t)
    else:  # half of one projection, as the model has it
        x = normal(b, t, 2 * e).chunk(2, dim=-1)[1].mT
    tensors = [x.to(dtype), normal(e, k), normal(e) if bias else None]
    return [x if x is None else x.detach().requires_grad_() for x in tensors]


def results(tensors, **options):
    out = causal_conv1d_silu(*tensors, **options)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [x for x in tensors if x is not None], cotangent)]


def worst_error(found, tensors, **options):
    double = [x if x is None else x.detach().double().requires_grad_() for x in tensors]
    expected = results(double, backend="torch", **options)
    assert len(found) == len(expected) >= 3
    return max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", FAST)
def test_three_tokens_worked_by_hand(backend):
    x, weight, bias = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[10.0, 1.0]]), torch.tensor([0.5])
    silu = torch.nn.functional.silu
    found = causal_conv1d_silu(x, weight, bias, backend=backend)
    assert torch.allclose(found, silu(torch.tensor([[[1.5, 12.5, 23.5]]])))
    found = causal_conv1d_silu(x, weight, bias, reverse=True, backend=backend)
    assert torch.allclose(found, silu(torch.tensor([[[21.5, 32.5, 3.5]]])))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    b=st.integers(1, 4),
    e=st.integers(1, 70),
    t=st.integers(1, 100),
    k=st.one_of(st.just(4), st.integers(1, 8)),
    layout=st.sampled_from(["channels", "tokens", "slices"]),
    reverse=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 100),
)
def test_the_kernel_agrees_with_double_precision(instruction_set, b, e, t, k, layout, reverse, bias, seed):
    tensors = draw(b, e, t, k, layout=layout, bias=bias, seed=seed)
    found = results(tensors, reverse=reverse, backend="native")
    assert worst_error(found, tensors, reverse=reverse) < 1e-5


def test_bfloat16_keeps_its_type_and_sums_in_float32(instruction_set):
    tensors = draw(3, 40, 50, 4, dtype=torch.bfloat16)
    found = results(tensors, backend="native")
    assert [x.dtype for x in found] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert worst_error(found, tensors) < 2**-8


@pytest.mark.parametrize("backend", FAST)
def test_weights_that_must_be_copied_give_the_gradients_of_their_copies(backend):
    x, weight, bias = (tensor.detach() for tensor in draw(3, 44, 50, 8))
    strided = [tensor.requires_grad_() for tensor in (x, weight[:, ::2], bias.repeat_interleave(2)[::2])]
    copied = [tensor.detach().contiguous().requires_grad_() for tensor in strided]
    assert not strided[1].is_contiguous()
    for found, expected in zip(results(strided, backend=backend), results(copied, backend=backend), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reverse", [False, True])
def test_no_token_sees_a_later_one(reverse, backend):
    x, *others = (x.detach() for x in draw(1, 3, 40, 4))
    before = causal_conv1d_silu(x, *others, reverse=reverse, backend=backend)
    x[:, :, 20] += 1
    changed = (causal_conv1d_silu(x, *others, reverse=reverse, backend=backend) != before).all(1).squeeze(0)
    expected = range(17, 21) if reverse else range(20, 24)
    assert changed.nonzero().flatten().tolist() == list(expected)


@pytest.mark.skipif("native" not in FAST, reason=build.unavailable())
def test_the_thread_count_changes_no_bit_and_results_lie_as_the_input_does():
    tensors = draw(5, 100, 50, 4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results(tensors)
        torch.set_num_threads(3)
        assert all(map(torch.equal, alone, results(tensors)))
    finally:
        torch.set_num_threads(before)
    assert alone[0].stride() == alone[1].stride() == tensors[0].stride()


@pytest.mark.skipif("native" not in FAST, reason=build.unavailable())
@pytest.mark.parametrize("bias", [True, False])
def test_the_operators_pass_torchs_own_checks(bias):
    tensors = draw(2, 5, 7, 4, bias=bias)
    torch.library.opcheck(torch.ops.famba.conv.default, (*tensors, True))
    tensors = [x if x is None else x.detach() for x in tensors]
    torch.library.opcheck(torch.ops.famba.conv_backward.default, (torch.randn(2, 5, 7), *tensors, True))


@pytest.mark.skipif("native" not in FAST, reason=build.unavailable())
@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (draw(1, 2, 3, 4, dtype=torch.float64), "it runs on float32 and bfloat16, got torch.float64"),
        (draw(1, 2, 3, 9), "it runs with at most 8 taps, got 9"),
    ],
)
def test_what_the_kernel_cannot_run_on_is_refused_by_name_and_left_to_torch(tensors, message):
    tensors = [x.detach().to(tensors[0].dtype) for x in tensors]
    with pytest.raises(BackendError, match=f"backend 'native' cannot run here: {message}"):
        causal_conv1d_silu(*tensors, backend="native")
    assert torch.equal(causal_conv1d_silu(*tensors), causal_conv1d_silu(*tensors, backend="torch"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3)}, r"x: shape \(2, 3\); allowed: \(b, e, t\)"),
        ({"weight": torch.zeros(2, 4)}, r"weight: shape \(2, 4\); allowed: \(3, k\)"),
        ({"bias": torch.zeros(2)}, r"bias: shape \(2,\); allowed: \(3,\)"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    given = {"x": torch.zeros(1, 3, 5), "weight": torch.zeros(3, 4), "bias": None}
    with pytest.raises(InputError, match=message):
        _check(**given | change)


def test_an_unknown_backend_is_refused():
    with pytest.raises(InputError, match="backend: 'cuda' is unknown; allowed: auto, reference, torch, native"):
        causal_conv1d_silu(*draw(1, 2, 3, 4), backend="cuda")


def draw_gate(b, e, t, *, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(2, b, t, e, generator=generator).to(dtype).mT.unbind()
    gate = torch.randn(b, t, 2 * e, generator=generator).to(dtype).chunk(2, dim=-1)[1].mT
    return [x.detach().requires_grad_() for x in (left, right, gate)]


def gate_results(tensors, **options):
    out = gated_sum(*tensors, scale=0.5, **options)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, cotangent)]


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    b=st.integers(1, 4),
    e=st.integers(1, 70),
    t=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 100),
)
def test_the_gate_agrees_with_double_precision(instruction_set, b, e, t, dtype, seed):
    tensors = draw_gate(b, e, t, dtype=dtype, seed=seed)
    found = gate_results(tensors, backend="native")
    expected = gate_results([x.detach().double().requires_grad_() for x in tensors])
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == dtype
        # of bfloat16 the sum is rounded, when it is kept for backward, and the result: by 2^-8 at most, each
        assert (x - y).abs().max() <= (2**-7 if dtype == torch.bfloat16 else 1e-6) * y.abs().max()
    assert found[0].stride() == tensors[0].stride()


@pytest.mark.parametrize("backend", FAST)
def test_the_gate_joins_by_hand(backend):
    one = torch.ones(1, 1, 1)
    assert gated_sum(2 * one, 3 * one, 0 * one, backend=backend).item() == 0
    assert gated_sum(2 * one, 3 * one, 30 * one, scale=0.5, backend=backend).item() == pytest.approx(75)


@pytest.mark.skipif("native" not in FAST, reason=build.unavailable())
def test_the_gate_passes_torchs_own_checks():
    tensors = draw_gate(2, 5, 7)
    torch.library.opcheck(torch.ops.famba.gate.default, (*tensors, 0.5, True))
    left, right, gate = (x.detach() for x in tensors)
    torch.library.opcheck(torch.ops.famba.gate.default, (left, right, gate, 0.5, False))
    torch.library.opcheck(torch.ops.famba.gate_backward.default, (torch.randn(2, 5, 7), left + right, gate, 1.0))


@pytest.mark.skipif("native" not in FAST, reason=build.unavailable())
def test_the_gate_keeps_the_sum_of_its_sides_and_neither_side():
    left, right, gate = draw_gate(2, 5, 7)
    assert [x.data_ptr() for x in kept_by(gated_sum(left, right, gate))[1:]] == [gate.data_ptr()]
    assert torch.equal(kept_by(gated_sum(left, right, gate))[0], left + right)
    with torch.no_grad():
        assert torch.ops.famba.gate(left, right, gate, 0.5, False)[1].numel() == 0
        assert gated_sum(left, right, gate).grad_fn is None


def kept_by(out):
    """What the last operation of a result has saved."""
    return out.grad_fn.saved_tensors


def test_a_gate_of_mixed_types_is_left_to_torch_and_refused_by_name():
    left, right, gate = (x.detach() for x in draw_gate(1, 2, 3))
    assert gated_sum(left, right, gate.double()).dtype == torch.float64
    if "native" in FAST:
        with pytest.raises(BackendError, match="it runs on tensors of one type"):
            gated_sum(left, right, gate.bfloat16(), backend="native")


def draw_scan(b, e, t, n, m, *, optional=True, dtype=torch.float32, seed=0):
    """Arguments in the order of `projected_scan`: step, B and C are slices of one projection, as the model has them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    step, B, C = normal(b, t, m + 2 * n).to(dtype).split([m, n, n], dim=-1)
    tensors = [normal(b, t, e).mT.to(dtype), step.mT, normal(e, m) / m, -torch.exp(normal(e, n)), B.mT, C.mT]
    tensors += [normal(e), normal(e) - 2] if optional else [None, None]
    return [x if x is None else x.detach().requires_grad_() for x in tensors]


def scan_results(tensors, **options):
    out = projected_scan(*tensors, **options)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [x for x in tensors if x is not None], cotangent)]


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("reverse", [True, False])
def test_a_projected_scan_is_the_scan_of_the_projection(reverse, optional, backend):
    tensors = draw_scan(2, 21, 19, 5, 3, optional=optional)
    found = scan_results(tensors, reverse=reverse, backend=backend)
    double = [x if x is None else x.detach().double().requires_grad_() for x in tensors]
    u, step, weight, A, B, C, D, bias = double
    out = selective_scan_ref(u, torch.einsum("em,bmt->bet", weight, step), A, B, C, D, None, bias, True, reverse)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().double()
    expected = [out, *torch.autograd.grad(out, [x for x in double if x is not None], cotangent)]
    assert len(found) == len(expected) == 7 + 2 * optional
    for x, y in zip(found, expected, strict=True):
        assert (x - y).abs().max() <= 1e-5 * y.abs().max()


@pytest.mark.skipif("native" not in FAST, reason=build.unavailable())
def test_a_native_projected_scan_keeps_no_delta_for_backward():
    b, e, t = 2, 48, 32
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        projected_scan(*draw_scan(b, e, t, 4, 3), backend="native")
    assert kept.count((b, e, t)) == 1, "u, and nothing else as large"
    assert (b, 3, t) in kept
    with torch.no_grad():
        assert projected_scan(*draw_scan(b, e, t, 4, 3), backend="native").grad_fn is None


@pytest.mark.skipif("native" not in FAST, reason=build.unavailable())
def test_a_projected_scan_in_bfloat16_is_near_and_gives_each_gradient_its_type():
    tensors = draw_scan(2, 21, 40, 16, 3, dtype=torch.bfloat16)
    found = scan_results(tensors, backend="native")
    assert [x.dtype for x in found[1:]] == [x.dtype for x in tensors]
    expected = scan_results([x.detach().double().requires_grad_() for x in tensors])
    for x, y in zip(found, expected, strict=True):
        # delta is rounded, and so are its gradient and what it makes: by 2^-8 at most, each
        assert (x - y).abs().max() <= 3 * 2**-8 * y.abs().max()
    single = draw_scan(2, 21, 40, 16, 3)
    with torch.autocast("cpu", torch.bfloat16):  # would round the projection in forward, where it reigns, only
        out = projected_scan(*single, backend="native")
    expected = projected_scan(*single, backend="native")
    assert torch.equal(out, expected)
    found = zip(torch.autograd.grad(out.sum(), single), torch.autograd.grad(expected.sum(), single), strict=True)
    assert all(torch.equal(x, y) for x, y in found)


@pytest.mark.parametrize(
    ("place", "shape", "message"),
    [
        (1, (2, 4, 7), r"step: shape \(2, 4, 7\); allowed: \(2, 3, 7\)"),
        (2, (4, 3), r"weight: shape \(4, 3\); allowed: \(5, m\)"),
    ],
)
def test_arguments_of_a_projected_scan_that_do_not_fit_are_named(place, shape, message):
    tensors = [x.detach() for x in draw_scan(2, 5, 7, 4, 3)]
    tensors[place] = torch.zeros(shape)
    with pytest.raises(InputError, match=message):
        _check_projection(*tensors[:3])


def draw_norm(b, t, d, *, residual=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(b, t, d, generator=generator), torch.randn(d, generator=generator)
    tensors = [x, torch.randn(b, t, d, generator=generator) if residual else None, weight]
    return [x if x is None else x.requires_grad_() for x in tensors]


def norm_results(tensors, *, use="both", **options):
    outs = add_rms_norm(*tensors, **options)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outs]
    chosen = {"both": slice(0, 2), "normed": slice(0, 1), "sum": slice(1, 2)}[use]
    total = sum((x * c).sum() for x, c in list(zip(outs, cotangents, strict=True))[chosen])
    grads = torch.autograd.grad(total, [x for x in tensors if x is not None], allow_unused=use == "sum")
    return [*(x.detach() for x in outs), *grads]


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    b=st.integers(1, 4),
    t=st.integers(1, 90),
    d=st.integers(1, 70),
    residual=st.booleans(),
    use=st.sampled_from(["both", "normed", "sum"]),
    seed=st.integers(0, 100),
)
def test_the_norm_agrees_with_double_precision(instruction_set, b, t, d, residual, use, seed):
    tensors = draw_norm(b, t, d, residual=residual, seed=seed)
    found = norm_results(tensors, use=use, backend="native")
    expected = norm_results([x if x is None else x.detach().double().requires_grad_() for x in tensors], use=use)
    assert len(found) == len(expected) == 4 + residual
    for x, y in zip(found, expected, strict=True):
        if y is None:
            assert x is None or not x.any()
        else:
            assert (x - y).abs().max() <= 1e-5 * max(1, y.abs().max())


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("case", json.loads((GOLDEN / "components.json").read_text())["rmsnorm"])
def test_the_norm_is_the_independent_one(case, backend):
    prefix = f"rmsnorm/{case}/"
    stored = {k.removeprefix(prefix): x for k, x in load_file(GOLDEN / "components.safetensors").items() if prefix in k}
    out, total = add_rms_norm(stored["x"], stored.get("residual"), stored["weight"], backend=backend)
    assert torch.allclose(out, stored["out"], rtol=1e-5, atol=1e-6)
    assert torch.allclose(total, stored["residual_out"], rtol=1e-6, atol=1e-7)


@pytest.mark.skipif("native" not in FAST, reason=build.unavailable())
@pytest.mark.parametrize("residual", [True, False])
def test_the_norm_passes_torchs_own_checks(residual):
    tensors = draw_norm(2, 3, 5, residual=residual)
    torch.library.opcheck(torch.ops.famba.norm.default, (*tensors, 1e-5))
    before = torch.get_num_threads()
    tensors = draw_norm(4, 200, 40, residual=residual)
    try:
        torch.set_num_threads(1)
        alone = norm_results(tensors)
        torch.set_num_threads(3)
        assert all(map(torch.equal, alone, norm_results(tensors)))
    finally:
        torch.set_num_threads(before)

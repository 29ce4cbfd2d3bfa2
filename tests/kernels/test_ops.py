"""Fused convolution, both scans and norm: by hand, against double precision, threads, checks of torch, refusals."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from famba.errors import BackendError, InputError
from famba.kernels.cpu import build
from famba.kernels.ops import Side, _check, _check_projection, add_rms_norm, bidirectional_scan, causal_conv1d_silu
from famba.kernels.scan import selective_scan_ref

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FAST = ["torch"] if build.unavailable() else ["torch", "native"]
needs_native = pytest.mark.skipif("native" not in FAST, reason=build.unavailable())


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
    if layout != "slices" and e > 1:
        assert found[0].stride() == found[1].stride() == tensors[0].stride()


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


@needs_native
@pytest.mark.parametrize("bias", [True, False])
def test_the_operators_pass_torchs_own_checks(bias):
    tensors = draw(2, 5, 7, 4, bias=bias)
    torch.library.opcheck(torch.ops.famba.conv.default, (*tensors, True))
    tensors = [x if x is None else x.detach() for x in tensors]
    torch.library.opcheck(torch.ops.famba.conv_backward.default, (torch.randn(2, 5, 7), *tensors, True))


@needs_native
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


def draw_sides(*, dtype=torch.float32):
    """Both sides of `bidirectional_scan`, then z; dt, B and C are slices of one projection, as the model has them."""
    b, e, t, n, m = 2, 21, 19, 5, 3
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    made = []
    for _ in range(2):
        dt, B, C = normal(b, t, m + 2 * n).to(dtype).split([m, n, n], dim=-1)
        made += [normal(b, t, e).mT.to(dtype), dt.mT, normal(e, m).to(dtype) / m, -torch.exp(normal(e, n)), B.mT, C.mT]
        made += [normal(e), normal(e) - 2]
    return [x.detach().requires_grad_() for x in (*made, normal(b, t, e).mT.to(dtype))]


def by_sides(tensors, backend):
    return bidirectional_scan(Side(*tensors[:8]), Side(*tensors[8:16]), tensors[16], scale=0.5, backend=backend)


def by_definition(tensors):
    total = 0
    for (u, dt, dt_proj, A, B, C, D, bias), reverse in ((tensors[:8], False), (tensors[8:16], True)):
        delta = torch.einsum("em,bmt->bet", dt_proj, dt)
        total = total + selective_scan_ref(u, delta, A, B, C, D, None, bias, True, reverse)
    return 0.5 * total * torch.nn.functional.silu(tensors[16])


# In bfloat16 delta, the sum, the gate and each gradient are rounded, by 2^-8 at most, each.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-5)])
@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_both_scans_of_projected_dt_agree_with_double_precision(backend, dtype, tolerance):
    tensors = draw_sides(dtype=dtype)
    double = [x.detach().double().requires_grad_() for x in tensors]
    cotangent = torch.randn(2, 21, 19, generator=torch.Generator().manual_seed(1)).bfloat16()
    found, expected = (
        [out, *torch.autograd.grad(out, given, cotangent.to(out.dtype))]
        for given, out in ((tensors, by_sides(tensors, backend)), (double, by_definition(double)))
    )
    assert [x.dtype for x in found] == [dtype, *(x.dtype for x in tensors)]
    for x, y in zip(found, expected, strict=True):
        assert (x - y).abs().max() <= tolerance * y.abs().max()


@pytest.mark.parametrize(
    ("place", "shape", "message"),
    [
        (1, (2, 4, 19), r"dt: shape \(2, 4, 19\); allowed: \(2, 3, 19\)"),
        (2, (4, 3), r"dt_proj: shape \(4, 3\); allowed: \(21, m\)"),
    ],
)
def test_a_dt_that_does_not_fit_is_named(place, shape, message):
    tensors = [x.detach() for x in draw_sides()]
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


@needs_native
@pytest.mark.parametrize("residual", [True, False])
def test_the_norm_passes_torchs_own_checks(residual):
    tensors = draw_norm(2, 3, 5, residual=residual)
    torch.library.opcheck(torch.ops.famba.norm.default, (*tensors, 1e-5))


@needs_native
@pytest.mark.parametrize(
    ("function", "tensors"),
    [(results, draw(5, 100, 50, 4)), *((norm_results, draw_norm(4, 200, 40, residual=x)) for x in (True, False))],
    ids=["conv", "add_norm", "norm"],
)
def test_the_thread_count_changes_no_bit(threads, function, tensors):
    threads(1)
    alone = function(tensors)
    threads(3)
    assert len(alone) >= 4
    assert all(map(torch.equal, alone, function(tensors)))

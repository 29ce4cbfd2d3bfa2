"""Fused convolution, both scans and norm: by hand, against double precision, threads, checks of torch, refusals."""

from functools import partial

import pytest
import torch
from agreement import assert_agree, assert_both_scans_agree, draw_sides, draw_tokens, leaves, results
from hypothesis import given
from hypothesis import strategies as st

from famba.errors import BackendError, InputError
from famba.kernels.cpu import build
from famba.kernels.ops import (
    Side,
    _check,
    _check_projection,
    add_rms_norm,
    bidirectional_conv1d_silu,
    bidirectional_scan,
    causal_conv1d_silu,
)

FAST = ["torch"] if build.unavailable() else ["torch", "native"]
needs_native = pytest.mark.skipif("native" not in FAST, reason=build.unavailable())


def draw(b, e, t, k, *, seed=0, layout="channels", bias=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = draw_tokens(b, e, t, generator, layout).to(dtype)
    return leaves([x, torch.randn(e, k, generator=generator), torch.randn(e, generator=generator) if bias else None])


@pytest.mark.parametrize("backend", FAST)
def test_three_tokens_worked_by_hand(backend):
    x, weight, bias = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[10.0, 1.0]]), torch.tensor([0.5])
    silu = torch.nn.functional.silu
    found = causal_conv1d_silu(x, weight, bias, backend=backend)
    assert torch.allclose(found, silu(torch.tensor([[[1.5, 12.5, 23.5]]])))
    found = causal_conv1d_silu(x, weight, bias, reverse=True, backend=backend)
    assert torch.allclose(found, silu(torch.tensor([[[21.5, 32.5, 3.5]]])))


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
    found = assert_agree(partial(causal_conv1d_silu, reverse=reverse), tensors, 1e-5, backend="native")
    if layout != "slices" and min(e, t) > 1:
        assert found[0].stride() == found[1].stride() == tensors[0].stride()


def test_bfloat16_keeps_its_type_and_sums_in_float32(instruction_set):
    tensors = draw(3, 40, 50, 4, dtype=torch.bfloat16)
    found = assert_agree(causal_conv1d_silu, tensors, 2**-8, backend="native")
    assert [x.dtype for x in found] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]


@needs_native
def test_weights_that_must_be_copied_give_the_gradients_of_their_copies():
    x, weight, bias = draw(3, 44, 50, 8)
    strided = leaves([x, weight[:, ::2], bias.repeat_interleave(2)[::2]])
    assert not strided[1].is_contiguous()
    copied = leaves([x, *(tensor.contiguous() for tensor in strided[1:])])
    run = partial(causal_conv1d_silu, backend="native")
    assert all(map(torch.equal, results(run, strided), results(run, copied)))


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
    with pytest.raises(BackendError, match=f"backend 'native' cannot run here: {message}"):
        causal_conv1d_silu(*tensors, backend="native")
    assert torch.equal(causal_conv1d_silu(*tensors), causal_conv1d_silu(*tensors, backend="torch"))


# In bfloat16 delta, the sum, the gate and each gradient are rounded, by 2^-8 at most, each.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-5)])
@pytest.mark.parametrize("backend", FAST)
def test_both_scans_of_projected_dt_agree_with_double_precision(backend, dtype, tolerance):
    tensors = draw_sides(2, 21, 19, 5, 3, dtype=dtype)
    found = assert_both_scans_agree(tensors, tolerance, backend=backend)
    assert [x.dtype for x in found] == [dtype, *(x.dtype for x in tensors)]


@pytest.mark.parametrize("backend", [name for name in FAST if name != "torch"] + ["triton"])
def test_both_directions_are_refused_where_the_second_alone_does_not_suit(backend, on_paper):
    tensors = draw_sides(1, 3, 4, 2, 1)
    tensors[11] = tensors[11].detach().double()  # A
    sides, z = (Side(*tensors[:8]), Side(*tensors[8:16])), tensors[16]
    with pytest.raises(BackendError, match=r"got torch\.float64"):
        bidirectional_scan(*sides, z, backend=backend)
    x, *weights = *draw(1, 3, 4, 2), *leaves(draw(1, 3, 4, 2)[1:], dtype=torch.float64)
    with pytest.raises(BackendError, match=r"got torch\.float64"):
        bidirectional_conv1d_silu(x, tuple(weights[:2]), tuple(weights[2:]), backend=backend)


X, WEIGHT, DT = torch.zeros(1, 3, 5), torch.zeros(3, 4), torch.zeros(1, 4, 5)


@pytest.mark.parametrize(
    ("check", "given", "message"),
    [
        (_check, (X[0], WEIGHT, None), r"x: shape \(3, 5\); allowed: \(b, e, t\)"),
        (_check, (X, WEIGHT[1:], None), r"weight: shape \(2, 4\); allowed: \(3, k\)"),
        (_check, (X, WEIGHT, torch.zeros(2)), r"bias: shape \(2,\); allowed: \(3,\)"),
        (_check_projection, (X, DT[:, 1:], WEIGHT), r"dt: shape \(1, 3, 5\); allowed: \(1, 4, 5\)"),
        (_check_projection, (X, DT, WEIGHT[1:]), r"dt_proj: shape \(2, 4\); allowed: \(3, m\)"),
    ],
)
def test_arguments_that_do_not_fit_are_named(check, given, message):
    with pytest.raises(InputError, match=message):
        check(*given)


def draw_norm(b, t, d, *, residual=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, other = torch.randn(2, b, t, d, generator=generator).unbind()
    return leaves([x, other if residual else None, torch.randn(d, generator=generator)])


@given(
    b=st.integers(1, 4),
    t=st.integers(1, 90),
    d=st.integers(1, 70),
    residual=st.booleans(),
    used=st.sampled_from([slice(2), slice(1), slice(1, 2)]),  # of what is normed and the sum
    seed=st.integers(0, 100),
)
def test_the_norm_agrees_with_double_precision(instruction_set, b, t, d, residual, used, seed):
    def norm(*tensors, backend):
        return add_rms_norm(*tensors, backend=backend)[used]

    assert_agree(norm, draw_norm(b, t, d, residual=residual, seed=seed), 1e-5, backend="native", least=1)


@needs_native
@pytest.mark.parametrize("residual", [True, False])
def test_the_norm_passes_torchs_own_checks(residual):
    x, residual, weight = (x if x is None else x.detach() for x in draw_norm(2, 3, 5, residual=residual))
    torch.library.opcheck(torch.ops.famba.norm.default, (x, residual, weight, 1e-5))
    torch.library.opcheck(torch.ops.famba.norm_backward.default, (x, residual, x, torch.ones(2, 3), weight))


@needs_native
@pytest.mark.parametrize(
    ("function", "tensors"),
    [
        (causal_conv1d_silu, draw(5, 100, 50, 4)),
        *((add_rms_norm, draw_norm(4, 200, 40, residual=x)) for x in (True, False)),
    ],
    ids=["conv", "add_norm", "norm"],
)
def test_the_thread_count_changes_no_bit(threads, function, tensors):
    threads(1)
    alone = results(function, tensors)
    threads(3)
    assert all(map(torch.equal, alone, results(function, tensors)))

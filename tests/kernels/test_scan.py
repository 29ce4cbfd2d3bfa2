"""The selective scan: a case by hand, invariants, agreement of the backends, reference data, and what is refused."""

import itertools
import math

import pytest
import torch
from goldens import golden_json, golden_tensors
from hypothesis import given
from hypothesis import strategies as st

from famba.errors import InputError
from famba.kernels import scan
from famba.kernels.scan import backends, selective_scan, selective_scan_ref
from famba.profiling import memory

CASES = golden_json("components")["scan"]
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
FAST = [name for name, missing in backends().items() if not missing and name != "reference"]


def draw(b, e, t, n, *, seed=0, dtype=torch.float64, scale=1.0, optional=True):
    """Inputs by name; A decays, steps are about exp(normal) * scale after softplus."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    inputs = {
        "u": normal(b, e, t),
        "delta": normal(b, e, t) + math.log(math.expm1(scale)) if scale < 30 else normal(b, e, t) + scale,
        "A": -torch.exp(normal(e, n)),
        "B": normal(b, n, t),
        "C": normal(b, n, t),
    }
    if optional:
        inputs |= {"D": normal(e), "z": normal(b, e, t), "delta_bias": normal(e)}
    return {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}


def golden(case):
    """Tensors of one stored case by name."""
    return golden_tensors("components", f"scan/{case}/")


def run(function, inputs, cotangent, **options):
    out = function(**inputs, delta_softplus=True, **options)
    grads = torch.autograd.grad(out, list(inputs.values()), cotangent.to(out.dtype))
    return {"out": out, **dict(zip(inputs, grads, strict=True))}


def assert_close(found, expected, *, rtol):
    """Largest error of each tensor, relative to the tensor's largest value."""
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        error = (found[name].double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-30)
        assert error <= rtol, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_two_tokens_worked_by_hand(backend):
    # decay 1/2 per token at step 1: h = 3, then 3/2 + 5; read by C = 2, plus u times D = 10
    column = torch.ones(1, 1, 2)
    options = {
        "u": torch.tensor([[[3.0, 5.0]]]),
        "delta": column,
        "A": torch.tensor([[-math.log(2)]]),
        "B": column,
        "C": 2 * column,
        "D": torch.tensor([10.0]),
        "backend": backend,
    }
    assert torch.allclose(selective_scan(**options), torch.tensor([[[36.0, 63.0]]]))
    # from the last token: h = 5, then 5/2 + 3
    assert torch.allclose(selective_scan(**options, reverse=True), torch.tensor([[[41.0, 60.0]]]))
    # a gate of zero closes
    assert torch.equal(selective_scan(**options, z=0 * column), 0 * column)


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_of_an_independent_implementation(case, backend):
    stored = golden(case)
    inputs = {name: stored[name].requires_grad_() for name in NAMES if name in stored}
    assert sorted(inputs) == CASES[case]["has"]
    out = selective_scan(**inputs, delta_softplus=CASES[case]["softplus"], backend=backend)
    grads = torch.autograd.grad((out * stored["cotangent"]).sum(), list(inputs.values()))
    tolerance = max(1e-5, 4 * CASES[case]["fp32_vs_fp64"])
    assert_close({"out": out}, {"out": stored["out_f64"]}, rtol=tolerance)
    expected = {name: stored[f"grad_{name}"] for name in inputs}
    assert_close(dict(zip(inputs, grads, strict=True)), expected, rtol=2 * tolerance)


@pytest.mark.parametrize("case", CASES)
def test_reference_in_double_precision_is_the_independent_one(case):
    stored = golden(case)
    inputs = {name: stored[name].double() for name in NAMES if name in stored}
    for backend in ("reference", "torch"):
        out = selective_scan(**inputs, delta_softplus=CASES[case]["softplus"], backend=backend)
        assert out.dtype == torch.float64
        assert_close({"out": out}, {"out": stored["out_f64"]}, rtol=1e-12)


@given(
    b=st.integers(1, 5),
    e=st.integers(1, 9),
    t=st.integers(1, 50),
    n=st.integers(1, 20),
    reverse=st.booleans(),
    optional=st.booleans(),
    block=st.sampled_from([1, 500, 1 << 19]),
    seed=st.integers(0, 1000),
)
def test_chunks_agree_with_the_reference_at_any_shape(b, e, t, n, reverse, optional, block, seed):
    inputs = draw(b, e, t, n, seed=seed, optional=optional)
    cotangent = torch.randn(b, e, t, generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "_BLOCK", block)
        found = run(selective_scan, inputs, cotangent, reverse=reverse, backend="torch")
    assert_close(found, run(selective_scan_ref, inputs, cotangent, reverse=reverse), rtol=1e-10)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    ("t", "scale"),
    # Where the steps are large, a state is forgotten within a few tokens.
    [*itertools.product((1, 16, 17), (1e-6, 0.01, 1.0, 50.0, 1e4)), (2000, 1e-6), (2000, 0.01), (2000, 1.0)],
)
def test_single_precision_is_right_for_steps_of_any_size(t, scale, backend):
    inputs = draw(1, 4, t, 16, scale=scale, dtype=torch.float32)
    cotangent = torch.randn(1, 4, t, generator=torch.Generator().manual_seed(1))
    exact = run(selective_scan_ref, {k: x.detach().double().requires_grad_() for k, x in inputs.items()}, cotangent)
    found = run(selective_scan, inputs, cotangent, backend=backend)
    assert all(x.isfinite().all() for x in found.values())
    assert_close(found, exact, rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_reverse_is_the_scan_of_the_reversed_sequence(backend):
    inputs = {name: x.detach().float() for name, x in draw(2, 3, 19, 4).items()}
    flipped = {name: x.flip(-1) if x.ndim == 3 else x for name, x in inputs.items()}
    backward = selective_scan(**inputs, delta_softplus=True, reverse=True, backend=backend)
    assert torch.allclose(backward, selective_scan(**flipped, delta_softplus=True, backend=backend).flip(-1), atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_no_token_sees_a_later_one_and_no_sequence_another(backend):
    inputs = {name: x.detach().float() for name, x in draw(2, 3, 40, 4).items()}
    before = selective_scan(**inputs, delta_softplus=True, backend=backend)
    for name in ("u", "delta", "B", "C", "z"):
        inputs[name][1, :, 20:] += 1
    after = selective_scan(**inputs, delta_softplus=True, backend=backend)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1, :, :20], after[1, :, :20])
    assert not torch.isclose(before[1, :, 20:], after[1, :, 20:]).any(dim=-1).all()


@pytest.mark.parametrize(
    ("optional", "dtype"), [(True, torch.float64), (True, torch.bfloat16), (False, torch.bfloat16)]
)
def test_the_operators_pass_torchs_own_checks(optional, dtype):
    tensors = [draw(2, 5, 20, 3, dtype=dtype).get(name) for name in NAMES[: 8 if optional else 5]]
    tensors += [None] * (8 - len(tensors))
    torch.library.opcheck(torch.ops.famba.chunked_scan.default, (*tensors, True, False, True))
    tensors = [x if x is None else x.detach() for x in tensors]
    torch.library.opcheck(torch.ops.famba.chunked_scan.default, (*tensors, True, True, False))
    out, *kept = torch.ops.famba.chunked_scan(*tensors, True, False, True)
    torch.library.opcheck(torch.ops.famba.chunked_scan_backward.default, (out, *tensors, *kept, True, False))


@pytest.mark.parametrize("backend", FAST)
def test_nothing_is_kept_for_a_gradient_that_cannot_be_asked_for(backend):
    inputs = draw(2, 64, 160, 8, dtype=torch.float32)

    def largest():
        return memory.peak_memory(lambda: selective_scan(**inputs, backend=backend), inputs.values(), "cpu")

    with torch.no_grad():
        ungraded = largest()
    states = 4 * 2 * 64 * 8 * 160 // 16
    assert largest() >= ungraded + states


@pytest.mark.parametrize("backend", FAST)
def test_low_precision_activations_keep_their_type_and_a_float32_state(backend):
    inputs = draw(2, 8, 60, 16, dtype=torch.float32)
    low = {name: (x.detach().bfloat16() if x.ndim == 3 else x.detach()).requires_grad_() for name, x in inputs.items()}
    cotangent = torch.randn(2, 8, 60, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = run(selective_scan_ref, {name: x.detach().double().requires_grad_() for name, x in low.items()}, cotangent)
    found = run(selective_scan, low, cotangent, backend=backend)
    assert found["out"].dtype == torch.bfloat16
    assert {name: x.dtype for name, x in found.items() if name != "out"} == {name: x.dtype for name, x in low.items()}
    assert_close(found, exact, rtol=2**-8)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("u", lambda x: x[0], r"u: shape \(3, 4\); allowed: \(b, e, t\)"),
        ("u", lambda x: x[..., :0], r"u: shape \(2, 3, 0\)"),
        ("delta", lambda x: x[..., 1:], r"delta: shape \(2, 3, 3\); allowed: \(2, 3, 4\)"),
        ("A", lambda x: x.t(), r"A: shape \(5, 3\); allowed: \(3, n\)"),
        ("B", lambda x: x[:, 1:], r"B: shape \(2, 4, 4\); allowed: \(2, 5, 4\)"),
        ("C", lambda x: x[:1], r"C: shape \(1, 5, 4\)"),
        ("D", lambda x: x[1:], r"D: shape \(2,\); allowed: \(3,\)"),
        ("z", lambda x: x.mT, r"z: shape \(2, 4, 3\)"),
        ("delta_bias", lambda x: x[:, None], r"delta_bias: shape \(3, 1\)"),
        ("A", lambda x: x.to(torch.complex64), r"A: dtype torch.complex64; allowed: a real floating-point type"),
        ("u", lambda x: x.int(), r"u: dtype torch.int32"),
        ("B", lambda x: x.to("meta"), r"B: on meta; allowed: cpu"),
    ],
)
def test_arguments_that_do_not_fit_are_named(name, change, message):
    inputs = draw(2, 3, 4, 5)
    with pytest.raises(InputError, match=message):
        scan.check(**inputs | {name: change(inputs[name].detach())})

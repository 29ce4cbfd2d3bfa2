"""The selective scan: a case by hand, reference data, agreement of the backends, and what is refused."""

import math
from functools import partial

import pytest
import torch
from agreement import NAMES, STEPS, assert_scan_agrees, draw_scan
from goldens import golden_json, golden_tensors
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from famba.errors import InputError
from famba.kernels import dispatch, scan
from famba.kernels.cpu import build
from famba.kernels.scan import backends, selective_scan
from famba.profiling import memory

CASES = golden_json("components")["scan"]
FAST = ["torch"] if build.unavailable() else ["torch", "native"]


def test_the_backends_are_those_that_have_a_name():
    assert list(backends()) == list(dispatch.NAMES)
    assert set(scan._BACKENDS) == set(dispatch.NAMES)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_two_tokens_worked_by_hand(backend):
    # decay 1/2 per token at step 1: h = 3, then 3/2 + 5; read by C = 2, plus u times D = 10
    u, column = torch.tensor([[[3.0, 5.0]]]), torch.ones(1, 1, 2)
    A, D = torch.tensor([[-math.log(2)]]), torch.tensor([10.0])
    run = partial(selective_scan, u, column, A, column, 2 * column, D, backend=backend)
    assert torch.allclose(run(), torch.tensor([[[36.0, 63.0]]]))
    # from the last token: h = 5, then 5/2 + 3
    assert torch.allclose(run(reverse=True), torch.tensor([[[41.0, 60.0]]]))
    # a gate of zero closes
    assert torch.equal(run(z=0 * column), 0 * column)


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_of_an_independent_implementation(case, backend):
    stored, about = golden_tensors("components", f"scan/{case}/"), CASES[case]
    inputs = {name: stored[name].requires_grad_() for name in NAMES if name in stored}
    assert sorted(inputs) == about["has"]
    run = partial(selective_scan, delta_softplus=about["softplus"], backend=backend)
    out = run(**inputs)
    grads = torch.autograd.grad((out * stored["cotangent"]).sum(), list(inputs.values()))
    tolerance = max(1e-5, 4 * about["fp32_vs_fp64"])
    pairs = [(out, "out_f64", tolerance)]
    pairs += [(grad, f"grad_{name}", 2 * tolerance) for grad, name in zip(grads, inputs, strict=True)]
    if backend == "reference":
        exact = run(**{name: x.detach().double() for name, x in inputs.items()})
        assert exact.dtype == torch.float64
        pairs += [(exact, "out_f64", 1e-12)]
    for found, key, most in pairs:
        want = stored[key].double()
        assert (found.double() - want).abs().max() <= most * want.abs().max(), key


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
    tensors = draw_scan(b, e, t, n, seed=seed, optional=optional, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "_BLOCK", block)
        assert_scan_agrees(tensors, 1e-10, backend="torch", reverse=reverse)


class Operations(TorchDispatchMode):
    """Counts operations, views apart; `largest` has the most numbers of those of a block's (tokens, b, n, e) arrays."""

    count = largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += not func.is_view
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(out) if x.ndim == 4)])
        return out


@pytest.mark.parametrize("e", [384, 1536])
def test_on_other_devices_than_a_cpu_a_training_batch_takes_few_launches(e):
    b, t, n = 128, 197, 16
    sizes = ((b, e, t), (b, e, t), (e, n), (b, n, t), (b, n, t), (e,), (b, e, t), (e,))
    tensors = [torch.empty(size, device="meta") for size in sizes]
    with Operations() as operations:
        out, *kept = scan._forward(*tensors, True, False, True)
        scan._backward(out, *tensors, *kept, True, True)
    assert operations.count < 7 * t


def test_the_memory_that_a_scan_takes_for_a_block_is_bounded_on_every_device():
    b, e, t, n = 2048, 384, 20, 16
    tensors = [torch.empty(size, device="meta") for size in ((b, e, t), (b, e, t), (e, n), (b, n, t), (b, n, t))]
    with Operations() as operations:
        scan._forward(*tensors, None, None, None, True, False, False)
    assert 2**25 < operations.largest <= 2**26


@pytest.mark.parametrize(("t", "scale"), STEPS)
def test_single_precision_is_right_for_steps_of_any_size(t, scale):
    assert_scan_agrees(draw_scan(1, 4, t, 16, scale=scale), 1e-5, backend="torch")


def test_low_precision_activations_keep_their_type_and_a_float32_state():
    tensors = draw_scan(2, 8, 60, 16, scale=1.0, dtype=torch.bfloat16)
    found = assert_scan_agrees(tensors, 2**-8, backend="torch")
    assert [x.dtype for x in found] == [torch.bfloat16, *(x.dtype for x in tensors)]


CHECKED = [("chunked_scan", True, torch.bfloat16), ("chunked_scan", False, torch.float64)]
CHECKED += [("scan", optional, torch.float32) for optional in (True, False) if "native" in FAST]


@pytest.mark.parametrize(("name", "optional", "dtype"), CHECKED)
def test_the_operators_pass_torchs_own_checks(name, optional, dtype):
    tensors = draw_scan(2, 5, 20, 3, optional=optional, dtype=dtype)
    forward, backward = (getattr(torch.ops.famba, f"{name}{end}") for end in ("", "_backward"))
    torch.library.opcheck(forward.default, (*tensors, True, False, True))
    tensors = [x if x is None else x.detach() for x in tensors]
    torch.library.opcheck(forward.default, (*tensors, True, True, False))
    out, *kept = forward(*tensors, True, False, True)
    torch.library.opcheck(backward.default, (out, *tensors, *kept, True, False))


@pytest.mark.parametrize("backend", FAST)
def test_nothing_is_kept_for_a_gradient_that_cannot_be_asked_for(backend):
    tensors = draw_scan(2, 64, 160, 8, layout="tokens")

    def largest():
        return memory.peak_memory(lambda: selective_scan(*tensors, backend=backend), tensors, "cpu")

    with torch.no_grad():
        ungraded = largest()
    states = 4 * 2 * 64 * 8 * (160 // 16 - 1)  # the first chunk begins with zeros
    assert largest() >= ungraded + states


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
        ("B", lambda x: x.to("meta"), r"B: on meta; allowed: cpu"),
    ],
)
def test_arguments_that_do_not_fit_are_named(name, change, message):
    inputs = dict(zip(NAMES, draw_scan(2, 3, 4, 5), strict=True))
    with pytest.raises(InputError, match=message):
        scan.check(**inputs | {name: change(inputs[name].detach())})

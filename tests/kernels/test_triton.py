"""The GPU kernels against double precision, against torch and independent results; determinism, graphs, compilation.

Where there is a CUDA device they run on it (`-m gpu`). Elsewhere Triton's interpreter runs the same tests on small
tensors, in a process of its own: it has to be chosen before Triton is imported, for all of a process.
"""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from goldens import golden_json, golden_tensors
from torch._subclasses.fake_tensor import DataDependentOutputException

from famba import FusionOptions, create_model
from famba.fusion import matching, merge
from famba.kernels import dispatch, ops
from famba.kernels.scan import backends, selective_scan, selective_scan_ref
from famba.kernels.triton import runtime
from famba.kernels.triton import scan as kernels

ROOT = Path(__file__).resolve().parents[2]
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)
on_each_device = pytest.mark.parametrize("device", ["cpu"] if runtime.INTERPRETED else [CUDA])
on_cuda = pytest.mark.parametrize("device", [CUDA])
# A result's error by rounding to bfloat16, of its largest value: to nearest, but in the interpreter towards zero.
ROUNDED = 2**-7 if runtime.INTERPRETED else 2**-8
needs_triton = pytest.mark.skipif(runtime.triton is None, reason="triton is missing")


def child(*command, **environment):
    """Run Python in a process that has Triton as the environment says."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**{k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}, **environment},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@needs_triton
@pytest.mark.skipif(runtime.INTERPRETED, reason="these are the tests that it starts")
@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on the device")
def test_every_kernel_agrees_under_the_interpreter():
    others = ["kernels/test_derivatives", "fusion/test_fusion", "models/test_mixer"]
    # Several blocks of tokens are 65 of them here; 197 are slow and find no more. What never starts a kernel has run.
    left_out = "t197 or t64 or div or unit or toolarge or vmap or forward_mode or never_asks"
    chosen = f"triton and not ({left_out})"
    tests = ["tests/kernels/test_triton.py", *(f"tests/{name}.py" for name in others)]
    done = child("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", chosen, TRITON_INTERPRET="1")
    counted = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-5000:]
    assert counted is not None
    assert int(counted[1]) >= 75


def draw_scan(b, e, t, n, *, seed=0, dtype=torch.float32, optional=True, layout="channels", shift=-1.0, device="cpu"):
    """Arguments of `selective_scan` in its order, as leaves."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    def tokens(rows):
        if layout == "channels":
            return normal(b, t, rows).mT
        if layout == "tokens":
            return normal(b, rows, t)
        return normal(b, 2 * t, 3 * rows)[:, ::2, ::3].mT

    tensors = [
        tokens(e),
        tokens(e) + shift,
        -torch.exp(normal(e, n)),
        tokens(n),
        tokens(n),
        normal(e),
        tokens(e),
        normal(e),
    ]
    tensors = [x.to(dtype) if x.ndim == 3 else x for x in tensors]
    if not optional:
        tensors[5:] = [None] * 3
    return leaves(tensors, device)


def leaves(tensors, device, dtype=None):
    return [x if x is None else x.detach().to(device, dtype or x.dtype).requires_grad_() for x in tensors]


def results(function, tensors):
    """Outputs and all gradients for fixed cotangents."""
    out = function(*tensors)
    out = list(out) if isinstance(out, tuple) else [out]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator).bfloat16().to(x.device, x.dtype) for x in out]
    return [x.detach() for x in out] + list(torch.autograd.grad(out, [x for x in tensors if x is not None], cotangents))


def assert_agree(function, tensors, tolerance, expected=None):
    """The same function by the kernels and, in double precision, by torch; errors are of a tensor's largest value."""
    found = results(functools.partial(function, backend="triton"), tensors)
    double = leaves(tensors, "cpu", torch.float64)
    want = results(expected or functools.partial(function, backend="torch"), double)
    assert len(found) == len(want) >= 2
    for i, (x, y) in enumerate(zip(found, want, strict=True)):
        assert x.isfinite().all()
        error = (x.cpu().double() - y).abs().max() / y.abs().max().clamp_min(1e-30)
        # of a single token A learns nothing: there the gradient is zero on both sides
        assert error <= tolerance or not (x.any() or y.any()), f"tensor {i}: relative error {error:.1e}"


def scanned(*tensors, backend, reverse=False):
    return selective_scan(*tensors, delta_softplus=True, reverse=reverse, backend=backend)


def exactly(*tensors, reverse=False):
    return selective_scan_ref(*tensors, delta_softplus=True, reverse=reverse)


# What more than one chunk of tokens takes (67) is slow to interpret: tested with both directions at once, below.
SHAPES = {(2, 5, 1, 1): False, (1, 33, 5, 16): True, (2, 3, 5, 3): False, (1, 9, 5, 64): False, (1, 70, 3, 8): True}


@on_each_device
@pytest.mark.parametrize(("shape", "reverse"), SHAPES.items(), ids=str)
def test_the_scan_agrees_with_double_precision(device, shape, reverse):
    function = functools.partial(scanned, reverse=reverse)
    assert_agree(function, draw_scan(*shape, device=device), 1e-5, functools.partial(exactly, reverse=reverse))


@on_each_device
@pytest.mark.parametrize(("layout", "optional"), [("tokens", True), ("scattered", False)])
def test_the_scan_takes_any_strides_and_no_more_than_it_must(device, layout, optional):
    assert_agree(scanned, draw_scan(2, 5, 6, 3, layout=layout, optional=optional, device=device), 1e-5, exactly)


@on_each_device
@pytest.mark.parametrize(
    ("step", "softplus"), [(0.0, False), (1e-8, False), (50.0, False), (1e4, False), (-18.0, True), (90.0, True)]
)
def test_the_scan_takes_steps_of_any_size(device, step, softplus):
    u, delta, *others = draw_scan(1, 4, 6, 4, optional=False, device=device)
    tensors = [u, torch.full_like(delta, step).requires_grad_(), *others[:3]]

    def given(*tensors, backend="triton"):
        return selective_scan(*tensors, delta_softplus=softplus, backend=backend)

    assert_agree(given, tensors, 1e-5, functools.partial(selective_scan_ref, delta_softplus=softplus))


@on_each_device
def test_bfloat16_is_near_and_gives_each_gradient_its_type(device):
    tensors = draw_scan(1, 9, 7, 16, dtype=torch.bfloat16, device=device)
    found = results(functools.partial(scanned, backend="triton"), tensors)
    assert [x.dtype for x in found] == [torch.bfloat16, *(x.dtype for x in tensors)]
    # the ungated output is rounded once for the gate's gradient, and so is every result: by 2^-9 at most, each
    assert_agree(scanned, tensors, 2**-7, exactly)


@on_each_device
@pytest.mark.parametrize("case", ["len2_noz", "noD_nobias"])
def test_the_scan_is_the_independent_one(device, case):
    about = golden_json("components")["scan"][case]
    stored = golden_tensors("components", f"scan/{case}/", device)
    inputs = {name: stored[name].requires_grad_() for name in about["has"]}
    out = selective_scan(**inputs, delta_softplus=about["softplus"], backend="triton")
    grads = torch.autograd.grad((out * stored["cotangent"]).sum(), list(inputs.values()))
    pairs = [(out, stored["out_f64"]), *((g, stored[f"grad_{name}"]) for g, name in zip(grads, inputs, strict=True))]
    for found, want in pairs:
        assert (found.double() - want.double()).abs().max() <= 1e-4 * want.double().abs().max()


def draw_side(b, e, t, n, m, seed, dtype, device):
    u, _, A, B, C, D, _, bias = draw_scan(b, e, t, n, seed=seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    step, weight = torch.randn(b, t, m, generator=generator).mT.to(dtype), torch.randn(e, m, generator=generator) / m
    return leaves([u, step, weight, A, B, C, D, bias], device)


def both_scans(*tensors, backend):
    return ops.bidirectional_scan(
        ops.Side(*tensors[:8]), ops.Side(*tensors[8:16]), tensors[16], scale=0.5, backend=backend
    )


@on_each_device
@pytest.mark.parametrize("shape", [(2, 5, 6, 4, 3), (1, 3, 67, 4, 2)], ids=str)
def test_both_directions_in_one_launch_are_two_scans_and_a_gate(device, shape):
    b, e, t, *_ = shape
    gate = torch.randn(b, t, 2 * e, generator=torch.Generator().manual_seed(2)).chunk(2, dim=-1)[1].mT
    tensors = [x for seed in (0, 1) for x in draw_side(*shape, seed, torch.float32, device)]
    assert_agree(both_scans, [*tensors, *leaves([gate], device)], 1e-5)


@on_each_device
def test_both_directions_in_bfloat16_are_near(device):
    gate = torch.randn(1, 6, 9, generator=torch.Generator().manual_seed(2)).mT.bfloat16()
    tensors = [x for seed in (0, 1) for x in draw_side(1, 9, 6, 8, 3, seed, torch.bfloat16, device)]
    # delta, what is projected to it, the sum and each result are rounded by 2^-9 at most, each
    assert_agree(both_scans, [*tensors, *leaves([gate], device)], 2**-6)


@on_each_device
def test_no_delta_and_few_states_are_kept_for_backward(device):
    b, e, t = 1, 8, 33
    kept = []
    sides = [x for seed in (0, 1) for x in draw_side(b, e, t, 4, 2, seed, torch.float32, device)]
    gate = torch.randn(b, e, t, device=device)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        both_scans(*sides, gate, backend="triton")
    assert kept.count((b, e, t)) == 4, "u of both directions, the gate and the sum that it multiplies"
    with torch.no_grad():
        assert (
            torch.ops.famba.gpu_scan(
                *draw_scan(b, e, t, 4, device=device)[:6], None, *7 * [None], None, True, False, 1.0, False
            )[2].numel()
            == 0
        )


@on_each_device
@pytest.mark.parametrize(("b", "e", "t", "k"), [(2, 5, 7, 4), (1, 70, 18, 4), (1, 3, 1, 2), (1, 9, 5, 8)])
def test_the_convolution_agrees_in_both_directions_at_once_and_alone(device, b, e, t, k):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(b, t, 2 * e, generator=generator).chunk(2, dim=-1)[1].mT
    weights = [torch.randn(*size, generator=generator) for size in ((e, k), (e,), (e, k), (e,))]
    tensors = leaves([x, *weights], device)

    def both(x, *w, backend):
        return ops.bidirectional_conv1d_silu(x, w[:2], w[2:], backend=backend)

    assert_agree(both, tensors, 1e-5)
    assert_agree(functools.partial(ops.causal_conv1d_silu, reverse=True), tensors[:2], 1e-5)
    low = [tensors[0].detach().bfloat16().requires_grad_(), *tensors[1:]]
    assert [x.dtype for x in results(functools.partial(both, backend="triton"), low)[:3]] == 3 * [torch.bfloat16]
    assert_agree(both, low, ROUNDED)


@on_each_device
@pytest.mark.parametrize(("b", "t", "d"), [(2, 5, 7), (1, 9, 192), (3, 2, 1)])
@pytest.mark.parametrize("residual", [True, False])
def test_the_norm_agrees(device, b, t, d, residual):
    generator = torch.Generator().manual_seed(0)
    x, other = torch.randn(2, b, t, d, generator=generator).unbind()
    tensors = leaves([x, other if residual else None, torch.randn(d, generator=generator)], device)
    assert_agree(ops.add_rms_norm, tensors, 1e-5)
    low = leaves([tensors[0].bfloat16(), *tensors[1:]], device)
    out, total = ops.add_rms_norm(*low, backend="triton")
    assert out.dtype == total.dtype == torch.float32
    assert_agree(ops.add_rms_norm, low, ROUNDED)


PAIRINGS = [(2, 9, 5, 3, None), (2, 20, 40, 8, [10, 3]), (1, 75, 6, 30, [0]), (1, 20, 4, 9, [1])]


@on_each_device
@pytest.mark.parametrize("case", PAIRINGS, ids=str)
def test_matching_planning_and_fusing_are_those_of_torch(device, case):
    b, t, c, r, guard = case
    feature = torch.randn(b, t, c, generator=torch.Generator().manual_seed(0))
    feature[0, 2], feature[0, 4] = 0, feature[0, 6]
    feature = feature.to(device)
    protected = () if guard is None else torch.tensor(guard, device=device)
    found, want = (matching.match_tokens(feature, r, protected=protected, backend=x) for x in ("triton", "torch"))
    assert torch.equal(found.source, want.source)
    assert torch.equal(found.target, want.target)
    torch.testing.assert_close(found.similarity, want.similarity, rtol=1e-5, atol=1e-6)
    size = torch.randint(1, 5, (b, t), generator=torch.Generator().manual_seed(1)).float().to(device)
    for options in ({"order": "scan", "weighting": "size"}, {"order": "append", "weighting": "mean"}):
        ours, theirs = (merge.plan(want, size, **options, backend=x) for x in ("triton", "torch"))
        assert all(map(torch.equal, ours, theirs))
        tensors = leaves([feature, feature.repeat(1, 1, 2).bfloat16()], device)
        exact = merge.Plan(*(x.cpu() for x in theirs))._replace(weight=theirs.weight.cpu().double())

        def both(x, y, *, backend, plan=ours):
            return merge.apply_both(plan, x, y, backend=backend)

        expected = functools.partial(both, backend="torch", plan=exact)
        assert_agree(both, tensors, ROUNDED, expected)
        assert_agree(both, leaves(tensors, device, torch.float32), 1e-6, expected)


@on_each_device
def test_equal_similarities_go_by_position(device):
    found = matching.match_tokens(torch.ones(1, 70, 3, device=device), 20, backend="triton")
    assert found.source.tolist() == [list(range(0, 40, 2))]
    assert found.target.tolist() == [20 * [1]]


@on_each_device
def test_a_model_that_fuses_is_that_of_torch_and_so_are_its_gradients(device):
    images = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(0)).to(device)
    for options, cls_position in (
        (FusionOptions(), "middle"),
        (FusionOptions("append", "mean", "delta", "after_scan"), "none"),
    ):
        made = []
        for backend in ("triton", "torch"):
            torch.manual_seed(0)
            model = create_model(
                "vim_nano", img_size=5, depth=2, d_model=16, num_classes=3, schedule=[2, 2], fusion=options,
                backend=backend, cls_position=cls_position, pool="mean" if cls_position == "none" else "cls",
            ).to(device)  # fmt: skip
            logits = model(images)
            logits.square().sum().backward()
            made.append([logits.detach(), *(weight.grad for weight in model.parameters())])
        assert len(made[0]) > 30
        for found, want in zip(*made, strict=True):
            assert (found - want).abs().max() <= 1e-4 * want.abs().max() + 1e-7


@on_each_device
def test_the_operators_pass_torchs_own_checks(device):
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    inputs = draw_scan(1, 3, 4, 2, device=device)
    u, delta, A, B, C, D, z, bias = inputs
    torch.library.opcheck(
        torch.ops.famba.gpu_scan.default,
        (u, delta, A, B, C, D, bias, *7 * [None], z, True, False, 1.0, True),
        test_utils=tests,
    )
    weight = torch.randn(3, 4, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.famba.gpu_conv.default, (u, weight, D, weight, None, False), test_utils=tests)
    x = torch.randn(1, 4, 5, device=device, requires_grad=True)
    torch.library.opcheck(
        torch.ops.famba.gpu_norm.default, (x, x, torch.ones(5, device=device), 1e-5), test_utils=tests
    )
    torch.library.opcheck(torch.ops.famba.gpu_match.default, (x.detach(), None, 1), test_utils=tests)


def test_without_triton_or_a_device_the_reason_says_what_to_do(monkeypatch):
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runtime, "triton", SimpleNamespace(__version__="3.3.0"))
    assert "no CUDA device" in backends()["triton"]
    monkeypatch.setattr(runtime, "triton", SimpleNamespace(__version__="3.2.0"))
    assert backends()["triton"] == "triton 3.2.0 cannot compile the kernels; they need 3.3 (torch 2.7) or later"
    monkeypatch.setattr(runtime, "triton", None)
    assert backends()["triton"] == "triton is missing; pip install triton"
    assert set(backends()) == set(dispatch.NAMES)


def test_bytes_of_the_scan_follow_the_table():
    assert kernels.scan_bytes(128, 384, 197, 16, torch.bfloat16) == pytest.approx(0.43e9, rel=0.01)


def start_all(dtype):
    """Call every operator once."""
    b, e, t, n = 2, 48, 9, 16
    sides = [x.detach().to(dtype) if x.ndim == 3 else x.detach() for _ in range(2) for x in draw_scan(b, e, t, n)]
    given = [*sides[:6], sides[7], *sides[8:14], sides[15]]
    out, y, states = torch.ops.famba.gpu_scan(*given, sides[6], True, False, 0.5, True)
    torch.ops.famba.gpu_scan_backward(out, *given, sides[6], y, states, True, False, 0.5)
    weight, bias = torch.randn(e, 4), torch.randn(e)
    torch.ops.famba.gpu_conv(given[0], weight, bias, weight, bias, False)
    torch.ops.famba.gpu_conv_backward(out, out, given[0], weight, bias, weight, bias, False)
    x = torch.randn(b, t, e)
    normed, total, scale = torch.ops.famba.gpu_norm(x.to(dtype), x, bias, 1e-5)
    torch.ops.famba.gpu_norm_backward(normed, total, total, scale, bias)
    source, target, _ = torch.ops.famba.gpu_match(x, torch.zeros(b, 1, dtype=torch.int64), 3)
    places = torch.ops.famba.gpu_plan(source, target, torch.ones(b, t), True, True)
    fused = torch.ops.famba.gpu_fuse(x.to(dtype), x, *places[:3], source)
    torch.ops.famba.gpu_fuse_backward(*fused, *places[1:3])


@pytest.mark.parametrize("position", ["before_mixer", "after_scan"])
def test_a_training_step_never_asks_for_a_number(position, on_paper):
    emptied, mode = on_paper
    options = FusionOptions(position=position)
    model = emptied(create_model("vim_nano", depth=3, schedule=[0, 9, 9], fusion=options, backend="triton"))
    with mode:
        images, classes = torch.empty(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(images).float(), classes)
        loss.backward()
        assert all(weight.grad is not None for weight in model.parameters())
        with pytest.raises(DataDependentOutputException):
            loss.item()


@on_cuda
def test_a_large_batch(device):
    tensors = draw_scan(1024, 40, 30, 16, device=device)
    assert_agree(scanned, tensors, 1e-5, exactly)


def training_step(device, *, capturable=False):
    torch.manual_seed(0)
    model = create_model("vim_nano", depth=3, schedule=[0, 9, 9], num_classes=10, backend="triton").to(device)
    optimiser = torch.optim.AdamW(model.parameters(), capturable=capturable)
    images, classes = torch.rand(4, 3, 8, 8, device=device), torch.randint(10, (4,), device=device)
    loss = torch.zeros((), device=device)

    def step():
        optimiser.zero_grad(set_to_none=False)
        with torch.autocast("cuda", torch.bfloat16):
            found = torch.nn.functional.cross_entropy(model(images), classes)
        found.backward()
        optimiser.step()
        loss.copy_(found.detach())

    return step, loss


@on_cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # setting it warns that it is a prototype
def test_a_training_step_never_waits_for_the_device(device):
    step, loss = training_step(device, capturable=True)
    step()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()

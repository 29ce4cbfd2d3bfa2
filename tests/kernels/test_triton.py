"""The GPU kernels against double precision and against torch; no waiting for the device.

Where there is a CUDA device they run on it (`-m gpu`). Elsewhere Triton's interpreter runs the same tests on small
tensors, in a process of its own: it has to be chosen before Triton is imported, for all of a process.
"""

import functools
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import agreement
import pytest
import torch
from agreement import draw_scan, draw_sides, leaves
from checkout import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

from famba import FusionOptions, create_model
from famba.fusion import matching, merge
from famba.kernels import ops
from famba.kernels.scan import backends
from famba.kernels.triton import runtime
from famba.kernels.triton import scan as kernels

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)
on_each_device = pytest.mark.parametrize("device", ["cpu"] if runtime.INTERPRETED else [CUDA])
on_cuda = pytest.mark.parametrize("device", [CUDA])
# A result's error by rounding to bfloat16, of its largest value: to nearest, but in the interpreter towards zero.
ROUNDED = 2**-7 if runtime.INTERPRETED else 2**-8
assert_agree = functools.partial(agreement.assert_agree, backend="triton")
assert_scan_agrees = functools.partial(agreement.assert_scan_agrees, backend="triton")
assert_both_scans_agree = functools.partial(agreement.assert_both_scans_agree, backend="triton")


@pytest.mark.slow
@pytest.mark.skipif(runtime.triton is None, reason="triton is missing")
@pytest.mark.skipif(runtime.INTERPRETED, reason="these are the tests that it starts")
@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on the device")
def test_every_kernel_agrees_under_the_interpreter():
    others = ["kernels/test_derivatives", "fusion/test_fusion", "models/test_mixer"]
    tests = ["tests/kernels/test_triton.py", *(f"tests/{name}.py" for name in others)]
    # Several blocks of tokens are 65 of them here; 197 are slow and find no more. What never starts a kernel has run.
    chosen = "triton and not (t197 or t64 or div or odd_dim or toolarge or vmap or forward_mode)"
    environment = {key: x for key, x in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", chosen],
        cwd=ROOT,
        env={**environment, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    counted = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-5000:]
    assert counted is not None
    assert int(counted[1]) >= 75


# What more than one chunk of tokens takes (67) is slow to interpret: tested with both directions at once, below.
SHAPES = {(2, 5, 1, 1): False, (1, 33, 5, 16): True, (2, 3, 5, 3): False, (1, 9, 5, 64): False, (1, 70, 3, 8): True}


@on_each_device
@pytest.mark.parametrize(("shape", "reverse"), SHAPES.items(), ids=str)
def test_the_scan_agrees_with_double_precision(device, shape, reverse):
    assert_scan_agrees(draw_scan(*shape, device=device), 1e-5, reverse=reverse)


@on_each_device
@pytest.mark.parametrize(("layout", "absent"), [("tokens", ("D", "delta_bias")), ("scattered", ("z",))])
def test_the_scan_takes_any_strides_and_no_more_than_it_must(device, layout, absent):
    tensors = zip(agreement.NAMES, draw_scan(2, 5, 6, 3, layout=layout, device=device), strict=True)
    assert_scan_agrees([None if name in absent else x for name, x in tensors], 1e-5)


@on_each_device
@pytest.mark.parametrize(
    ("step", "softplus"), [(0.0, False), (1e-8, False), (50.0, False), (1e4, False), (-18.0, True), (90.0, True)]
)
def test_the_scan_takes_steps_of_any_size(device, step, softplus):
    u, delta, *others = draw_scan(1, 4, 6, 4, optional=False, device=device)
    assert_scan_agrees([u, torch.full_like(delta, step).requires_grad_(), *others], 1e-5, softplus=softplus)


@on_each_device
def test_bfloat16_is_near_and_gives_each_gradient_its_type(device):
    tensors = draw_scan(1, 9, 7, 16, dtype=torch.bfloat16, device=device)
    # the ungated output is rounded once for the gate's gradient, and so is every result: by 2^-9 at most, each
    found = assert_scan_agrees(tensors, 2**-7)
    assert [x.dtype for x in found] == [torch.bfloat16, *(x.dtype for x in tensors)]


@on_each_device
@pytest.mark.parametrize(
    ("shape", "dtype", "tolerance"),
    [
        ((2, 5, 6, 4, 3), torch.float32, 1e-5),
        ((1, 3, 67, 4, 2), torch.float32, 1e-5),
        # delta, what is projected to it, the sum and each result are rounded by 2^-9 at most, each
        ((1, 9, 6, 8, 3), torch.bfloat16, 2**-6),
    ],
    ids=str,
)
def test_both_directions_in_one_launch_are_two_scans_and_a_gate(device, shape, dtype, tolerance):
    assert_both_scans_agree(draw_sides(*shape, dtype=dtype, device=device), tolerance)


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
    found = assert_agree(both, [tensors[0].detach().bfloat16().requires_grad_(), *tensors[1:]], ROUNDED)
    assert [x.dtype for x in found[:3]] == 3 * [torch.bfloat16]


@on_each_device
@pytest.mark.parametrize(("b", "t", "d"), [(2, 5, 7), (1, 9, 192), (3, 2, 1)])
@pytest.mark.parametrize("residual", [True, False])
def test_the_norm_agrees(device, b, t, d, residual):
    generator = torch.Generator().manual_seed(0)
    x, other = torch.randn(2, b, t, d, generator=generator).unbind()
    tensors = leaves([x, other if residual else None, torch.randn(d, generator=generator)], device)
    assert_agree(ops.add_rms_norm, tensors, 1e-5)
    found = assert_agree(ops.add_rms_norm, leaves([tensors[0].bfloat16(), *tensors[1:]], device), ROUNDED)
    assert [x.dtype for x in found[:3]] == [torch.float32, torch.float32, torch.bfloat16]


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
        assert_agree(both, tensors, ROUNDED, expected=expected)
        assert_agree(both, leaves(tensors, device, torch.float32), 1e-6, expected=expected)


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
def test_sides_of_different_kinds_are_scanned_one_by_one(device):
    tensors = draw_sides(1, 3, 4, 2, 1, device=device)
    tensors[6] = tensors[15] = None  # D of one side, dt_bias of the other
    assert_both_scans_agree(tensors, 1e-5)


@on_each_device
def test_what_is_kept_for_backward_may_come_back_in_another_layout(device):
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.contiguous, lambda x: x):  # as save_on_cpu pins it
        assert_both_scans_agree(draw_sides(1, 3, 4, 2, 1, device=device), 1e-5)
        assert_scan_agrees(draw_scan(1, 3, 4, 2, device=device), 1e-5)


@pytest.mark.skipif(runtime.triton is None, reason="triton is missing")
@pytest.mark.parametrize(("capabilities", "usable"), [([(6, 1), (7, 5)], [1]), ([(9, 0), (6, 1)], [0]), ([(6, 1)], [])])
def test_a_gpu_too_old_for_triton_is_left_to_torch_whichever_device_is_the_current_one(
    capabilities, usable, monkeypatch
):
    with FakeTensorMode():
        tensors = [torch.empty(2, device=f"cuda:{i}") for i in range(len(capabilities))]
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    monkeypatch.setattr(runtime, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(runtime, "_capability", capabilities.__getitem__)
    too_old = "compute capability 6.1; Triton needs 7.0 or higher"
    assert runtime.unavailable() == ("" if usable else too_old)
    assert [runtime.unsuited(None, x) for x in tensors] == ["" if i in usable else too_old for i in range(len(tensors))]


@on_each_device
@pytest.mark.parametrize("e", [3, 64, 70])  # less than a block, a block, more
def test_gradients_lie_in_memory_as_the_compiler_is_told(device, e):
    *_, z, _ = tensors = draw_scan(1, e, 4, 8, device=device)
    sides = (*tensors[:6], tensors[7], *7 * [None])
    out, y, states = torch.ops.famba.gpu_scan(*sides, z, True, False, 1.0, True)
    torch.library.opcheck(
        torch.ops.famba.gpu_scan_backward.default,
        (out, *sides, z, y, states, True, False, 1.0),
        test_utils="test_faketensor",
    )


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


def test_bytes_of_the_scan_follow_the_table():
    assert kernels.scan_bytes(128, 384, 197, 16, torch.bfloat16) == pytest.approx(0.43e9, rel=0.01)


@on_cuda
def test_a_large_batch(device):
    assert_scan_agrees(draw_scan(1024, 40, 30, 16, device=device), 1e-5)


@on_cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # setting it warns that it is a prototype
def test_a_training_step_never_waits_for_the_device(device):
    torch.manual_seed(0)
    model = create_model("vim_nano", depth=3, schedule=[0, 9, 9], num_classes=10, backend="triton").to(device)
    optimiser = torch.optim.AdamW(model.parameters(), capturable=True)
    images, classes = torch.rand(4, 3, 8, 8, device=device), torch.randint(10, (4,), device=device)

    def step():
        optimiser.zero_grad(set_to_none=False)
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(images), classes)
        loss.backward()
        optimiser.step()
        return loss

    step()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        loss = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()

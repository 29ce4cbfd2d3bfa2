"""Derivatives beyond backward's, of every operator on every backend: higher order, forward mode, torch.func, hooks.

Triton's interpreter runs those of `triton` in a process of its own, which test_triton.py starts.
"""

from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from famba import FusionOptions, create_model
from famba.errors import BackendError
from famba.fusion.matching import match_tokens
from famba.fusion.merge import apply_both, plan
from famba.kernels import mamba_ssm, ops, scan
from famba.kernels.cpu import build
from famba.kernels.ops import Side
from famba.kernels.triton import runtime as gpu

# torch's own forward-mode formulas are scripted when the first of them is used
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
NATIVE = pytest.param("native", marks=pytest.mark.skipif(bool(build.unavailable()), reason=build.unavailable()))
TRITON = [] if gpu.unavailable() else [pytest.param("triton", marks=pytest.mark.gpu)]
on_kernels = pytest.mark.parametrize("backend", ["torch", NATIVE, *TRITON])


def scanned(u, delta, A, B, C, D, z, bias, *, backend):
    return scan.selective_scan(u, delta, -A.exp(), B, C, D, z, bias, True, reverse=True, backend=backend)


def both_scanned(*tensors, backend):
    sides = [Side(*x[:3], -x[3].exp(), *x[4:]) for x in (tensors[:8], tensors[8:16])]
    return ops.bidirectional_scan(*sides, tensors[16], scale=0.5, backend=backend)


def both_convolved(x, weight, bias, other_weight, other_bias, *, backend):
    return ops.bidirectional_conv1d_silu(x, (weight, bias), (other_weight, other_bias), backend=backend)


def fused(x, residual, *, backend):
    pairs = match_tokens(waves(x).float(), 2, backend=backend)
    sizes = torch.arange(1, x.shape[0] * x.shape[1] + 1, device=x.device, dtype=torch.float32).view(x.shape[:2])
    return tuple(x**3 for x in apply_both(plan(pairs, sizes, backend=backend), x, residual, backend=backend))


b, e, t, n, m, d = 2, 3, 5, 2, 2, 4
SIDE = [(b, e, t), (b, m, t), (e, m), (e, n), (b, n, t), (b, n, t), (e,), (e,)]
OPERATORS = {  # a function of tensors, and their shapes
    scanned: [(b, e, t), (b, e, t), (e, n), (b, n, t), (b, n, t), (e,), (b, e, t), (e,)],
    both_scanned: [*SIDE, *SIDE, (b, e, t)],
    partial(ops.causal_conv1d_silu, reverse=True): [(b, e, t), (e, 4), (e,)],
    both_convolved: [(b, e, t), (e, 4), (e,), (e, 4), (e,)],
    ops.add_rms_norm: [(b, t, d), (b, t, d), (d,)],
    lambda x, weight, *, backend: ops.add_rms_norm(x, None, weight, backend=backend)[0]: [(b, t, d), (d,)],
    fused: [(b, t, d), (b, t, d)],
}
NAMES = ["scan", "both_scans", "conv", "both_convs", "add_norm", "norm", "fuse"]
on_operators = pytest.mark.parametrize(("function", "shapes"), OPERATORS.items(), ids=NAMES)


def draw(shapes, backend="torch", *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    device = gpu.DEVICE if backend == "triton" else "cpu"
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float32) for shape in shapes]
    return [x.to(device, dtype).requires_grad_() for x in tensors]


def waves(x, seed=0):
    """Numbers in the place of x that are the same every time, inside vmap too."""
    return torch.arange(x.numel(), device=x.device, dtype=x.dtype).view(x.shape).mul(2 + seed).cos()


def weighted(outs, seed=0):
    """One number made of all, each with a weight of its own."""
    return sum((x * waves(x, seed)).sum() for x in ([outs] if isinstance(outs, torch.Tensor) else outs))


def derivatives(function, tensors, order):
    """Of each order up to this one: the gradients of one number made of the previous."""
    made, found = function(*tensors), []
    for seed in range(order):
        made = torch.autograd.grad(weighted(made, seed), tensors, create_graph=True, materialize_grads=True)
        found.append(made)
    return found


def assert_close(found, expected, tolerance=1e-4):
    assert len(found) == len(expected) >= 1
    for x, y in zip(found, expected, strict=True):
        assert (x.detach().cpu() - y.detach()).abs().max() <= tolerance * y.abs().max().clamp_min(1), (x, y)


@on_kernels
@on_operators
def test_derivatives_of_three_orders_are_those_of_double_precision(function, shapes, backend):
    found = derivatives(partial(function, backend=backend), draw(shapes, backend), 3)
    want = derivatives(partial(function, backend="torch"), draw(shapes, dtype=torch.float64), 3)
    for x, y in zip(found, want, strict=True):
        assert any(grad.any() for grad in y)
        assert_close(x, y)


@on_operators
def test_derivatives_are_those_of_finite_differences_in_both_modes_and_in_batches(function, shapes):
    tensors, by_torch = draw(shapes, dtype=torch.float64), partial(function, backend="torch")
    assert torch.autograd.gradcheck(by_torch, tensors, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(by_torch, tensors, fast_mode=True)


@on_kernels
@on_operators
def test_forward_mode_agrees_with_backward(function, shapes, backend):
    run = partial(function, backend=backend)
    tensors, tangents = draw(shapes, backend), [x.detach() for x in draw(shapes, backend, seed=1)]
    (first,) = derivatives(run, tensors, 1)
    want = sum((grad * tangent).sum() for grad, tangent in zip(first, tangents, strict=True))
    _, made = torch.func.jvp(run, tuple(x.detach() for x in tensors), tuple(tangents))
    with forward_ad.dual_level():
        outs = run(*map(forward_ad.make_dual, tensors, tangents))
        outs = outs if isinstance(outs, tuple) else [outs]
        dual = [forward_ad.unpack_dual(x).tangent for x in outs]
    assert_close([weighted(made), weighted(dual)], [want.cpu(), want.cpu()])


@on_kernels
@on_operators
def test_vmap_is_a_loop_and_so_are_gradients_in_it(function, shapes, backend):
    run = partial(function, backend=backend)
    pairs = zip(*(draw(shapes, backend, seed=i) for i in (0, 1)), strict=True)
    stacked = [torch.stack(pair).detach() for pair in pairs]
    everything = tuple(range(len(shapes)))
    gradients = torch.func.vmap(torch.func.grad(lambda *x: weighted(run(*x)), everything))(*stacked)
    outs = torch.func.vmap(run)(*stacked)
    for i in (0, 1):
        tensors = [x[i].clone().requires_grad_() for x in stacked]
        want = run(*tensors)
        assert_close(*([x[i] for x in outs], want) if isinstance(outs, tuple) else ([outs[i]], [want]))
        assert_close([x[i] for x in gradients], torch.autograd.grad(weighted(want), tensors))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("vim_nano", num_classes=3, depth=2, d_model=16, schedule=[2, 1])


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_torch_func_differentiates_a_model_in_every_way(model, images):
    weights = {name: x.detach() for name, x in model.named_parameters()}
    tangents = {name: waves(x) for name, x in weights.items()}

    def loss(weights, images):
        return torch.func.functional_call(model, weights, (images,)).square().sum()

    whole = dict(zip(weights, torch.autograd.grad(model(images).square().sum(), model.parameters()), strict=True))
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, images[:, None])
    assert_close([x.sum(0) for x in each.values()], list(whole.values()))
    _, forward = torch.func.jvp(lambda weights: loss(weights, images), (weights,), (tangents,))
    assert_close([forward], [sum((whole[name] * x).sum() for name, x in tangents.items())])
    hessian = torch.func.hessian(lambda bias: loss(weights | {"head.bias": bias}, images))(weights["head.bias"])
    assert_close([hessian], [4 * torch.eye(3)])  # of the squares of both images' logits


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # a block's tokens come in a tuple
@pytest.mark.parametrize(
    "path",
    [
        "layers.0",
        "layers.0.norm",
        "layers.0.mixer",
        *(f"layers.0.mixer.{name}" for name in ["x_proj_b", "conv1d", "conv1d_b", "dt_proj", "dt_proj_b"]),
    ],
)
def test_every_hook_on_a_block_and_on_what_it_calls_runs(model, images, path):
    module, ran = model.get_submodule(path), []
    handles = [
        getattr(module, f"register_{kind}_hook")(lambda *_, kind=kind: ran.append(kind))
        for kind in ("forward_pre", "forward", "full_backward_pre", "full_backward")
    ]
    model(images).sum().backward()
    for handle in handles:
        handle.remove()
    assert ran == ["forward_pre", "forward", "full_backward_pre", "full_backward"]


@pytest.mark.parametrize("backend", ["torch", NATIVE])
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_backward_needs_may_be_computed_again(images, backend, reentrant):
    model = create_model("vim_nano", num_classes=3, depth=2, d_model=16, schedule=[2, 1], backend=backend)
    images = images.clone().requires_grad_()

    def gradients(logits):
        model.zero_grad()
        logits.square().sum().backward()
        return [weight.grad for weight in model.parameters()]

    want = gradients(model(images))
    assert_close(gradients(checkpoint(model, images, use_reentrant=reentrant)), want)


@pytest.mark.parametrize("position", ["before_mixer", "after_scan"])
def test_hooks_on_all_modules_run_and_change_nothing(images, position):
    options = FusionOptions(position=position, feature="delta")
    model = create_model("vim_nano", num_classes=3, depth=1, schedule=[1], fusion=options)
    want, ran = model(images), set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
    assert_close([model(images)], [want])
    assert ran == {name for name, _ in model.named_modules()} - {"layers"}  # a list, which is not called


def test_a_kernel_of_mamba_ssm_refuses_to_have_its_gradient_differentiated(monkeypatch):
    monkeypatch.setattr(mamba_ssm, "_ready", lambda package, hub: lambda u, *_, **__: u * 2)
    u, delta, A, B, C, *_ = draw(OPERATORS[scanned])
    out = mamba_ssm.selective_scan(u, delta, A, B, C, None, None, None, True, False)
    out.sum().backward(retain_graph=True)
    with pytest.raises(BackendError, match=r"mamba_ssm and hub: create_graph=True .*; allowed: torch"):
        out.sum().backward(create_graph=True)

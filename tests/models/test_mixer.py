"""The mixer alone against an independent one: output and every gradient, by each backend."""

import copy

import pytest
import torch
from goldens import golden_json, golden_tensors

from famba import BackendError, backends
from famba.kernels.triton import runtime
from famba.models.mixer import BidirectionalMixer

CASES = golden_json("components")["mixer"]
BACKENDS = [
    "torch",
    *([] if backends()["native"] else ["native"]),
    # On a GPU, or where test_triton.py has Triton's interpreter run these tests.
    *([] if runtime.unavailable() else [pytest.param("triton", marks=pytest.mark.gpu)]),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_the_mixer_is_the_independent_one(case, backend):
    sizes, device = CASES[case], runtime.DEVICE if backend == "triton" else "cpu"
    stored = golden_tensors("components", f"mixer/{case}/", device)
    mixer = BidirectionalMixer(
        sizes["embed_dim"], sizes["d_state"], average_directions=sizes["divide_out"], backend=backend
    ).to(device)
    mixer.load_state_dict({key.removeprefix("param/"): x for key, x in stored.items() if key.startswith("param/")})
    x = stored["in"].clone().requires_grad_()
    out = mixer(x)
    (out * stored["cotangent"]).sum().backward()
    found = {"out_f64": out.detach(), "grad_in": x.grad}
    found |= {f"grad/{name}": weight.grad for name, weight in mixer.named_parameters()}
    assert len(found) == 18
    for name, value in found.items():
        want = stored[name].double()
        error = (value.double() - want).abs().max()
        assert error <= 1e-5 * want.abs().max().clamp_min(1e-30) or not (value.any() or want.any()), name


@pytest.mark.skipif("native" not in BACKENDS, reason="cannot run")
@pytest.mark.parametrize("adapted", [False, True])
def test_the_fused_mixer_has_torchs_gradients_and_gradients_of_gradients(adapted):
    torch.manual_seed(0)
    mixer, x = BidirectionalMixer(16, 4), torch.randn(2, 7, 16, requires_grad=True)
    if adapted:  # the kernels must not read x_proj's weight past what stands in its place
        mixer.x_proj = torch.nn.utils.parametrizations.weight_norm(mixer.x_proj)
        mixer.x_proj_b.register_forward_hook(lambda module, inputs, output: 2 * output)
    found = {}
    for backend in ("torch", "native"):
        mixer.backend = backend
        weights = [x, *mixer.parameters()]
        once = torch.autograd.grad(mixer(x).square().sum(), weights, create_graph=True)
        plain = torch.autograd.grad(mixer(x).square().sum(), weights)
        twice = torch.autograd.grad(sum(g.square().sum() for g in once), weights)
        found[backend] = [*once, *plain, *twice]
    for expected, native in zip(found["torch"], found["native"], strict=True):
        torch.testing.assert_close(native, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["conv1d", "conv1d_b", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b"])
def test_what_stands_in_the_place_of_a_module_is_called(name):
    torch.manual_seed(0)
    mixer, x = BidirectionalMixer(16, 4), torch.randn(2, 7, 16)
    doubled, module = copy.deepcopy(mixer), mixer.get_submodule(name)
    for weight in doubled.get_submodule(name).parameters():
        weight.data *= 2
    call, kind = module.forward, type(module)
    module.forward = lambda x: 2 * call(x)
    torch.testing.assert_close(mixer(x), doubled(x))
    del module.forward
    module.__class__ = type("Adapted", (kind,), {"forward": lambda m, x: 2 * kind.forward(m, x)})
    torch.testing.assert_close(mixer(x), doubled(x))
    setattr(mixer, name, torch.nn.Sequential(torch.nn.Identity(), module))  # without a weight of its own
    torch.testing.assert_close(mixer(x), doubled(x))


@pytest.mark.skipif("native" not in BACKENDS, reason="cannot run")
@pytest.mark.parametrize("name", ["A_log", "A_b_log", "D_b", "conv1d_b.weight"])
def test_no_kernel_rounds_a_weight_in_float64_of_either_direction(name):
    torch.manual_seed(0)
    mixer = BidirectionalMixer(16, 4, backend="native")
    owner = mixer.get_submodule(name.rpartition(".")[0])
    setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(mixer.get_parameter(name).detach().double()))
    with pytest.raises(BackendError, match=r"got torch\.float64"):
        mixer(torch.randn(2, 7, 16))

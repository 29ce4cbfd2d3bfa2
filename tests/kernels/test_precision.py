"""Precision: what stays float32 under autocast, and where values stop being finite."""

import math
import os
import subprocess
import sys

import pytest
import torch

from famba import create_model
from famba.kernels import precision, scan
from famba.models import mixer


def small(**changes) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model("vim_nano", num_classes=10, depth=3, schedule=[0, 8, 8], **changes)


def images() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("weight", "place"),
    [
        ("patch_embed.proj.bias", "the output of patch_embed.proj"),
        ("layers.0.norm.weight", "the output of layer 1, norm"),
        ("layers.2.mixer.A_b_log", "the output of layer 3, mixer.out_proj"),
    ],
)
def test_the_first_module_that_gives_something_not_finite_is_named_with_its_layer(weight, place):
    model = small()
    with torch.no_grad():
        dict(model.named_parameters())[weight].view(-1)[0] = math.nan
    assert precision.first_not_finite(model, images()) == place


def test_images_are_looked_at_first_and_the_gradient_nearest_to_the_loss_if_all_else_is_finite():
    model, broken = small(), images()
    model(images()).sum().backward()
    assert precision.first_not_finite(model, images()) == ""
    for name in ("layers.0.mixer.D", "layers.1.mixer.D"):
        dict(model.named_parameters())[name].grad[3] = math.inf
    assert precision.first_not_finite(model, images()) == "the gradient of layer 2, mixer.D"
    broken[1, 0, 0, 0] = -math.inf
    assert precision.first_not_finite(model, broken) == "the images"


def test_under_autocast_the_scans_parameters_and_the_residual_stream_stay_float32(monkeypatch):
    given, choose = [], mixer.choose
    monkeypatch.setattr(mixer, "choose", lambda name, *tensors: given.append(tensors) or choose(name, *tensors))
    with precision.autocast(torch.device("cpu"), "bf16"):
        _, trace = small().forward_with_trace(images())
    assert len(given) == 3
    for xz, _, A, _, _, D, _, dt_bias in given:
        assert (xz.dtype, A.dtype, D.dtype, dt_bias.dtype) == (torch.bfloat16, *3 * [torch.float32])
    assert {x.dtype for x in trace.residuals} == {torch.float32}


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_a_scan_of_float32_is_the_same_under_autocast(backend):
    shapes = ((2, 8, 40), (2, 8, 40), (8, 4), (2, 4, 40), (2, 4, 40))
    given = [(-1) ** i * torch.rand(shape).requires_grad_() for i, shape in enumerate(shapes)]
    found = []
    for how in ("fp32", "bf16"):
        with precision.autocast(torch.device("cpu"), how):
            out = scan.selective_scan(*given, backend=backend)
        found.append([out, *torch.autograd.grad(out.square().sum(), given)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_under_autocast_the_scans_states_are_float32_however_long_the_sequence(backend):
    """A state that decays slowly sums 4,096 tokens of 2^-9 to about 8, which a bfloat16 state stops short of at 1."""
    ones = torch.ones(1, 32, 4096, dtype=torch.bfloat16)
    A, bias = torch.full((32, 1), -1e-9), torch.full((32,), math.log(math.expm1(2**-9)))
    with precision.autocast(torch.device("cpu"), "bf16"):
        out = scan.selective_scan(
            ones, 0 * ones, A, ones[:, :1], ones[:, :1], delta_bias=bias, delta_softplus=True, backend=backend
        )
    assert out.dtype == torch.bfloat16
    assert out[0, 0, -1].item() == pytest.approx(8, rel=0.01)


@pytest.mark.parametrize("before", [0, 1])
def test_the_current_gpu_is_afterwards_the_one_before(before, monkeypatch):
    current = [before]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", current.append)  # of torch's own, which this rests on
    with precision.settings_restored():
        torch.cuda.set_device(2)
    assert torch.cuda.current_device() == before


@pytest.mark.parametrize(("given", "found"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_idle_threads_wait_passively_unless_the_user_sets_it(given, found):
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    code = "import famba, os, sys; assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == found


@pytest.mark.parametrize(("variable", "threads"), [(None, 2), ("OMP_WAIT_POLICY", 2), ("GOMP_SPINCOUNT", 2), (None, 1)])
def test_threads_that_spin_because_torch_was_imported_first_are_warned_of(variable, threads, monkeypatch, caplog):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "0")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    precision.configure()
    warned = ["OMP_WAIT_POLICY=PASSIVE" in line for line in caplog.messages]
    assert warned == ([True] if variable is None and threads == 2 else [])

"""mamba-ssm and causal-conv1d behind the scan and the convolution, with stand-ins of their exact signatures.

The packages need CUDA even to be imported. The stand-ins compute by the reference on CPU tensors, and refuse what the
kernels refuse: selective_scan.cpp's and causal_conv1d.cpp's checks of types, layouts and sizes.
"""

import importlib.machinery
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from famba import backends, create_model, dispatch, mamba, selective_scan
from famba.errors import BackendError
from famba.scan import selective_scan_ref


def scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):  # mamba-ssm 1.1.1 to 2.3.2
    assert u.dtype == delta.dtype == B.dtype == C.dtype
    assert z is None or z.dtype == u.dtype
    assert all(x is None or (x.dtype == torch.float32 and x.stride(-1) == 1) for x in (A, D, delta_bias))
    for x in (u, delta, B, C, z):
        assert x is None or x.stride(-1) == 1 or x.shape[-1] == 1
    assert not return_last_state
    return selective_scan_ref(u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def convolve(x, weight, bias, activation):
    assert activation == "silu"
    assert bias is None or (bias.dtype == weight.dtype and bias.stride(-1) == 1)
    assert x.stride(2) == 1 or x.stride(1) == 1
    assert 2 <= weight.shape[1] <= 4
    if x.stride(1) == 1 and x.stride(2) > 1:
        assert x.shape[1] % 8 == x.stride(0) % 8 == x.stride(2) % 8 == 0
    padded = F.pad(x.to(weight.dtype), (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=weight.shape[0])).to(x.dtype)


def old_conv_fn(x, weight, bias=None, seq_idx=None, activation=None):  # causal-conv1d 1.1
    assert seq_idx is None
    return convolve(x, weight, bias, activation)


def new_conv_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):  # causal-conv1d 1.2 to 1.7
    assert seq_idx is initial_states is final_states_out is None
    assert not return_final_states
    return convolve(x, weight, bias, activation)


SCAN = ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface", "selective_scan_cuda")
CONV = ("causal_conv1d", "causal_conv1d_cuda")


@pytest.fixture
def install(monkeypatch):
    """Puts stand-ins for the packages in place, on a device that is there; without arguments neither is installed."""

    def put(scan=None, conv=None, without=(), device="cpu"):
        monkeypatch.setattr(mamba, "_DEVICE", device)
        present = (SCAN if scan else ()) + (CONV if conv else ())
        for name in SCAN + CONV:
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
            there = name in present and name not in without
            monkeypatch.setitem(sys.modules, name, module if there else None)
        if scan:
            sys.modules[SCAN[2]].selective_scan_fn = scan
        if conv:
            sys.modules["causal_conv1d"].causal_conv1d_fn = conv
        forget()

    def forget():
        mamba._scan.cache_clear()
        mamba._conv.cache_clear()

    yield put
    monkeypatch.undo()
    forget()


def arguments(b=2, e=8, t=7, n=4, *, dtype=torch.float32, channels_last=True):
    generator = torch.Generator().manual_seed(b + e + t)

    def draw(*size):
        return torch.randn(*size, generator=generator)

    wide = [draw(b, t, k).to(dtype) for k in (e, e, n, n, e)]
    u, delta, B, C, z = (x.mT if channels_last else x.mT.contiguous() for x in wide)
    A = -torch.rand(e, n, generator=generator)
    return [x.requires_grad_() for x in (u, delta, A, B, C, draw(e), z, draw(e))]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("t", [1, 7])
def test_the_scan_agrees_with_the_reference_in_both_directions_with_gradients(install, reverse, channels_last, t):
    install(scan=scan_fn)
    inputs = arguments(t=t, channels_last=channels_last)
    assert not mamba.unavailable()
    assert not mamba.unsuited(*inputs)
    found = mamba.selective_scan(*inputs, True, reverse)
    expected = selective_scan_ref(*inputs, True, reverse)
    torch.testing.assert_close(found, expected)
    to_out = torch.linspace(-1, 1, found.numel()).view(found.shape)
    for one, other in zip(*(torch.autograd.grad(y, inputs, to_out) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_half_precision_and_absent_arguments_reach_the_scan_as_it_wants_them(install):
    install(scan=scan_fn)
    u, delta, A, B, C, D, _, bias = arguments(dtype=torch.bfloat16)
    found = mamba.selective_scan(u, delta, A.bfloat16(), B, C, D.bfloat16(), None, bias.bfloat16(), True, True)
    assert found.dtype == torch.bfloat16
    bare = mamba.selective_scan(u, delta, A, B, C, None, None, None, False, False)
    torch.testing.assert_close(bare, selective_scan_ref(u, delta, A, B, C))


@pytest.mark.parametrize("conv", [old_conv_fn, new_conv_fn])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("e", "k", "t"), [(8, 4, 7), (16, 2, 1), (12, 4, 6), (6, 3, 5), (6, 4, 1), (1, 2, 5)])
def test_the_convolution_agrees_with_torchs_in_both_versions_and_directions(install, conv, reverse, e, k, t):
    install(conv=conv)
    generator = torch.Generator().manual_seed(e)
    inner = torch.randn(2, t, 2 * e, generator=generator, requires_grad=True)
    weight = torch.randn(e, k, generator=generator, requires_grad=True)
    bias = torch.randn(e, generator=generator, requires_grad=True)
    x = inner.chunk(2, dim=-1)[0].mT  # a view of half the channels, as the mixer's
    assert not mamba.conv_unsuited(x, weight, bias)
    found = mamba.causal_conv1d_silu(x, weight, bias, reverse)
    padded = F.pad(x, (0, k - 1) if reverse else (k - 1, 0))
    expected = F.silu(F.conv1d(padded, (weight.flip(1) if reverse else weight)[:, None], bias, groups=e))
    torch.testing.assert_close(found, expected)
    inputs, to_out = (inner, weight, bias), torch.linspace(-1, 1, found.numel()).view(found.shape)
    for one, other in zip(*(torch.autograd.grad(y, inputs, to_out) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_channels_stay_innermost_where_the_kernel_takes_them_so(install):
    seen = []

    def conv(x, weight, bias=None, activation=None):
        seen.append(x)
        return x

    install(conv=conv)
    for e in (16, 12):
        x = torch.randn(2, 5, e).mT
        mamba.causal_conv1d_silu(x, torch.ones(e, 4), None, False)
        assert (seen[-1].data_ptr() == x.data_ptr()) == (e == 16), e


def test_what_is_missing_is_said_with_the_command_that_brings_it(install):
    install()
    assert mamba.unavailable() == (
        "mamba_ssm is not installed; MAMBA_KEEP_CUDA_BUILD=TRUE pip install mamba-ssm --no-build-isolation"
    )
    assert mamba.conv_unavailable() == "causal_conv1d is not installed; " + mamba.INSTALL_CONV
    install(scan=scan_fn, conv=new_conv_fn, without=("selective_scan_cuda",))
    assert mamba.unavailable() == (
        "mamba_ssm is installed without its kernels, selective_scan_cuda; "
        "MAMBA_KEEP_CUDA_BUILD=TRUE pip install mamba-ssm --no-build-isolation"
    )
    assert mamba.conv_unavailable() == ""
    install(scan=scan_fn)
    assert mamba.unavailable() == ""
    assert mamba.conv_unavailable().startswith("causal_conv1d is not installed; ")
    with pytest.raises(BackendError, match="causal_conv1d is not installed"):
        mamba.causal_conv1d_silu(torch.ones(1, 8, 3), torch.ones(8, 4), None, False)


def test_a_package_that_does_not_import_is_said_in_one_line(install, monkeypatch):
    install(scan=scan_fn)

    def broken(name):
        raise ImportError("libc10.so: undefined symbol\n_ZN3c10 in another torch")

    monkeypatch.setattr(mamba.importlib, "import_module", broken)
    reason = mamba.unavailable()
    assert reason.startswith("mamba_ssm does not import: libc10.so: undefined symbol _ZN3c10 in another torch; ")
    assert reason.endswith(mamba.INSTALL_SCAN)


def test_without_its_device_nothing_is_imported_nor_recommended(install, monkeypatch):
    install(device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert mamba.unavailable() == mamba.conv_unavailable() == "torch sees no cuda device"
    assert mamba._scan.cache_info().misses == 0


def test_tensors_that_the_kernels_refuse_are_told_apart(install):
    install(scan=scan_fn, conv=new_conv_fn)
    u, delta, A, B, C, D, z, bias = arguments()
    told = mamba.unsuited(u, delta.bfloat16(), A, B, C, D, z, bias)
    assert told == "u, delta, B, C and z must have one type, got torch.float32 and delta of torch.bfloat16"
    assert "float16 and bfloat16, got torch.float64" in mamba.unsuited(u.double(), delta, A, B, C, D, z, bias)
    assert "got torch.float64" in mamba.unsuited(u, delta, A.double(), B, C, D, z, bias)
    assert "at most 256 states per channel, got 257" in mamba.unsuited(u, delta, torch.ones(8, 257), B, C, D, z, bias)
    assert "2 to 4 taps, got 5" in mamba.conv_unsuited(u, torch.ones(8, 5), None)
    assert "got torch.float64" in mamba.conv_unsuited(u, torch.ones(8, 4), torch.ones(8).double())
    install(device="cuda")
    assert mamba.unsuited(u, delta, A, B, C, D, z, bias) == "it runs on cuda tensors, got cpu"
    assert mamba.conv_unsuited(u, torch.ones(8, 4), None) == "it runs on cuda tensors, got cpu"


def test_a_model_runs_on_it_by_name_with_the_gradients_of_torchs(install):
    install(scan=scan_fn, conv=new_conv_fn)
    assert backends()["mamba_ssm"] == ""
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = {}
    for backend in ("mamba_ssm", "torch"):
        torch.manual_seed(0)
        model = create_model("vim_nano", num_classes=3, depth=2, schedule=[3, 0], backend=backend)
        logits = model(images)
        logits.square().sum().backward()
        found[backend] = [logits, *(weight.grad for weight in model.parameters())]
    assert len(found["torch"]) > 20
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_model_without_the_convolution_is_refused_and_auto_does_without(install, monkeypatch):
    install(scan=scan_fn)
    images = torch.ones(1, 3, 8, 8)
    with pytest.raises(BackendError, match="backend 'mamba_ssm' cannot run here: causal_conv1d is not installed; pip"):
        create_model("vim_nano", depth=1, backend="mamba_ssm")(images)
    called = []
    install(scan=lambda *args, **kwargs: called.append(1) or scan_fn(*args, **kwargs))
    monkeypatch.setattr(dispatch, "_FASTEST", {"cpu": ("mamba_ssm", "torch")})
    create_model("vim_nano", depth=1)(images)
    assert len(called) == 2, "both directions by mamba_ssm, the convolution by torch"


def test_asked_for_by_name_without_its_package_it_says_the_command(install):
    install()
    with pytest.raises(BackendError, match="backend 'mamba_ssm' cannot run here: mamba_ssm is not installed; MAMBA_K"):
        selective_scan(*arguments(), backend="mamba_ssm")

"""mamba-ssm and causal-conv1d behind the scan and the convolution, with stand-ins of their exact signatures.

The packages need CUDA even to be imported. The stand-ins compute by the reference on CPU tensors, and refuse what the
kernels refuse: selective_scan.cpp's and causal_conv1d.cpp's checks of types, layouts and sizes. The same stand-ins,
laid in the hub's cache as its builds lie there, are loaded by the real package `kernels`.
"""

import importlib.machinery
import importlib.util
import inspect
import json
import platform
import re
import sys
import tomllib
import types
from functools import partial

import huggingface_hub
import kernels
import pytest
import torch
import torch.nn.functional as F
from agreement import draw_scan, results
from refusals import refusal

from famba import backends, create_model, selective_scan
from famba.errors import BackendError
from famba.kernels import dispatch, mamba_ssm, precision, reference
from famba.kernels.scan import selective_scan_ref
from famba.profiling import environment


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
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, out=None, activation=None
):  # causal-conv1d 1.2 to 1.7, where `out` is named final_states_out
    assert seq_idx is initial_states is out is None
    assert not return_final_states
    return convolve(x, weight, bias, activation)


SCAN = ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface", "selective_scan_cuda")
CONV = ("causal_conv1d", "causal_conv1d_cuda")


@pytest.fixture(autouse=True)
def nothing_is_remembered():
    yield
    mamba_ssm._find.cache_clear()


@pytest.fixture
def install(monkeypatch):
    """Puts stand-ins for the packages in place, on a device that is there; without arguments neither is installed."""

    def put(scan=None, conv=None, without=(), device="cpu"):
        monkeypatch.setattr(mamba_ssm, "_DEVICE", device)
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
        mamba_ssm._find.cache_clear()

    return put


PINS = tomllib.loads((mamba_ssm._PROJECT / "pyproject.toml").read_text())["tool"]["kernels"]["dependencies"]
SCAN_REPOSITORY, CONV_REPOSITORY = "kernels-community/mamba-ssm", "kernels-community/causal-conv1d"
CODE = {  # of the builds: the stand-ins above, under the names that the repositories give
    SCAN_REPOSITORY: "import torch\nfrom famba.kernels.scan import selective_scan_ref\n"
    f"{inspect.getsource(scan_fn)}\nselective_scan_fn = scan_fn",
    CONV_REPOSITORY: "import torch.nn.functional as F\n"
    f"{inspect.getsource(convolve)}\n{inspect.getsource(new_conv_fn)}\ncausal_conv1d_fn = new_conv_fn",
}
CUDA = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cpu"
THIS_TORCH = "torch" + "".join(torch.__version__.split(".")[:2])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Puts a version of a repository into the hub's cache, with one build, for this torch unless another is named."""
    monkeypatch.setattr(mamba_ssm, "_DEVICE", "cpu")
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path))  # read by kernels at each call, and once when it was imported
    monkeypatch.setattr(kernels.resolver, "CACHE_DIR", str(tmp_path))

    def put(repository, code=None, *, version=None, built_for=THIS_TORCH, commit="a" * 40, needs=()):
        name = repository.split("/")[1]
        folder = tmp_path / f"kernels--{repository.replace('/', '--')}"
        build = folder / "snapshots" / commit / "build" / f"{built_for}-cxx11-{CUDA}-{platform.machine()}-linux"
        for parent in (folder / "refs", build):
            parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / f"v{PINS[repository] if version is None else version}").write_text(commit)
        (build / "__init__.py").write_text(CODE[repository] if code is None else code)
        about = {"id": f"{name}_{commit[:7]}", "name": name, "version": 1, "license": "none"}
        about |= {"python-depends": [*needs], "backend": {"type": "cuda" if torch.version.cuda else "cpu"}}
        (build / "metadata.json").write_text(json.dumps(about))
        return build

    return put


@pytest.fixture
def downloaded(monkeypatch):
    """The repositories that were asked for, in their order."""
    asked, download = [], mamba_ssm._downloaded
    monkeypatch.setattr(mamba_ssm, "_downloaded", lambda name, function: asked.append(name) or download(name, function))
    return asked


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layout", ["channels", "tokens"])
@pytest.mark.parametrize("t", [1, 7])
def test_the_scan_agrees_with_the_reference_in_both_directions_with_gradients(install, reverse, layout, t):
    install(scan=scan_fn)
    inputs = draw_scan(2, 8, t, 4, layout=layout)
    assert not mamba_ssm.unavailable()
    assert not mamba_ssm.unsuited(*inputs)
    how = {"delta_softplus": True, "reverse": reverse}
    found, expected = (results(partial(f, **how), inputs) for f in (mamba_ssm.selective_scan, selective_scan_ref))
    torch.testing.assert_close(found, expected)


def test_half_precision_and_absent_arguments_reach_the_scan_as_it_wants_them(install):
    install(scan=scan_fn)
    u, delta, A, B, C, D, _, bias = draw_scan(2, 8, 7, 4, dtype=torch.bfloat16)
    found = mamba_ssm.selective_scan(u, delta, A.bfloat16(), B, C, D.bfloat16(), None, bias.bfloat16(), True, True)
    assert found.dtype == torch.bfloat16
    bare = mamba_ssm.selective_scan(u, delta.abs(), A, B, C, None, None, None, False, False)
    torch.testing.assert_close(bare, selective_scan_ref(u, delta.abs(), A, B, C))


@pytest.mark.parametrize("conv", [old_conv_fn, new_conv_fn])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("e", "k", "t"), [(8, 4, 7), (16, 2, 1), (12, 4, 6), (6, 3, 5), (6, 4, 1), (1, 2, 5)])
def test_the_convolution_agrees_with_torchs_in_both_versions_and_directions(install, conv, reverse, e, k, t):
    install(conv=conv)
    generator = torch.Generator().manual_seed(e)
    tensors = [torch.randn(*x, generator=generator).requires_grad_() for x in ((2, t, 2 * e), (e, k), (e,))]
    assert not mamba_ssm.conv_unsuited(*tensors)

    def convolved(function):
        # a view of half the channels, as the mixer's
        return results(lambda inner, *weights: function(inner.chunk(2, dim=-1)[0].mT, *weights, reverse), tensors)

    torch.testing.assert_close(convolved(mamba_ssm.causal_conv1d_silu), convolved(reference.conv))


def test_what_is_missing_is_said_with_the_command_that_brings_it(install):
    install()
    command = "MAMBA_KEEP_CUDA_BUILD=TRUE pip install mamba-ssm causal-conv1d --no-build-isolation"
    assert mamba_ssm.unavailable() == f"mamba_ssm is not installed; {command}"
    assert mamba_ssm.conv_unavailable() == f"causal_conv1d is not installed; {command}"
    install(scan=scan_fn, conv=new_conv_fn, without=("selective_scan_cuda",))
    assert mamba_ssm.unavailable() == (
        "mamba_ssm is installed without its kernels, selective_scan_cuda; "
        f"{command} --no-cache-dir --force-reinstall --no-deps"
    )
    assert mamba_ssm.conv_unavailable() == ""


def test_a_package_that_does_not_import_is_said_in_one_line(install, monkeypatch):
    install(scan=scan_fn)

    def broken(name):
        raise ImportError("libc10.so: undefined symbol\n_ZN3c10 in another torch")

    monkeypatch.setattr(mamba_ssm.importlib, "import_module", broken)
    reason = mamba_ssm.unavailable()
    assert reason.startswith("mamba_ssm does not import: libc10.so: undefined symbol _ZN3c10 in another torch; ")
    assert reason.endswith(mamba_ssm.BUILD)


def test_without_its_device_nothing_is_imported_nor_recommended(install, monkeypatch):
    install(device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert mamba_ssm.unavailable() == mamba_ssm.conv_unavailable() == "torch sees no cuda device"
    assert mamba_ssm._find.cache_info().misses == 0


def test_tensors_that_the_kernels_refuse_are_told_apart(install):
    install(scan=scan_fn, conv=new_conv_fn)
    u, delta, A, B, C, D, z, bias = draw_scan(2, 8, 7, 4)
    told = mamba_ssm.unsuited(u, delta.bfloat16(), A, B, C, D, z, bias)
    assert told == "u, delta, B, C and z must have one type, got torch.float32 and delta of torch.bfloat16"
    assert "float16 and bfloat16, got torch.float64" in mamba_ssm.unsuited(u.double(), delta, A, B, C, D, z, bias)
    assert "got torch.float64" in mamba_ssm.unsuited(u, delta, A.double(), B, C, D, z, bias)
    many = torch.ones(8, 257)
    assert "at most 256 states per channel, got 257" in mamba_ssm.unsuited(u, delta, many, B, C, D, z, bias)
    assert "2 to 4 taps, got 5" in mamba_ssm.conv_unsuited(u, torch.ones(8, 5), None)
    assert "got torch.float64" in mamba_ssm.conv_unsuited(u, torch.ones(8, 4), torch.ones(8).double())
    install(device="cuda")
    assert mamba_ssm.unsuited(u, delta, A, B, C, D, z, bias) == "it runs on cuda tensors, got cpu"
    assert mamba_ssm.conv_unsuited(u, torch.ones(8, 4), None) == "it runs on cuda tensors, got cpu"


@pytest.mark.parametrize("source", ["mamba_ssm", "hub"])
def test_a_model_runs_on_it_by_name_with_the_gradients_of_torchs(source, install, hub, downloaded):
    install(scan=scan_fn, conv=new_conv_fn)
    for repository in PINS:
        hub(repository)
    assert backends()[source] == ""
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = {}
    for backend in (source, "torch"):
        torch.manual_seed(0)
        model = create_model("vim_nano", num_classes=3, depth=2, schedule=[3, 0], backend=backend)
        logits = model(images)
        logits.square().sum().backward()
        found[backend] = [logits, *(weight.grad for weight in model.parameters())]
    assert len(found["torch"]) > 20
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert sorted(downloaded) == (sorted(PINS) if source == "hub" else [])


def test_a_model_without_the_convolution_is_refused_and_auto_does_without(install, monkeypatch):
    install(scan=scan_fn)
    images = torch.ones(1, 3, 8, 8)
    with pytest.raises(BackendError, match="backend 'mamba_ssm' cannot run here: causal_conv1d is not installed; MAM"):
        create_model("vim_nano", depth=1, backend="mamba_ssm")(images)
    called = []
    install(scan=lambda *args, **kwargs: called.append(1) or scan_fn(*args, **kwargs))
    monkeypatch.setattr(dispatch, "_FASTEST", {"cpu": ("mamba_ssm", "torch")})
    create_model("vim_nano", depth=1)(images)
    assert len(called) == 2, "both directions by mamba_ssm, the convolution by torch"


# the hub


def scanned_by_the_hub():
    mamba_ssm._find.cache_clear()
    inputs = draw_scan(2, 8, 7, 4)
    torch.testing.assert_close(selective_scan(*inputs, True, backend="hub"), selective_scan_ref(*inputs, True))


def locked(project, monkeypatch, commit):
    """A project whose kernels.lock, of the form that `kernels lock` writes, fixes the commit of the scan alone."""
    entry = {"dependency": {"repo-id": SCAN_REPOSITORY, "version": 2}, "lock": {"commit": commit}}
    (project / "kernels.lock").write_text(json.dumps([entry]))
    (project / "pyproject.toml").write_text("")
    monkeypatch.setattr(mamba_ssm, "_PROJECT", project)


def refused() -> str:
    """What naming the backend says where it cannot run."""
    mamba_ssm._find.cache_clear()
    return refusal(lambda: selective_scan(*draw_scan(2, 8, 7, 4), backend="hub"), BackendError)


def test_the_version_of_pyproject_is_loaded_and_named_among_a_runs_versions(hub):
    assert set(PINS) == {SCAN_REPOSITORY, CONV_REPOSITORY}
    hub(SCAN_REPOSITORY, "selective_scan_fn = None", version=PINS[SCAN_REPOSITORY] + 1, commit="b" * 40)
    assert f"Version {PINS[SCAN_REPOSITORY]} not found" in refused()
    hub(SCAN_REPOSITORY)
    scanned_by_the_hub()
    versions = environment.environment("cpu")["versions"]
    assert (versions["hub mamba-ssm"], versions["kernels"]) == ("mamba-ssm_aaaaaaa", kernels.__version__)


def test_the_commit_of_a_lock_is_loaded_whatever_the_version_is_now(hub, tmp_path, monkeypatch):
    hub(SCAN_REPOSITORY, commit="c" * 40)
    hub(SCAN_REPOSITORY, "selective_scan_fn = None", commit="d" * 40)
    locked(tmp_path, monkeypatch, "c" * 40)
    scanned_by_the_hub()
    said = mamba_ssm._find("causal_conv1d", True)[0]
    assert "`kernels-community/causal-conv1d` is not locked. Please lock it with `kernels lock <project>`" in said


def test_auto_and_the_list_of_backends_load_nothing_from_the_hub(install, hub, downloaded):
    install()
    assert not any("hub" in names for names in dispatch._FASTEST.values())
    assert backends()["hub"] == ""
    create_model("vim_nano", depth=1)(torch.ones(1, 3, 8, 8))
    assert downloaded == []


def test_without_the_package_kernels_the_command_that_installs_it_is_said(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", None)
    monkeypatch.setattr(mamba_ssm.importlib.util, "find_spec", lambda name: None)
    assert refused() == "backend 'hub' cannot run here: kernels is not installed; " + mamba_ssm.INSTALL_HUB
    project = tomllib.loads((mamba_ssm._PROJECT / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["hub"]
    assert set(mamba_ssm.INSTALL_HUB.split()[2:]) < {re.split("[<>=]", line)[0] for line in extra}


def test_outside_a_checkout_no_version_is_guessed(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(mamba_ssm, "_PROJECT", tmp_path)
    assert "famba is not installed from a checkout, whose pyproject.toml fixes the versions" in refused()


def test_offline_and_never_downloaded_it_says_how_to_download(hub, tmp_path, monkeypatch):
    said = refused()
    assert said.startswith(f"backend 'hub': {SCAN_REPOSITORY}: Version 2 of '{SCAN_REPOSITORY}' is not available in")
    assert said.endswith("; to download it: unset HF_HUB_OFFLINE")
    locked(tmp_path, monkeypatch, "c" * 40)
    assert refused().endswith("; to download it: unset HF_HUB_OFFLINE")


def test_a_hub_out_of_reach_is_not_reported_as_one_that_is_not_trusted(hub, monkeypatch):
    def unreachable(*arguments, **options):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # what the variable was at the import
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.HfApi, "get_organization_overview", unreachable)
    assert refused() == (
        f"backend 'hub': {SCAN_REPOSITORY}: Name or service not known; "
        "to use what was downloaded before: HF_HUB_OFFLINE=1"
    )


def test_a_build_for_another_torch_only_is_refused_in_one_line_without_the_list_of_builds(hub):
    hub(SCAN_REPOSITORY, built_for="torch27")
    assert refused() == (
        f"backend 'hub': {SCAN_REPOSITORY}: Cannot find a build variant for this system in {SCAN_REPOSITORY} "
        f"(revision: {'a' * 40}):; this is torch {torch.__version__}; what there is: kernels versions {SCAN_REPOSITORY}"
    )


def test_a_repository_without_the_function_is_refused_by_its_name(hub):
    hub(CONV_REPOSITORY, "causal_conv1d_update = None")
    x, weight = torch.ones(1, 8, 3), torch.ones(8, 4)
    with pytest.raises(BackendError, match=r"has no attribute 'causal_conv1d_fn'; this is torch .*: kernels versions"):
        mamba_ssm.causal_conv1d_silu(x, weight, None, False, hub=True)


def test_a_download_that_is_not_whole_is_to_be_downloaded_again(hub):
    build = hub(SCAN_REPOSITORY, "import torch; torch.ops.load_library(__file__.replace('__init__.py', 'scan.so'))")
    (build / "scan.so").write_bytes(b"\x7fELF, and no more")
    assert re.search(rf"file too short; to download it again: hf cache rm kernel/{SCAN_REPOSITORY}$", refused())
    hub(SCAN_REPOSITORY, "def selective_scan_fn(")
    assert re.search(rf"never closed .*; to download it again: hf cache rm kernel/{SCAN_REPOSITORY}$", refused())
    (hub(SCAN_REPOSITORY) / "metadata.json").write_text("{")
    assert refused().endswith(f"; to download it again: hf cache rm kernel/{SCAN_REPOSITORY}")


def test_a_package_that_does_not_import_is_to_be_installed_be_it_kernels_or_what_a_build_imports(hub, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setitem(sys.modules, "kernels", None)  # found, and not importable
        assert refused().endswith(f"; {mamba_ssm.INSTALL_HUB}")
    hub(SCAN_REPOSITORY, "import absent_package")
    assert refused().endswith(f": No module named 'absent_package'; {mamba_ssm.INSTALL_HUB}")
    hub(SCAN_REPOSITORY, needs=["einops"])
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "einops" else find(name))
    assert refused().endswith(f"Please install with: pip install einops; {mamba_ssm.INSTALL_HUB}")


@pytest.mark.parametrize("backend", ["mamba_ssm", "hub"])
def test_a_run_on_these_kernels_is_not_deterministic(backend):
    found = precision.nondeterministic(torch.device("cuda"), backend)
    assert {"causal_conv1d_bwd", "selective_scan_bwd"} < set(found)

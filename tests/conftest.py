"""Shapes written in annotations are checked under pytest: the hook must be in place before famba is imported."""

import gc
import getpass
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import jaxtyping
import pytest
import torch
from checkout import ROOT
from filelock import FileLock
from torch._subclasses.fake_tensor import FakeTensorMode

from famba.kernels.triton import conv, fuse, match, norm, scan  # noqa: F401 (Triton reads their source: not to be wrapped)

jaxtyping.install_import_hook("famba", "beartype.beartype")
from famba.kernels import precision  # noqa: E402 (after the hook)
from famba.kernels.cpu import build  # noqa: E402
from famba.kernels.triton import runtime as gpu_runtime  # noqa: E402

for part, key, exact in precision._TF32:  # as in training: its errors are above the tolerances
    setattr(part, key, exact)

found = str(ROOT / "tests" / "children"), os.environ.get("PYTHONPATH")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, found))
# One worker compiles the kernels and the others find them in the cache.
BUILDING = FileLock(Path(tempfile.gettempdir()) / f"famba-tests-{getpass.getuser()}.lock")
# The files that take longest, the longest first; a file with slow tests that is not here comes next.
LONGEST = (
    "test_pipeline", "test_interruption", "test_distributed", "test_layout", "test_compile", "test_gpu_check",
    "test_triton_specialisation", "test_triton", "test_fit", "test_cpu", "test_cluster", "test_accelerator",
    "test_profiling", "test_bench", "benchmark", "test_results", "test_diagnostics", "test_sass",
)  # fmt: skip


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported stays, and is much: the garbage collector need not look through it, now or later."""
    gc.disable()
    with BUILDING:
        build.unavailable()
    result = yield
    gc.freeze()
    gc.enable()
    return result


def pytest_collection_modifyitems(items):
    """Files that take long come first, so that several workers end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.path.suffix == ".ipynb"}
    place = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (place.get(item.path.stem, len(place)), item.path not in slow))


@pytest.fixture(autouse=True, scope="module")
def check_shapes(request):
    """Except where much is trained, which takes twice as long with it; one run of test_fit.py is checked."""
    jaxtyping.config.update("jaxtyping_disable", request.path.parent.name in ("bench", "experiments", "training"))


@pytest.fixture
def on_paper(monkeypatch):
    """Tensors of shape and type alone, on which the GPU's operators run anywhere: nothing is launched.

    To read a number of one, for which the host would have to wait, raises DataDependentOutputException.

    Returns:
        A function that takes a model's numbers from it, and the mode in which tensors are made so.
    """
    monkeypatch.setattr(gpu_runtime, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_runtime, "INTERPRETED", True)  # no device is asked for
    monkeypatch.setattr(gpu_runtime, "triton", SimpleNamespace(__version__="3.3.0"))
    mode = FakeTensorMode()

    def emptied(model):
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[name] = torch.nn.Parameter(mode.from_tensor(weight.detach()))
        return model

    return emptied, mode


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository root of its own, which is the working directory: no test sees another's checkpoints or cache."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def threads():
    """Sets torch's thread count; put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=build.INSTRUCTION_SETS)
def instruction_set(request, monkeypatch):
    """Each instruction set that the native kernels have and this machine can run, in turn."""
    sets = list(build.INSTRUCTION_SETS)
    if sets.index(request.param) < sets.index(build.instruction_set()):
        pytest.skip(f"this processor lacks {request.param}")
    monkeypatch.setattr(build, "instruction_set", lambda: request.param)
    with BUILDING:
        reason = build.unavailable()
    if reason:
        pytest.skip(reason)
    return request.param

"""The doctor: one row for everything, and each problem with its reason and its command."""

import re
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from processes import FOREVER_S

import famba
from famba import diagnostics
from famba.cli import main
from famba.diagnostics import Row
from famba.kernels.cpu import build
from famba.profiling import environment

NAMES = [
    "torch", "GPU", "native kernels", "triton", "hub", "mamba_ssm",
    "datasets", "timm", "torchvision", "accelerate", "tensorboard",
]  # fmt: skip
GPU_BACKENDS = NAMES[3:6]


@pytest.fixture
def examine(monkeypatch):
    """All rows by name, with the given errors of imports and no others; of a GPU's backends error and reason."""

    def run(*backends: tuple[str, str], **errors: str | None) -> dict[str, Row]:
        monkeypatch.setattr(diagnostics, "_imported", lambda names: dict.fromkeys(names, "") | errors)
        if backends:
            monkeypatch.setattr(diagnostics, "_gpu", lambda: Row("GPU", "NVIDIA H100"))
            monkeypatch.setattr(diagnostics, "_run", Mock(side_effect=backends))
            monkeypatch.setattr("triton.runtime.driver", Mock())
        return {row.name: row for row in famba.doctor()}

    return run


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder of packages, before all others on the path; its torch imports at once."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("")
    return tmp_path


def test_every_row_is_there_in_order_and_only_unusable_ones_have_commands(examine):
    found = examine(timm=None, datasets=None)
    assert list(found) == NAMES
    assert {row.usable for row in found.values()} == {True, False}
    assert not any(row.usable and row.command for row in found.values())
    assert found["native kernels"].usable == (not build.unavailable())


def test_the_command_prints_torchs_report_and_the_rows_and_succeeds_whatever_is_broken(examine, capsys):
    examine(datasets=None, accelerate="ImportError: no")
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"PyTorch version: {torch.__version__}\n")
    assert all(f"  {name}" in printed for name in NAMES)
    assert "does not import: ImportError: no" in printed
    assert "$ pip install torch==" in printed


def test_text_by_hand():
    rows = [Row("datasets", "2.13.0"), Row("timm", "", "not installed", "pip install timm\nmake env")]
    assert diagnostics.text(rows) == (
        "yes  datasets  2.13.0\nno   timm\n               not installed\n               $ pip install timm\n"
        "               $ make env"
    )


def test_missing_broken_and_crashing_packages_are_recognised(packages):
    sources = {
        "sound": "import torch",
        "broken": "raise ImportError('of another\\nbuild')",
        "crashing": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "noisy": "import sys; print('a warning', file=sys.stderr)",
        "needy": "import absent_package",
    }
    for name, source in sources.items():
        (packages / f"{name}.py").write_text(source)
    assert diagnostics._imported(["absent_package", *sources]) == {
        "absent_package": None,
        "sound": "",
        "broken": "build",
        "crashing": "its import was ended by signal 11",
        "noisy": "",
        "needy": "ModuleNotFoundError: No module named 'absent_package'",
    }
    assert diagnostics._run("print('noise'); print('a reason')") == ("", "a reason")


def test_an_import_that_hangs_is_given_up(packages, monkeypatch):
    monkeypatch.setattr(diagnostics, "_TIME_LIMIT_S", 1)
    (packages / "hanging.py").write_text(f"import time; time.sleep({FOREVER_S})")
    assert diagnostics._imported(["hanging"]) == {"hanging": "its import took more than 1 s"}


def test_it_runs_where_torch_cannot_be_imported_at_all():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from famba import cli, diagnostics\n"
        "diagnostics._imported = lambda names: dict.fromkeys(names)\n"
        "sys.exit(cli.main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    rows = re.findall(r"no   (.+)\n +(.+)\n +\$ make env\n", done.stdout)
    broken = "torch does not import"
    assert rows == [("torch", "not installed"), ("GPU", broken), ("native kernels", broken)]


def test_a_gpu_that_torch_cannot_compute_on_is_not_usable(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch, "ones", Mock(return_value=torch.ones(1)))
    assert diagnostics._gpu() == Row("GPU", "NVIDIA H100")
    error = RuntimeError("CUDA error: no kernel image is available\nCUDA kernel errors might be ..")
    monkeypatch.setattr(torch, "ones", Mock(side_effect=error))
    reason = "torch cannot compute on it: CUDA error: no kernel image is available"
    assert diagnostics._gpu() == Row("GPU", "NVIDIA H100", reason, "make env TORCH_BACKEND=auto")


@pytest.mark.parametrize(
    ("driver", "cuda", "reason", "command"),
    [
        ("", None, "there is no NVIDIA driver here", ""),
        ("580.1", None, "torch is built without CUDA", "make env TORCH_BACKEND=auto"),
        ("450.1", "13.0", "torch, built for CUDA 13.0, sees no device with", "make env TORCH_BACKEND=auto"),
    ],
)
def test_a_missing_gpu_is_the_drivers_or_torchs_fault(monkeypatch, driver, cuda, reason, command):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(environment, "gpu_driver", lambda: driver)
    row = diagnostics._gpu()
    assert not row.usable
    assert row.reason.startswith(reason)
    assert (row.command, row.version) == (command, f"driver {driver}" if driver else "")


def test_gpu_backends_are_recommended_only_where_there_is_a_gpu(examine):
    found = examine()
    for name in GPU_BACKENDS:
        assert (found[name].reason, found[name].command) == ("it runs on a GPU, and none can be used", "")


def test_what_a_user_can_do_for_gpu_kernels_is_said_by_each_backend_or_beside_its_error(examine):
    works, absent = ("", ""), "ModuleNotFoundError: No module named 'einops'"
    needless = "not needed, for backend triton has all kernels: "
    found = examine(works, (absent, ""), ("", "mamba_ssm is not installed; pip"))
    assert list(found)[3:6] == GPU_BACKENDS
    assert (found["triton"].usable, found["triton"].command) == (True, "")
    assert found["hub"].reason == f"{needless}{absent}"
    assert found["hub"].command == "pip install kernels einops transformers"
    assert found["mamba_ssm"][2:] == (f"{needless}mamba_ssm is not installed; pip", "")
    found = examine(("ImportError: no ptxas", ""), works, ("its import was ended by signal 11", ""))
    assert found["triton"][2:] == ("ImportError: no ptxas", "pip install triton")
    assert found["mamba_ssm"].reason == "its import was ended by signal 11"
    assert found["mamba_ssm"].command.startswith("MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE MAMBA_KEEP")
    assert all(row.usable for name, row in examine(works, works, works).items() if name in GPU_BACKENDS)


def test_each_gpu_backend_is_asked_for_its_own_reason(monkeypatch):
    """Here torch sees no GPU, and each says so."""
    monkeypatch.setattr("triton.runtime.driver", Mock())
    rows = diagnostics._gpu_backends(Row("GPU", "NVIDIA H100"))
    if not torch.cuda.is_available():
        assert "no CUDA device" in rows[0].reason
        assert rows[2].reason == "torch sees no cuda device"


def test_triton_that_imports_but_finds_no_compiler_is_not_usable(examine, monkeypatch):
    works = ("", "")
    examine(works, works, works, *[works] * 3)
    no_compiler = Mock(side_effect=RuntimeError("Failed to find C compiler."))
    monkeypatch.setattr("triton.runtime.driver.active.get_current_target", no_compiler)
    row = next(row for row in famba.doctor() if row.name == "triton")
    assert row.reason == "triton cannot build its helper: Failed to find C compiler."
    assert row.command == "apt-get install gcc python3-dev"


def test_extras_keep_torch_and_timm_depends_on_torchvision(examine):
    kept = f"torch=={torch.__version__.split('+')[0]}"
    broken = "RuntimeError: operator torchvision::nms does not exist"
    found = examine(datasets=None, torchvision=broken, timm=broken)
    assert found["datasets"].command == f"pip install {kept} datasets"
    assert found["torchvision"].reason == f"does not import: {broken}"
    assert kept in found["torchvision"].command
    assert (found["timm"].reason, found["timm"].command) == ("it imports torchvision", found["torchvision"].command)
    assert examine(timm="ImportError: timm's own")["timm"].reason == "does not import: ImportError: timm's own"


def test_without_a_compiler_the_native_kernels_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_attempt", build._attempt.__wrapped__)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    said = "no C++ compiler ({}) on PATH; install g++ or clang, or set CXX".format
    assert diagnostics._native().reason == said("c++, g++, clang++")
    monkeypatch.setenv("CXX", "nowhere-c++")
    assert diagnostics._native().reason == said("nowhere-c++")


def test_a_driver_that_hangs_is_no_driver(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "_DRIVER", tmp_path / "absent")
    monkeypatch.setattr(subprocess, "run", Mock(side_effect=subprocess.TimeoutExpired("nvidia-smi", 20)))
    assert environment.gpu_driver() == ""

"""gpu-check, run on a CPU: its checks find faults, and checks may fail, hang or die."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from processes import PATIENCE_S, is_there, wait_until
from refusals import refused

from famba import bench, gpu_check
from famba.cli import main
from famba.errors import FambaError
from famba.gpu_check import Check, Setting, checks
from famba.training import cuda_graph

ROOT = gpu_check.ROOT
CPU = Setting("cpu", quick=True)


# By check of broken_checks.py: its verdict and detail, in the order in which they run.
BROKEN = {
    "has_a_wrong_scan": ("FAILED", r"AssertionError: 10 of [2-4]\d cases; scan, b \d+, .*: relative error \d.*"),
    "has_a_scan_that_raises": ("FAILED", r".* 10 of [2-4]\d cases; scan, b .*: RuntimeError: no such chip; at: .*"),
    "forgets_its_optimiser": ("FAILED", r"AssertionError: other metrics after resum.*; at: checkpoints left: \[\]"),
    "hangs": ("FAILED", r"it took more than 10 s; at: waiting for \d+"),
    "is_killed": ("FAILED", "its process was killed by SIGSEGV; at: reading nowhere"),
    "exits": ("FAILED", "its process ended with status 3"),
    "cannot_run": ("skipped", "no such program"),
    "lacks_a_package": ("skipped", "nowhere is missing; make gpu-check-wheels"),
    "raises": ("FAILED", "RuntimeError: no such device"),
    "passes": ("ok", "cpu it is"),
}


def broken(*names):
    return {name: Check(f"broken_checks:{name}", 10.0 if name == "hangs" else PATIENCE_S) for name in names}


@pytest.mark.slow
def test_each_end_of_a_check_is_one_line_and_the_next_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "CHECKS", broken(*BROKEN))
    path = tmp_path / "check.json"
    assert main(["gpu-check", "--device", "cpu", "--quick", "--json", str(path)]) == 1
    printed, written = capsys.readouterr(), json.loads(path.read_text())
    rows = {row["check"]: row for row in written["checks"]}
    for (name, (verdict, detail)), line in zip(BROKEN.items(), printed.out.splitlines(), strict=True):
        assert rows[name]["verdict"] == verdict
        assert re.fullmatch(detail, rows[name]["detail"])
        assert re.match(rf"{name} *{verdict} ", line)
    assert "has_a_wrong_scan printed:\nscan, b" in printed.err
    assert "Traceback" in rows["has_a_scan_that_raises"]["output"]
    assert rows["raises"]["output"].startswith("what the compiler printed\nTraceback")
    assert wait_until(lambda: not is_there(int(rows["hangs"]["detail"].split()[-1]))), "its child goes with it"
    assert written["command"] == "python -m famba gpu-check --quick --device cpu"
    assert written["steps"] == [{"x": 1}]


def test_without_its_device_gpu_check_says_so_in_one_line_fails_and_writes_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "CHECKS", {"device": broken("raises")["raises"], **broken("passes")})
    said = refused(capsys, "gpu-check", "passes", "--json", str(tmp_path / "check.json"))
    assert said == "famba: gpu-check: device 'cuda' cannot be used: RuntimeError: no such device\n"
    assert not list(tmp_path.iterdir())


def test_a_check_without_its_time_is_skipped_and_gpu_check_fails_if_all_are():
    with pytest.raises(FambaError, match=r"^gpu-check: every check was skipped: passes$"):
        gpu_check.run(broken("passes"), CPU, "", None, limit_s=0.0)
    with pytest.raises(FambaError, match=r"^gpu-check: every check was skipped: hangs$"):
        gpu_check.run(broken("hangs"), CPU, "", None, limit_s=1.0)  # of its own 10 s


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["speed"], "check: 'speed' is unknown; allowed: device, operators"),
        (["--device", "tpu"], "device: 'tpu' is not one of cuda, cuda:N, cpu"),
        (["--device", "cpu"], "device: 'cpu' takes --quick only"),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(options, said, capsys):
    assert said in refused(capsys, "gpu-check", *options)


ELSEWHERE = ("streaming", "steps")  # checks that run below, with torch alone


@pytest.mark.slow
def test_every_check_that_runs_on_a_cpu_passes_and_can_be_drawn(tmp_path, capsys):
    from famba import plots  # a machine that collects this file may not have matplotlib

    path = tmp_path / "check.json"
    names = [name for name in gpu_check.CHECKS if name not in ELSEWHERE]
    assert main(["gpu-check", *names, "--device", "cpu", "--quick", "--json", str(path)]) == 0
    verdicts = {name: "ok" if gpu_check.CHECKS[name].on_cpu else "skipped" for name in names}
    assert sum(verdict == "ok" for verdict in verdicts.values()) == 6
    result = json.loads(path.read_text())
    assert {row["check"]: row["verdict"] for row in result["checks"]} == verdicts
    assert len(capsys.readouterr().out.splitlines()) == len(verdicts)
    assert {"device", "instruction_set", "versions"} <= set(result)
    details = {row["check"]: row["detail"] for row in result["checks"]}
    for name in ("operators", "models"):
        assert re.match(r"40 of 40 cases, worst relative error bf16: .*; fp32: .* at ", details[name])
    assert details["training"].startswith("killed in epoch 2 of 3 and resumed: equal metrics, top-1 ")
    assert details["fusion"].startswith("all: ")
    tables = bench.gpu_frames(path)
    assert {"checks", "setting", "schedules"} <= set(tables)
    assert list(tables["checks"]["verdict"]) == list(verdicts.values())
    assert len(plots.gpu_benchmark(tables).axes) == 1


@pytest.fixture
def torch_alone(tmp_path):
    """Runs the command where torch, NumPy and what torch needs are all that is installed."""
    installed, site = Path(sysconfig.get_paths()["purelib"]), tmp_path / "site"
    site.mkdir()
    needed = "torch functorch torchgen numpy numpy.libs typing_extensions.py sympy mpmath filelock fsspec jinja2"
    for name in [*needed.split(), "markupsafe", "networkx"]:
        if (installed / name).exists():
            (site / name).symlink_to(installed / name)

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-S", "-m", "famba", "gpu-check", *arguments, "--device", "cpu", "--quick"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{site}"},
        )

    return run


def wheels_of(names, folder):
    """Wheels of installed packages and of all that they need."""
    folder.mkdir()
    todo, made = list(names), set()
    while todo:
        found = importlib.metadata.distribution(todo.pop())
        if found.name in made:
            continue
        made.add(found.name)
        with zipfile.ZipFile(folder / f"{found.name.replace('-', '_')}-{found.version}-py3-none-any.whl", "w") as wheel:
            for file in found.files or []:
                if not {"..", "__pycache__", "tests"} & set(file.parts) and found.locate_file(file).is_file():
                    wheel.write(found.locate_file(file), str(file))
        needed = [Requirement(line) for line in found.requires or []]
        todo += [x.name for x in needed if x.marker is None or x.marker.evaluate({"extra": ""})]
    return folder


@pytest.mark.slow
def test_a_machine_with_torch_alone_needs_only_the_wheels_of_the_makefile(torch_alone, tmp_path):
    from famba import plots

    line = re.search(r"^WHEELS +:= (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert line is not None
    folder = wheels_of(line[1].split(), tmp_path / "wheels")
    assert len(list(folder.iterdir())) > 10
    path = tmp_path / "check.json"
    done = torch_alone(*ELSEWHERE, "--wheels", str(folder), "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = {row["check"]: row["verdict"] for row in json.loads(path.read_text())["checks"]}
    assert verdicts == {"device": "ok", **dict.fromkeys(ELSEWHERE, "ok")}, done.stdout
    tables = bench.gpu_frames(path)
    assert {"checks", "setting", "steps"} <= set(tables)
    assert len(plots.gpu_benchmark(tables).axes) == 1


def test_without_wheels_the_missing_package_is_named(torch_alone, tmp_path):
    done = torch_alone("device", "steps", "--wheels", str(tmp_path))
    said = "famba: gpu-check: device 'cpu' cannot be used: pydantic is missing; make gpu-check-wheels\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)


def test_the_sanitizer_runs_small_calls_of_every_operator_and_its_finding_fails(tmp_path, monkeypatch):
    program = tmp_path / "compute-sanitizer"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    # Its arguments: --tool, a tool, --error-exitcode, 9, --report-api-errors, no, then the command.
    program.write_text('#!/bin/sh\n[ $2 = memcheck ] || { echo an invalid read; exit $4; }\nshift 6; exec "$@"\n')
    program.chmod(0o755)
    with pytest.raises(AssertionError, match=r"^racecheck: status 9, an invalid read$"):
        checks.sanitizer(CPU, print)
    program.write_text("#!/bin/sh\n")
    assert checks.sanitizer(CPU, print).detail == "memcheck and racecheck have found nothing"
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(gpu_check.Skipped, match="compute-sanitizer is missing"):
        checks.sanitizer(CPU, print)


def test_failed_gpu_tests_are_named_and_missing_packages_are_separate(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # three processes, which need none
    file = tmp_path / "tests" / "test_of_a_gpu.py"
    file.parent.mkdir()
    head = "import pytest\npytestmark = pytest.mark.gpu\n"
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (file.parent / "test_of_a_cpu.py").write_text("import nowhere\n")
    (file.parent / "test_that_wants_more.py").write_text(head + "import elsewhere\n")
    file.write_text(head + "def test_one(): pass\ndef test_two(): import nowhere.at_all\n")
    assert checks.tests(CPU, print).detail == "1 of 3 passed, missing: elsewhere, nowhere"
    (file.parent / "test_that_wants_more.py").unlink()
    file = file.rename(file.with_name("test_of_another.py"))
    file.write_text(head + "def test_one(): pass\ndef test_two(): assert 0\n")
    with pytest.raises(AssertionError, match=r"^1 failed, 1 of 2 passed: tests\.test_of_another\.test_two$"):
        checks.tests(CPU, print)
    file = file.rename(file.with_name("test_of_none.py"))
    file.write_text(head)
    with pytest.raises(AssertionError, match=r"^0 of 0 passed; pytest ended with status 5$"):
        checks.tests(CPU, print)


def test_a_gpu_without_a_number_is_torchs_current_one_and_a_numbered_one_becomes_it(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)  # as it is to be afterwards
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    for name in ("cuda", "cuda:1"):
        assert checks.begin(Setting(name, quick=True)) == torch.device(name)
    assert chosen == [1]


def test_a_graph_with_other_losses_fails(monkeypatch):
    factor = 1
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)  # as it is to be afterwards
    monkeypatch.setattr(checks, "_CLASS_IMAGES", 30)
    monkeypatch.setattr(cuda_graph, "unavailable", lambda device, processes: "")

    def captured(call, device):
        return lambda: tuple(x * weight for x, weight in zip(call(), (factor, 1), strict=True))

    monkeypatch.setattr(cuda_graph, "captured", captured)
    assert checks.graph(CPU, print).detail.startswith("3 epochs, losses apart by 0e+00")
    factor = 2
    with pytest.raises(AssertionError, match=r"^training losses .* without, .* with a graph$"):
        checks.graph(CPU, print)

"""Check everything that famba does on a GPU, in one command: `python -m famba gpu-check`; see famba.gpu_check.checks.

Each check is a process with a time limit, because a faulty kernel breaks CUDA for its whole process and a hanging one
must not stop the others. This module imports the standard library alone, so that it starts where only torch, triton and
NumPy are installed. Other packages come as wheels (`make gpu-check-wheels`); a check without its package is skipped.
"""

import contextlib
import importlib.metadata
import multiprocessing
import os
import pkgutil
import re
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from famba.errors import FambaError, InputError
from famba.storage.files import json_bytes, write_atomic

ROOT = Path(__file__).resolve().parents[2]
PATH = "results/gpu_check.json"
WHEELS = "build/wheels"
LIMIT_S = 465.0  # of all checks: eight minutes with start-up
OK, FAILED, SKIPPED = "ok", "FAILED", "skipped"
_GRACE_S = 10.0  # for a process to exit after its verdict
_OUTPUT = 4000  # characters shown of the output of a failed check


class Check(NamedTuple):
    """A check as `module:function`, its time limit, and whether a CPU can run it."""

    function: str
    limit_s: float
    on_cpu: bool = True


# The most important first, because the limit of all is less than the sum of theirs. All others need `device`.
CHECKS = {
    "device": Check("famba.gpu_check.checks:device", 60),
    "operators": Check("famba.gpu_check.accuracy:operators", 85),
    "models": Check("famba.gpu_check.accuracy:models", 85),
    "determinism": Check("famba.gpu_check.checks:determinism", 60),
    "training": Check("famba.gpu_check.checks:training", 90),
    "streaming": Check("famba.gpu_check.checks:streaming", 60),
    "graph": Check("famba.gpu_check.checks:graph", 60, on_cpu=False),
    "steps": Check("famba.gpu_check.checks:steps", 120),
    "fusion": Check("famba.gpu_check.checks:fused_steps", 90),
    "tests": Check("famba.gpu_check.checks:tests", 150, on_cpu=False),
    "sanitizer": Check("famba.gpu_check.checks:sanitizer", 100, on_cpu=False),
}


@dataclass(frozen=True)
class Setting:
    """Where checks run (cuda, cuda:N or cpu), and whether at small sizes, to test the checks themselves."""

    device: str
    quick: bool

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def backend(self) -> str:
        """The kernels under test."""
        return "triton" if self.on_gpu else "native"


@dataclass
class Outcome:
    """The summary of a check that passed, and the tables that it measured."""

    detail: str
    tables: dict[str, Any] = field(default_factory=dict)


class Skipped(Exception):
    """A check cannot run here; the message is the reason."""


Say = Callable[[str], None]  # what a check does next: reported if it fails, hangs or dies there


def main(
    names: Sequence[str] = (), *, device: str = "cuda", quick: bool = False, json: Path | None = None, wheels: Path
) -> int:
    """Run the checks, print and write them; the exit status: 1 if one has failed.

    Args:
        names: some of `CHECKS`; none is all. `device` always runs.
        json: where the result is written after each check; the default is `PATH` for all checks at full size.
        wheels: a folder of wheels, whose packages are used where they are not installed.

    Raises:
        InputError: an unknown check or device.
        FambaError: the device cannot be used, or every check was skipped.
    """
    for name in names:
        if name not in CHECKS:
            raise InputError(f"check: {name!r} is unknown; allowed: {', '.join(CHECKS)}")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise InputError(f"device: {device!r} is not one of cuda, cuda:N, cpu")
    if device == "cpu" and not quick:
        raise InputError("device: 'cpu' takes --quick only")
    chosen = {name: check for name, check in CHECKS.items() if not names or name in ("device", *names)}
    path = json.absolute() if json else (None if names or quick else ROOT / PATH)
    options = [*names, *(["--quick"] if quick else []), *([] if device == "cuda" else ["--device", device])]
    with _importable(wheels):
        result = run(chosen, Setting(device, quick), " ".join(["python -m famba gpu-check", *options]), path)
    failed = [row for row in result["checks"] if row["verdict"] == FAILED]
    for row in failed:
        print(f"\n{row['check']} printed:\n{row['output']}", file=sys.stderr)
    return int(bool(failed))


def run(
    checks: Mapping[str, Check], setting: Setting, command: str, path: Path | None, *, limit_s: float = LIMIT_S
) -> dict[str, Any]:
    """Run the checks in order, print each when it ends, and return what they found.

    Args:
        command: as a user would type it.
        path: where the result so far is written after each check.
        limit_s: of all checks; those left after it are skipped.

    Raises:
        FambaError: the check `device` does not pass, so that no other can, or every check was skipped.
    """
    end = time.monotonic() + limit_s
    result: dict[str, Any] = {"device": setting.device, "versions": {}, "command": command, "checks": []}
    for name, check in checks.items():
        left = end - time.monotonic()
        if not (check.on_cpu or setting.on_gpu):
            row, tables = _row(SKIPPED, "it needs a CUDA device"), {}
        elif left <= 0:
            row, tables = _row(SKIPPED, f"the {limit_s:g} s of all checks are over"), {}
        else:
            row, tables = _tried(check, setting, left)
        if name == "device" and row["verdict"] != OK:
            raise FambaError(f"gpu-check: device {setting.device!r} cannot be used: {row['detail']}")
        result |= tables
        result["checks"].append({"check": name, **row})
        print(f"{name:<12}{row['verdict']:<8}{row['seconds']:6.1f} s  {row['detail']}", flush=True)
        if path is not None:
            write_atomic(path, json_bytes(result))
    others = {row["check"]: row["verdict"] for row in result["checks"] if row["check"] != "device"}
    if others and set(others.values()) == {SKIPPED}:
        raise FambaError(f"gpu-check: every check was skipped: {', '.join(others)}")
    return result


def _row(verdict: str, detail: str) -> dict[str, Any]:
    return {"verdict": verdict, "detail": " ".join(detail.split()), "seconds": 0.0}


def _tried(check: Check, setting: Setting, left_s: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row and tables of a check, even if its process crashes or hangs; it may take what is left for all checks."""
    # The server imports the slow packages once without initialising CUDA, so that checks can fork from it.
    context, at = multiprocessing.get_context("forkserver"), ""
    context.set_forkserver_preload(["torch", "famba.gpu_check.checks"])
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile() as printed:
        process = context.Process(target=_child, args=(check.function, setting, printed.name, sender))
        process.start()
        sender.close()
        start = time.monotonic()
        try:
            while True:
                if not receiver.poll(max(0.0, start + min(check.limit_s, left_s) - time.monotonic())):
                    row, tables = _row(FAILED, f"it took more than {check.limit_s:.0f} s"), {}
                    if left_s < check.limit_s:
                        row = _row(SKIPPED, f"cut off after {left_s:.0f} s, which were left for it of all checks' time")
                    break
                said = receiver.recv()
                if not isinstance(said, str):
                    row, tables = said
                    process.join(_GRACE_S)
                    break
                at = said
        except EOFError:
            process.join()
            status = process.exitcode or 0
            end = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            row, tables = _row(FAILED, f"its process {end}"), {}
        finally:
            _kill(process)
        row["seconds"] = time.monotonic() - start
        if row["verdict"] == FAILED:
            row["detail"] += f"; at: {at}" if at else ""
            row["output"] = Path(printed.name).read_text(errors="replace")[-_OUTPUT:]
    return row, tables


def _kill(process: BaseProcess) -> None:
    """Kill a check's process and its children."""
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):  # no process group yet, or no longer
        os.killpg(process.pid, signal.SIGKILL)
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGKILL)
    process.join()


def _child(function: str, setting: Setting, printed: str, sender: Connection) -> None:
    os.setsid()
    handle = os.open(printed, os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    tables: dict[str, Any] = {}
    try:
        outcome: Outcome = pkgutil.resolve_name(function)(setting, sender.send)
        row, tables = _row(OK, outcome.detail), outcome.tables
    except Skipped as reason:
        row = _row(SKIPPED, str(reason))
    except ModuleNotFoundError as error:
        row = _row(SKIPPED, f"{(error.name or str(error)).split('.')[0]} is missing; make gpu-check-wheels")
    except Exception as error:  # whatever kernels, compilers and drivers raise; the next check runs
        traceback.print_exc()
        row = _row(FAILED, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
    sys.stdout.flush()
    sys.stderr.flush()
    sender.send((row, tables))


@contextlib.contextmanager
def _importable(wheels: Path) -> Iterator[None]:
    """In the block, processes started here can import those packages of these wheels that are not installed."""
    with tempfile.TemporaryDirectory() as folder:
        for wheel in sorted(wheels.glob("*.whl")):
            try:
                importlib.metadata.distribution(wheel.name.split("-")[0])
            except importlib.metadata.PackageNotFoundError:
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(folder)
        # Checks inherit sys.path; the server and what checks start inherit the environment.
        sys.path.append(folder)
        before = os.environ.get("PYTHONPATH", "")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [before, folder]))
        try:
            yield
        finally:
            sys.path.remove(folder)
            os.environ["PYTHONPATH"] = before

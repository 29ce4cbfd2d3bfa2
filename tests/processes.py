"""Starting other processes and looking at them, in the tests that end and kill them."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from checkout import ROOT

T = TypeVar("T")
# How long what must not go on would go on, and how long it is waited for to end: far apart, and both far longer than
# anything takes on a busy machine. A test fails by them if something hangs, never because it is slow.
FOREVER_S = 900
PATIENCE_S = 300


def start(*command: str | Path, environment: Mapping[str, str] = {}, **given: Any) -> subprocess.Popen[str]:
    """A program that finds this environment's programs, famba and these tests' modules, and has no supervisor.

    Args:
        command: the program and its arguments; `-c`, as the program, is Python's.
    """
    inherited = {key: value for key, value in os.environ.items() if key not in ("DVC_STAGE", "FAMBA_ENDS_WITH")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = {"PATH": path, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = (sys.executable, *command) if command[0] == "-c" else command
    return subprocess.Popen(command, env={**inherited, **found, **environment}, text=True, **given)


def is_there(pid: int) -> bool:
    """Whether a process runs; one that has ended and whose parent has not asked yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(what: Callable[[], T], process: subprocess.Popen | None = None) -> T:
    """The first value that counts as true; a process of which it is expected shows what it printed if it ends."""
    end = time.monotonic() + PATIENCE_S
    while not (found := what()):
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found

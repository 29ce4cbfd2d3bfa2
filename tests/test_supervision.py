"""Processes that end with their supervisor, however that ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import FOREVER_S, is_there, start, wait_until

from famba import supervision
from famba.errors import InputError

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")

# Says its number and "ready" in the file that is its argument, then in another the reason why it ended.
STAGE = """
import os, sys, time
from pathlib import Path
from famba import supervision
said = Path(sys.argv[1])
try:
    supervision.start()
    said.with_suffix(".new").write_text(str(os.getpid()))
    said.with_suffix(".new").replace(said)
    time.sleep(float(sys.argv[2]))
except supervision.Terminated as end:
    said.with_suffix(".reason").write_text(end.reason)
    raise
"""
# Starts its arguments, as DVC starts a command, and waits; or does not wait, so that they are orphans at once.
DVC = """
import os, subprocess, sys
started = subprocess.Popen(sys.argv[2:], env=os.environ | {"DVC_STAGE": "train"} if sys.argv[1] != "plain" else None)
if sys.argv[1] != "leaves":
    started.wait()
"""


def start_by_dvc(command: list[str], how: str = "waits", **given: str) -> subprocess.Popen:
    given_to = {"environment": given, "start_new_session": True, "stderr": subprocess.DEVNULL}
    return start("-c", DVC, how, *command, **given_to)


def stage(said: Path) -> list[str]:
    return [sys.executable, "-c", STAGE, str(said), str(FOREVER_S)]


def within(shell: str, said: Path) -> list[str]:
    """The stage in a shell that stays between it and who started it."""
    return ["sh", "-c", f'{shell} "$0" "$@"; true', *stage(said)]


def number(said: Path) -> int:
    return wait_until(lambda: said.exists() and int(said.read_text()))


@pytest.mark.parametrize("between", ["nothing", "shell"])
def test_a_stage_ends_when_its_dvc_is_killed(tmp_path, between):
    said = tmp_path / "said"
    dvc = start_by_dvc(stage(said) if between == "nothing" else within("", said))
    pid = number(said)
    time.sleep(1.2)  # it has looked, and stayed
    assert is_there(pid)
    dvc.kill()
    dvc.wait()
    wait_until(lambda: not is_there(pid))
    assert (tmp_path / "said.reason").read_text() == f"the supervising process {dvc.pid} is gone"


def test_a_stage_ends_when_a_process_between_it_and_its_supervisor_is_gone(tmp_path):
    said = tmp_path / "said"
    xargs = 'FAMBA_ENDS_WITH=$$ sh -c \'"$0" "$@"; true\''  # a shell that stays, in another
    make = start_by_dvc(within(xargs, said), "plain")
    pid = number(said)
    middle = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    assert middle != make.pid
    os.kill(middle, signal.SIGTERM)
    wait_until(lambda: not is_there(pid))
    assert (tmp_path / "said.reason").read_text() == f"the supervising process {middle} is gone"
    make.wait()


def test_a_stage_whose_dvc_is_gone_already_does_not_begin(tmp_path):
    said = tmp_path / "said"
    start_by_dvc(["sh", "-c", 'sleep 0.5; exec "$0" "$@"', *stage(said)], "leaves").wait()
    assert wait_until(lambda: said.with_suffix(".reason").exists() and said.with_suffix(".reason").read_text()) == (
        "the DVC that ran this stage is gone"
    )
    assert not said.exists()


def test_a_process_whose_supervisor_is_no_ancestor_does_not_begin(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    start_by_dvc(stage(tmp_path / "said"), "plain", **{supervision.ENDS_WITH: str(gone.pid)}).wait()
    assert (tmp_path / "said.reason").read_text() == f"the supervising process {gone.pid} (FAMBA_ENDS_WITH) is gone"
    assert not (tmp_path / "said").exists()


def test_a_command_of_a_shell_outlives_the_shell(tmp_path):
    shell = start_by_dvc(stage(tmp_path / "said"), "plain")
    pid = number(tmp_path / "said")
    shell.kill()
    shell.wait()
    time.sleep(1.5)
    assert is_there(pid)
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not is_there(pid))
    assert (tmp_path / "said.reason").read_text() == "terminated"


def test_a_number_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv(supervision.ENDS_WITH, "make")
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    with pytest.raises(InputError, match=r"^FAMBA_ENDS_WITH: 'make' is not the number of a process$"):
        supervision.start()

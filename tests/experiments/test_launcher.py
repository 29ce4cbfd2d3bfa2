"""Work in other processes: its results, its failures, and that nothing of it is left behind."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from processes import FOREVER_S, PATIENCE_S, is_there, start, wait_until

from famba.errors import FambaError, InputError
from famba.experiments import launcher


def leave_number(path: Path) -> None:
    time.sleep(0.2)
    path.write_text(str(os.getpid()))


def refuse_two(x: int) -> int:
    if x == 2:
        raise InputError(f"x: {x}; anything else is allowed")
    return x


def divide(x: int) -> float:
    return 1 / x


def die_at_two(x: int) -> int:
    if x == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def signal_itself(number: int) -> None:
    os.kill(os.getpid(), number)


def say_and_wait(path: Path) -> None:
    path.write_text(str(os.getpid()))
    time.sleep(FOREVER_S)
    path.write_text("waited in vain")


def refuse_once_the_other_waits(what: tuple[str, Path]) -> None:
    if what[0] == "waits":
        say_and_wait(what[1])
    wait_until(lambda: what[1].exists() and what[1].read_text())
    raise InputError("refused")


def test_each_item_is_said_to_be_done_and_every_process_works_on_several(tmp_path):
    done, paths = [], {name: tmp_path / name for name in "312540"}
    launcher.run(leave_number, paths, jobs=2, done=done.append)
    assert sorted(done) == sorted(paths)
    pids = {int(path.read_text()) for path in paths.values()}
    assert len(pids) <= 2
    assert os.getpid() not in pids
    assert not any(is_there(pid) for pid in pids)


def test_the_signals_of_a_scheduler_do_not_end_a_worker():
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
    launcher.run(signal_itself, {number.name: number for number in numbers}, jobs=1)


def test_an_error_keeps_its_kind_and_names_the_item():
    with pytest.raises(InputError, match=r"^second: x: 2; anything else is allowed$"):
        launcher.run(refuse_two, {"first": 1, "second": 2, "third": 3}, jobs=1)


def test_a_defect_names_the_item_and_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError) as error:
        launcher.run(divide, {"one": 1, "nothing": 0}, jobs=2)
    assert error.value.__notes__ == ["while working on nothing"]
    assert "return 1 / x" in str(error.value.__cause__)


def test_a_process_that_is_killed_is_an_error_that_names_its_item():
    with pytest.raises(FambaError, match=r"^second: a worker process was stopped; most often"):
        launcher.run(die_at_two, {"first": 1, "second": 2, "third": 3}, jobs=1)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")
def test_a_failure_ends_what_the_others_are_doing(tmp_path):
    said = tmp_path / "pid"
    with pytest.raises(InputError, match="refused"):
        launcher.run(refuse_once_the_other_waits, {name: (name, said) for name in ("waits", "fails")}, jobs=2)
    assert not is_there(int(said.read_text()))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_nothing_goes_on_once_the_process_that_asked_for_it_is_gone(tmp_path, how):
    said = tmp_path / "pid"
    program = (
        "import signal, sys; from pathlib import Path; import test_launcher; from famba.experiments import launcher\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in a shell's background ignores it
        f"if __name__ == '__main__': launcher.run(test_launcher.say_and_wait, {{'it': Path({str(said)!r})}}, jobs=1)"
    )
    parent = start("-c", program, stderr=subprocess.DEVNULL)
    wait_until(lambda: said.exists() and said.read_text())
    worker = int(said.read_text())
    assert is_there(worker)
    parent.send_signal(how)
    parent.wait(timeout=PATIENCE_S)
    wait_until(lambda: not is_there(worker))

"""A process that ends when it is told to, and when what it works for is gone.

Neither DVC, nor make, nor xargs ends what it started when it is itself ended by SIGTERM: a stage would train on, and
the next `dvc repro` would be refused by its lock. So the stage looks up, twice a second, whether all are still there
between it and the process that it works for: the DVC that runs it as a stage, and the one that `FAMBA_ENDS_WITH` names
by its number, as the Makefile does with make's. A command that a shell started is left alone, whatever becomes of the
shell.

Ancestors are read in /proc; where there is none, only the parent is watched.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from famba.errors import InputError

ENDS_WITH = "FAMBA_ENDS_WITH"
TERMINATED = "terminated"  # what is said where there is no other reason
_LOOK_EVERY_S = 0.5
_PATIENCE_S = 20.0  # for what must be tidied up
_at_stop: list[Callable[[], None]] = []
_why = TERMINATED


class Terminated(SystemExit):
    """Raised in the main thread by SIGTERM; exit status 143, as of whatever SIGTERM ends.

    Attributes:
        why: the reason in a few words.
    """

    def __init__(self, why: str) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.why = why


def hold() -> None:
    """From now on SIGTERM raises `Terminated` here, and comes by itself once what this process works for is gone.

    For the main thread alone.

    Raises:
        InputError: FAMBA_ENDS_WITH is not the number of a process.
        Terminated: it is gone already.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell leaves SIGINT for what it starts with `&`
            signal.signal(number, _stop)
    if line := _line():
        threading.Thread(target=_watch, args=(line,), name="supervision", daemon=True).start()


@contextlib.contextmanager
def at_stop(act: Callable[[], None]) -> Iterator[None]:
    """While this lasts, do that first when SIGTERM or SIGINT comes."""
    _at_stop.append(act)
    try:
        yield
    finally:
        _at_stop.remove(act)


def _stop(number: int, frame: Any) -> None:
    del frame
    for act in _at_stop:
        act()
    raise Terminated(_why) if number == signal.SIGTERM else KeyboardInterrupt


def _line() -> list[int]:
    """The ancestors between this process and what it works for, that included, the parent first; empty if nothing."""
    above = _ancestors()
    length = 0
    if number := os.environ.get(ENDS_WITH):
        if not number.isdecimal():
            raise InputError(f"{ENDS_WITH}: {number!r} is not the number of a process")
        if int(number) not in above and _has_proc():
            raise Terminated(f"process {number}, which this one works for ({ENDS_WITH}), is gone")
        length = above.index(int(number)) + 1 if int(number) in above else 1
    if "DVC_STAGE" in os.environ:
        length = max(length, _up_to_dvc(above))
    return above[:length]


def _up_to_dvc(above: list[int]) -> int:
    """How many ancestors there are up to DVC: the first that was not itself started as its stage."""
    below = os.getpid()
    for count, pid in enumerate(above, start=1):
        if not _is_of_stage(pid):
            # Who adopts orphans has a session of its own. DVC shares its own with the stage that it starts.
            if os.getsid(pid) != os.getsid(below):
                raise Terminated("the DVC that ran this stage is gone")
            return count
        below = pid
    return len(above)


def _is_of_stage(pid: int) -> bool:
    try:
        return any(entry.startswith(b"DVC_STAGE=") for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    except OSError:  # another user's, or none of this system's
        return False


def _watch(line: list[int]) -> None:
    global _why
    while (gone := _first_gone(line)) is None:
        time.sleep(_LOOK_EVERY_S)
    _why = f"process {gone}, which this one works for, is gone"
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE_S)
    os._exit(128 + signal.SIGTERM)


def _first_gone(line: list[int]) -> int | None:
    """The children of a process that ends get another parent: the first ancestor that is not where it was."""
    now = _ancestors(len(line))
    for index, pid in enumerate(line):
        if now[index : index + 1] != [pid]:
            return pid
    return None


def _ancestors(limit: int = sys.maxsize) -> list[int]:
    """The parent, its parent, and so on, as far as they can be seen."""
    found = [os.getppid()]
    while len(found) < limit and found[-1] > 1 and (parent := _parent(found[-1])):
        found.append(parent)
    return found


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None


def _has_proc() -> bool:
    return Path("/proc/self/stat").exists()

"""Exit on SIGTERM, or when a supervising process dies.

Neither DVC, nor make, nor xargs ends what it started when it is itself killed: a stage would train on, and the next
`dvc repro` would be refused by its lock. So a thread compares this process's ancestors twice a second with those that
it started with, up to its supervisor: the DVC that runs it as a stage, and the process whose number is in
`FAMBA_ENDS_WITH`, as the Makefile gives make's. A command that a shell started has no supervisor.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import wait
from typing import Any

from famba.errors import InputError

ENDS_WITH = "FAMBA_ENDS_WITH"
TERMINATED = "terminated"  # where there is no other reason
_POLL_S = 0.5
_GRACE_S = 20.0  # for what must be tidied up
_reason = TERMINATED


class Terminated(SystemExit):
    """Raised in the main thread by SIGTERM, with the reason; exit status 143, as of whatever SIGTERM ends."""

    def __init__(self, reason: str) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.reason = reason


def start() -> None:
    """From now on SIGTERM raises `Terminated` in the main thread, and comes by itself once a supervisor is gone.

    Raises:
        InputError: FAMBA_ENDS_WITH is not the number of a process.
        Terminated: a supervisor is gone already.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell leaves SIGINT for what it starts with `&`
            signal.signal(number, _exit)
    if ENDS_WITH not in os.environ and "DVC_STAGE" not in os.environ:
        return
    import psutil  # a machine that a GPU is checked on may lack it

    ancestors = psutil.Process().parents()
    pids, length = [process.pid for process in ancestors], 0
    if number := os.environ.get(ENDS_WITH):
        if not number.isdecimal():
            raise InputError(f"{ENDS_WITH}: {number!r} is not the number of a process")
        if int(number) not in pids:
            raise Terminated(f"the supervising process {number} ({ENDS_WITH}) is gone")
        length = pids.index(int(number)) + 1
    if "DVC_STAGE" in os.environ:
        # DVC is the first ancestor that is not part of a stage itself, and shares its session with what it starts.
        count = next((count for count, process in enumerate(ancestors) if not _is_stage(process)), len(pids) - 1)
        if os.getsid(pids[count]) != os.getsid(pids[count - 1] if count else 0):
            raise Terminated("the DVC that ran this stage is gone")
        length = max(length, count + 1)
    if length:
        threading.Thread(target=_poll, args=(pids[:length],), name="supervision", daemon=True).start()


def start_worker() -> None:
    """In a worker of multiprocessing: exit when the process that started it does, and leave Ctrl-C to that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    with contextlib.suppress(OSError):
        wait([parent.sentinel])
    os._exit(1)


def _exit(number: int, frame: Any) -> None:
    raise Terminated(_reason) if number == signal.SIGTERM else KeyboardInterrupt


def _is_stage(process: Any) -> bool:
    import psutil

    try:
        return "DVC_STAGE" in process.environ()
    except psutil.Error:  # another user's
        return False


def _poll(pids: list[int]) -> None:
    """An orphan gets another parent: wait for the first ancestor that is not where it was."""
    global _reason
    while not (gone := [pid for pid, now in zip(pids, _pids(len(pids)), strict=True) if pid != now]):
        time.sleep(_POLL_S)
    _reason = f"the supervising process {gone[0]} is gone"
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os._exit(128 + signal.SIGTERM)


def _pids(length: int) -> list[int]:
    import psutil

    try:
        found = [process.pid for process in psutil.Process().parents()][:length]
    except psutil.Error:  # an ancestor that ended meanwhile
        found = []
    return found + [0] * (length - len(found))

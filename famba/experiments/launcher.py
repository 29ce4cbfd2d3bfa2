"""One task on many items, in processes of their own.

A process is started once and given one item after another, so that it imports what the task needs once. It ends when
its work does, when another item fails, and when the process that started it is gone, however that ended.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from famba.errors import FambaError

Item = TypeVar("Item")
Result = TypeVar("Result")


def run(task: Callable[[Item], Result], items: Mapping[str, Item], *, jobs: int) -> dict[str, Result]:
    """The task's results by the items' names, in the items' order.

    Args:
        task: a function of a module; it, the items and the results are pickled.
        jobs: items in work at the same time, each in its own process.

    Raises:
        FambaError: as the task raised it, the item's name put before its message; or a process that was killed. What
            the others are doing is then stopped.
        RuntimeError: the task failed in another way, with the item's name and the traceback.
    """
    waiting = list(items.items())[::-1]
    started: list[BaseProcess] = []
    busy: dict[Connection, tuple[BaseProcess, str]] = {}
    results: dict[str, Result] = {}
    try:
        while len(busy) < jobs and waiting:
            end, process = _start(task)
            started.append(process)
            busy[end] = process, _give(end, waiting)
        while busy:
            for end in wait(list(busy)):
                assert isinstance(end, Connection)
                process, name = busy.pop(end)
                results[name] = _taken(end, process, name)
                if waiting:
                    busy[end] = process, _give(end, waiting)
                else:
                    end.close()  # no more: it ends by itself
    except BaseException:
        for process in started:
            process.terminate()
        raise
    finally:
        for process in started:
            process.join()
    return {name: results[name] for name in items}


def _start(task: Callable[[Any], Any]) -> tuple[Connection, BaseProcess]:
    context = multiprocessing.get_context("spawn")  # a fork of a process that has used torch may hang
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(task, theirs), daemon=True)
    process.start()
    theirs.close()  # so that a killed process reads as the end of the pipe
    return ours, process


def _give(end: Connection, waiting: list[tuple[str, Any]]) -> str:
    name, item = waiting.pop()
    with contextlib.suppress(BrokenPipeError):  # it is gone, as whoever listens for its answer will find
        end.send((name, item))
    return name


def _taken(end: Connection, process: BaseProcess, name: str) -> Any:
    try:
        result, error = end.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        reason = f"its process was stopped (exit status {process.exitcode}); most often the machine ran out of memory"
        raise FambaError(f"{name}: {reason}") from None
    if error is not None:
        raise error
    return result


def _serve(task: Callable[[Any], Any], end: Connection) -> None:
    """The life of a process: items in, results or errors out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the process that started this one answers it
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin would take the others' cores
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            name, item = end.recv()
        except EOFError:
            return
        try:
            answer = task(item), None
        except FambaError as error:
            answer = None, type(error)(f"{name}: {error}")
        except Exception:
            answer = None, RuntimeError(f"{name}:\n{traceback.format_exc()}")
        end.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)

"""One task on many items, in worker processes.

A worker imports what the task needs once and takes one item after another. It ends when its work does, when another
item fails, and when the process that started it is gone, however that ended.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from famba import supervision
from famba.errors import FambaError

Item = TypeVar("Item")


def run(
    task: Callable[[Item], object],
    items: Mapping[str, Item],
    *,
    jobs: int,
    done: Callable[[str], object] = lambda name: None,
) -> None:
    """Do the task with each of the items, which have names.

    Args:
        task: a function of a module; it, the items and what it returns are pickled.
        jobs: items in work at the same time, each in its own process.
        done: called here with the name of each item whose task is done.

    Raises:
        FambaError: as the task raised it, the item's name put before its message; or a worker that was killed. The
            other workers are then stopped.
        Exception: the task failed in another way; a note names the item.
    """
    context = multiprocessing.get_context("spawn")  # a fork of a process that has used torch may hang
    before = set(multiprocessing.active_children())
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_initialise) as workers:
        futures = {workers.submit(task, item): name for name, item in items.items()}
        try:
            for future in as_completed(futures):
                try:
                    future.result()
                    done(futures[future])
                except BrokenProcessPool:  # it does not say whose; items are begun in their order
                    lost = [name for other, name in futures.items() if not other.done() or other.exception()]
                    reason = "a worker process was stopped; most often the machine ran out of memory"
                    raise FambaError(f"{' or '.join(lost[:jobs])}: {reason}") from None
                except FambaError as error:
                    raise type(error)(f"{futures[future]}: {error}") from None
                except Exception as error:
                    error.add_note(f"while working on {futures[future]}")
                    raise
        except BaseException:
            for process in set(multiprocessing.active_children()) - before:
                process.kill()
            workers.shutdown(cancel_futures=True)
            raise


def _initialise() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):  # sent by a scheduler to each process of a job
        signal.signal(number, signal.SIG_IGN)  # the process that started this one answers them
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin would take the others' cores
    supervision.start_worker()

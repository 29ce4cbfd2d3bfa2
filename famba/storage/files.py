"""Files that are either whole or not there: written under another name, flushed to the disk, then renamed."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from famba.errors import InputError

_log = logging.getLogger(__name__)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a kill at any moment, sees the old content or the new one, never half.

    A kill can leave a draft, `.<name>.tmp`, and its lock, `.<name>.lock`; the next writing of the same file removes
    them. Of several processes that write one file, one goes after the other.

    Raises:
        InputError: it cannot be written there; what was there before is untouched, and no draft is left.
    """
    draft = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f".{path.name}.lock")):
            try:
                with draft.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                draft.replace(path)
            finally:
                draft.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # brings the rename itself to the disk
        finally:
            os.close(folder)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


@contextlib.contextmanager
def claimed(lock: Path, taken: str, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock file, which is removed in the end; one that a kill left is free. A thread may claim it again.

    Args:
        taken: what to say if another process or thread holds it.
        wait: say so in the log and wait, instead of raising.

    Raises:
        InputError: another holds it, or it cannot be written there.
    """
    with contextlib.ExitStack() as held:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(_locked(lock, blocking=False))
            except Timeout:
                if not wait:
                    raise InputError(taken) from None
                _log.warning("%s; waiting for it", taken)
                held.enter_context(_locked(lock))
        except OSError as error:
            raise InputError(f"{lock}: cannot be written ({error.strerror})") from None
        yield


def json_bytes(value: Any) -> bytes:
    """The value as JSON, the same bytes whenever it is the same; ValueError where a number is not finite."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n").encode()


@contextlib.contextmanager
def _locked(path: Path, *, blocking: bool = True) -> Iterator[None]:
    """Hold a lock file and remove it in the end. A process that waited for the removed file tries again."""
    lock = FileLock(path, is_singleton=True)
    with lock.acquire(blocking=blocking):
        try:
            yield
        finally:
            if lock.lock_counter == 1:
                path.unlink(missing_ok=True)

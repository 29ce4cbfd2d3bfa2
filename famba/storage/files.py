"""Files that are either whole or not there: written under another name, flushed to the disk, then renamed."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from famba.errors import InputError


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a kill at any moment, sees the old content or the new one, never half.

    A kill can leave a draft, `.<name>.tmp`, which the next writing of the same file takes over. Of several processes
    that write one file, one goes after the other.

    Args:
        path: its folder is made if need be.

    Raises:
        InputError: it cannot be written there; what was there before is untouched, and no draft is left.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f".{path.name}.tmp"), wait=True) as (draft, handle):
            os.ftruncate(handle, 0)
            with open(handle, "wb", closefd=False) as file:
                file.write(content)
            os.fsync(handle)
            draft.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


@contextlib.contextmanager
def claimed(lock: Path, refusal: str) -> Iterator[None]:
    """Hold a lock file, and with it what it stands for. In the end it is removed; one that a kill left is free.

    Args:
        lock: its folder is made if need be.
        refusal: the message, should another process hold it.

    Raises:
        InputError: another process holds it, or it cannot be written there.
    """
    with contextlib.ExitStack() as held:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(_locked(lock, wait=False))
        except BlockingIOError:
            raise InputError(refusal) from None
        except OSError as error:
            raise InputError(f"{lock}: cannot be written ({error.strerror})") from None
        yield


def json_bytes(value: Any) -> bytes:
    """The value as JSON that is the same bytes whenever the value is the same: sorted keys, one final newline.

    Raises:
        ValueError: a number that is not finite, which JSON has no word for.
    """
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n").encode()


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[tuple[Path, int]]:
    """A file, made if need be, that one process at a time has open; in the end it is gone, unless it was renamed.

    Raises:
        BlockingIOError: another process has it, and is not to be waited for.
    """
    handle = _opened(path, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    try:
        yield path, handle
    finally:
        if _is_at(path, handle):
            path.unlink()
        os.close(handle)  # last: the lock ends with it


def _opened(path: Path, operation: int) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, operation)
            if _is_at(path, handle):  # else the process that had it renamed or removed it meanwhile
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
    """Bring the rename itself to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

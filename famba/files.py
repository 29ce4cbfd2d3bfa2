"""Files that are either whole or not there: written under another name, flushed to the disk, then renamed."""

import json
import os
from pathlib import Path
from typing import Any

from famba.errors import InputError


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a kill at any moment, sees the old content or the new one, never half.

    Args:
        path: its folder is made if need be.

    Raises:
        InputError: it cannot be written there; what was there before is untouched.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        _discard(draft)


def json_bytes(value: Any) -> bytes:
    """The value as JSON that is the same bytes whenever the value is the same: sorted keys, one final newline.

    Raises:
        ValueError: a number that is not finite, which JSON has no word for.
    """
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n").encode()


def _sync_folder(folder: Path) -> None:
    """Bring the rename itself to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _discard(draft: Path) -> None:
    try:
        draft.unlink(missing_ok=True)
    except OSError:  # its folder is not one: nothing was written, and the error on its way says so
        return

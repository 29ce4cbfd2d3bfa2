import contextlib
import errno
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from refusals import refusal

from famba.errors import InputError
from famba.storage.files import claimed, json_bytes, write_atomic


@pytest.mark.parametrize(("module", "step"), [(os, "open"), (os, "fsync"), (Path, "replace")])
def test_a_disk_that_is_full_at_any_step_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch, module, step):
    path = tmp_path / "c.bin"
    path.write_bytes(b"old")

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, step, full)
    assert refusal(lambda: write_atomic(path, b"new")) == f"{path}: cannot be written (No space left on device)"
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_flushed_is_an_error_though_the_file_is_whole(tmp_path, monkeypatch):
    path, fsync = tmp_path / "c.bin", os.fsync
    path.write_bytes(b"old")

    def full(handle):
        if os.path.isdir(f"/dev/fd/{handle}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"c\.bin: cannot be written \(Input/output error\)"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


WRITE = """
import resource, signal, sys
from pathlib import Path
from famba.storage.files import write_atomic
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
write_atomic(Path(sys.argv[1]), b"new" * 5000)
"""


def test_the_draft_that_a_kill_left_is_taken_over_by_the_next_writing(tmp_path):
    path = tmp_path / "c.bin"
    path.write_bytes(b"old")
    assert subprocess.run([sys.executable, "-c", WRITE, path]).returncode == -signal.SIGXFSZ
    assert (tmp_path / ".c.bin.lock").exists()
    assert (tmp_path / ".c.bin.tmp").stat().st_size == 5000
    assert path.read_bytes() == b"old"
    write_atomic(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert list(tmp_path.iterdir()) == [path]


def test_writers_of_one_file_go_one_after_the_other(tmp_path):
    path, seen = tmp_path / "c.bin", set()
    contents = [bytes([65 + k]) * (100_000 + k) for k in range(8)]
    with ThreadPoolExecutor(8) as threads:
        writings = [threads.submit(write_atomic, path, content) for content in 5 * contents]
        while not all(writing.done() for writing in writings):
            if path.exists():
                seen.add(path.read_bytes())
    assert [writing.exception() for writing in writings] == 40 * [None]
    assert seen | {path.read_bytes()} <= set(contents)
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_claimed_is_refused_to_other_threads_and_free_again_afterwards(tmp_path):
    lock = tmp_path / "new" / "lock"

    def claim():
        with claimed(lock, "x: taken"):
            return lock.exists()

    with ThreadPoolExecutor(1) as other:
        with claimed(lock, "x: taken"):
            assert claim()  # again by the thread that has it
            assert refusal(lambda: other.submit(claim).result()) == "x: taken"
            assert lock.exists()
        assert not lock.exists()
        assert other.submit(claim).result()


def test_two_holders_are_never_in_at_once(tmp_path):
    inside, most = [], []

    def claim_often(_):
        for _ in range(100):
            with contextlib.suppress(InputError), claimed(tmp_path / "lock", "taken"):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(claim_often, range(4)))
    assert set(most) == {1}


def test_a_claim_that_a_kill_left_is_free(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from famba.storage.files import claimed\n"
        "with claimed(Path(sys.argv[1]), ''): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "lock"]).returncode == -signal.SIGKILL
    assert (tmp_path / "lock").exists()
    with claimed(tmp_path / "lock", "taken"):
        pass
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("write", [lambda path: write_atomic(path, b""), lambda path: claimed(path, "").__enter__()])
def test_a_folder_that_is_a_file_is_an_input_error_of_one_line(tmp_path, write):
    (tmp_path / "file").write_text("x")
    assert "file/c: cannot be written" in refusal(lambda: write(tmp_path / "file" / "c"))


def test_json_is_the_same_bytes_whatever_the_order_of_the_keys():
    assert json_bytes({"b": 1.5, "a": [None, "×"]}) == json_bytes({"a": [None, "×"], "b": 1.5})
    assert json_bytes({"a": 1}) == b'{\n  "a": 1\n}\n'

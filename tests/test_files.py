import os

import pytest

from famba.errors import InputError
from famba.files import json_bytes, write_atomic


def test_the_folder_is_made_and_the_content_arrives(tmp_path):
    write_atomic(tmp_path / "a" / "b" / "c.bin", b"\x00\n")
    assert (tmp_path / "a" / "b" / "c.bin").read_bytes() == b"\x00\n"


def test_an_interrupted_write_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "c.bin"
    path.write_bytes(b"old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"c\.bin: cannot be written \(No space left on device\)"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_between_writing_and_renaming_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "c.bin"
    path.write_bytes(b"old")

    def killed(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_a_file_is_an_input_error_of_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file/c: cannot be written") as caught:
        write_atomic(tmp_path / "file" / "c", b"")
    assert "\n" not in str(caught.value)


def test_json_is_the_same_bytes_whatever_the_order_of_the_keys():
    assert json_bytes({"b": 1.5, "a": [None, "×"]}) == json_bytes({"a": [None, "×"], "b": 1.5})
    assert json_bytes({"a": 1}) == b'{\n  "a": 1\n}\n'


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_refuses_what_is_not_finite(value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_bytes({"a": [value]})

"""The cache of compiled kernels: nothing changed or foreign is loaded, and any usual CXX works."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from refusals import refusal

from famba.errors import BackendError
from famba.kernels.cpu import build

COMPILER = shutil.which("c++") or shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and instead of the kernels a library that is compiled in no time."""
    (tmp_path / "one.cpp").write_text('extern "C" __attribute__((visibility("default"))) int one() { return 1; }\n')
    compiled = []

    def compile_one(compiler, folder):
        compiled.append(compiler)
        subprocess.run([*compiler, "-shared", "-fPIC", tmp_path / "one.cpp", "-o", folder / "k.so"], check=True)
        return folder / "k.so"

    monkeypatch.setattr(build, "_compile", compile_one)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "famba" / "kernels"


def load() -> tuple[str, int | None]:
    reason, library = build._attempt.__wrapped__("baseline")
    return reason, None if library is None else library.one()


def refused() -> str:
    return refusal(lambda: build.build("baseline"), BackendError)


def test_a_library_that_is_changed_or_does_not_load_here_is_built_again(cache):
    path = build.build("baseline")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"!")
    assert load() == ("", 1)
    assert [x.read_bytes() for x in cache.iterdir()] == [whole]
    path.unlink()  # now loaded: not to be written to
    foreign = b"for another system"
    (cache / f"{path.name.rpartition('-')[0]}-{build._sha256(foreign)}.so").write_bytes(foreign)
    assert load() == ("", 1)
    assert [x.read_bytes() for x in cache.iterdir()] == [whole]


def test_the_cache_is_the_users_alone_and_another_is_refused(cache, monkeypatch):
    build.build("baseline")
    assert cache.stat().st_mode & 0o777 == 0o700
    cache.chmod(0o777)
    assert refused().startswith(f"{cache}: drwxrwxrwx of user {os.geteuid()}; must be a folder that user")
    cache.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: cache.stat().st_uid + 1)
    assert f"drwx------ of user {cache.stat().st_uid}; must be" in refused()
    monkeypatch.undo()
    (cache.parent / "kernels").rename(cache.parent / "planted")
    (cache.parent / "kernels").symlink_to(cache.parent / "planted")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parents[1]))
    assert f"{cache}: lrwxrwxrwx" in refused()


def test_a_cache_that_cannot_be_made_is_named_with_what_to_set(cache, monkeypatch):
    def homeless():
        raise RuntimeError("no home")

    cache.parent.write_text("not a folder")
    assert refused().startswith(f"no cache for the kernels ([Errno 17] File exists: '{cache.parent}'); set XDG_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert refused() == "no cache for the kernels (no home); set XDG_CACHE_HOME to a folder of your own"


def test_a_compiler_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("FAMBA_CXXFLAGS", "-fnonsense")
    assert "could not compile the kernels" in refused()


def test_cxx_may_have_a_launcher_and_flags(cache, monkeypatch):
    for given in (f"{shutil.which('env')} {COMPILER}", f"'{COMPILER}' -O1"):
        monkeypatch.setenv("CXX", given)
        assert load() == ("", 1)
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setenv("CXX", "'g++")
    assert refused() == """CXX: "'g++"; must be a command (No closing quotation)"""
    monkeypatch.setenv("CXX", "no-such-launcher g++")
    assert refused().startswith("no C++ compiler (no-such-launcher) on PATH")


def test_a_compiler_whose_version_is_not_utf8_works(cache, monkeypatch, tmp_path):
    wrapper = tmp_path / "latin1-c++"
    wrapper.write_bytes(f'#!/bin/sh\n[ "$1" = --version ] && printf "g++ \\351\\n" || exec {COMPILER} "$@"\n'.encode())
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    assert load() == ("", 1)

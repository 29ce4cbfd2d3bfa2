"""Kernels for the CPU: compiled by the system's C++ compiler on first use, kept in the user's cache, loaded by ctypes.

The library has a plain C interface, so it does not care which torch is installed. Its name in the cache holds a hash of
the sources, the flags and the compiler's version, so nothing stale is loaded, and the SHA-256 of its own bytes, so
nothing truncated or changed is. It is moved into place in one step, so any number of processes may build at once. The
folder must be the user's alone: loading a library runs its code. There is a library for each instruction set.

Environment: CXX names the compiler, which may have a launcher and flags (`ccache g++ -m64`); XDG_CACHE_HOME the cache;
FAMBA_CXXFLAGS adds flags (the sanitizers use it).
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from famba.errors import BackendError, InputError
from famba.storage.files import write_atomic

SOURCES = Path(__file__).parent
_FLAGS = (
    *("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
)
INSTRUCTION_SETS = {  # widest first; the compiler's default is SSE2 on x86-64, NEON on ARM
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
    "avx2": ("-mavx2", "-mfma"),
    "baseline": (),
}
_TIME_LIMIT_S = 120


@functools.cache
def instruction_set() -> str:
    """The one to compile for: the widest that this processor and its system have, as torch finds."""
    import torch  # the doctor reports on a machine without it

    found = torch.backends.cpu.get_cpu_capability().lower()
    return found if found in INSTRUCTION_SETS else "baseline"


def library() -> ctypes.CDLL:
    """The compiled kernels, built if need be.

    Raises:
        BackendError: no compiler, or it failed, or the cache cannot be written.
    """
    reason, loaded = _attempt(instruction_set())
    if loaded is None:
        raise BackendError(reason)
    return loaded


def unavailable() -> str:
    """The reason why the kernels cannot run here ("": they can). Builds them if need be."""
    return _attempt(instruction_set())[0]


@functools.cache
def _attempt(wanted: str) -> tuple[str, ctypes.CDLL | None]:
    if sys.byteorder != "little":
        return "the native kernels know little-endian machines only", None
    try:
        path = build(wanted)
        try:
            return "", ctypes.CDLL(str(path))
        except OSError:  # whole, but built beside another C library, say: once more, for this machine
            path.unlink(missing_ok=True)
            return "", ctypes.CDLL(str(build(wanted)))
    except BackendError as error:
        return str(error), None
    except OSError as error:
        return f"the compiled kernels did not load: {_first_line(str(error))}", None


def build(wanted: str) -> Path:
    """Path of the library for an instruction set in the cache, compiled unless it is there, whole.

    Raises:
        BackendError: as `library`; or the cache's folder is not this user's alone.
    """
    compiler = _compiler()
    version = _run([*compiler, "--version"])
    flags = [*_FLAGS, *INSTRUCTION_SETS[wanted], *os.environ.get("FAMBA_CXXFLAGS", "").split()]
    sources = sorted(x for x in SOURCES.iterdir() if x.suffix in (".cpp", ".h"))
    inputs = (platform.machine(), compiler[1:], version, flags, [(x.name, x.read_bytes()) for x in sources])
    name = f"kernels-{_sha256(repr(inputs).encode())[:24]}"
    folder = _folder()
    try:
        for found in folder.glob(f"{name}-*.so"):
            if found.name == f"{name}-{_sha256(found.read_bytes())}.so":
                return found
            found.unlink()
        with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as scratch:
            built = _compile([*compiler, *flags], Path(scratch)).read_bytes()
        target = folder / f"{name}-{_sha256(built)}.so"
        write_atomic(target, built)
    except OSError as error:
        raise BackendError(f"{folder}: {error.strerror}; set XDG_CACHE_HOME to a folder that can be written") from error
    except InputError as error:
        raise BackendError(f"{error}; set XDG_CACHE_HOME to a folder that can be written") from None
    return target


def _folder() -> Path:
    """The cache's folder, made if need be, once it is known that no other user can put a library there."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "famba" / "kernels"
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        held = folder.lstat()
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        raise BackendError(f"no cache for the kernels ({error}); set XDG_CACHE_HOME to a folder of your own") from None
    if held.st_uid != os.geteuid() or held.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or not stat.S_ISDIR(held.st_mode):
        raise BackendError(
            f"{folder}: {stat.filemode(held.st_mode)} of user {held.st_uid}; must be a folder that user {os.geteuid()} "
            "owns and nobody else can write to; remove it, or set XDG_CACHE_HOME"
        )
    return folder


def runtime_of(name: str) -> str:
    """Path of a library that comes with the compiler."""
    return _run([*_compiler(), f"-print-file-name={name}"]).strip()


def _compile(compiler: list[str], folder: Path) -> Path:
    sources = sorted(SOURCES.glob("*.cpp"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda x: _run([*compiler, "-c", str(x), "-o", str(folder / f"{x.stem}.o")]), sources))
    built = folder / "kernels.so"
    _run([*compiler, "-shared", "-pthread", *(str(folder / f"{x.stem}.o") for x in sources), "-o", str(built)])
    return built


def _compiler() -> list[str]:
    """The command that compiles: CXX as a shell would split it, else the first compiler on PATH."""
    try:
        given = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise BackendError(f"CXX: {os.environ['CXX']!r}; must be a command ({error})") from None
    names = (given[0],) if given else ("c++", "g++", "clang++")
    for name in names:
        if path := shutil.which(name):
            return [path, *given[1:]]
    raise BackendError(f"no C++ compiler ({', '.join(names)}) on PATH; install g++ or clang, or set CXX")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TIME_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendError(f"{command[0]} did not run: {_first_line(str(error))}") from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit status {done.returncode}"]
        raise BackendError(f"{command[0]} could not compile the kernels: {errors[0]}")
    return done.stdout


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else "no reason given"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

"""Kernels for the CPU: compiled by the system's C++ compiler on first use, kept in the user's cache, loaded by ctypes.

The library has a plain C interface, so it does not care which torch is installed. Its name in the cache is a hash of
the sources, the flags and the compiler's version, so nothing stale is ever loaded; it is moved into place in one step,
so any number of processes may build at once. Kernels are compiled once per instruction set and chosen when they run.

Environment: CXX names the compiler; XDG_CACHE_HOME the cache; FAMBA_CXXFLAGS adds flags (the sanitizers use it).
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from famba.errors import BackendError

SOURCES = Path(__file__).parent
KERNELS = ("scan", "conv", "gate", "norm", "match", "fuse")
_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_VARIANTS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
    "avx2": ("-mavx2", "-mfma"),
    "baseline": (),
}
_TIME_LIMIT_S = 120


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels, built if need be.

    Raises:
        BackendError: no compiler, or it failed, or the cache cannot be written.
    """
    reason, loaded = _attempt()
    if loaded is None:
        raise BackendError(reason)
    return loaded


def unavailable() -> str:
    """Why the kernels cannot run here ("": they can). Builds them if need be."""
    return _attempt()[0]


@functools.cache
def _attempt() -> tuple[str, ctypes.CDLL | None]:
    if sys.byteorder != "little":
        return "the native kernels know little-endian machines only", None
    try:
        return "", ctypes.CDLL(str(build()))
    except BackendError as error:
        return str(error), None
    except OSError as error:
        return f"the compiled kernels did not load: {_first_line(str(error))}", None


def build() -> Path:
    """Path of the library in the cache, compiled unless it is there."""
    compiler = _compiler()
    version = _run([compiler, "--version"])
    machine = platform.machine()
    variants = _VARIANTS if machine in ("x86_64", "AMD64") else {"baseline": ()}
    extra = tuple(os.environ.get("FAMBA_CXXFLAGS", "").split())
    sources = sorted(x for x in SOURCES.iterdir() if x.suffix in (".cpp", ".h"))
    recipe = repr((machine, version, _FLAGS, extra, variants, [(x.name, x.read_bytes()) for x in sources]))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "famba"
    target = cache / f"kernels-{hashlib.sha256(recipe.encode()).hexdigest()[:24]}.so"
    if target.is_file():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="build-", dir=cache) as folder:
            os.replace(_compile(compiler, variants, (*_FLAGS, *extra), Path(folder)), target)
    except OSError as error:
        raise BackendError(
            f"cannot write {cache}: {error.strerror}; set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    return target


def runtime_of(name: str) -> str:
    """Path of a library that comes with the compiler."""
    return _run([_compiler(), f"-print-file-name={name}"]).strip()


def _compile(compiler: str, variants: dict[str, tuple[str, ...]], flags: tuple[str, ...], folder: Path) -> Path:
    jobs = {
        f"{kernel}-{variant}.o": [*flags, *own, f"-DVARIANT={variant}", str(SOURCES / f"{kernel}.cpp")]
        for kernel in KERNELS
        for variant, own in variants.items()
    }
    jobs["dispatch.o"] = [*flags, str(SOURCES / "dispatch.cpp")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: _run([compiler, "-c", *job[1], "-o", str(folder / job[0])]), jobs.items()))
    built = folder / "kernels.so"
    _run([compiler, "-shared", "-pthread", *flags, *(str(folder / name) for name in jobs), "-o", str(built)])
    return built


def _compilers() -> list[str]:
    return [path for name in _names() if (path := shutil.which(name))]


def _compiler() -> str:
    if found := _compilers():
        return found[0]
    raise BackendError(f"no C++ compiler ({', '.join(_names())}) on PATH; install g++ or clang, or set CXX")


def _names() -> tuple[str, ...]:
    return (os.environ["CXX"],) if os.environ.get("CXX") else ("c++", "g++", "clang++")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIME_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendError(f"{command[0]} did not run: {_first_line(str(error))}") from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit status {done.returncode}"]
        raise BackendError(f"{command[0]} could not compile the kernels: {errors[0]}")
    return done.stdout


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else "no reason given"

"""Test the CPU kernels under the address and undefined-behaviour sanitizers: `python -m famba.kernels.cpu.sanitize`.

The kernels are compiled anew with -fsanitize=address,undefined into the same cache, under another name, and the tests
run in a process that has the sanitizer's runtime loaded first. Any finding ends that process.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from famba.kernels.cpu import build

ROOT = Path(__file__).resolve().parents[3]
TESTS = ("tests/kernels/test_cpu.py", "tests/kernels/test_ops.py", "tests/fusion/test_fusion.py")
_FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"


def main(arguments: Sequence[str]) -> int:
    # torch throws what an operator raises, and the sanitizer can only pass that on if it finds the C++ library
    runtime = f"{build.runtime_of('libasan.so')} {build.runtime_of('libstdc++.so.6')}"
    environment = {
        **os.environ,
        "FAMBA_CXXFLAGS": _FLAGS,
        "LD_PRELOAD": runtime,
        # leaks would be Python's; torch's own libraries were built without the sanitizer
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:alloc_dealloc_mismatch=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    # tests that start processes or trace graphs say nothing about the kernels
    chosen = ["-k", "not process and not compile and not own_checks and not compiler"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, *chosen, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""Training on a device that is not the CPU, without one: whole runs on a fake one, in a process of its own.

It shows tensors on the wrong device and how often the host waits for the device. It has no numbers, no memory and
no streams; and a run on CUDA waits twice a step more than counted here, to time it.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHILD = "tests/training/on_accelerator.py"


def test_whole_runs_on_an_accelerator():
    done = subprocess.run(
        # Without conftest.py: other tests check shapes, which takes time.
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", CHILD],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert re.search(r"\b4 passed", done.stdout)

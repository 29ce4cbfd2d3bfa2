"""Two training scripts beside each other against one alone: `python -m famba.bench.side_by_side`.

Each is a process of its own with torch's default number of threads, in which the user has set nothing. Without a
remedy, the idle threads of one spin on the cores of the other, and two train fewer images together than one alone.
"""

import os
import statistics
import subprocess
import sys
from contextlib import ExitStack

from famba.bench.timing import table

_SCRIPT = """
import time
from famba import create_model
import torch
from torch.nn import functional

model = create_model({model!r}, num_classes=10, img_size=32, patch_size=4, stride=4)
images, labels = torch.randn({batch}, 3, 32, 32), torch.randint(0, 10, ({batch},))
optimizer = torch.optim.AdamW(model.parameters())

def step():
    functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    optimizer.zero_grad()

step()
print("ready", flush=True)
input()
start, steps = time.perf_counter(), 0
while time.perf_counter() - start < {seconds}:
    step()
    steps += 1
print(steps * {batch} / (time.perf_counter() - start))
"""


def bench_side_by_side(
    model: str = "vim_micro", batch: int = 64, seconds: float = 10.0, rounds: int = 3
) -> list[dict[str, float]]:
    """One row for each round: images per second of one script alone, of both together, and their ratio."""
    script = _SCRIPT.format(model=model, batch=batch, seconds=seconds)
    rows = []
    for _ in range(rounds):
        alone, both = _images_per_second(script, 1), _images_per_second(script, 2)
        rows.append({"alone_img_s": alone, "both_img_s": both, "ratio": both / alone})
    return rows


def _images_per_second(script: str, count: int) -> float:
    untouched = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, "-c", script]
    with ExitStack() as stack:
        started = [
            stack.enter_context(subprocess.Popen(command, env=untouched, stdin=-1, stdout=-1, text=True))
            for _ in range(count)
        ]
        for process in started:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("a training script ended before its first step; see its message above")
        for process in started:
            assert process.stdin is not None
            print(file=process.stdin, flush=True)
        return sum(float(process.communicate()[0]) for process in started)


def main() -> None:
    """Measure and print the rounds and the median of their ratios."""
    rows = bench_side_by_side()
    print(table(rows))
    print(f"\nmedian ratio: {statistics.median(row['ratio'] for row in rows):.2f}")


if __name__ == "__main__":
    main()

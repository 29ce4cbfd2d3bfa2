"""Peak memory of a training step, measured: the profiler's allocation events on a CPU, the allocator's peak on CUDA."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import profile  # torch.profiler's imports the compiler


def peak_memory(step: Callable[[], object], resident: Iterable[Tensor], device: torch.device | str) -> int:
    """The most bytes of tensors alive at any one time while `step` runs; runs it once.

    They are the resident tensors and what the step adds to them, temporaries inside an operator included. Others'
    memory does not count: the data set, say, or what a copy was made of. On CUDA a tensor takes whole blocks.

    Args:
        resident: what is alive before the step, stays, and is its own: weights, optimiser state, the batch. What the
            step frees of it counts to its end, because the profiler cannot see that.
    """
    device = torch.device(device)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in resident}
    live = peak = sum(storages.values())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return peak + torch.cuda.max_memory_allocated(device) - before
    profiler = profile(profile_memory=True, use_kineto=True)
    with _without_profiler_lines(), profiler:
        step()
    results: Any = profiler.kineto_results  # which torch declares as None
    events = (x for x in results.events() if x.name() == "[memory]")
    for event in sorted(events, key=lambda x: x.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


_PROFILER_LINES = ("USDT:", "Memory block of unknown size")


@contextlib.contextmanager
def _without_profiler_lines() -> Iterator[None]:
    """Keep the profiler's own lines from stderr, where they would fail strict notebook tests; pass on all others."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            caught.seek(0)
            for line in caught:
                if not any(own in line.decode(errors="replace") for own in _PROFILER_LINES):
                    os.write(2, line)

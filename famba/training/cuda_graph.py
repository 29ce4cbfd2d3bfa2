"""What a GPU is given by a piece of code, captured as one CUDA graph: replayed without Python in between.

A small model's step is over sooner than Python's calls of it. A graph reads and writes the same memory each time: what
goes in is copied to where it was when captured, what comes out is overwritten by the next replay.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

_T = TypeVar("_T")
_WARMUP = 3  # calls, for what is made once: kernels, a library's workspace


def unavailable(device: torch.device, processes: int = 1) -> str:
    """Why a training step cannot be captured ("": it can)."""
    if device.type != "cuda":
        return f"it needs a CUDA device, got {device.type}"
    return "" if processes == 1 else f"it takes one process, got {processes}"


def captured(call: Callable[[], _T], device: torch.device | str) -> Callable[[], _T]:
    """The call as a graph; replayed, it gives what it gave when captured, with the new numbers in it.

    Gradients that are to be made anew each time must be None when the call begins, and stay where they are afterwards.

    Args:
        device: that the call runs on. A capture elsewhere would record nothing, and no error would say so.

    Raises:
        RuntimeError: it cannot be captured, because it waits for the device, say, or there is no CUDA device.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARMUP):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # The thread that pins the loader's batches allocates meanwhile, which a capture of the whole process forbids.
        # Torch's own stream for captures is of the first device that it captured on.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            made = call()

    def replay() -> _T:
        graph.replay()
        return made

    return replay

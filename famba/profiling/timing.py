"""Wall-clock time of training steps, apart from the loading of their data."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

_T = TypeVar("_T")


class StepClock:
    """Times training steps apart from the loading of their data.

        clock = StepClock(device)
        for batch in clock.batches(loader):
            ...                      # still data time: augmentation, say
            with clock.step():
                ...

    On CUDA the device is synchronised at both ends of a step.

    Attributes:
        step_time_ms: of each step after the first `warmup_steps`.
        data_time_ms: what each of those steps waited for its batch; what the caller does between a step and asking for
            the next batch, such as drawing a progress bar, is in `total_s` alone.
        total_s: from the start of `batches` to the end of the latest step.
    """

    def __init__(self, device: torch.device | str, *, warmup_steps: int = 1) -> None:
        self._device = torch.device(device)
        self._left = warmup_steps
        self._start = self._mark = time.perf_counter()
        self.step_time_ms: list[float] = []
        self.data_time_ms: list[float] = []
        self.total_s = 0.0

    def batches(self, loader: Iterable[_T]) -> Iterator[_T]:
        """The loader's batches; the clock starts when the first is asked for."""
        self._start = self._mark = time.perf_counter()
        for batch in loader:
            yield batch
            self._mark = time.perf_counter()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around one training step. A step that raises is not recorded."""
        begin = self._now()
        yield
        end = self._now()
        if self._left:
            self._left -= 1
        else:
            self.step_time_ms.append(1000 * (end - begin))
            self.data_time_ms.append(1000 * (begin - self._mark))
        self._mark, self.total_s = end, end - self._start

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

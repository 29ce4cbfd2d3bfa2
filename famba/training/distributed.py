"""Processes that train one model together, each on its device with its share of every batch (data parallel).

They are started by torch.distributed.run (torchrun), on one machine or several, and joined by Accelerate. A process
that trains alone imports none of that.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from famba import supervision
from famba.errors import InputError, TrainingError

_MISSING = "several processes need Accelerate, which is not installed: pip install 'famba[paper]'"
_AGAIN = "run it again to go on from the last checkpoint"
_LOST = "lost the other processes"
_POLL_S = 0.2
# How long a process waits for another: before training, since each compiles kernels and reads images; and, on a CPU, in
# training, say for rank 0 to write a checkpoint.
_START_TIMEOUT, _TIMEOUT = timedelta(minutes=30), timedelta(seconds=30)


class Processes:
    """This process among those that train together; by itself, the only one.

    Attributes:
        rank: from 0; only 0 writes files and shows what is going on.
        count: processes.
        device: this process's own.
    """

    def __init__(self, device: torch.device, accelerator: Any = None) -> None:
        self._accelerator = accelerator
        self.device = device
        self.rank, self.count = (
            (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        )

    def share(self, length: int) -> slice:
        """The rows of a batch that are this process's; the length is a multiple of the number of processes."""
        part = length // self.count
        return slice(self.rank * part, (self.rank + 1) * part)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as it is trained: its gradients are averaged over the processes, its weights start as rank 0's."""
        if self._accelerator is None:
            return model
        wrapped = self._accelerator.prepare_model(model)  # waits for all
        if self.device.type == "cpu":
            torch.distributed.distributed_c10d._set_pg_timeout(_TIMEOUT)
        return wrapped

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Around training: a lost connection is an error of one line.

        Raises:
            TrainingError: another process has ended or cannot be reached.
        """
        try:
            yield
        except RuntimeError as error:
            if "gloo" not in str(error):
                raise
            raise TrainingError(f"rank {self.rank} {_LOST}: {str(error).splitlines()[0]}; {_AGAIN}") from None

    def no_sync(self, model: nn.Module) -> contextlib.AbstractContextManager:
        """Around a backward pass whose gradients are not averaged yet, since more are to be added to them."""
        return contextlib.nullcontext() if self._accelerator is None else self._accelerator.no_sync(model)

    def sum(self, values: Sequence[int | float]) -> list[Any]:
        """Each number summed over the processes."""
        if self._accelerator is None:
            return list(values)
        # MPS and some accelerators have no float64; every device that several processes run on here does.
        return self._accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def from_first(self, tensors: dict[str, Tensor], described: Any) -> tuple[dict[str, Tensor], Any]:
        """What rank 0 has, on every rank: tensors of equal names and shapes, and anything that can be pickled."""
        if self._accelerator is None:
            return tensors, described
        from accelerate.utils import broadcast, broadcast_object_list

        (described,) = broadcast_object_list([described])
        # In one order: a file's keys come in another than a model's.
        copies = {key: tensors[key].detach().to(self.device, copy=True) for key in sorted(tensors)}
        moved: Any = broadcast(copies)
        return moved, described

    def wait(self) -> None:
        """Until all are here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()


def started() -> int:
    """Processes that torchrun has started together with this one; 0 if it has not."""
    return int(os.environ.get("WORLD_SIZE", "0"))


def writes() -> bool:
    """Whether this process is the one of those that torchrun has started that writes, or has been started alone."""
    return os.environ.get("RANK", "0") == "0"


def join(device: torch.device) -> Processes:
    """Find the other processes, if there are any; on CUDA each takes the device of its place on the machine."""
    if started() < 2:
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # as Accelerate does: threads that pin memory would start the first GPU, too
        return Processes(device)
    try:
        from accelerate import Accelerator, InitProcessGroupKwargs
    except ImportError:
        raise InputError(_MISSING) from None
    patient = InitProcessGroupKwargs(timeout=_START_TIMEOUT)
    try:
        accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=[patient])
    except NotImplementedError as error:  # of some GPUs and drivers: which variables to set
        raise InputError(" ".join(str(error).split())) from None
    return Processes(accelerator.device, accelerator)


def launch(arguments: Sequence[str], count: int, *, quiet: bool, on_poll: Callable[[], None] = lambda: None) -> None:
    """Run `python -m famba` with these arguments in so many processes on this machine, and wait for them.

    Args:
        quiet: keep what they write to stderr.
        on_poll: called a few times a second.

    Raises:
        InputError: Accelerate is missing.
        TrainingError: a process ended badly; all were stopped.
    """
    try:
        import accelerate  # noqa: F401 (its absence is better said once, here)
    except ImportError:
        raise InputError(_MISSING) from None
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    process = subprocess.Popen(
        [sys.executable, *torchrun, "-m", "famba", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE if quiet else None,
        text=True,
        env={
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)),  # or torchrun says 1
            **os.environ,
            supervision.ENDS_WITH: str(os.getpid()),  # torchrun's processes outlive a torchrun that is killed
        },
    )
    stderr = None
    try:
        while stderr is None:
            try:
                stderr = process.communicate(timeout=_POLL_S)[1] or ""
            except subprocess.TimeoutExpired:
                on_poll()
    finally:
        if process.poll() is None:
            process.terminate()  # it stops the others
            process.wait()
    if process.returncode:
        raise TrainingError(_reason(stderr, process.returncode))


def _reason(stderr: str, status: int) -> str:
    """One line: the error of a process of famba, else which one was stopped, else torchrun's own status."""
    lines = [line.partition("famba: ")[2] for line in stderr.splitlines() if "famba: " in line]
    # Not of those that were stopped because of another.
    lines = [line for line in lines if line != supervision.TERMINATED and _LOST not in line]
    if lines:
        return lines[0]
    if found := re.search(r"Root Cause.*?rank\s*:\s*(\d+).*?exitcode\s*:\s*(-?\d+)", stderr, re.DOTALL):
        rank, code = map(int, found.groups())
        how = f"was stopped by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        before = stderr.partition("ChildFailedError")[0]  # which is torchrun's
        error = r"(\S*(?:Error|Exception): .+)"
        errors = re.findall(rf"(?m)^\[rank{rank}\]: {error}", before) or re.findall(rf"(?m)^{error}", before)
        how += f" ({errors[-1]})" if errors else ""
        return f"rank {rank} {how}, and all others with it; {_AGAIN}"
    return f"the processes ended with exit status {status}; {_AGAIN}"

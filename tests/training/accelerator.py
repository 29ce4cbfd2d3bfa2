"""A fake accelerator: tensors on it have a shape, a type and a device, but no numbers.

Operators on the CPU run as ever. Those on the device check shapes, types and devices, and launch nothing. Every number
read from the device is 1. Host synchronisations, as CUDA would make them, are counted.

The device is registered with torch for the rest of the process: use it in a process of its own.
"""

import contextlib
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from famba.kernels import dispatch
from famba.kernels.triton import runtime

DEVICE = torch.device("privateuseone:0")  # what torch calls a device that others add
_PACKAGE = Path(runtime.__file__).parents[2]
_aten = torch.ops.aten
_library = torch.library.Library("_", "IMPL")  # kept, since it undoes what it registered when it is collected


def register() -> None:
    """Make torch know the device, and famba's GPU kernels run on it."""
    module = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: False,  # so that no generator is asked for
        _is_in_bad_fork=lambda: False,
        manual_seed_all=lambda seed: None,
        current_device=lambda: 0,
        device_count=lambda: 1,
        get_amp_supported_dtype=lambda: [torch.bfloat16],
    )
    _setup_privateuseone_for_python_backend(DEVICE.type, module)
    _library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    runtime.DEVICE, runtime.INTERPRETED = DEVICE.type, True  # no CUDA device is asked for
    runtime.triton = runtime.triton or SimpleNamespace(__version__="3.4.0")
    dispatch._FASTEST[DEVICE.type] = dispatch._FASTEST["cuda"]


class Accelerator(TorchDispatchMode):
    """The device, while this is entered.

    Attributes:
        waits: how often the host waited for the device, by the function of famba that made it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "Accelerator":
        self._open.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", True))
        self._open.enter_context(mock.patch.object(FakeTensor, "tolist", self._tolist(), create=True))
        lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(.., device=..) is then a copy that is seen here
        self._open.callback(torch._C._set_only_lift_cpu_tensors, lifts)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._open.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = kwargs.get("device")
        if FakeTensor not in types and (target is None or target.type == "cpu"):
            return func(*args, **kwargs)
        packet = func.overloadpacket
        on_cpu = [x for x in tree_leaves((args, kwargs)) if type(x) in (torch.Tensor, torch.nn.Parameter)]
        if packet is _aten._local_scalar_dense:
            self._wait()
            return torch.ones((), dtype=args[0].dtype).item()
        if packet is _aten.copy_ and not isinstance(args[0], FakeTensor):
            self._wait()
            return args[0].fill_(1)
        if packet is _aten._fused_adamw_ and on_cpu:
            raise RuntimeError(f"{func}: a tensor of shape {tuple(on_cpu[0].shape)} is on the CPU, others on {DEVICE}")
        if packet in (_aten._to_copy, _aten.copy_):
            blocks = not kwargs.get("non_blocking", len(args) > 2 and args[2])
            if blocks and (on_cpu or (target is not None and target.type == "cpu")):
                self._wait()
        elif packet in (_aten.index, _aten.index_put, _aten.index_put_) and any(x.dim() for x in on_cpu):
            self._wait()  # the indices are copied
        with self._fake:
            made = func(*args, **kwargs)
        return tree_map_only(FakeTensor, _readable, made)

    def _tolist(self) -> Any:
        def tolist(tensor: FakeTensor) -> Any:
            self._wait()
            return torch.ones(tensor.shape, dtype=tensor.dtype).tolist()

        return tolist

    def _wait(self) -> None:
        frame = sys._getframe(1)
        while frame is not None and _PACKAGE not in Path(frame.f_code.co_filename).parents:
            frame = frame.f_back
        name = "elsewhere" if frame is None else f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"
        self.waits[name] += 1


def _readable(made: FakeTensor) -> torch.Tensor:
    """A tensor that has come to the CPU, with numbers in it."""
    return torch.ones(made.shape, dtype=made.dtype) if made.device.type == "cpu" else made

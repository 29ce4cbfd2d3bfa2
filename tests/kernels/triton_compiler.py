"""Triton without a GPU: the kernels that famba starts are specialised and compiled, and do not run.

A driver stands for that of a CUDA device, and a compiler that stops early for Triton's. The rest is what happens on a
GPU: famba's launch, and Triton's own choice of the arguments that become constants (None, the integer 1) and of those
that are multiples of 16.
"""

import contextlib
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from famba.kernels.triton import runtime

_CAPABILITY = 90  # of the device that the kernels are started on


class _Driver:
    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return _target(_CAPABILITY)


@dataclass
class Specialisation:
    """A kernel for one choice of types, constants and multiples of 16. Starting it checks the grid and does no more."""

    source: Any
    warps: int
    function = packed_metadata = None  # what Triton hands to a launch

    @property
    def name(self) -> str:
        """Module and function, such as `scan._forward_kernel`."""
        return f"{self.source.fn.__module__.split('.')[-1]}.{self.source.fn.__name__}"

    @functools.cached_property
    def ttir(self) -> str:
        """Triton's first intermediate form, where types must fit."""
        return self.code("ttir", _CAPABILITY)

    def code(self, stage: str, capability: int) -> Any:
        """Compiled as far as a stage: text at `ttir`, `ttgir`, `llir` and `ptx`, bytes as a `cubin`."""
        from triton._C.libtriton import ir
        from triton.compiler import make_backend

        target, stages = _target(capability), {}
        backend = make_backend(target)
        options = backend.parse_options({"num_warps": self.warps})
        backend.add_stages(stages, options, self.source.language)
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        implementation, modules = backend.get_codegen_implementation(options), backend.get_module_map()
        code, metadata = self.source.make_ir(target, options, implementation, modules, context), {}
        for name, lower in stages.items():
            code = lower(code, metadata)
            if name == stage:
                break
        return code if isinstance(code, bytes) else str(code)

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, *_: Any) -> None:
        limits = zip((x, y, z), (2**31, 2**16, 2**16), strict=True)
        assert all(1 <= blocks < limit for blocks, limit in limits), f"{self.name}: grid {x, y, z}"

    def accesses(self) -> dict[str, list[str]]:
        """`load`s and `store`s of the memory that each argument points to, with every `barrier`, as TTIR lists them.

        Repetitions are left out. Pointers are followed through arithmetic, not out of branches.
        """
        origin = {f"%{name}": name for name in self.source.fn.arg_names}
        found: dict[str, list[str]] = {name: [] for name in origin.values()}
        for line in self.ttir.splitlines():
            if "ttg.barrier" in line or "gpu.barrier" in line:
                events = [("barrier", name) for name in found]
            else:
                access = re.search(r"\btt\.(load|store) (%\w+)", line)
                events = [(access[1], origin[access[2]])] if access and access[2] in origin else []
            for event, name in events:
                if found[name][-1:] != [event]:
                    found[name].append(event)
            if made := re.match(r"\s*(%\w+) = (tt\.addptr|tt\.splat|tt\.broadcast|arith\.select)?([^:]*)", line):
                parents = [
                    origin[x] for x in re.findall(r"%\w+", made[3]) if made[2] and "!tt.ptr" in line and x in origin
                ]
                origin.pop(made[1], None)  # a name may return in another loop
                if parents:
                    origin[made[1]] = parents[0]
        return found


@contextlib.contextmanager
def specialised() -> Iterator[list[Specialisation]]:
    """famba's GPU operators take CPU tensors meanwhile and return zeros; each specialisation is listed once.

    A kernel that does not compile raises Triton's own error where it is started.
    """
    from triton.runtime.driver import driver

    made: list[Specialisation] = []
    kernels = set()

    def compile(source: Any, target: Any, options: dict[str, Any], **_: Any) -> Specialisation:
        kernels.add(source.fn)
        made.append(Specialisation(source, options["num_warps"]))
        assert made[-1].ttir
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", _Driver())
        patch.setattr("triton.compiler.compile", compile)
        patch.setattr(runtime, "DEVICE", "cpu")
        patch.setattr(runtime, "INTERPRETED", True)  # no device is asked for
        patch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)  # torch looks up the positions among them
        try:
            yield made
        finally:
            for kernel in kernels:
                kernel.device_caches.clear()  # they refer to the driver


def _target(capability: int) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", capability, 32)

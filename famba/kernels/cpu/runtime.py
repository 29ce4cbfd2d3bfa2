"""Shared by the kernels' bindings: the library, its threads, and tensors as it sees them."""

import ctypes
import functools
import re
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from famba.kernels import dispatch
from famba.kernels.cpu.build import SOURCES, library

DTYPES = (torch.float32, torch.bfloat16)  # in the order of vector.h's Type
_HEADER = re.sub("//.*", "", (SOURCES / "jobs.h").read_text(encoding="utf-8"))
_TYPES: dict[str, Any] = {"int64_t": ctypes.c_int64, "double": ctypes.c_double}


def structure(name: str) -> Any:
    """The structure of that name in jobs.h: a field for each `type name`, `type *name` and `type name[count]`."""
    found = re.search(rf"struct {name} {{(.*?)}};", _HEADER, re.DOTALL)
    assert found is not None
    fields = []
    for kind, names in re.findall(r"(?:const )?(\w+)([^;]+);", found[1]):
        for pointer, field, count in re.findall(r"(\*?) *(\w+)(?:\[(\d+)\])?", names):
            type_ = ctypes.c_void_p if pointer else _TYPES[kind]
            fields.append((field, type_ * int(count) if count else type_))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


View = _TYPES["View"] = structure("View")


def view(x: Tensor | None) -> Any:
    return View() if x is None else View(x.data_ptr(), *x.stride(), DTYPES.index(x.dtype))


def pointer(x: Tensor | None) -> int | None:
    """The address of the elements; None where there are none."""
    return None if x is None else x.data_ptr() or None


def unsuited(*tensors: Tensor | None, allowed: tuple[torch.dtype, ...] = DTYPES) -> str:
    """The reason why a kernel cannot run on these tensors ("": it can)."""
    return dispatch.unsuited("cpu", allowed, *tensors)


def like(x: Tensor) -> Tensor:
    """An empty (b, e, t) tensor, dense, with channels innermost where they are in x."""
    b, e, t = x.shape
    if x.stride(1) == 1:
        return x.new_empty(b, t, e).transpose(1, 2)
    return x.new_empty(b, e, t)


@overload
def float32(x: Tensor) -> Tensor: ...
@overload
def float32(x: None) -> None: ...
def float32(x: Tensor | None) -> Tensor | None:
    """A small parameter as the kernels take it."""
    if x is None or (x.dtype is torch.float32 and x.is_contiguous()):
        return x
    return x.detach().to(torch.float32).contiguous()


def instruction_set() -> str:
    """The one that the kernels in use were compiled for, by their compiler: avx512, avx2, neon or baseline."""
    name = library().famba_instruction_set
    name.restype = ctypes.c_char_p
    return name().decode()


def call(name: str, job: ctypes.Structure | ctypes.Array) -> None:
    """Run one of the library's jobs, or two directions of one, on torch's threads.

    Raises:
        MemoryError: no room for scratch memory.
    """
    function = getattr(library(), name)
    if not function(ctypes.byref(job), ctypes.c_int64(torch.get_num_threads()), _parallel()):
        raise MemoryError(f"no room for scratch memory in {name}")


def refuses(name: str, structure: Any, *fields: Any) -> bool:
    """Run a job whose last field is the flag `refused`, and tell whether it was set; errors are those of `call`."""
    refused = ctypes.c_int64()
    call(name, structure(*fields, ctypes.addressof(refused)))
    return bool(refused.value)


@functools.cache
def _parallel() -> ctypes.c_void_p:
    """The entry point of the OpenMP runtime that torch runs on, or null: then the library starts threads of its own.

    Two pools would get in each other's way: the idle threads of torch's spin for a while after each of its operations,
    on the very cores that a second pool would need.
    """
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return ctypes.c_void_p()
    loaded = {line.split(maxsplit=5)[5] for line in lines if "omp" in line and ".so" in line}
    bundled = {path for path in loaded if Path(path).is_relative_to(Path(torch.__file__).parents[1])}
    for path in sorted(bundled) + sorted(loaded - bundled):
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p)
        except (OSError, AttributeError):
            continue
    return ctypes.c_void_p()

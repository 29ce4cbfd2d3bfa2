"""What the GPU's scan is compiled to, read without a GPU: `python -m famba.bench.sass`.

Triton compiles the kernels for compute capability 9.0 and brings NVIDIA's disassembler. Counted are the instructions of
the loops that run once for so many tokens: a multiprocessor's four schedulers start one instruction of one warp in a
clock each, so that their number bounds the time from below. It says nothing of how long instructions wait.
"""

import contextlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from famba.bench.timing import table
from famba.errors import BackendError
from famba.kernels.triton import conv, fuse, match, norm, scan
from famba.kernels.triton import runtime as gpu_runtime

SHAPE = (128, 384, 197, 16)  # b, e, t, n: Vim-Ti's scan at 224 px
_CAPABILITY = 90
_MULTIPROCESSORS, _SCHEDULERS, _CLOCK_HZ, _BYTES_PER_S = 132, 4, 1.755e9, 3.35e12  # of an H100 SXM, by its data sheet
_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32"}
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;]*);")
_LABEL = re.compile(r"\s*(\.L\w+):")


@dataclass(frozen=True)
class Launch:
    """A kernel as it would have been started."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The kernels that famba's operators start meanwhile are listed, once each, and not started."""
    launches: list[Launch] = []

    def note(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        if all(launch.kernel is not kernel for launch in launches):
            launches.append(Launch(kernel, arguments, constants))

    modules: tuple[Any, ...] = (scan, conv, norm, match, fuse)
    try:
        for module in modules:
            module.launch = note
        yield launches
    finally:
        for module in modules:
            module.launch = gpu_runtime.launch


def compiled(launch: Launch) -> dict[str, Any]:
    """The kernel for compute capability 9.0 as that launch would have it compiled: `ttgir`, `ptx`, `cubin` and others.

    Raises:
        BackendError: triton is missing.
    """
    if gpu_runtime.triton is None:
        raise BackendError("triton is missing; pip install triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel, options = launch.kernel, {"num_warps": launch.constants["num_warps"]}
    fixed = {key: value for key, value in launch.constants.items() if key not in options}
    signature: dict[str, str] = {}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, (name, x) in enumerate(zip(kernel.arg_names, launch.arguments, strict=False)):
        if isinstance(x, Tensor):
            signature[name] = _TYPES[x.dtype]
            multiple = name not in kernel.do_not_specialize_on_alignment
        elif x is None or (isinstance(x, int) and x == 1):
            fixed[name], multiple = x, False
        else:
            signature[name], multiple = ("i32", x % 16 == 0) if isinstance(x, int) else ("fp32", False)
        if multiple:
            aligned[i,] = [["tt.divisibility", 16]]
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, fixed, aligned)
    return compile(source, target=GPUTarget("cuda", _CAPABILITY, 32), options=options).asm


def loops(sass: str) -> list[list[str]]:
    """The names of the instructions of each loop that has no other within, in the order of the text."""
    names: list[str] = []
    labels: dict[str, int] = {}
    back: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(names)
        elif found := _INSTRUCTION.search(line):
            target = re.search(r"\.L\w+", found[2]) if found[1] == "BRA" else None
            if target and labels.get(target[0], len(names)) < len(names):
                back.append((labels[target[0]], len(names)))
            names.append(found[1])
    innermost = [
        (first, last)
        for first, last in back
        if not any((first, last) != other and first <= other[0] and other[1] <= last for other in back)
    ]
    return [names[first : last + 1] for first, last in sorted(innermost)]


def count(shape: tuple[int, int, int, int] = SHAPE) -> list[dict[str, Any]]:
    """One row for each loop of the gated scan of bfloat16 in both directions: what a warp issues for a token.

    `special` are exponentials and reciprocals, which a multiprocessor makes 16 of in a clock. `least_ms` is what
    issuing all of its instructions takes an H100 for the whole shape, were nothing ever waited for.
    """
    b, e, t, n = shape
    rows = []
    with recorded() as launches:
        _scan_both(e, t, n)
    er, _, _, el = scan._shape(n)
    warps = b * -(-e // (er * el))
    for launch in launches:
        sass, resources = _disassembled(compiled(launch)["cubin"])
        forward = launch.kernel is scan._forward_kernel
        found = [x for x in loops(sass) if "MUFU" in x]  # what computes; not the filling of memory
        for number, names in enumerate(found, start=1):
            tokens, each = (1, 1) if forward else (scan._SUB, 2)  # one direction; both by the same code
            per_token = len(names) / tokens
            rows.append(
                {
                    "pass": "forward" if forward else "backward",
                    "loop": number,
                    **resources,
                    "instructions": len(names),
                    "tokens": tokens,
                    "per_token": per_token,
                    "special": names.count("MUFU") / tokens,
                    "shuffles": names.count("SHFL") / tokens,
                    "least_ms": 1e3 * each * warps * t * per_token / (_MULTIPROCESSORS * _SCHEDULERS * _CLOCK_HZ),
                }
            )
    return rows


def text(rows: Sequence[Mapping[str, Any]], shape: tuple[int, int, int, int] = SHAPE) -> str:
    """The rows to be read in a terminal, and their sum beside what memory takes."""
    least, moved = sum(row["least_ms"] for row in rows), scan.scan_bytes(*shape, torch.bfloat16)
    moving = f"{1e3 * moved / _BYTES_PER_S:.2f} ms to move {moved / 1e9:.2f} GB"
    return "\n".join(
        [
            f"scan in both directions, gated, {shape} bf16, for compute capability 9.0; an H100 needs at least",
            f"{least:.2f} ms to issue its instructions, {moving}",
            "",
            table(rows),
        ]
    )


def _scan_both(e: int, t: int, n: int) -> None:
    """Call the operators as a mixer does, on tensors as they lie there."""

    def side() -> list[Tensor]:
        selected = torch.empty(2, t, 12 + 2 * n, dtype=torch.bfloat16)
        _, B, C = selected.split([12, n, n], dim=-1)
        u, delta = torch.empty(2, 2, t, e, dtype=torch.bfloat16)
        return [u.mT, delta.mT, torch.empty(e, n), B.mT, C.mT, torch.empty(e), torch.empty(e)]

    sides = [*side(), *side()]
    gate = torch.empty(2, t, 2 * e, dtype=torch.bfloat16).chunk(2, dim=-1)[1].mT
    out, y, states = torch.ops.famba.gpu_scan(*sides, gate, True, False, 0.5, True)
    torch.ops.famba.gpu_scan_backward(out, *sides, gate, y, states, True, False, 0.5)


def _disassembled(cubin: bytes) -> tuple[str, dict[str, int]]:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        sass = _output(knobs.nvidia.nvdisasm.path, "-c", str(path))
        used = _output(knobs.nvidia.cuobjdump.path, "-res-usage", str(path))
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", used)}
    return sass, {"registers": numbers["REG"], "stack_bytes": numbers["STACK"]}


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    try:
        print(text(count()))
    except BackendError as error:
        sys.exit(f"famba: {error}")

"""What the GPU's scan is compiled to for compute capability 9.0, read without a GPU by NVIDIA's disassembler.

A multiprocessor's four schedulers start one instruction of one warp per clock each, so the number of instructions per
token is a lower bound of the time. Waiting is not counted.
"""

import re
import subprocess

import pytest
import torch

from famba.kernels.triton import conv, runtime, scan

if runtime.triton is None or runtime.INTERPRETED:
    pytest.skip("nothing is compiled without triton", allow_module_level=True)

from test_triton import start_all
from triton_compiler import specialised

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;]*);")
TEXT = """
        /*0000*/                   IADD3 R1, R1, 1, RZ ;
.L_x_1:
        /*0010*/                   FADD R2, R2, R3 ;
.L_x_2:
        /*0020*/                   MUFU.EX2 R4, R4 ;
        /*0030*/              @!P0 FFMA R2, R2, R4, R5 ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/                   FADD R2, R2, R3 ;
        /*0060*/               @P2 BRA `(.L_x_1) ;
        /*0070*/               @P3 BRA `(.L_x_3) ;
        /*0080*/                   STG.E [R2.64], R4 ;
.L_x_3:
        /*0090*/                   EXIT ;
"""


def innermost_loops(sass):
    """The names of the instructions of each innermost loop, in the order of the text."""
    names, labels, back = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(names)
        elif found := INSTRUCTION.search(line):
            target = re.search(r"\.L\w+", found[2]) if found[1] == "BRA" else None
            if target and labels.get(target[0], len(names)) < len(names):
                back.append((labels[target[0]], len(names)))
            names.append(found[1])
    inner = [x for x in back if not any(x != y and x[0] <= y[0] and y[1] <= x[1] for y in back)]
    return [names[first : last + 1] for first, last in sorted(inner)]


def start_scan(e, t, n):
    """Start forward and backward of both directions on a mixer's layout; one specialisation of each kernel."""

    def side():
        selected = torch.zeros(2, t, 12 + 2 * n, dtype=torch.bfloat16)
        _, B, C = selected.split([12, n, n], dim=-1)
        u, delta = torch.zeros(2, 2, t, e, dtype=torch.bfloat16)
        return [u.mT, delta.mT, torch.zeros(e, n), B.mT, C.mT, torch.zeros(e), torch.zeros(e)]

    with specialised() as made:
        sides, gate = [*side(), *side()], torch.zeros(2, t, 2 * e, dtype=torch.bfloat16).chunk(2, dim=-1)[1].mT
        out, y, states = torch.ops.famba.gpu_scan(*sides, gate, True, False, 0.5, True)
        torch.ops.famba.gpu_scan_backward(out, *sides, gate, y, states, True, False, 0.5)
    return {x.source.fn: x for x in made}


def test_the_innermost_loop_is_found_and_its_instructions_are_named():
    assert innermost_loops(TEXT) == [["MUFU", "FFMA", "BRA"]]
    assert innermost_loops("") == []


def test_the_scan_issues_no_more_instructions_per_token_than_before(tmp_path):
    from triton import knobs

    made, path, per_token = start_scan(384, 197, 16), tmp_path / "kernel.cubin", {}
    assert len(made) == 2
    for kernel, specialisation in made.items():
        path.write_bytes(specialisation.code("cubin", 90))
        sass, resources = (
            subprocess.run([program, *options, path], capture_output=True, text=True, check=True).stdout
            for program, *options in ((knobs.nvidia.nvdisasm.path, "-c"), (knobs.nvidia.cuobjdump.path, "-res-usage"))
        )
        assert int(re.search(r"STACK:(\d+)", resources)[1]) <= 64
        computing = [loop for loop in innermost_loops(sass) if "MUFU" in loop]  # others fill memory
        assert len(computing) == 2
        tokens = 1 if kernel is scan._forward_kernel else scan._SUB
        assert all(loop.count("MUFU") >= 16 * tokens for loop in computing), "an exponential for each of 16 states"
        shuffles = [loop.count("SHFL") / tokens for loop in computing]
        assert shuffles == ([0, 0] if tokens == 1 else [0, 40]), "only the sums of a token's gradients"
        per_token[tokens] = sum(map(len, computing)) / tokens
    # about what triton 3.4 to 3.7 compile; with another layout of the tiles backward has a thousand
    assert per_token[1] <= 420
    assert per_token[scan._SUB] <= 700


def test_each_thread_reads_from_memory_the_states_that_it_wrote_there():
    """Otherwise threads would have to wait for each other more often."""
    for kernel, specialisation in start_scan(48, 9, 64).items():
        code = specialisation.code("ttgir", 90)
        layouts = re.findall(r"tt\.(?:load|store) .* tensor<16x32x!tt\.ptr<f32>, (#\w+)>", code)
        assert len(layouts) >= 3
        assert len(set(layouts)) == 1
        layout = re.search(rf"^{layouts[0]} = #ttg\.blocked<{{(.*)}}>$", code, re.MULTILINE)
        assert layout
        assert "sizePerThread = [1, 1], threadsPerWarp = [1, 32]" in layout[1], "registers by lanes"
        if kernel is scan._forward_kernel:
            # one between the directions: what the second adds to may be another thread's
            assert len(re.findall(r"(?:ttg|gpu)\.barrier", code)) == 1


def test_lanes_access_adjacent_addresses():
    with specialised() as made:
        start_all(torch.bfloat16)
    kernels = {x.source.fn: x for x in made}
    assert len(kernels) == 11
    for kernel, specialisation in kernels.items():
        code = specialisation.code("ttgir", 90)
        layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<{(.*)}>$", code, re.MULTILINE))
        tiles = set(re.findall(r"tt\.(?:load|store) .* tensor<\d+x(?!1x)\d+x!tt\.ptr<\w+>, (#\w+)>", code))
        for tile in tiles:
            assert "order = [1, 0]" in layouts[tile], (kernel.__name__, layouts[tile])
        if kernel is conv._forward_kernel:  # eight adjacent numbers, by declaration and not by chance
            assert {layouts[tile].split(", threads")[0] for tile in tiles} == {"sizePerThread = [1, 8]"}

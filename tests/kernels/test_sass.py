"""What the GPU's kernels are compiled to for compute capability 9.0, read without a GPU by NVIDIA's disassembler.

A multiprocessor's four schedulers start one instruction of one warp per clock each, so the number of instructions per
token is a lower bound of the time. Waiting is not counted.
"""

import re
import subprocess

import pytest
import torch
from agreement import draw_scan

from famba.kernels.triton import conv, runtime, scan

if runtime.triton is None or runtime.INTERPRETED:
    pytest.skip("nothing is compiled without triton", allow_module_level=True)

from triton_compiler import specialised

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;]*);")


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


def test_the_scan_issues_no_more_instructions_per_token_than_before(tmp_path):
    """Forward and backward of both directions on a mixer's layout."""
    from triton import knobs

    e, t, n = 384, 197, 16

    def side():
        _, B, C = torch.zeros(2, t, 12 + 2 * n, dtype=torch.bfloat16).split([12, n, n], dim=-1)
        u, delta = torch.zeros(2, 2, t, e, dtype=torch.bfloat16)
        return [u.mT, delta.mT, torch.zeros(e, n), B.mT, C.mT, torch.zeros(e), torch.zeros(e)]

    with specialised() as found:
        sides, gate = [*side(), *side()], torch.zeros(2, t, 2 * e, dtype=torch.bfloat16).chunk(2, dim=-1)[1].mT
        out, y, states = torch.ops.famba.gpu_scan(*sides, gate, True, False, 0.5, True)
        torch.ops.famba.gpu_scan_backward(out, *sides, gate, y, states, True, False, 0.5)
    made, path, per_token = {x.source.fn: x for x in found}, tmp_path / "kernel.cubin", {}
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


def start_all():
    """Call every operator once."""
    b, e, t, n = 2, 48, 9, 16
    sides = [x.detach() for _ in range(2) for x in draw_scan(b, e, t, n, dtype=torch.bfloat16)]
    given = [*sides[:6], sides[7], *sides[8:14], sides[15]]
    out, y, states = torch.ops.famba.gpu_scan(*given, sides[6], True, False, 0.5, True)
    torch.ops.famba.gpu_scan_backward(out, *given, sides[6], y, states, True, False, 0.5)
    weight, bias = torch.randn(e, 4), torch.randn(e)
    torch.ops.famba.gpu_conv(given[0], weight, bias, weight, bias, False)
    torch.ops.famba.gpu_conv_backward(out, out, given[0], weight, bias, weight, bias, False)
    x = torch.randn(b, t, e)
    normed, total, scale = torch.ops.famba.gpu_norm(x.bfloat16(), x, bias, 1e-5)
    torch.ops.famba.gpu_norm_backward(normed, total, total, scale, bias)
    source, target, _ = torch.ops.famba.gpu_match(x, torch.zeros(b, 1, dtype=torch.int64), 3)
    places = torch.ops.famba.gpu_plan(source, target, torch.ones(b, t), True, True)
    fused = torch.ops.famba.gpu_fuse(x.bfloat16(), x, *places[:3], source)
    torch.ops.famba.gpu_fuse_backward(*fused, *places[1:3])


def test_lanes_access_adjacent_addresses():
    with specialised() as made:
        start_all()
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

"""Instructions counted: by hand on a small text, and those of the scan, which nothing else would tell from more."""

import re

import pytest
import torch
from test_triton import start_all

from famba.bench import sass
from famba.errors import BackendError
from famba.kernels.triton import conv, runtime, scan

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


def test_the_innermost_loop_is_found_and_its_instructions_are_named():
    assert sass.loops(TEXT) == [["MUFU", "FFMA", "BRA"]]
    assert sass.loops("") == []


@pytest.mark.skipif(runtime.triton is None or runtime.INTERPRETED, reason="nothing is compiled without triton")
def test_the_scan_issues_no_more_than_it_did():
    rows = sass.count()
    assert [(row["pass"], row["tokens"]) for row in rows] == [("forward", 1)] * 2 + [("backward", scan._SUB)] * 2
    assert all(row["special"] >= 16 for row in rows), (
        "an exponential for each of a thread's sixteen states and channels, at least"
    )
    # about what triton 3.4 to 3.7 make of it: with another layout of the tiles, backward has a thousand
    assert sum(row["per_token"] for row in rows[:2]) <= 420
    assert sum(row["per_token"] for row in rows[2:]) <= 700
    assert [row["shuffles"] for row in rows] == [0, 0, 0, 40], "states in registers; the sums of a token's gradients"
    assert all(row["stack_bytes"] <= 64 for row in rows)
    said = sass.text(rows)
    assert f"{sum(row['least_ms'] for row in rows):.2f} ms to issue" in said


@pytest.mark.skipif(runtime.triton is None or runtime.INTERPRETED, reason="nothing is compiled without triton")
@pytest.mark.parametrize("n", [2, 16, 64])
def test_each_thread_reads_from_memory_the_states_that_it_wrote_there(n):
    """Else threads would have to wait for each other, which neither the kernels do nor the interpreter shows."""
    with sass.recorded() as launches:
        sass._scan_both(48, 9, n)
    for launch in launches:
        code = sass.compiled(launch)["ttgir"]
        layouts = re.findall(r"tt\.(?:load|store) .* tensor<16x32x!tt\.ptr<f32>, (#\w+)>", code)
        assert len(layouts) >= 3
        assert len(set(layouts)) == 1
        layout = re.search(rf"^{layouts[0]} = #ttg\.blocked<{{(.*)}}>$", code, re.MULTILINE)
        assert layout
        assert "sizePerThread = [1, 1], threadsPerWarp = [1, 32]" in layout[1], "registers by lanes"
        if launch.kernel is scan._forward_kernel:
            # between the directions they do: what the second adds to may be another thread's
            assert len(re.findall(r"(?:ttg|gpu)\.barrier", code)) == 1


@pytest.mark.skipif(runtime.triton is None or runtime.INTERPRETED, reason="nothing is compiled without triton")
def test_lanes_read_and_write_what_lies_side_by_side_in_memory():
    with sass.recorded() as launches:
        start_all(torch.bfloat16)
    assert len(launches) == 11
    for launch in launches:
        code = sass.compiled(launch)["ttgir"]
        layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<{(.*)}>$", code, re.MULTILINE))
        tiles = set(re.findall(r"tt\.(?:load|store) .* tensor<\d+x(?!1x)\d+x!tt\.ptr<\w+>, (#\w+)>", code))
        for tile in tiles:
            assert "order = [1, 0]" in layouts[tile], (launch.kernel.__name__, layouts[tile])
        if launch.kernel is conv._forward_kernel:  # known to be eight numbers in a row: not so by the compiler's luck
            assert {layouts[tile].split(", threads")[0] for tile in tiles} == {"sizePerThread = [1, 8]"}


def test_recording_starts_nothing_and_ends(monkeypatch):
    x, weight = torch.zeros(1, 2, 3), torch.ones(3)
    with sass.recorded() as launches:
        torch.ops.famba.gpu_norm(x, None, weight, 1e-5)
        torch.ops.famba.gpu_norm(x, None, weight, 1e-5)
    assert [launch.kernel.__name__ for launch in launches] == ["_forward_kernel"]
    assert scan.launch is runtime.launch
    monkeypatch.setattr(runtime, "triton", None)
    with pytest.raises(BackendError, match="triton is missing; pip install triton"):
        sass.compiled(launches[0])

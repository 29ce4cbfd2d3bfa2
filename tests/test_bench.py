"""The benchmark measures what it says: every contestant scans the same, rounds are interleaved, names are checked."""

import json

import pytest
import torch
import torch.nn.functional as F

from famba import bench
from famba.errors import InputError
from famba.scan import selective_scan_ref


@pytest.mark.parametrize("name", bench._OTHERS)
@pytest.mark.parametrize("t", [1, 2, 7, 8, 33])
def test_the_other_ways_to_scan_are_right(name, t):
    generator = torch.Generator().manual_seed(0)
    u, delta, cotangent = torch.randn(3, 2, 3, t, generator=generator, dtype=torch.float64).unbind()
    B, C = torch.randn(2, 2, 4, t, generator=generator, dtype=torch.float64).unbind()
    A = -torch.rand(3, 4, generator=generator, dtype=torch.float64)
    tensors = [x.requires_grad_() for x in (u, F.softplus(delta), A, B, C)]
    found, expected = bench._OTHERS[name](*tensors), selective_scan_ref(*tensors)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    grads = zip(*(torch.autograd.grad(y, tensors, cotangent) for y in (found, expected)), strict=True)
    assert [torch.allclose(x, y, rtol=1e-10, atol=1e-12) for x, y in grads] == [True] * 5


def test_rounds_are_interleaved_and_warm_up_is_dropped():
    seen = []
    times = bench.interleaved({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, rounds=2, warmup=1)
    assert "".join(seen) == "ababab"
    assert {name: len(x) for name, x in times.items()} == {"a": 2, "b": 2}


def test_the_command_prints_and_writes_one_row_each(tmp_path, capsys):
    names = ["reference", "torch", "kind loop"]
    bench.main(["--shapes", "1,2,3,4", "--rounds", "2", "--names", *names, "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["contestant"] for row in rows] == [*names, bench.UNIT]
    assert rows[0]["speedup"] == 1
    assert rows[1]["speedup"] == pytest.approx(rows[0]["median_ms"] / rows[1]["median_ms"])
    assert rows[-1]["matmuls"] == 1
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


def test_a_contestant_that_does_not_exist_is_named():
    with pytest.raises(InputError, match="contestant: 'fast' is unknown or cannot run here; allowed: reference, torch"):
        bench.bench_scan(names=["fast"])

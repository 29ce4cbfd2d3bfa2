"""The benchmark of a GPU, run on CPU tensors: contestants, bytes, what is left out, devices."""

import dataclasses
import json
import sys
import types

import pytest
import torch
from refusals import refused

from famba import bench
from famba.bench import gpu, timing
from famba.bench.gpu import PublishedMixer, set_norm_backend
from famba.bench.model import Training
from famba.bench.timing import table
from famba.cli import main
from famba.kernels import ops
from famba.kernels.scan import selective_scan_ref
from famba.models.mixer import BidirectionalMixer
from famba.profiling import memory

QUICK = dataclasses.replace(gpu.QUICK, device="cpu")
GPUS = torch.cuda.device_count()


def inner(xz, conv_weight, conv_bias, x_weight, dt_weight, out_weight, out_bias, A, B=None, C=None, D=None,
          delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True):  # fmt: skip
    """What mamba-ssm's function computes, by torch; its arguments and their order are those of 1.1 to 2.3."""
    assert out_bias is B is C is B_proj_bias is C_proj_bias is None
    assert A.dtype == D.dtype == delta_bias.dtype == torch.float32
    x, z = xz.chunk(2, dim=1)
    u = ops.causal_conv1d_silu(x, conv_weight[:, 0], conv_bias, backend="torch")
    n, m = A.shape[1], dt_weight.shape[1]
    step, B, C = (u.mT @ x_weight.T).split([m, n, n], dim=-1)
    y = selective_scan_ref(u, (step @ dt_weight.T).mT, A, B.mT, C.mT, D, z, delta_bias, delta_softplus)
    return y.mT @ out_weight.T


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("average", [True, False])
def test_the_published_mixer_computes_what_famba_does(average, fused, monkeypatch):
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["mamba_ssm.ops.selective_scan_interface"].mamba_inner_fn = inner
    torch.manual_seed(0)
    mixer = BidirectionalMixer(16, 4, average_directions=average, backend="torch")
    x = torch.randn(2, 7, 16, requires_grad=True)
    inputs, to_out = [x, *mixer.parameters()], torch.randn(2, 7, 16)
    found, expected = PublishedMixer(mixer, fused=fused)(x), mixer(x)
    torch.testing.assert_close(found, expected)
    for one, other in zip(*(torch.autograd.grad(y, inputs, to_out) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_backend_of_all_norms_is_set():
    model = Training(QUICK, "torch").model
    set_norm_backend(model, "reference")
    backends = [module._backend for name, module in model.named_modules() if name.split(".")[-1] in ("norm", "norm_f")]
    assert backends == ["reference"] * (model.depth + 1)


def test_asynchronous_calls_are_queued_in_doubling_numbers(monkeypatch):
    seen, waits = [], [0]  # a call takes a second, which is waited for
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(waits[-1]))
    calls = {"c": lambda: seen.append("c")}
    finish = lambda: waits.append(len(seen))  # noqa: E731
    assert timing.interleaved(calls, rounds=1, warmup=0, turn_s=3.5, finish=finish) == {"c": [1.0]}
    assert waits == [0, 1, 2, 4]


def test_a_table_by_hand():
    rows = [{"what": "a", "x": 1.5, "x_least_ms": 9.0, "n": 3}, {"what": "bb", "x": 12.25, "n": 4, "y": 0.5}]
    assert table(rows) == "what     x  n     y\n   a 1.500  3      \n  bb  12.2  4 0.500"


def test_the_bytes_of_a_scan_by_hand():
    # forward: u, delta, z in and y out; backward: those three and y's gradient in, three gradients out; B and C alike
    assert gpu.one_scan_bytes(2, 3, 5, 7, torch.bfloat16) == 2 * (11 * 2 * 3 * 5 + 6 * 2 * 7 * 5)
    assert gpu.one_scan_bytes(2, 3, 5, 7, torch.float32) == 2 * gpu.one_scan_bytes(2, 3, 5, 7, torch.bfloat16)


def test_a_slow_step_is_left_out(monkeypatch):
    monkeypatch.setattr(memory, "peak_memory", lambda *_: 0)
    left: timing.Left = []
    assert gpu.bench_steps(dataclasses.replace(QUICK, slow_s=-1.0), left) == []
    assert {row["reason"].split(" took ")[0] for row in left} == {"TimeoutError: one step"}


def test_a_compiler_has_a_time_limit():
    before = gpu.signal.getsignal(gpu.signal.SIGALRM)
    with pytest.raises(TimeoutError, match=r"compiling took more than 0\.05 s"), gpu._time_limit(0.05, "compiling"):
        gpu.time.sleep(5)
    assert gpu.signal.getsignal(gpu.signal.SIGALRM) is before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "tpu", "--quick"], "device: 'tpu' is not one of those here (cpu"),
        (["--device", "cpu"], "; to try it without: --quick --device cpu"),
        (["--device", "cuda:99"], f"device: 'cuda:99' is not one of those here ({'cuda' if GPUS else 'none'}"),
        (["speed", "--device", "cpu", "--quick"], "part: 'speed' is unknown; allowed: scan, steps, fusion, graphs"),
    ],
)
def test_unknown_devices_and_parts_are_refused_in_one_line(options, said, capsys):
    assert said in refused(capsys, "bench", "--gpu", *options)


def test_a_gpu_without_a_number_is_torchs_current_one_and_a_numbered_one_becomes_it(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    monkeypatch.setattr(gpu, "check_device", lambda device, quick: None)
    monkeypatch.setattr(bench.environment, "environment", lambda device: {})
    monkeypatch.setitem(gpu.PARTS, "graphs", lambda setting, left: {"graphs": [setting.device]})
    assert [bench.run(["graphs"], on_gpu=True, device=name)["graphs"] for name in ("cuda", "cuda:1")] == [
        ["cuda"],
        ["cuda:1"],
    ]
    assert chosen == [1]


def test_a_quick_benchmark_measures_every_table_and_writes_it(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    assert main(["bench", "--gpu", "--quick", "--device", "cpu", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert set(gpu.TITLES) <= set(result)
    assert result["command"] == "python -m famba bench --gpu --quick --device cpu"
    assert {"device", "versions", "setting"} <= set(result)
    printed = capsys.readouterr().out
    assert all(title in printed for title in gpu.TITLES.values())
    (copy,) = result["copy"]
    for row in result["scan"]:
        bound_ms = row["mib"] * 2**20 / copy["gb_per_s"] / 1e6
        assert row["of_roofline"] == pytest.approx(row["median_ms"] / bound_ms)
    kinds = {(row["precision"], row["directions"]) for row in result["scan"]}
    assert kinds == {(x, y) for x in ("bf16", "fp32") for y in ("one", "both, gated")}
    first, *others = result["steps"]
    assert (first["times"], first["memory"]) == (1, 1)
    assert {"torch", f"published, {first['contestant']}"} <= {first["contestant"]} | {x["contestant"] for x in others}
    for row in others:
        assert row["times"] == pytest.approx(row["median_ms"] / first["median_ms"])
        assert row["memory"] == pytest.approx(row["peak_mib"] / first["peak_mib"])
    left = {row["what"]: row["reason"] for row in result["left_out"]}
    assert "vim_nano, captured" in left, "no CUDA graph on a CPU"
    assert left["vim_nano, compiled"] == "TimeoutError: torch.compile took more than 0 s"
    tables = bench.gpu_frames(path)
    assert set(tables) == {*gpu.TITLES, "setting"}
    assert bench.gpu_frames(tmp_path / "absent.json") == {}


def test_the_result_so_far_is_written_when_a_later_part_fails(tmp_path, monkeypatch):
    def broken(setting, left):
        raise RuntimeError("the device fell off the bus")

    monkeypatch.setitem(gpu.PARTS, "graphs", broken)
    with pytest.raises(RuntimeError, match="fell off the bus"):
        bench.run(["scan", "graphs"], on_gpu=True, quick=True, device="cpu", path=tmp_path / "gpu.json")
    assert json.loads((tmp_path / "gpu.json").read_text())["scan"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_captured_step_trains_as_the_called_one():
    losses = []
    for capture in (False, True):
        training = Training(dataclasses.replace(QUICK, device="cuda", precision="fp32"))
        step = gpu.captured(training.step, "cuda") if capture else training.step
        for _ in range(2 if capture else 5):  # three warm it up; what is captured is not done
            step()
        losses.append(training.forward(training.images).sum().item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)

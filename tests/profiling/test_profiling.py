"""Cost: the formulas against a case by hand, torch's counter, what autograd keeps, and what the allocator sees."""

import json
import os
import socket
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from famba import FusionOptions, InputError, backends, create_model
from famba.fusion import matching, merge
from famba.kernels.triton import conv, norm, scan
from famba.profiling import environment, flops, memory, timing

MIB = 2**20
LATE = FusionOptions(order="append", weighting="mean", feature="delta", position="after_scan")
# changes to vim_nano, schedule, options
CASES = [
    pytest.param({}, [0, 0, 0], FusionOptions(), id="nothing fused"),
    pytest.param({}, [5, 0, 7], FusionOptions(), id="fused before the mixer"),
    pytest.param({}, [5, 0, 7], LATE, id="fused after the scan"),
    pytest.param({"cls_position": "none", "pool": "mean"}, [0, 9, 9], FusionOptions(feature="B"), id="no class token"),
    pytest.param({"cls_position": "head"}, [9, 0, 9], FusionOptions(feature="residual", weighting="mean"), id="head"),
    pytest.param({"pool": "mean", "average_directions": False}, [1, 1, 1], FusionOptions(feature="delta"), id="summed"),
    pytest.param({}, [5, 7, 0], FusionOptions(matching="random", feature="delta"), id="random pairs"),
    pytest.param({"d_model": 40, "d_state": 5, "img_size": 11}, [0, 20, 0], FusionOptions(feature="C"), id="odd sizes"),
]
SCANS = [name for name in ("torch", "native") if not backends()[name]]
# All with torch; with the others what depends on the kernels.
ON_EACH = [
    pytest.param(*case.values, backend, id=f"{case.id}-{backend}")
    for case in CASES
    for backend in (*SCANS, "triton")
    if backend == "torch" or case.id in ("fused before the mixer", "fused after the scan", "odd sizes")
]


def nano(changes: dict, removed: list[int], options: FusionOptions, backend: str = "torch"):
    sizes = {"num_classes": 10, "depth": len(removed), **changes}
    return create_model("vim_nano", schedule=removed, fusion=options, backend=backend, **sizes)


def images_for(model, batch: int) -> torch.Tensor:
    return torch.rand(batch, 3, model.img_size, model.img_size, generator=torch.Generator().manual_seed(0))


def autocast(precision: str):
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def saved_bytes(call, weights=()) -> int:
    """What autograd keeps of a call, every storage once, the weights apart."""
    apart = {weight.untyped_storage()._cdata for weight in weights}
    storages: dict[int, int] = {}
    alive = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        alive.append(x.detach())  # no address is used twice
        storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        assert call() is not None
    return sum(size for address, size in storages.items() if address not in apart)


def training(model, images: torch.Tensor, precision: str):
    """One training step, and what stays alive around it."""
    labels = torch.zeros(len(images), dtype=torch.int64)
    optimiser = torch.optim.AdamW(model.parameters())

    def step() -> None:
        with autocast(precision):
            logits = model(images)
        functional.cross_entropy(logits.float(), labels).backward()
        optimiser.step()
        optimiser.zero_grad()

    step()
    moments = [value for state in optimiser.state.values() for value in state.values()]
    return step, [images, labels, *model.parameters(), *moments]


def test_the_flops_of_one_small_layer_are_those_worked_out_by_hand():
    """4 tokens; d 4, e 8, n 2, a step of rank 1; the numbers below are the parts in order."""
    model = nano(
        {"img_size": 4, "patch_size": 2, "stride": 2, "d_model": 4, "d_state": 2, "num_classes": 3}
        | {"cls_position": "none", "pool": "mean"},
        [0],
        FusionOptions(),
    )
    found = flops.analyse(model.config, [0])
    assert found.stem.flops == 2 * 4 * 12 * 4
    assert found.layers[0].flops == 512 + 2 * 256 + 2 * 320 + 2 * 64 + 256  # in, conv, x, dt, out
    assert found.head.flops == 24
    assert found.product_flops == 384 + 2048 + 24
    assert found.flops == found.product_flops + 2 * 9 * 4 * 8 * 2  # and both directions' scans
    assert found.token_counts == [4, 4]


@pytest.mark.parametrize(("batch", "precision"), [(1, "fp32"), (4, "bf16")])
@pytest.mark.parametrize(("changes", "removed", "options", "backend"), ON_EACH)
def test_flops_and_bytes_by_formula_are_those_of_the_model_whichever_backend_computes_it(
    changes, removed, options, batch, backend, precision, on_paper
):
    emptied, mode = on_paper
    model = emptied(nano(changes, removed, options, backend))
    found = flops.analyse(model.config, removed, batch=batch, options=options, backend=backend, precision=precision)
    with mode:
        images = torch.empty(batch, 3, model.img_size, model.img_size)
        counted = flops.flops_counted(model, images)
        with autocast(precision):
            kept = saved_bytes(lambda: model(images), model.parameters())
    assert found.product_flops == counted > 0
    assert found.token_counts == model.token_counts
    assert found.parameter_bytes == 4 * sum(weight.numel() for weight in model.parameters())
    assert found.layers[0].parameter_bytes == 4 * sum(weight.numel() for weight in model.layers[0].parameters())
    assert found.activation_bytes == pytest.approx(kept, rel=0.05), "what autograd keeps"


@pytest.mark.parametrize("backend", SCANS)
def test_fusing_keeps_each_tokens_destination_and_weight_and_nothing_else(backend):
    x, other = torch.randn(2, 3, 11, 8, requires_grad=True).unbind()
    plan = merge.plan(matching.match_tokens(x, 4), torch.ones(3, 11))
    assert saved_bytes(lambda: merge.apply_both(plan, x, other, backend=backend)) == 3 * 11 * (8 + 4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", SCANS)
@pytest.mark.parametrize(
    ("changes", "removed", "options", "batch"),
    [
        ({}, [0] * 6, FusionOptions(), 32),
        ({}, [5] * 6, FusionOptions(), 32),
        ({}, [0, 0, 8, 8, 8], LATE, 32),
        ({"d_model": 128}, [0, 5, 5], FusionOptions(), 1),
    ],
    ids=["unfused", "fused", "after the scan", "mostly weights"],
)
def test_peak_bytes_are_those_that_a_training_step_reaches(changes, removed, options, batch, backend, precision):
    if precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("a processor without bfloat16 products: torch makes them in another way, with other memory")
    model = nano(changes, removed, options, backend)
    step, resident = training(model, images_for(model, batch), precision)
    measured = memory.peak_memory(step, resident, "cpu")
    found = flops.analyse(model.config, removed, batch=batch, options=options, backend=backend, precision=precision)
    assert found.peak_bytes == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_peak_bytes_with_triton_are_those_that_a_training_step_reaches(precision, on_paper, monkeypatch):
    for module in (conv, norm, scan):  # what the kernels would write does not matter
        monkeypatch.setattr(module, "launch", lambda *_, **__: None)
    model = nano({}, [0, 0], FusionOptions(), "triton")
    step, resident = training(model, images_for(model, 32), precision)
    measured = memory.peak_memory(step, resident, "cpu")
    found = flops.analyse(model.config, [0, 0], batch=32, backend="triton", precision=precision)
    assert found.peak_bytes == pytest.approx(measured, rel=0.02)


def test_the_native_backend_needs_less_than_three_fifths_of_torchs_memory():
    """By formula, which other tests hold to the allocator within 5%."""
    analyse = partial(flops.analyse, create_model("vim_tiny").config, [0] * 24, batch=16)
    assert analyse(backend="native").peak_bytes < 0.57 * analyse(backend="torch").peak_bytes


@pytest.mark.parametrize(
    ("schedule", "how", "message"),
    [
        ([0, 0], {}, "schedule: 2 entries"),
        ([0] * 8, {"backend": "reference"}, "backend: 'reference'"),
        ([0] * 8, {"precision": "fp16"}, "precision: 'fp16' is not one of fp32, bf16"),
    ],
)
def test_what_has_no_formula_is_refused(schedule, how, message):
    with pytest.raises(InputError, match=message):
        flops.analyse(create_model("vim_nano", depth=8).config, schedule, **how)


def mib(n: int) -> torch.Tensor:
    return torch.zeros(n * MIB // 4)


def test_peak_memory_is_the_largest_sum_of_tensors_alive_together():
    def step() -> None:
        x = mib(3)
        y = mib(5)  # 8 together
        del x
        z = mib(2)
        assert len(y) > len(z)

    base = mib(4)
    for _ in range(3):  # as often as one likes in a process
        assert memory.peak_memory(step, [], "cpu") == 8 * MIB
        assert memory.peak_memory(step, [base, base[5:], base.view(2, -1)], "cpu") == 12 * MIB
    assert memory.peak_memory(lambda: base.logsumexp(0), [base], "cpu") >= 8 * MIB, "inside an operator too"


def test_measuring_memory_prints_nothing_and_passes_on_what_the_step_prints(capfd):
    with pytest.raises(ZeroDivisionError):
        memory.peak_memory(lambda: 1 // 0, [], "cpu")
    assert memory.peak_memory(lambda: mib(2), [], "cpu") == 2 * MIB, "after a step that raises"
    old = [mib(1)]

    def step() -> None:
        old.clear()  # the profiler complains of this on stderr
        os.write(2, b"from below\n")
        print("from python", file=sys.stderr)

    memory.peak_memory(step, [], "cpu")
    captured = capfd.readouterr()
    assert captured.out == ""
    assert sorted(captured.err.splitlines()) == ["from below", "from python"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_peak_memory_on_cuda_is_the_allocators():
    base, other = (torch.zeros(size * MIB, dtype=torch.uint8, device="cuda") for size in (4, 2))
    peak = memory.peak_memory(lambda: torch.zeros(8 * MIB, dtype=torch.uint8, device="cuda"), [base, base[5:]], "cuda")
    assert peak == 12 * MIB
    assert torch.cuda.memory_allocated() >= base.nbytes + other.nbytes


def test_peak_memory_on_cuda_is_that_of_the_resident_tensors_and_the_step_whatever_else_is_there(monkeypatch):
    class Allocator:
        allocated = peak = 100 * MIB  # the resident tensors, and others'

    def reset(device) -> None:
        Allocator.peak = Allocator.allocated

    def step() -> None:
        Allocator.peak = Allocator.allocated + 8 * MIB
        Allocator.allocated += MIB  # stays after the step

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: Allocator.allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: Allocator.peak)
    base = mib(4)
    for _ in range(2):
        assert memory.peak_memory(step, [base, base[5:]], "cuda") == 12 * MIB


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The time, to be set by hand."""
    time_s = [100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: time_s[0])
    return time_s


def test_the_clock_tells_steps_from_waiting_and_drops_the_warm_up(now):
    def loader():
        for wait_s in (7, 1, 2):
            now[0] += wait_s
            yield wait_s

    clock = timing.StepClock("cpu")
    now[0] += 50  # before training
    for batch in clock.batches(loader()):
        now[0] += 0.5  # augmentation
        with clock.step():
            now[0] += 10 * batch
        now[0] += 100  # a progress bar
    assert clock.step_time_ms == [10_000, 20_000]
    assert clock.data_time_ms == [1_500, 2_500]
    assert clock.total_s == 7.5 + 70 + 101.5 + 10 + 102.5 + 20


def test_the_clock_does_not_record_a_step_that_raises(now):
    clock = timing.StepClock("cpu", warmup_steps=0)
    with pytest.raises(ZeroDivisionError), clock.step():
        now[0] += 1 // 0
    assert clock.step_time_ms == clock.data_time_ms == []
    with clock.step():
        now[0] += 1
    assert clock.step_time_ms == [1000]


def test_the_environment_names_device_and_versions_but_no_host_and_no_path():
    loaded = set(sys.modules)
    found = environment.environment("cpu")
    assert not {"triton", "mamba_ssm"} & (set(sys.modules) - loaded)
    assert set(found) == {"device", "instruction_set", "threads", "versions"}
    assert found["device"].startswith("cpu: ")
    assert found["threads"] == torch.get_num_threads()
    assert {"python", "torch", "numpy"} <= set(found["versions"])
    assert found["versions"]["torch"] == str(torch.__version__)
    text = json.dumps(found)
    assert socket.gethostname() not in text
    assert str(Path.home()) not in text
    assert str(Path.cwd()) not in text


def test_on_cuda_the_environment_names_the_gpu_its_driver_and_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(environment, "gpu_driver", lambda: "580.65.06")
    found = environment.environment("cuda")
    assert (found["device"], found["instruction_set"]) == ("cuda: NVIDIA H100", "sm_90")
    assert found["versions"] | {"cuda": "13.0", "driver": "580.65.06"} == found["versions"]
    assert not {"cuda", "driver"} & set(environment.environment("cpu")["versions"])


def test_the_driver_is_read_from_its_module_else_from_nvidia_smi(tmp_path, monkeypatch):
    module = tmp_path / "version"
    monkeypatch.setattr(environment, "_DRIVER", module)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.gpu_driver() == ""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 550.54.15\necho 550.54.15\n")
    program.chmod(0o755)
    assert environment.gpu_driver() == "550.54.15"
    module.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n")
    assert environment.gpu_driver() == "580.65.06"
    module.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n")
    assert environment.gpu_driver() == "535.104.05"

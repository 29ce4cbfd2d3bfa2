"""The benchmark of a CPU; no test depends on how long anything takes."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch.autograd.profiler_util import FunctionEvent

from famba import bench, plots
from famba.bench import fusing, growth, loading, model, profile, scan, timing
from famba.bench.model import FULL, QUICK, Training, available
from famba.cli import main
from famba.errors import InputError
from famba.fusion import merge
from famba.kernels.scan import selective_scan, selective_scan_ref
from famba.models import mixer
from famba.profiling import flops
from famba.storage.files import json_bytes

BACKENDS = available()


@pytest.mark.parametrize("name", scan._PEERS)
@pytest.mark.parametrize("t", [1, 8, 33])
def test_a_peer_computes_the_reference_scan(name, t):
    pytest.importorskip(scan._PEERS[name][0].split(".")[0])
    if name == "accelerated-scan" and t == 1:
        pytest.skip("its recursion needs two tokens")
    generator = torch.Generator().manual_seed(0)
    u, delta, cotangent = torch.randn(3, 2, 3, t, generator=generator).unbind()
    B, C = torch.randn(2, 2, 4, t, generator=generator).unbind()
    A = -torch.rand(3, 4, generator=generator)
    tensors = [x.requires_grad_() for x in (u, F.softplus(delta), A, B, C)]
    found, expected = scan.peer(name)(*tensors), selective_scan_ref(*tensors)
    torch.testing.assert_close(found, expected)
    grads = zip(*(torch.autograd.grad(y, tensors, cotangent) for y in (found, expected)), strict=True)
    assert [torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in grads] == [True] * 5


def test_a_peer_that_cannot_be_imported_is_left_out_with_its_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "mambapy.pscan", None)
    monkeypatch.setitem(scan._PEERS, "transformers", ("types", scan._PEERS["transformers"][1]))  # an older version
    monkeypatch.setattr(scan, "available", lambda: ["torch"])
    left: timing.Left = []
    scan.bench_scan([(1, 2, 3, 4)], left, rounds=1)
    reasons = {row["what"]: row["reason"] for row in left}
    assert reasons["mambapy"].startswith("ModuleNotFoundError: import of mambapy.pscan halted")
    assert reasons["transformers"].startswith("AttributeError: module 'types' has no attribute")
    assert "loop in torch" not in reasons


def test_rounds_are_interleaved_and_warm_up_is_dropped():
    seen = []
    times = timing.interleaved({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, rounds=2, warmup=1)
    assert "".join(seen) == "abbaab", "every other round in reverse"
    assert {name: len(x) for name, x in times.items()} == {"a": 2, "b": 2}


@pytest.fixture
def clock(monkeypatch):
    """A clock by which the call that this makes takes so many seconds."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return lambda seconds: lambda: now.__setitem__(0, now[0] + seconds)


def test_a_call_over_its_budget_is_measured_twice_only(clock):
    calls = {"slow": clock(9.0), "fast": clock(1.0)}
    assert timing.interleaved(calls, rounds=4, budget_s=3.0) == {"slow": [9, 9], "fast": [1, 1, 1, 1]}


def test_a_short_call_is_repeated_for_its_turn_and_its_mean_counts(clock):
    made, short = [], clock(1.0)
    calls = {"long": clock(5.0), "short": lambda: (short(), made.append(1))}
    assert timing.interleaved(calls, rounds=1, warmup=0, turn_s=2.5) == {"long": [5.0], "short": [1.0]}
    assert len(made) == 3


def test_medians_are_compared_with_medians_and_minima_with_minima():
    one, other = timing.summary([0.003, 0.001, 0.005]), timing.summary([0.002, 0.001])
    assert one == {"median_ms": 3.0, "least_ms": 1.0, "rounds": 3}
    assert timing.ratio(one, other, "times") == {"times": pytest.approx(2.0), "times_least": 1.0}


def test_a_scans_time_is_relative_to_the_first_contestant_and_to_a_matrix_product(monkeypatch):
    names = ["torch", "reference", "loop in torch"]
    monkeypatch.setattr(scan, "available", lambda: names[:1])
    monkeypatch.setattr(scan, "_PEERS", {names[2]: scan._PEERS[names[2]]})
    rows = scan.bench_scan([(1, 2, 3, 4), (1, 2, 5, 4)], [], rounds=2)
    assert [row["contestant"] for row in rows] == 2 * [*names, scan.UNIT]
    assert [row["shape"] for row in rows] == 4 * ["(1, 2, 3, 4)"] + 4 * ["(1, 2, 5, 4)"]
    for first, row, product in ((rows[0], rows[1], rows[3]), (rows[4], rows[6], rows[7])):
        assert first["times"] == product["matmuls"] == product["matmuls_least"] == 1
        assert row["times"] == pytest.approx(row["median_ms"] / first["median_ms"])
        assert row["matmuls_least"] == pytest.approx(row["least_ms"] / product["least_ms"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_repeated_products_are_exactly_the_models_flops(backend):
    training = Training(QUICK, backend)
    config, tokens = training.model.config, training.model.tokens
    found = flops.analyse(config, [0] * config["depth"], batch=QUICK.batch)
    convolutions = config["depth"] * 2 * QUICK.batch * tokens * 2 * config["d_model"] * 4 * 2
    forward = found.product_flops - convolutions
    rank = math.ceil(config["d_model"] / 16)
    if backend == "native":  # its scans project dt
        forward -= config["depth"] * 2 * 2 * QUICK.batch * tokens * rank * 2 * config["d_model"]
    products = model.products_of(training.step)
    assert model.flops_of(products) == 3 * forward - found.stem.flops  # the images need no gradient
    with torch.no_grad():
        once = model.products_of(lambda: training.model(training.images))
    assert model.flops_of(once) == forward
    assert layouts(products[: len(once)]) == layouts(once)


def layouts(products):
    """Products with the shape and the stride of each tensor."""

    def layout(x):
        return (x.shape, x.stride()) if isinstance(x, torch.Tensor) else x

    return [(op, [layout(x) for x in given]) for op, given in products]


def test_a_product_is_repeated_with_its_strides():
    x, w = torch.randn(6, 8)[:, :3], torch.randn(5, 3)
    products = model.products_of(lambda: F.linear(x, w))
    ((_, arguments),) = layouts(products)
    assert arguments == [((6, 3), (8, 1)), ((3, 5), (1, 3))]
    assert layouts(model.products_of(lambda: model.repeat(products))) == layouts(products)


def events(*rows):
    """Events of torch's profiler from name, depth, own time in us and autograd's number, in order of their start."""
    made, above = [], []
    for start, (name, depth, own, number) in enumerate(rows):
        del above[depth:]
        event = SimpleNamespace(name=name, self_cpu_time_total=own, sequence_nr=number)
        event.cpu_parent = above[-1] if above else None
        event.time_range = SimpleNamespace(start=start, end=start)
        made.append(event)
        above.append(event)
    return made


def test_own_times_by_hand():
    backward = profile._BACKWARD
    rows = events(
        ("part: Python", 0, 25e3, -1),
        ("part: scan", 1, 10e3, -1),  # with all inside
        ("aten::mm", 2, 10e3, 3),
        ("aten::linear", 1, 5e3, 4),
        ("aten::mm", 2, 15e3, 4),
        (backward + "MmBackward0", 1, 2e3, 4),
        ("aten::mm", 2, 8e3, -1),
        (backward + "ScanBackward", 1, 7e3, 3),
        ("aten::mm", 2, 8e3, 5),  # inside a gradient: creates no node
        (backward + "Other", 1, 0, 5),
        ("Optimizer.step#AdamW.step", 1, 5e3, -1),
        ("aten::_fused_adamw_", 2, 5e3, -1),
        ("aten::mm", 0, 50e3, -1),  # after the step
    )
    found = profile.own_times(reversed(rows))
    assert list(found) == list(profile.PARTS)
    expected = {"scan": 35, "matrix products": 23, "elementwise": 7, "optimiser": 10, "Python": 25}
    assert {part: x for part, x in found.items() if x} == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_part_of_a_step_is_found(backend):
    training = Training(QUICK, backend)
    before = mixer.bidirectional_conv1d_silu, merge.apply_both
    unfused = profile.parts_of(training.step)
    schedule = QUICK.schedules(training.model.depth)["all"]
    fused = profile.parts_of(lambda: training.step(schedule))
    assert (mixer.bidirectional_conv1d_silu, merge.apply_both) == before
    assert unfused.pop("fusion") == 0 < fused.pop("fusion")
    if backend == "native":  # its scans have the gate
        assert unfused.pop("gate") == fused.pop("gate") == 0
    assert all(x > 0 for x in [*unfused.values(), *fused.values()])


def test_a_gradient_counts_for_the_part_of_its_operation(monkeypatch):
    """Nearly all events of this backward are a scan's, whatever their operations and times."""
    monkeypatch.setattr(FunctionEvent, "self_cpu_time_total", 1e3)
    u = torch.randn(4, 64, 40, requires_grad=True)
    A, B = -torch.ones(64, 16), torch.randn(4, 16, 40)
    scanned = lambda: selective_scan(u, u.exp(), A, B, B, backend="torch")  # noqa: E731
    found = profile.parts_of(lambda: scanned().backward(torch.ones(4, 64, 40)))
    assert found["scan"] > 0.8 * math.fsum(found.values())


def test_shares_of_a_step_sum_to_one():
    table = pd.DataFrame(profile.bench_profile(QUICK))
    assert set(table["part"]) == set(profile.PARTS)
    assert table["step"].nunique() == len(BACKENDS) + 2 * ("native" in BACKENDS)
    np.testing.assert_allclose(table.groupby("step")["share"].sum(), 1)


def test_the_smallest_r_that_is_faster_is_the_break_even():
    rows = [{"r": r, "of_unfused": x} for r, x in ((5, 0.8), (2, 0.99), (1, 1.0))]
    assert fusing.break_even(rows) == 2
    assert fusing.break_even(rows[2:]) is None


@pytest.mark.parametrize("setting", [FULL, QUICK])
def test_the_lengths_measured_cover_every_schedule(setting):
    tokens = sorted(setting.create(img_size=size).tokens for size in setting.img_sizes)
    whole = setting.create()
    uniform = [[r] * whole.depth for r in setting.uniform]
    for schedule in [*setting.schedules(whole.depth).values(), *uniform]:
        whole.set_fusion(schedule, whole.options)
        assert tokens[0] <= min(whole.token_counts) <= max(whole.token_counts) == tokens[-1]
    assert set(setting.removed) == {"all", "interleaved", "lower", "upper"}


def test_fusing_is_relative_to_its_layer():
    table = pd.DataFrame(fusing.bench_layer(QUICK)).set_index("what")
    assert table.loc["layer", "layer"] == 1
    row = table.loc["all steps, r = 6"]
    assert row["layer"] == pytest.approx(row["median_ms"] / table.loc["layer", "median_ms"])
    assert len(table) == 1 + 4 * len(set(QUICK.removed.values()))


def test_the_command_prints_and_writes_the_chosen_parts(tmp_path, capsys):
    written = tmp_path / "new" / "memory.json"
    assert main(["bench", "memory", "--quick", "--json", str(written)]) == 0
    result = json.loads(written.read_text())
    assert result["command"] == "python -m famba bench memory --quick"
    assert {"device", "instruction_set", "kernels", "threads", "versions", "setting"} <= set(result)
    assert set(bench.frames(result)) == {"memory", "setting"}
    assert {row["strategy"] for row in result["memory"]} == {"none", *QUICK.removed}
    for row in result["memory"]:
        assert row["of_predicted"] == pytest.approx(row["peak_mib"] / row["predicted_mib"])
    assert result["memory"][0]["of_torch"] == 1
    assert plots.benchmark(bench.frames(result)).axes
    printed = capsys.readouterr().out
    assert bench.TITLES["memory"] in printed
    assert result["device"] in printed


def test_the_curves_are_drawn_alike_whether_measured_now_or_read_from_a_file():
    rows = [{"step": step, "fp32": 2.0, "bf16": 2.1, "fp32, other order": 2.2} for step in (10, 20)]
    drawn = []
    for curves in (rows, json.loads(json_bytes(rows))):  # there the keys are sorted
        tables = {"curves": pd.DataFrame(curves), "precision": pd.DataFrame([{"precision": "bf16", "faster": 1.5}])}
        setting = pd.DataFrame([{"device": "cpu", "threads": 1, "versions": ""}])
        lines = plots.benchmark(tables | {"setting": setting}).axes[0].lines
        drawn.append([(line.get_label(), line.get_color(), line.get_linestyle()) for line in lines])
    assert drawn[0] == drawn[1]


def test_fusion_is_measured_against_lengths_and_every_table_has_its_title():
    result = bench.run(["fusion"], quick=True)
    assert set(bench.frames(result)) - {"setting"} == {"layer", "lengths", "schedules", "uniform"} < set(bench.TITLES)
    unfused = {row["tokens"]: row["median_ms"] for row in result["lengths"]}
    for row in result["schedules"]:
        assert row["of_predicted"] == pytest.approx(row["median_ms"] / row["predicted_median_ms"])
        assert min(unfused.values()) <= row["predicted_median_ms"] <= max(unfused.values())
        assert row["of_unfused"] == pytest.approx(row["median_ms"] / unfused[37])
    assert result["break_even_r"] in (None, *QUICK.uniform)


def test_the_loss_falls_in_bf16_as_in_fp32():
    """They differ by less than a quarter of what another order of the images changes."""
    kinds = (("fp32", 0), ("bf16", 0), ("fp32", 1))
    single, low, other = (model.loss_curve(kind, steps=100, depth=1, order=order) for kind, order in kinds)
    assert single[:3] == model.loss_curve("fp32", steps=3, depth=1), "a curve is the same every time"
    curves = np.reshape([single, low, other], (3, 5, 20)).mean(2)
    assert curves[0, -1] < 0.85 * curves[0, 0]
    _, of_low, of_other = np.abs(curves - curves[0]).max(1)
    assert 0 < of_low < 0.25 * of_other


def test_bf16_is_compared_with_fp32_in_time_and_loss():
    result = bench.run(["precision"], quick=True)
    single, low = result["precision"]
    assert (single["precision"], low["precision"]) == ("fp32", "bf16")
    assert single["faster"] == 1
    assert low["faster"] == pytest.approx(single["median_ms"] / low["median_ms"])
    assert [row["step"] for row in result["curves"]] == list(range(1, 21))
    assert list(result["curves"][0]) == ["step", "fp32", "bf16", "fp32, other order"]


def test_loading_is_measured_in_turn_with_the_step_that_takes_the_images(monkeypatch):
    import bridge  # before timm

    monkeypatch.setattr(loading, "TimmAugmentation", bridge.Bridged)
    monkeypatch.setattr(loading, "_WORKERS", (0, 1))
    result = bench.run(["data"], quick=True)
    assert result["left_out"] == []
    rows = {(row["img_size"], row["what"]): row for row in result["data"]}
    step, one_by_one = "training step, vim_nano", "timm, image by image"
    small, large = ["tensors, whole batches", one_by_one, step], [one_by_one, f"{one_by_one}, 1 workers", step]
    assert list(rows) == [(16, what) for what in small] + [(40, what) for what in large]
    for (img_size, what), row in rows.items():
        assert row["images_per_s"] == pytest.approx(1e3 * row["images"] / row["median_ms"])
        assert row["of_model"] == pytest.approx(row["images_per_s"] / rows[img_size, step]["images_per_s"])
        expected = row["images_per_s"] / rows[img_size, one_by_one]["images_per_s"]
        assert row["faster"] == (None if what == step else pytest.approx(expected))
    assert "images_per_s" in bench.text(result)


def test_without_timm_its_rows_are_left_out_with_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.data", None)
    result = bench.run(["data"], quick=True)
    assert [row["what"] for row in result["data"]] == ["tensors, whole batches", *["training step, vim_nano"] * 2]
    assert {row["faster"] for row in result["data"]} == {None}
    (row,) = result["left_out"]
    assert "pip install 'famba[paper]'" in row["reason"]
    assert f"left out: timm, image by image: {row['reason']}" in bench.text(result)


def test_growth_compares_measured_steps_with_the_law_of_the_fitted_sizes(monkeypatch):
    """A clock and memory of 5 + 2 x in all but the last size, whose memory is 20% above."""
    sizes = iter([7.0, 9.0, 13.0, 21.0 * 1.2] * len(BACKENDS))
    monkeypatch.setattr(growth.memory, "peak_memory", lambda *_: next(sizes) * 2**20)
    step = lambda self, calls, **_: {x: {"median_ms": 5 + 2 * int(x)} for x in calls}  # noqa: E731
    monkeypatch.setattr(model.Setting, "times", step)
    frame = growth.bench_growth(QUICK, {"depth": growth.Axis("depth", (1, 2, 4), (8,))})
    assert frame["depth"].tolist() == [1, 2, 4, 8] * len(BACKENDS)
    assert frame["fitted"].tolist() == [True, True, True, False] * len(BACKENDS)
    np.testing.assert_allclose(frame["time_ms_off"], 1)
    np.testing.assert_allclose(frame["memory_mib_off"], [1, 1, 1, 1.2] * len(BACKENDS))
    np.testing.assert_allclose(frame["time_ms_coefficients"].tolist(), [[5, 2]] * len(frame))
    figure = plots.growth(frame, {"device": "cpu: a machine", "threads": 3})
    assert figure.get_supxlabel().replace("\n", " ").endswith("on cpu: a machine, threads: 3.")
    time, memory = figure.axes
    assert [axes.get_xlabel() for axes in (time, memory)] == ["depth (layers)"] * 2
    for axes, off in ((time, "+0%"), (memory, "+20%")):
        laws = [text.get_text() for text in axes.get_legend().get_texts()]
        assert laws == [f"{name}: 5 + 2 x  ({off})" for name in frame["backend"].unique()]


def test_a_steps_time_is_predicted_layer_by_layer():
    unfused_ms = {10: 20.0, 20: 30.0, 40: 70.0}
    assert timing.predicted_ms([20, 20, 20], unfused_ms) == 30
    assert timing.predicted_ms([40, 20, 10], unfused_ms) == 40
    assert timing.predicted_ms([30, 15], unfused_ms) == (50 + 25) / 2
    with pytest.raises(InputError, match=r"counts: 9 tokens; measured were 10\.\.40"):
        timing.predicted_ms([20, 9], unfused_ms)

"""The native kernels: every instruction set against the reference, threads, strides, the build."""

import math
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from agreement import NAMES, STEPS, assert_scan_agrees, draw_scan, draw_steps, results
from hypothesis import given
from hypothesis import strategies as st
from processes import start

from famba.errors import BackendError
from famba.kernels.cpu import build, runtime
from famba.kernels.cpu import scan as native
from famba.kernels.ops import causal_conv1d_silu
from famba.kernels.scan import backends, selective_scan, selective_scan_ref

pytestmark = pytest.mark.skipif(
    build.unavailable().startswith("no C++ compiler"),
    reason="no C++ compiler: the kernels cannot be built, and famba runs on torch alone",
)
scan = partial(selective_scan, delta_softplus=True, backend="native")


def test_the_kernels_run_on_the_widest_vectors_that_the_processor_has():
    assert backends()["native"] == ""
    flags = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"} <= flags:
        assert runtime.instruction_set() == "avx512"
    elif {"avx2", "fma"} <= flags:
        assert runtime.instruction_set() == "avx2"
    else:
        assert runtime.instruction_set() == ("neon" if "asimd" in flags or "Features" in flags else "baseline")


def test_each_library_is_of_the_set_that_was_asked_for(instruction_set):
    assert runtime.instruction_set() in (instruction_set, "neon")


@given(
    b=st.integers(1, 4),
    e=st.integers(1, 70),
    t=st.integers(1, 70),
    n=st.integers(1, 64),
    layout=st.sampled_from(["channels", "tokens", "slices", "scattered"]),
    reverse=st.booleans(),
    optional=st.booleans(),
    seed=st.integers(0, 100),
)
def test_it_agrees_with_the_reference_at_any_shape_and_strides(
    instruction_set, b, e, t, n, layout, reverse, optional, seed
):
    tensors = draw_scan(b, e, t, n, seed=seed, layout=layout, optional=optional, scale=0.1)
    assert_scan_agrees(tensors, 1e-5, backend="native", reverse=reverse)


@pytest.mark.parametrize(("t", "scale"), STEPS)
def test_steps_of_any_size_and_long_sequences(instruction_set, t, scale):
    tensors, expected = draw_steps(t, scale)
    assert_scan_agrees(tensors, 1e-5, backend="native", expected=expected)


def test_bfloat16_is_rounded_once_and_to_nearest(instruction_set):
    tensors = draw_scan(2, 21, 40, 16, dtype=torch.bfloat16, scale=0.1)
    found = assert_scan_agrees(tensors, 2**-8, backend="native")
    assert [x.dtype for x in found] == [torch.bfloat16, *(x.dtype for x in tensors)]
    assert torch.equal(found[0], scan(*(x.detach().float() for x in tensors)).bfloat16())


@pytest.mark.parametrize("b", [1, 3, 40])
def test_no_bit_depends_on_the_thread_count_or_on_an_openmp_runtime(threads, monkeypatch, b):
    tensors = draw_scan(b, 100, 50, 16)
    threads(1)
    alone = results(scan, tensors)
    for count in (2, 3, 7):
        threads(count)
        assert all(map(torch.equal, results(scan, tensors), alone))
    monkeypatch.setattr(runtime, "_parallel", lambda: None)  # it starts threads of its own
    assert all(map(torch.equal, results(scan, tensors), alone))


def test_a_value_that_is_not_a_number_stays_in_its_sequence(instruction_set):
    u, *others = (x.detach() for x in draw_scan(2, 20, 30, 4))
    u[1, 3, 10] = torch.nan
    expected = torch.zeros(2, 20, 30, dtype=torch.bool)
    expected[1, 3, 10:] = True
    assert torch.equal(scan(u, *others).isnan(), expected)


HUGE = [-math.inf, -2e38, -3e37, -1e10, -1e4, -105.0, -0.0, 0.0, 105.0, 1e4, 1e10, 3e37, 2e38, math.inf, math.nan]


def test_silu_of_infinite_and_huge_numbers_is_torchs(instruction_set):
    extreme = torch.tensor(HUGE).expand(1, 20, -1).mT.contiguous().mT.requires_grad_()
    one, weight = torch.ones(1, 20, len(HUGE)), torch.ones(20, 1)

    def calls(backend):
        yield causal_conv1d_silu(extreme, weight, backend=backend)
        yield selective_scan(one, one, -one[0, :, :1], one[:, :1], one[:, :1], z=extreme, backend=backend)

    found, expected = (
        [(out.detach(), *torch.autograd.grad(out.sum(), extreme)) for out in calls(backend)]
        for backend in ("native", "torch")
    )
    assert len(found) == 2
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("step", [-math.inf, -3e38, 1e30, math.inf])
def test_steps_and_rates_without_bound_decay_to_nothing_or_not_at_all(instruction_set, step):
    u, delta, A, B, C, *_ = (x.detach() for x in draw_scan(2, 20, 9, 5))
    delta[..., 4] = step
    A[:, 2] = -math.inf
    found, expected = (f(u, delta, A, B.abs(), C.abs(), delta_softplus=True) for f in (scan, selective_scan_ref))
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found[..., :4].isfinite().all()


@pytest.mark.parametrize("layout", ["channels", "tokens"])
def test_outputs_and_gradients_lie_in_memory_as_their_tensors_do(layout):
    tensors = draw_scan(2, 20, 30, 4, layout=layout)
    assert [x.stride() for x in results(scan, tensors)] == [x.stride() for x in (tensors[0], *tensors)]


@pytest.mark.parametrize(
    ("n", "types", "message"),
    [
        (3, {"z": torch.float16}, "it runs on float32 and bfloat16, got torch.float16"),
        (65, {}, "it runs with at most 64 states per channel, got 65"),
    ],
)
def test_what_it_cannot_run_on_is_refused_by_name_and_passed_over_by_auto(n, types, message):
    inputs = {name: x.detach().to(types.get(name)) for name, x in zip(NAMES, draw_scan(2, 5, 6, n), strict=True)}
    with pytest.raises(BackendError, match=f"backend 'native' cannot run here: {message}"):
        scan(**inputs)
    assert torch.equal(scan(**inputs, backend="auto"), scan(**inputs, backend="torch"))
    assert native.unsuited(*draw_scan(1, 2, 3, 64)) == ""


def python(code, **environment):
    return start("-c", code, environment=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_two_processes_may_build_at_once_and_the_third_builds_nothing(tmp_path):
    compiler, links = tmp_path / "compiler", tmp_path / "links"
    compiled = build.build(build.instruction_set())
    compiler.write_text(f"""#!/bin/sh
        for made; do :; done
        case "$*" in
            *-shared*) echo >> {links}; until [ $(wc -l < {links}) -ge 2 ]; do sleep 0.1; done; cp {compiled} "$made";;
            *-c*) : > "$made";;
        esac
    """)
    compiler.chmod(0o755)
    code = f"from famba.kernels.cpu import build; print(build.build({build.instruction_set()!r}))"
    environment = {"XDG_CACHE_HOME": str(tmp_path), "CXX": str(compiler)}
    both = [python(code, **environment) for _ in range(2)]
    (path,) = {process.communicate(timeout=100)[0].strip() for process in both}
    assert links.read_text() == 2 * "\n"
    assert [x.name for x in (tmp_path / "famba" / "kernels").iterdir()] == [Path(path).name]
    assert python(code, **environment).communicate(timeout=100)[0].strip() == path
    assert links.read_text() == 2 * "\n"


def test_without_a_compiler_or_triton_torch_takes_over_and_says_so(tmp_path):
    code = (
        "import sys; sys.modules['triton'] = None;"
        "import torch; from famba.kernels.scan import backends, selective_scan as f;"
        "print(backends()['native'], backends()['triton'], sep='\\n');"
        "x = torch.ones(1, 2, 3); a = -torch.ones(2, 4); b = torch.ones(1, 4, 3);"
        "assert f(x, x, a, b, b).equal(f(x, x, a, b, b, backend='torch'));"
        "f(x, x, a, b, b, backend='native')"
    )
    out = python(code, PATH="", CXX="", XDG_CACHE_HOME=str(tmp_path)).communicate(timeout=100)[0].splitlines()
    reason = "no C++ compiler (c++, g++, clang++) on PATH; install g++ or clang, or set CXX"
    assert out[:2] == [reason, "triton is missing; pip install triton"]
    assert out[-1] == f"famba.errors.BackendError: backend 'native' cannot run here: {reason}"
    assert sum(line.startswith(f"backend auto: slower kernels than native run on cpu: {reason}") for line in out) == 1

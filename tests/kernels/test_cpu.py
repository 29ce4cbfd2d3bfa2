"""The native kernels: every instruction set against the reference, threads, strides, torch's own checks, the build."""

import itertools
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from famba.errors import BackendError
from famba.kernels.cpu import build, runtime
from famba.kernels.cpu import scan as native
from famba.kernels.ops import causal_conv1d_silu
from famba.kernels.scan import backends, selective_scan, selective_scan_ref

pytestmark = pytest.mark.skipif(
    build.unavailable().startswith("no C++ compiler"),
    reason="no C++ compiler: the kernels cannot be built, and famba runs on torch alone",
)
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
ROOT = Path(__file__).resolve().parents[2]


def draw(b, e, t, n, *, seed=0, dtype=torch.float32, layout="channels", optional=True, scale=0.1):
    """Arguments in the order of `selective_scan`, as leaves; (b, e, t) tensors lie in memory as `layout` says."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    def tokens(rows):
        if layout == "channels":
            return normal(b, t, rows).transpose(1, 2)
        if layout == "tokens":
            return normal(b, rows, t)
        if layout == "slices":  # of one projection, as the model has them
            return normal(b, t, rows + 3)[..., 2:-1].transpose(1, 2)
        return normal(b, 2 * t, 3 * rows)[:, ::2, ::3].transpose(1, 2)

    u, delta, z = tokens(e).to(dtype), tokens(e).to(dtype) + math.log(math.expm1(scale)), tokens(e).to(dtype)
    tensors = [u, delta, -torch.exp(normal(e, n)), tokens(n).to(dtype), tokens(n).to(dtype), normal(e), z, normal(e)]
    if not optional:
        tensors[5:] = [None] * 3
    return [x if x is None else x.detach().requires_grad_() for x in tensors]


def results(function, tensors, **options):
    """Output and all gradients, by name, for a fixed cotangent."""
    given = dict(zip(NAMES, tensors, strict=True))
    out = function(*tensors, delta_softplus=True, **options)
    cotangent = torch.randn(out.mT.shape, generator=torch.Generator().manual_seed(1)).mT.bfloat16().to(out.dtype)
    leaves = {name: x for name, x in given.items() if x is not None}
    return {"out": out.detach()} | dict(
        zip(leaves, torch.autograd.grad(out, list(leaves.values()), cotangent), strict=True)
    )


def exact(tensors, **options):
    """The reference in double precision."""
    return results(
        selective_scan_ref, [x if x is None else x.detach().double().requires_grad_() for x in tensors], **options
    )


def worst_error(found, tensors, **options):
    """The largest error of any tensor relative to its largest value."""
    expected = exact(tensors, **options)
    assert found.keys() == expected.keys() >= {"out", "u", "delta", "A", "B", "C"}
    return max(
        ((found[k].double() - x).abs().max() / x.abs().max().clamp_min(1e-30)).item() for k, x in expected.items()
    )


def same_bits(found, expected):
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], x) for name, x in expected.items())


def test_it_is_what_auto_takes_on_a_machine_with_a_compiler():
    assert backends()["native"] == ""
    tensors = [x.detach() for x in draw(2, 5, 7, 3)]
    assert torch.equal(selective_scan(*tensors), selective_scan(*tensors, backend="native"))


def test_the_kernels_run_on_the_widest_vectors_that_the_processor_has():
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
    tensors = draw(b, e, t, n, layout=layout, optional=optional, seed=seed)
    found = results(selective_scan, tensors, reverse=reverse, backend="native")
    assert worst_error(found, tensors, reverse=reverse) < 1e-5


@pytest.mark.parametrize(("t", "scale"), [*itertools.product((1, 16, 17), (1e-6, 0.01, 1.0, 50.0, 1e4)), (2000, 1e-6)])
def test_steps_of_any_size_and_long_sequences(instruction_set, t, scale):
    tensors = draw(*((2, 20) if t < 2000 else (1, 3)), t, 16, scale=min(scale, 30))
    tensors[1] = (tensors[1].detach() + (scale if scale > 30 else 0)).requires_grad_()
    assert worst_error(results(selective_scan, tensors, backend="native"), tensors) < 1e-5


def test_bfloat16_is_rounded_once_and_to_nearest(instruction_set):
    tensors = draw(2, 21, 40, 16, dtype=torch.bfloat16)
    found = results(selective_scan, tensors, backend="native")
    assert [x.dtype for x in found.values()] == [torch.bfloat16, *(x.dtype for x in tensors)]
    assert worst_error(found, tensors) < 2**-8
    upcast = [x.detach().float().requires_grad_() for x in tensors]
    assert torch.equal(found["out"], selective_scan(*upcast, delta_softplus=True, backend="native").bfloat16())


@pytest.mark.parametrize("b", [1, 3, 40])
def test_the_thread_count_changes_no_bit(threads, b):
    tensors = draw(b, 100, 50, 16)
    threads(1)
    alone = results(selective_scan, tensors, backend="native")
    for count in (2, 3, 7):
        threads(count)
        assert same_bits(results(selective_scan, tensors, backend="native"), alone)


def test_without_an_openmp_runtime_it_starts_threads_of_its_own(threads, monkeypatch):
    threads(3)
    tensors = draw(5, 40, 30, 16)
    expected = results(selective_scan, tensors, backend="native")
    monkeypatch.setattr(runtime, "_parallel", lambda: None)
    assert same_bits(results(selective_scan, tensors, backend="native"), expected)


def test_a_value_that_is_not_a_number_stays_in_its_sequence(instruction_set):
    u, *others = (x.detach() for x in draw(2, 20, 30, 4))
    u[1, 3, 10] = float("nan")
    out = selective_scan(u, *others, delta_softplus=True, backend="native")
    assert out[0].isfinite().all()
    assert out[1, 3, 10:].isnan().all()
    assert out[1, 3, :10].isfinite().all()
    assert out[1, [0, 1, 2, *range(4, 20)]].isfinite().all()


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
    u, delta, A, B, C, *_ = (x.detach() for x in draw(2, 20, 9, 5))
    delta[..., 4] = step
    A[:, 2] = -math.inf
    found, expected = (
        f(u, delta, A, B.abs(), C.abs(), delta_softplus=True).float()
        for f in (partial(selective_scan, backend="native"), selective_scan_ref)
    )
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found[..., :4].isfinite().all()


@pytest.mark.parametrize("layout", ["channels", "tokens"])
def test_outputs_and_gradients_lie_in_memory_as_their_tensors_do(layout):
    tensors = draw(2, 20, 30, 4, layout=layout)
    found = results(selective_scan, tensors, backend="native")
    expected = dict(zip(NAMES, tensors, strict=True)) | {"out": tensors[0]}
    assert {name: x.stride() for name, x in found.items()} == {name: x.stride() for name, x in expected.items()}


@pytest.mark.parametrize("optional", [True, False])
def test_the_operators_pass_torchs_own_checks(optional):
    tensors = draw(2, 5, 20, 3, optional=optional)
    torch.library.opcheck(torch.ops.famba.scan.default, (*tensors, True, False, True))
    torch.library.opcheck(
        torch.ops.famba.scan.default, (*(x if x is None else x.detach() for x in tensors), True, True, False)
    )
    tensors = [x if x is None else x.detach() for x in tensors]
    states = torch.ops.famba.scan(*tensors, True, False, True)[1]
    grad = torch.randn(2, 5, 20)
    torch.library.opcheck(torch.ops.famba.scan_backward.default, (grad, *tensors, states, True, False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.float64}, "it runs on float32 and bfloat16, got torch.float64"),
        ({"z": torch.float16}, "it runs on float32 and bfloat16, got torch.float16"),
        ({"A": torch.float64}, "it runs on float32 and bfloat16, got torch.float64"),
    ],
)
def test_what_it_cannot_run_on_is_refused_by_name_and_passed_over_by_auto(change, message):
    inputs = {name: x.detach().to(change.get(name)) for name, x in zip(NAMES, draw(2, 5, 6, 3), strict=True)}
    with pytest.raises(BackendError, match=f"backend 'native' cannot run here: {message}"):
        selective_scan(**inputs, backend="native")
    assert torch.equal(selective_scan(**inputs), selective_scan(**inputs, backend="torch"))


def test_too_many_states_are_refused():
    assert native.unsuited(*draw(1, 2, 3, 64)) == ""
    assert native.unsuited(*draw(1, 2, 3, 65)) == "it runs with at most 64 states per channel, got 65"


def python(code, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


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


def test_a_compiler_that_fails_and_a_cache_that_cannot_be_written_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("FAMBA_CXXFLAGS", "-fnonsense")
    broken, _ = build._attempt.__wrapped__("baseline")
    assert "could not compile the kernels" in broken
    assert "\n" not in broken
    shutil.rmtree(tmp_path / "famba")
    (tmp_path / "famba").write_text("not a folder")
    blocked, _ = build._attempt.__wrapped__("baseline")
    assert blocked.startswith(
        f"no cache for the kernels ([Errno 17] File exists: '{tmp_path / 'famba'}'); set XDG_CACHE"
    )
    assert "\n" not in blocked

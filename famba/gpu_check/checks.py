"""The checks of `python -m famba gpu-check`; famba.gpu_check runs each in a process.

Letters as elsewhere: `b` batch, `e` channels, `t` tokens, `n` states per channel, `k` taps, `m` dt_rank.
"""

import contextlib
import dataclasses
import functools
import importlib
import itertools
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints
from unittest import mock
from xml.etree import ElementTree

import torch
from torch import Tensor
from torch.nn import functional

from famba import config
from famba.config import FusionOptions, FusionRule, Params
from famba.fusion import matching, merge
from famba.fusion.matching import Matching, match_tokens
from famba.gpu_check import ROOT, Outcome, Say, Setting, Skipped
from famba.kernels import ops, scan
from famba.kernels.precision import autocast, configure
from famba.models.vim import VisionMamba, create_model
from famba.profiling import environment

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_BATCHES, _STATES = (1, 2, 3, 16), (1, 2, 3, 8, 16, 33, 64)
_SIZES = ((5, 7), (33, 1), (70, 67), (48, 16), (3, 2))  # e, t
_TAPS, _CLASS_TOKENS, _IMAGES = (4, 2, 8), ("head", "middle", "none"), (6, 7, 8)
# Relative to a tensor's largest value. bfloat16 rounds each intermediate by at most 2^-9; a model has some hundred of
# them, and the native kernels, which are correct, have errors of up to 0.1.
_TOLERANCE = {"operators": {"fp32": 2e-5, "bf16": 2**-6}, "models": {"fp32": 1e-4, "bf16": 0.25}}
_FAILURES = 10  # stop after so many
_REPEATS = 10
_COMPARING_S = 30.0  # below the check's own limit, so that its results are reported
_QUICK, _SANITIZED = 40, 12  # cases
_WORKERS = 2
_CLASSES, _CLASS_IMAGES = 4, 120  # more than 1 MiB of pixels, so that they can stream


class _Case(NamedTuple):
    name: str
    precision: str
    error: Callable[[], float]  # relative, against double precision


def device(setting: Setting, say: Say) -> Outcome:
    """The device exists and computes."""
    where = _begin(setting)
    tables = environment.environment(where)
    if where.type == "cuda":
        tables["driver"] = tables["versions"]["driver"]
        tables["memory_mib"] = torch.cuda.get_device_properties(where).total_memory / 2**20
    torch.ones(8, device=where).sum().item()
    versions = ", ".join(f"{name} {version}" for name, version in tables["versions"].items())
    return Outcome(f"{tables['device']}, {tables['instruction_set']}; {versions}", tables)


def operators(setting: Setting, say: Say) -> Outcome:
    """Outputs and gradients of every operator against torch in double precision."""
    _begin(setting)
    return _compared(_operator_cases(setting), say, _TOLERANCE["operators"], _QUICK if setting.quick else None)


def models(setting: Setting, say: Say) -> Outcome:
    """Logits and gradients of whole models against torch in double precision, with every combination of options.

    Rounding can change a matching, so the model in double precision matches for both; `operators` checks the matching
    kernel where no similarity is near a tie.
    """
    _begin(setting)
    kinds = get_type_hints(FusionOptions)
    combined = [FusionOptions(*chosen) for chosen in itertools.product(*map(get_args, kinds.values()))]
    cases = []
    for i, (precision, options) in enumerate(itertools.product(_DTYPES, combined)):
        b, n, cls_position, img_size = _BATCHES[i % 4], _STATES[i % 7], _CLASS_TOKENS[i % 3], _IMAGES[i // 3 % 3]
        pool = "cls" if cls_position != "none" and i % 2 else "mean"
        sizes = {"img_size": img_size, "d_state": n, "cls_position": cls_position, "pool": pool, "fusion": options}
        sizes["average_directions"] = bool(i // 2 % 2)
        name = f"model, b {b}, n {n}, {img_size} px, class token {cls_position}, {precision}, "
        name += "/".join(vars(options).values())
        cases.append(_Case(name, precision, functools.partial(_model_error, setting, b, sizes, precision)))
    return _compared(cases, say, _TOLERANCE["models"], _QUICK if setting.quick else None)


def determinism(setting: Setting, say: Say) -> Outcome:
    """A training step gives the same bits every time."""
    where = _begin(setting)
    for precision in _DTYPES:
        torch.manual_seed(0)
        model = create_model("vim_nano", depth=4, schedule=[0, 6, 6, 6], num_classes=10, backend=setting.backend)
        model.to(where)
        images, labels = torch.randn(16, 3, 8, 8).to(where), torch.arange(16, device=where) % 10
        first: dict[str, Tensor] = {}
        for i in range(_REPEATS):
            say(f"{precision}, repeat {i + 1}")
            with autocast(where, precision):
                loss = functional.cross_entropy(model(images).float(), labels)
            weights = dict(model.named_parameters())
            grads = torch.autograd.grad(loss, list(weights.values()))
            found = {"the loss": loss.detach(), **dict(zip(weights, grads, strict=True))}
            differ = [name for name, x in found.items() if not torch.equal(x, first.get(name, x))]
            assert not differ, f"{len(differ)} of {len(found)} tensors differ, {differ[0]} first"
            first = first or found
    return Outcome(f"the same bits {_REPEATS} times, in {' and in '.join(_DTYPES)}: the loss and all gradients")


def training(setting: Setting, say: Say) -> Outcome:
    """A run that is killed and resumed ends with the metrics of an uninterrupted one."""
    from famba.training import fit

    with _run_params(setting) as p, contextlib.ExitStack() as after:
        after.callback(fit.forget, p, seed=0)
        say("a run that is killed in its second epoch")
        # Forked before CUDA is initialised here.
        process = multiprocessing.get_context("fork").Process(target=_killed_run, args=(setting, p))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"the run to be killed ended with status {process.exitcode}"
        assert list(fit.folder(p, seed=0).glob("epoch-*.safetensors")), "it has written no checkpoint"
        say("the same run, resumed")
        _begin(setting)
        lengths: list[int] = []
        resumed = fit.fit(p, seed=0, callbacks=[lambda history, _: lengths.append(len(history))])
        assert lengths[0] == 2, f"it continued with epoch {lengths[0]}, not with 2"
        fit.forget(p, seed=0)
        say("an uninterrupted run")
        whole = fit.fit(p, seed=0)
    losses = [[row["train_loss"] for row in run.history] for run in (resumed, whole)]
    assert resumed.metrics == whole.metrics, f"other metrics after resuming; training losses {losses}"
    assert losses[0] == losses[1], f"equal metrics, but training losses {losses}"
    return Outcome(
        f"killed in epoch 2 of {p.train.epochs} and resumed: equal metrics, top-1 "
        f"{whole.metrics['top1_percent']:.1f}%, training loss {losses[1][0]:.3f} to {losses[1][-1]:.3f}"
    )


def streaming(setting: Setting, say: Say) -> Outcome:
    """Training on images that worker processes decode."""
    from famba import data
    from famba.training import fit

    _begin(setting)
    with _run_params(setting) as p:
        streamed = dataclasses.replace(p.data, memory_mib=1, workers=_WORKERS)
        p = dataclasses.replace(p, data=streamed, train=dataclasses.replace(p.train, epochs=1))
        say("loading")
        assert not isinstance(data.load(p.data).train, data.Split), "the images lie in memory"
        say("training")
        run = fit.fit(p, seed=0)
        fit.forget(p, seed=0)
    (row,) = run.history
    return Outcome(f"an epoch by {_WORKERS} workers: {run.cost['train_time_s']:.1f} s, loss {row['train_loss']:.3f}")


def graph(setting: Setting, say: Say) -> Outcome:
    """Training with a CUDA graph gives the losses of training without."""
    from famba.training import fit

    _begin(setting)
    losses = []
    with _run_params(setting) as p:
        for captured in (False, True):
            say(f"cuda_graph: {captured}")
            q = dataclasses.replace(p, train=dataclasses.replace(p.train, cuda_graph=captured))
            losses.append([row["train_loss"] for row in fit.fit(q, seed=0).history])
            fit.forget(q, seed=0)
    apart = max(abs(x - y) / y for x, y in zip(*losses, strict=True))
    # A matrix product may take another workspace, and thus another order of sums, inside a graph.
    assert apart <= 1e-4, f"training losses {losses[0]} without, {losses[1]} with a graph"
    return Outcome(f"{len(losses[0])} epochs, losses apart by {apart:.0e}, the last {losses[0][-1]:.3f}")


def steps(setting: Setting, say: Say) -> Outcome:
    """Time and peak memory of a training step, beside mamba-ssm's where it is installed."""
    line = "{model}, {contestant}: {median_ms:.1f} ms, {peak_mib:.0f} MiB"
    return _measured("steps", "steps", line, setting, say)


def fused_steps(setting: Setting, say: Say) -> Outcome:
    """Time of a training step with fusion, relative to the prediction of its token counts."""
    line = "{strategy}: {of_predicted:.2f} of predicted, {of_unfused:.2f} of unfused"
    return _measured("fusion", "schedules", line, setting, say)


def _measured(part: str, table: str, line: str, setting: Setting, say: Say) -> Outcome:
    """A part of the GPU's benchmark, one of its tables as text."""
    from famba import bench

    _begin(setting)
    say(f"python -m famba bench --gpu {part}")
    result = bench.run([part], on_gpu=True, quick=setting.quick, device=setting.device)
    left_out = "".join(f"; left out: {row['what']}: {row['reason']}" for row in result["left_out"])
    assert result.get(table), left_out
    tables = {name: result[name] for name in bench.gpu.TITLES if name in result}
    return Outcome("; ".join(line.format_map(row) for row in result[table]) + left_out, tables)


def tests(setting: Setting, say: Say) -> Outcome:
    """The tests that need a GPU."""
    importlib.import_module("pytest")
    # Collecting the others would import packages that may be missing here.
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        # A process of its own: the tests' import hooks must be in place before famba is imported.
        command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += ["--continue-on-collection-errors"]  # a package missing for one file must not stop the others
        with subprocess.Popen([*command, *files], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="")
                if "::" in line:
                    say(line.strip())
        assert report.exists(), f"pytest ended with status {process.returncode}"
        cases = list(ElementTree.parse(report).iter("testcase"))
    passed, failed, lacking = 0, list[str](), set[str]()
    for case in cases:
        wrong = [x.text or "" for kind in ("failure", "error") for x in case.findall(kind)]
        if missing := re.search(r"No module named '(\w+)", "\n".join(wrong)):
            lacking.add(missing[1])
        elif wrong:
            failed.append(f"{case.get('classname')}.{case.get('name')}")
        else:
            passed += case.find("skipped") is None
    summary = f"{passed} of {len(cases)} passed" + (f", missing: {', '.join(sorted(lacking))}" if lacking else "")
    assert not failed, f"{len(failed)} failed, {summary}: {', '.join(failed)}"
    assert passed, f"{summary}; pytest ended with status {process.returncode}"
    return Outcome(summary)


def sanitizer(setting: Setting, say: Say) -> Outcome:
    """Small calls of every operator under NVIDIA's compute-sanitizer."""
    program = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if program is None:
        raise Skipped("compute-sanitizer is missing")
    code = "import sys; sys.path[:] = {!r}; from famba.gpu_check import checks; checks.small_calls({!r})"
    code = code.format(sys.path, setting.device)
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else an overrun stays inside torch's block
    for tool in ("memcheck", "racecheck"):
        say(tool)
        # Calls of the CUDA API may fail: torch and Triton try some.
        how = ["--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
        command = [program, *how, sys.executable, "-c", code]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
        print(done.stdout[-2000:], done.stderr[-2000:])
        assert done.returncode == 0, f"{tool}: status {done.returncode}, {(done.stdout.splitlines() or [''])[-1]}"
    return Outcome("memcheck and racecheck have found nothing")


def small_calls(name: str) -> None:
    """The program that runs under the sanitizer."""
    setting = Setting(name, quick=True)
    _begin(setting)
    _compared(_operator_cases(setting), print, _TOLERANCE["operators"], _SANITIZED)


def _begin(setting: Setting) -> torch.device:
    """The device, made torch's current one."""
    where = torch.device(setting.device)
    if where.type == "cuda":
        if not torch.cuda.is_available():
            raise Skipped("torch sees no CUDA device here")
        importlib.import_module("triton")
        if where.index is not None:
            torch.cuda.set_device(where)
    elif reason := scan.backends()[setting.backend]:
        raise Skipped(reason)
    torch.backends.cudnn.deterministic = True  # the patch embedding's gradient, which is not famba's
    configure()  # as in training
    return where


def _compared(cases: Sequence[_Case], say: Say, tolerance: Mapping[str, float], most: int | None) -> Outcome:
    """The largest error of each precision and its case. Cases run in random order within the time limit."""
    cases = random.Random(0).sample(cases, len(cases))[:most]
    end = time.monotonic() + _COMPARING_S
    worst: dict[str, tuple[float, str]] = {}
    failures: list[str] = []
    made = 0
    for case in cases:
        if time.monotonic() > end or len(failures) == _FAILURES:
            break
        say(case.name)
        made += 1
        try:
            error = case.error()
        except Exception as raised:  # whatever compilers and drivers raise; the next case runs
            traceback.print_exc()
            failures.append(f"{case.name}: {type(raised).__name__}: {(str(raised).splitlines() or [''])[0]}")
            continue
        worst[case.precision] = max(worst.get(case.precision, (0.0, "")), (error, case.name))
        if not error <= tolerance[case.precision]:
            failures.append(f"{case.name}: relative error {error:.1e}, more than {tolerance[case.precision]:.1e}")
    print("\n".join(failures))
    assert not failures, f"{len(failures)} of {made} cases; {failures[0]}"
    errors = "; ".join(f"{precision}: {error:.1e} at {name}" for precision, (error, name) in sorted(worst.items()))
    return Outcome(f"{made} of {len(cases)} cases, worst relative error {errors}")


class _Shape(NamedTuple):
    """Sizes of one call, and a number that selects the options of the operator."""

    b: int
    e: int
    t: int
    n: int
    k: int
    variant: int


_Draw = Callable[..., Tensor]  # standard normal numbers of a shape
_Call = tuple[Callable[..., Any], list[Tensor]]  # an operator, whose last argument is the backend, and its tensors


def _operator_cases(setting: Setting) -> list[_Case]:
    cases = []
    for i, (b, n, precision) in enumerate(itertools.product(_BATCHES, _STATES, _DTYPES)):
        variant = i // len(_DTYPES)
        shape = _Shape(b, *_SIZES[variant % 5], n, _TAPS[variant % 3], variant)
        sizes = ", ".join(f"{name} {x}" for name, x in shape._asdict().items())
        for name, make in _OPERATORS.items():
            error = functools.partial(_operator_error, setting, make, shape, precision)
            cases.append(_Case(f"{name}, {sizes}, {precision}", precision, error))
    return cases


def _operator_error(setting: Setting, make: Callable[..., _Call], shape: _Shape, precision: str) -> float:
    """The largest relative error of the outputs and of all gradients."""
    generator = torch.Generator().manual_seed(0)
    function, given = make(shape, lambda *size: torch.randn(*size, generator=generator), _DTYPES[precision])

    def results(tensors: Sequence[Tensor], backend: str) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in tensors]
        out = function(*leaves, backend)
        out = out if isinstance(out, tuple) else (out,)
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(x.shape, generator=generator).bfloat16().to(x.device, x.dtype) for x in out]
        return [*(x.detach() for x in out), *torch.autograd.grad(out, leaves, cotangents)]

    found = results([x.to(setting.device, copy=True) for x in given], setting.backend)
    return _largest_error(found, results([x.double() for x in given], "torch"))


def _largest_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Relative to each tensor's largest value; NaN if there is one."""
    errors = []
    for x, y in zip(found, exact, strict=True):
        difference, size = (x.cpu().double() - y).abs().max(), y.abs().max()
        errors.append(difference / size if size else difference)  # with a single token the gradient of A is zero
    return torch.stack(errors).max().item()


def _scan(s: _Shape, draw: _Draw, dtype: torch.dtype) -> _Call:
    def run(*given: Any) -> Tensor:
        *tensors, backend = given
        return scan.selective_scan(*tensors, delta_softplus=True, reverse=bool(s.variant % 2), backend=backend)

    D, bias = draw(2, s.e).unbind()
    A = -torch.exp(draw(s.e, s.n))
    u, delta, B, C, z = (draw(s.b, s.t, rows).mT.to(dtype) for rows in (s.e, s.e, s.n, s.n, s.e))
    return run, [u, delta - 1, A, B, C, D, z, bias]


def _both_scans(s: _Shape, draw: _Draw, dtype: torch.dtype) -> _Call:
    m, tensors = 3, []
    gate = draw(s.b, s.t, s.e).mT.to(dtype)
    for _ in range(2):
        u, _, A, B, C, D, _, bias = _scan(s, draw, dtype)[1]
        tensors += [u, draw(s.b, s.t, m).mT.to(dtype), draw(s.e, m) / m, A, B, C, D, bias]

    def run(*given: Any) -> Tensor:
        *sides, gate, backend = given
        return ops.bidirectional_scan(ops.Side(*sides[:8]), ops.Side(*sides[8:]), gate, scale=0.5, backend=backend)

    return run, [*tensors, gate]


def _convolution(s: _Shape, draw: _Draw, dtype: torch.dtype) -> _Call:
    def run(x: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        *weights, backend = given
        return ops.bidirectional_conv1d_silu(x, tuple(weights[:2]), tuple(weights[2:]), backend=backend)

    # The model's x is one half of a wider tensor.
    x = draw(s.b, s.t, 2 * s.e).chunk(2, dim=-1)[1].mT.to(dtype)
    return run, [x, draw(s.e, s.k), draw(s.e), draw(s.e, s.k), draw(s.e)]


def _norm(s: _Shape, draw: _Draw, dtype: torch.dtype) -> _Call:
    def run(x: Tensor, weight: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        *residual, backend = given
        return ops.add_rms_norm(x, residual[0] if residual else None, weight, backend=backend)

    x, residual = draw(2, s.b, s.t, s.e).unbind()
    return run, [x.to(dtype), draw(s.e), *([residual] if s.variant % 2 else [])]


def _fusion(s: _Shape, draw: _Draw, dtype: torch.dtype) -> _Call:
    t = s.t + 3
    cls_index = {"head": 0, "middle": t // 2, "none": None}[_CLASS_TOKENS[s.variant % 3]]
    order, weighting = ("scan", "append")[s.variant % 2], ("size", "mean")[s.variant // 2 % 2]
    feature, size = draw(s.b, t, 9), draw(s.b, t).abs().ceil()
    r = max(1, (t - 2) // 3)
    exact = match_tokens(feature.double(), r, protected=() if cls_index is None else (cls_index,), backend="torch")

    def run(x: Tensor, y: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        protected = () if cls_index is None else torch.full((s.b,), cls_index, device=x.device)
        pairs = match_tokens(feature.to(x.device), r, protected=protected, backend=backend)
        assert torch.equal(pairs.source.cpu(), exact.source), "other tokens than torch's disappear"
        assert torch.equal(pairs.target.cpu(), exact.target), "tokens join others than torch's"
        sizes = size.to(x.device, y.dtype)
        plan = merge.plan(pairs, sizes, order=order, weighting=weighting, backend=backend)
        return merge.apply_both(plan, x, y, backend=backend)

    x, y = draw(2, s.b, t, s.e).unbind()
    return run, [x.to(dtype), y]


_OPERATORS = {"scan": _scan, "both scans": _both_scans, "convolution": _convolution, "norm": _norm, "fusion": _fusion}


def _model_error(setting: Setting, b: int, config: Mapping[str, Any], precision: str) -> float:
    """The largest relative error of the logits and of all gradients."""
    sizes: dict[str, Any] = {"depth": 3, "d_model": 20, "num_classes": 5, "schedule": [0, 3, 2], **config}
    torch.manual_seed(0)
    exact = create_model("vim_nano", **sizes, backend="torch")
    model = create_model("vim_nano", **sizes, backend=setting.backend)
    model.load_state_dict(exact.state_dict())
    images = torch.randn(b, 3, config["img_size"], config["img_size"])
    matchings: list[Matching] = []

    def record(*args: Any, **kwargs: Any) -> Matching:
        matchings.append(match_tokens(*args, **kwargs))
        return matchings[-1]

    def repeat(feature: Tensor, r: int, **kwargs: Any) -> Matching:
        found, recorded = match_tokens(feature, r, **kwargs), matchings.pop(0)
        assert found.source.shape == recorded.source.shape, "another number of tokens is fused"
        return Matching(recorded.source.to(feature.device), recorded.target.to(feature.device))

    def results(model: VisionMamba, images: Tensor, match: Callable[..., Matching], how: str) -> list[Tensor]:
        with mock.patch.object(matching, "match_tokens", match), autocast(images.device, how):
            logits = model(images)
        cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits)
        return [logits.detach(), *torch.autograd.grad(logits, list(model.parameters()), cotangent)]

    expected = results(exact.double(), images.double(), record, "fp32")
    found = results(model.to(setting.device), images.to(setting.device), repeat, precision)
    assert not matchings, "fewer layers have fused"
    return _largest_error(found, expected)


@contextlib.contextmanager
def _run_params(setting: Setting) -> Iterator[Params]:
    """A run of three short epochs with fusion, on temporary images of noise whose brightness depends on the class."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        for split, label, i in itertools.product(("train", "test"), range(_CLASSES), range(_CLASS_IMAGES)):
            path = Path(folder, split, str(label), f"{i}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(128 + 32 * label, (32, 32, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(path)
        p = config.load("smoke", strategy="upper")
        yield dataclasses.replace(
            p,
            data=dataclasses.replace(p.data, dataset="folder", root=folder, img_size=32, limit=None),
            model=dataclasses.replace(p.model, patch_size=8, stride=8),
            fusion=FusionRule(r=2, first_layer=2, last_layer=4),
            train=dataclasses.replace(p.train, device=setting.device, epochs=3, backend=setting.backend),
        )


def _killed_run(setting: Setting, p: Params) -> None:
    from famba.training import fit

    _begin(setting)

    def kill(history: Sequence[Mapping[str, Any]], _: Mapping[str, Any]) -> None:
        if len(history) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    fit.fit(p, seed=0, callbacks=[kill])

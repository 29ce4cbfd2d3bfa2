"""The checks of `python -m famba gpu-check`, but for those of numbers; famba.gpu_check runs each in a process."""

import contextlib
import dataclasses
import importlib
import itertools
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor
from torch.nn import functional

from famba import config
from famba.gpu_check import ROOT, Outcome, Say, Setting, Skipped
from famba.kernels import scan
from famba.kernels.precision import autocast, configure
from famba.models.vim import create_model
from famba.params import FusionRule, Params
from famba.profiling import environment

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_REPEATS = 10
_WORKERS = 2
_CLASSES, _CLASS_IMAGES = 4, 120  # more than 1 MiB of pixels, so that they can stream


def device(setting: Setting, say: Say) -> Outcome:
    """The device exists and computes."""
    where = begin(setting)
    tables = environment.environment(where)
    if where.type == "cuda":
        tables["driver"] = tables["versions"]["driver"]
        tables["memory_mib"] = torch.cuda.get_device_properties(where).total_memory / 2**20
    torch.ones(8, device=where).sum().item()
    versions = ", ".join(f"{name} {version}" for name, version in tables["versions"].items())
    return Outcome(f"{tables['device']}, {tables['instruction_set']}; {versions}", tables)


def determinism(setting: Setting, say: Say) -> Outcome:
    """A training step gives the same bits every time."""
    where = begin(setting)
    for precision in DTYPES:
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
    return Outcome(f"the same bits {_REPEATS} times, in {' and in '.join(DTYPES)}: the loss and all gradients")


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
        begin(setting)
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

    begin(setting)
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

    begin(setting)
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

    begin(setting)
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
    code = "import sys; sys.path[:] = {!r}; from famba.gpu_check import accuracy; accuracy.small_calls({!r})"
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


def begin(setting: Setting) -> torch.device:
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
            data=dataclasses.replace(p.data, dataset="folder", root=folder, folds=None, img_size=32, limit=None),
            model=dataclasses.replace(p.model, patch_size=8, stride=8),
            fusion=FusionRule(r=2, first_layer=2, last_layer=4),
            train=dataclasses.replace(p.train, device=setting.device, epochs=3, backend=setting.backend),
        )


def _killed_run(setting: Setting, p: Params) -> None:
    from famba.training import fit

    begin(setting)

    def kill(history: Sequence[Mapping[str, Any]], _: Mapping[str, Any]) -> None:
        if len(history) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    fit.fit(p, seed=0, callbacks=[kill])

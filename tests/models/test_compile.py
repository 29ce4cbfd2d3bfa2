"""torch.compile and torch.export take the whole model: one graph, the same numbers.

Each case is a process of its own, because the shape checks that tests put around every function cannot be traced.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from famba import backends

ROOT = Path(__file__).resolve().parents[2]
NATIVE = pytest.param("native", marks=pytest.mark.skipif(backends()["native"] != "", reason=backends()["native"]))
PREPARE = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from famba import FusionOptions, create_model

compiler, backend, tolerance = sys.argv[1], sys.argv[2], float(sys.argv[3])
late = FusionOptions(order="append", weighting="mean", feature="delta", position="after_scan")
CASES = [([0, 5], FusionOptions(), "middle"), ([5, 5], late, "none")]
images = torch.rand(3, 3, 6, 6, generator=torch.Generator().manual_seed(0))

def models():
    for schedule, fusion, cls_position in CASES:
        torch.manual_seed(0)
        yield create_model(
            "vim_nano", img_size=6, depth=2, num_classes=10, schedule=schedule, fusion=fusion, backend=backend,
            cls_position=cls_position, pool="mean" if cls_position == "none" else "cls",
        )

def check(found, expected):
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
"""
COMPILE = """
for model in models():
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    with torch.no_grad():
        check(compiled(images), model(images))
    gradients = []
    for call in (compiled, model):
        call(images).square().sum().backward()
        gradients.append([weight.grad for weight in model.parameters()])
        model.zero_grad()
    for found, expected in zip(*gradients, strict=True):
        check(found, expected)
    print("the same")
"""
EXPORT = """
for model in models():
    shapes = {"images": {0: torch.export.Dim("b", min=2, max=64)}}
    exported = torch.export.export(model, (images,), dynamic_shapes=shapes).module()
    more = torch.rand(5, 3, 6, 6)
    check(exported(images), model(images))
    check(exported(more), model(more))
    print("the same")
"""


def run(code: str, compiler: str, backend: str, tolerance: float) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PREPARE + code, compiler, backend, str(tolerance)],
        cwd=ROOT,
        env=os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("backend", [NATIVE, pytest.param("torch", marks=pytest.mark.slow)])
def test_the_model_is_one_graph_and_its_gradients_are_the_same(backend):
    assert run(COMPILE, "aot_eager", backend, 1e-6) == 2 * ["the same"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", [NATIVE])
def test_the_default_compiler_makes_the_same_numbers(backend):
    assert run(COMPILE, "inductor", backend, 1e-4) == 2 * ["the same"]


@pytest.mark.parametrize("backend", [NATIVE])
def test_the_model_can_be_exported_for_any_batch(backend):
    assert run(EXPORT, "none", backend, 1e-6) == 2 * ["the same"]

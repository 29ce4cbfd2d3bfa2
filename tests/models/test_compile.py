"""torch.compile and torch.export take the whole model: one graph, the same numbers.

They run in processes of their own, because the shape checks that tests put around every function cannot be traced.
"""

import os
import subprocess
import sys

import pytest
from checkout import ROOT

from famba import backends

pytestmark = pytest.mark.skipif(backends()["native"] != "", reason=backends()["native"])
PREPARE = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from famba import FusionOptions, create_model, fuse, match_tokens, selective_scan

late = FusionOptions(order="append", weighting="mean", feature="delta", position="after_scan")
CASES = [([0, 5], FusionOptions(), "middle"), ([5, 5], late, "none")]
images = torch.rand(3, 3, 6, 6, generator=torch.Generator().manual_seed(0))

def made(backend, case):
    schedule, fusion, cls_position = case
    torch.manual_seed(0)
    return create_model(
        "vim_nano", img_size=6, depth=len(schedule), num_classes=10, schedule=schedule, fusion=fusion, backend=backend,
        cls_position=cls_position, pool="mean" if cls_position == "none" else "cls",
    )

def check(found, expected, tolerance=1e-6):
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()

def check_compiled(model, compiler, tolerance):
    torch._dynamo.reset()
    compiled, results = torch.compile(model, backend=compiler, fullgraph=True), []
    for call in (compiled, model):
        logits = call(images)
        logits.square().sum().backward()
        results.append([logits.detach(), *(weight.grad for weight in model.parameters())])
        model.zero_grad()
    for found, expected in zip(*results, strict=True):
        check(found, expected, tolerance)
    print("the same")
    return compiled
"""
COMPILE_AND_EXPORT = """
for case, backend in zip(CASES, ("native", "torch")):
    assert made("torch", case).to("meta")(images.to("meta")).shape == (3, 10)
    compiled = check_compiled(made(backend, case), "aot_eager", 1e-6)
    with torch.no_grad():
        check(compiled(images), made(backend, case)(images))
    model, shapes = made(backend, case), {"images": {0: torch.export.Dim("b", min=2, max=64)}}
    exported = torch.export.export(model, (images,), dynamic_shapes=shapes).module()
    for given in (images, torch.rand(5, 3, 6, 6)):
        check(exported(given), model(given))
    print("the same")

class Scan(torch.nn.Module):
    def forward(self, *tensors):
        return selective_scan(*tensors, delta_softplus=True, backend="native")

u, delta, z = torch.randn(3, 2, 20, 5).mT.unbind()
B, C = torch.randn(2, 2, 20, 3).mT.unbind()
tensors = [u, delta, -torch.rand(5, 3), B, C, torch.randn(5), z, torch.randn(5)]
assert torch.equal(torch.export.export(Scan(), tuple(tensors)).module()(*tensors), Scan()(*tensors))
tensors = [x.requires_grad_() for x in tensors]
compiled = torch.compile(Scan(), backend="aot_eager", fullgraph=True)
assert torch.equal(compiled(*tensors), Scan()(*tensors))
found, expected = (torch.autograd.grad(call(*tensors).sum(), tensors) for call in (compiled, Scan()))
assert len(found) == 8 and all(map(torch.equal, found, expected))
print("the same")

def fused(x, r, place):
    return fuse(x, match_tokens(x, r, protected=[place]))[0]

compiled, x = torch.compile(fused, backend="eager", fullgraph=True), torch.randn(2, 17, 8)
for r, place in ((2, 0), (3, 1), (4, 2)):  # from the second call on r and place are open
    assert torch.equal(compiled(x, r, place), fused(x, r, place))
print("the same")
"""


def run(code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PREPARE + code],
        cwd=ROOT,
        env=os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"},  # a pool takes longer to start than it saves
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.stdout.splitlines()


def test_the_model_is_one_graph_with_the_same_gradients_and_is_exported_for_any_batch():
    assert run(COMPILE_AND_EXPORT) == 6 * ["the same"]


@pytest.mark.slow
def test_the_default_compiler_makes_the_same_numbers():
    """One layer that fuses: the compiler takes as long again for each."""
    assert run('check_compiled(made("native", ([5], late, "none")), "inductor", 1e-4)') == ["the same"]

"""The mixer alone against an independent one: output and every gradient, by each backend."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from famba import backends
from famba.kernels.triton import runtime
from famba.models.mixer import BidirectionalMixer

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = json.loads((GOLDEN / "components.json").read_text())["mixer"]
TENSORS = load_file(GOLDEN / "components.safetensors")
BACKENDS = [
    "torch",
    *([] if backends()["native"] else ["native"]),
    # On a GPU, or where test_triton.py has Triton's interpreter run these tests.
    *([] if runtime.unavailable() else [pytest.param("triton", marks=pytest.mark.gpu)]),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_the_mixer_is_the_independent_one(case, backend):
    about, device = CASES[case], runtime.DEVICE if backend == "triton" else "cpu"
    stored = {
        key.removeprefix(f"mixer/{case}/"): x.to(device)
        for key, x in TENSORS.items()
        if key.startswith(f"mixer/{case}/")
    }
    mixer = BidirectionalMixer(
        about["embed_dim"], about["d_state"], average_directions=about["divide_out"], backend=backend
    ).to(device)
    mixer.load_state_dict({key.removeprefix("param/"): x for key, x in stored.items() if key.startswith("param/")})
    x = stored["in"].clone().requires_grad_()
    out = mixer(x)
    (out * stored["cotangent"]).sum().backward()
    found = {"out_f64": out.detach(), "grad_in": x.grad}
    found |= {f"grad/{name}": weight.grad for name, weight in mixer.named_parameters()}
    assert len(found) == 18
    for name, value in found.items():
        want = stored[name].double()
        error = (value.double() - want).abs().max()
        assert error <= 1e-5 * want.abs().max().clamp_min(1e-30) or not (value.any() or want.any()), name

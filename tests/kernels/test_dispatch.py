"""Which backend runs: what `auto` takes, and that it says why where it must take a slower one."""

import pytest
import torch

from famba.errors import InputError
from famba.kernels import dispatch
from famba.kernels.dispatch import Backend, choose, chosen

X = torch.zeros(1)
SLOW, FAST = (lambda: "slow"), (lambda: "fast")


def table(missing: str = "", unsuited: str = "") -> dict[str, Backend]:
    return {"torch": Backend(SLOW), "native": Backend(FAST, lambda: missing, lambda *tensors: unsuited)}


@pytest.fixture(autouse=True)
def warned_of_nothing():
    dispatch._warn.cache_clear()


def test_auto_takes_the_fastest_that_can_run_and_says_nothing(caplog):
    assert choose(table(), "auto", X).run() == "fast"
    assert chosen(table(), "auto", X) == "native"
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ({"missing": "no g++"}, "no g++ (python -m famba doctor names the command)"),
        ({"unsuited": "it runs on float32, got torch.float16"}, "it runs on float32, got torch.float16"),
    ],
)
def test_auto_says_once_why_it_cannot_take_the_fastest(caplog, reason, said):
    for _ in range(3):
        assert choose(table(**reason), "auto", X).run() == "slow"
    assert caplog.messages == [f"backend auto: slower kernels than native run on cpu: {said}"]


def test_a_backend_that_was_asked_for_by_name_gives_no_warning(caplog):
    assert chosen(table(missing="no compiler"), "torch", X) == "torch"
    assert chosen(table(), "reference", X) == "torch"
    with pytest.raises(InputError, match="backend: 'cuda' is unknown; allowed: auto, reference"):
        chosen(table(), "cuda", X)
    assert caplog.messages == []


def test_on_cuda_the_lack_of_triton_is_said_and_that_of_an_optional_package_is_not(caplog, monkeypatch):
    missing = {name: Backend(FAST, lambda name=name: f"{name} is missing") for name in ("triton", "mamba_ssm")}
    monkeypatch.setitem(dispatch._FASTEST, "meta", dispatch._FASTEST["cuda"])  # a device that is everywhere
    assert choose({"torch": Backend(SLOW), **missing}, "auto", X.to("meta")).run() == "slow"
    (line,) = caplog.messages
    assert "slower kernels than triton run on meta: triton is missing" in line

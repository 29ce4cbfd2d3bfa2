"""Whole runs on the accelerator of accelerator.py, from the first step to the end: started by test_accelerator.py."""

import dataclasses
import itertools
import shutil
from pathlib import Path

import accelerator
import pytest
import torch
from accelerator import DEVICE, Accelerator
from checkout import ROOT

from famba import config
from famba.models import saved
from famba.params import Params
from famba.profiling import memory
from famba.training import fit
from famba.training.trainer import Trainer

# torch's own deepcopy of a weight looks at its address, which one without numbers does not have
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
accelerator.register()


@pytest.fixture(autouse=True)
def device(tmp_path, monkeypatch):
    """The accelerator in place of the device that parameters name, in a repository of its own."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fit, "_device", lambda t: DEVICE)
    monkeypatch.setattr(memory, "peak_memory", peak_memory)
    with Accelerator() as device:
        yield device


def peak_memory(step, resident, device):
    """What stands in for the allocator that is not there."""
    assert {x.device for x in resident} == {device} == {DEVICE}
    step()
    return 2**20


def smoke(*, data=None, model=None, **changes) -> Params:
    p = config.load("smoke", strategy="upper")
    small = {"depth": 1, "patch_size": 4, "stride": 2}  # 9 patches
    return dataclasses.replace(
        p,
        fusion=dataclasses.replace(p.fusion, r=2, first_layer=1, last_layer=1),
        data=dataclasses.replace(p.data, **{"limit": 400, **(data or {})}),
        model=dataclasses.replace(p.model, **{**small, **(model or {})}),
        train=dataclasses.replace(p.train, **{"threads": 1, "batch_size": 200, **changes}),
    )


VARIED = {"shift": 1, "flip": True, "erase": 0.5, "mixup": 0.8, "cutmix": 1.0}
STREAMED = {"memory_mib": 1, "img_size": 32, "workers": 1}  # the digits take more than that
RUNS = {
    "everything that varies, in parts": smoke(data=VARIED, device_batch=100, ema_decay=0.9, clip_grad_norm=1.0),
    "bf16 by torch, class token first": smoke(model={"cls_position": "head"}, backend="torch", precision="bf16"),
    "streamed, no class token": smoke(
        data=STREAMED, model={"patch_size": 8, "stride": 8, "cls_position": "none", "pool": "mean"}
    ),
}


@pytest.mark.parametrize("p", RUNS.values(), ids=RUNS)
def test_a_run_that_was_stopped_goes_on_to_its_end_and_a_step_waits_once(device, monkeypatch, p):
    waits: list[tuple[int, int, int]] = []  # epoch, step, and how often the host had waited by its end
    places: list[dict[str, torch.device]] = []  # of all tensors that a checkpoint holds
    step, save, restore = Trainer._step, Trainer._save, Trainer.restore

    def note(trainer):
        places.append({key: t.device for key, t in trainer._state().items()})

    def counted(trainer, parts, lr, number):
        made = step(trainer, parts, lr, number)
        waits.append((trainer.epoch, number, device.waits.total()))
        return made

    def stopped(trainer):
        save(trainer)
        note(trainer)
        if trainer.epoch == 1:
            raise KeyboardInterrupt

    def restored(trainer):
        restore(trainer)
        if trainer.epoch:
            note(trainer)

    monkeypatch.setattr(Trainer, "_step", counted)
    monkeypatch.setattr(Trainer, "_save", stopped)
    monkeypatch.setattr(Trainer, "restore", restored)
    with pytest.raises(KeyboardInterrupt):
        fit.fit(p, seed=0)
    run = fit.fit(p, seed=0)
    assert [row["epoch"] for row in run.history] == [1, 2]
    by_torch = ["scatter_add"] if p.train.backend == "torch" else []
    assert run.cost["nondeterministic"] == ["convolution_backward", *by_torch]
    kept, again, _ = places
    averaged = {"ema"} if p.train.ema_decay else set()
    assert {key.split(".")[0] for key in kept} == {"model", "best", "optimiser"} | averaged
    assert set(kept.values()) == {DEVICE}
    assert again == kept
    # A step waits to read the loss, the gradients' norm and the hits, all at once; to load its batch it never waits.
    pairs = itertools.pairwise(waits)
    each = [after - before for (*one, before), (*other, after) in pairs if other == [one[0], one[1] + 1]]
    assert each == [1] * 3  # while memory is measured, and in each of two epochs


def test_weights_are_only_evaluated(device):
    p = smoke()
    described = {"classes": [str(digit) for digit in range(10)], "mean": [0.5] * 3, "std": [0.5] * 3}
    model = fit.build(p, classes=10, seed=0)
    Path("weights.safetensors").write_bytes(saved.model_bytes(model, model.state_dict(), described))
    device.waits.clear()
    run = fit.fit(smoke(init_from="weights.safetensors", epochs=0), seed=0)
    assert run.history == []
    assert run.metrics["chosen"] == {"weights": "raw", "epoch": 0}
    assert device.waits["trainer.evaluate"] == 2, "once for each split, whatever its batches"

"""A step in parts, and several processes on one run: what one process makes of the same batches, to rounding."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from processes import wait_until

from famba import InputError, config, data
from famba.cli import main
from famba.config import Params
from famba.errors import TrainingError
from famba.storage import runs
from famba.training import distributed, fit
from famba.training.trainer import evaluate

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def processes(repository, monkeypatch):
    """What torchrun starts finds this copy of famba, and its threads do not spin on cores that they share."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")


def test_a_process_by_itself_takes_its_cuda_device_as_the_current_one(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name in ("cuda:1", "cuda", "cpu"):
        assert distributed.join(torch.device(name)).device == torch.device(name)
    assert taken == [torch.device("cuda:1")]


MIXED = {"mixup": 0.8, "cutmix": 1.0, "erase": 0.25, "flip": True}


def smoke(varied: dict | None = None, **changes) -> Params:
    p = config.load("smoke", strategy="upper")
    images = dataclasses.replace(p.data, limit=64, **(varied or {}))
    changes = {"threads": 1, "batch_size": 16, "ema_decay": 0.9, **changes}
    return dataclasses.replace(p, data=images, train=dataclasses.replace(p.train, **changes))


def numbers(run: runs.Run) -> list[float]:
    """Every loss of the run, in training, validation and test."""
    keys = ("train_loss", "val_loss", "ema_val_loss")
    return [row[key] for row in run.history for key in keys] + [run.metrics["loss"]]


def test_a_step_in_parts_is_the_step_at_once():
    whole = fit.fit(smoke(MIXED), seed=3)
    parts = fit.fit(smoke(MIXED, device_batch=4), seed=3)
    assert numbers(parts) == pytest.approx(numbers(whole), rel=1e-5)
    assert parts.history[0]["train_top1_percent"] == whole.history[0]["train_top1_percent"]
    assert parts.cost["peak_memory_mib"] < 0.9 * whole.cost["peak_memory_mib"]


def test_a_batch_that_the_parts_do_not_divide_is_refused():
    with pytest.raises(InputError, match=r"batch_size: 16: must be a multiple of train\.processes times .*, 5"):
        fit.fit(smoke(device_batch=5), seed=0)


def test_parts_of_an_odd_number_of_images_cannot_be_mixed():
    with pytest.raises(InputError, match=r"train\.batch_size: 15: 5 images at once .*mixup.* must be even"):
        fit.fit(smoke(MIXED, batch_size=15, device_batch=5), seed=0)


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_two_that_give_the_same_losses(interrupt, repository, capfd, monkeypatch):
    undisturbed = fit.fit(smoke(MIXED), seed=4)
    shutil.rmtree("build")
    interrupt(smoke(MIXED), seed=4)
    (repository / "asked.json").write_text(json.dumps(smoke(MIXED, processes=2).as_dict()))
    capfd.readouterr()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # else what the processes write is shown with errors alone
    assert main(["train", "--resolved", "asked.json", "--seed", "4", "--out", "run"]) == 0
    printed = capfd.readouterr()
    assert printed.out.count("\n") == 1
    stated = (
        "a step takes 16 images: 2 processes x 1 parts x 8 images on cpu; 4 steps an epoch, 2 epochs; peak learning"
    )
    assert printed.err.count(stated) == 1
    assert "rate 0.005; fp32" in printed.err
    run = runs.read(repository / "run")
    assert numbers(run) == pytest.approx(numbers(undisturbed), rel=1e-5)
    assert run.history[0] == undisturbed.history[0]  # that epoch was not trained again
    assert run.history[1]["train_top1_percent"] == undisturbed.history[1]["train_top1_percent"]
    assert run.metrics["top1_percent"] == undisturbed.metrics["top1_percent"]
    assert (undisturbed.cost["processes"], run.cost["processes"]) == (1, 2)
    assert run.cost["command"].startswith("torchrun --nproc-per-node 2 -m famba train --profile smoke")
    assert not list((repository / "build" / "checkpoints").iterdir())


@pytest.mark.slow
def test_where_one_process_is_killed_all_stop_and_it_is_said_which(repository):
    p = smoke(epochs=500, processes=2)
    checkpoints = fit.folder(p, seed=0)
    killed: list[int] = []

    def kill(history, cost):
        if not killed:
            (pid,) = [pid for pid in ranks(repository) if environment(pid).get("RANK") == "1"]
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(TrainingError, match="rank 1 was stopped by SIGKILL, and all others with it") as error:
        fit.fit(p, seed=0, callbacks=[kill])
    assert "\n" not in str(error.value)
    assert list(checkpoints.glob("epoch-*.safetensors"))
    wait_until(lambda: not ranks(repository))


def ranks(folder: Path) -> list[int]:
    """The processes of a run in this folder that are alive."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):  # no process, or one that is gone
            if (entry / "cwd").resolve() == folder and "RANK" in environment(int(entry.name)):
                found.append(int(entry.name))
    return found


def environment(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def test_what_a_process_refuses_is_said_in_one_line():
    with pytest.raises(TrainingError, match=r"^strategy: 'uper' .*$") as error:
        distributed.launch(["train", "--strategy", "uper"], 2, quiet=True)
    assert "\n" not in str(error.value)


def test_more_processes_than_torchrun_has_started_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(InputError, match=r"train\.processes: 2; torchrun has started 1"):
        fit.fit(smoke(processes=2), seed=0)


def test_several_processes_need_accelerate(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(InputError, match=r"need Accelerate, which is not installed: pip install 'famba\[paper\]'"):
        distributed.launch([], 2, quiet=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="need Accelerate"):
        distributed.join(torch.device("cpu"))


class Rank(distributed.Processes):
    """One of several processes whose sums are kept, not made."""

    def __init__(self, rank: int, count: int) -> None:
        super().__init__(torch.device("cpu"))
        self.rank, self.count = rank, count
        self.own: list[float] = []

    def sum(self, values):
        self.own = list(values)
        return self.own


@pytest.mark.parametrize("count", [2, 3, 7])
def test_every_image_of_an_evaluation_counts_once_however_many_share_it(count):
    p = smoke()
    images = data.load(p.data)
    model = fit.build(p, classes=10, seed=0)
    ranks = [Rank(i, count) for i in range(count)]
    for rank in ranks:
        evaluate(model, images.val, images, batch_size=50, processes=rank)
    loss, top5, *first = (sum(parts) for parts in zip(*(rank.own for rank in ranks), strict=True))
    n, top1 = len(images.val), sum(first)
    assert len(first) == n
    assert set(first) == {0, 1}
    alone = evaluate(model, images.val, images, batch_size=50)
    assert (100 * top1 / n, 100 * top5 / n) == (alone["top1_percent"], alone["top5_percent"])
    assert loss / n == pytest.approx(alone["loss"], rel=1e-6)

"""A step in parts, and several processes on one run: what one process makes of the same batches, to rounding."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from checkout import ROOT
from processes import FOREVER_S, PATIENCE_S, wait_until
from refusals import refusal

from famba import InputError, config, data
from famba.cli import main
from famba.errors import TrainingError
from famba.params import Params
from famba.profiling import memory
from famba.storage import runs
from famba.training import distributed, fit
from famba.training.trainer import evaluate


@pytest.fixture(autouse=True)
def processes(repository, monkeypatch):
    """What torchrun starts finds this copy of famba."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))


def test_a_process_by_itself_takes_its_cuda_device_as_the_current_one(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name in ("cuda:1", "cuda", "cpu"):
        assert distributed.join(torch.device(name)).device == torch.device(name)
    assert taken == [torch.device("cuda:1")]


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match=r"train\.processes: 4, each on a GPU; torch sees 2 CUDA devices"):
        fit.fit(smoke(processes=4, device="cuda"), seed=0)


ROOT_CAUSE = """{error}
torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \nRoot Cause (first observed failure):
  rank      : 1 (local_rank: 1)
  exitcode  : {code} (pid: 7)
"""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ("[rank1]: torch.OutOfMemoryError: no more\n[rank0]: BError: gone", 1, " (torch.OutOfMemoryError: no more)"),
        ("[rank1]: torch.OutOfMemoryError: no more\nBError: gone", 1, " (torch.OutOfMemoryError: no more)"),
        ("Traceback:\nNotImplementedError: set X", 1, " (NotImplementedError: set X)"),
        ("[rank0]: RuntimeError: gone", 1, ""),
        ("", -9, ""),
    ],
)
def test_the_error_of_a_process_is_said_with_its_rank(error, code, said):
    how = "was stopped by SIGKILL" if code < 0 else "ended with exit status 1"
    found = distributed._reason(ROOT_CAUSE.format(error=error, code=code), 1)
    assert found.startswith(f"rank 1 {how}{said}, and all others with it; run it again")


MIXED = {"mixup": 0.8, "cutmix": 1.0, "erase": 0.25, "flip": True}


def smoke(varied: dict | None = None, *, strategy: str = "upper", **changes) -> Params:
    p = config.load("smoke", strategy=strategy)
    images = dataclasses.replace(p.data, **{"limit": 64, **(varied or {})})
    changes = {"threads": 1, "batch_size": 16, "ema_decay": 0.9, **changes}
    return dataclasses.replace(p, data=images, train=dataclasses.replace(p.train, **changes))


def numbers(run: runs.Run) -> list[float]:
    """Every loss of the run, in training, validation and test."""
    keys = ("train_loss", "val_loss", "ema_val_loss")
    return [row[key] for row in run.history for key in keys] + [run.metrics["loss"]]


def test_a_step_in_parts_is_the_step_at_once(monkeypatch):
    whole = fit.fit(smoke(MIXED), seed=3)
    measure, resident = memory.peak_memory, []

    def noted(step, kept, device):
        resident.extend(kept)
        return measure(step, resident, device)

    monkeypatch.setattr(memory, "peak_memory", noted)
    parts = fit.fit(smoke(MIXED, device_batch=4), seed=3)
    assert numbers(parts) == pytest.approx(numbers(whole), rel=1e-5)
    assert parts.history[0]["train_top1_percent"] == whole.history[0]["train_top1_percent"]
    assert len({x.data_ptr() for x in resident if x.shape[1:] == (3, 8, 8)}) == 4, (
        "the images of a step are there all at once"
    )
    assert parts.cost["peak_memory_mib"] < 0.9 * whole.cost["peak_memory_mib"]


def test_what_processes_and_parts_cannot_share_is_refused(monkeypatch):
    with pytest.raises(InputError, match=r"train\.batch_size: 15: 5 images at once .*mixup.* must be even"):
        fit.fit(smoke(MIXED, batch_size=15, device_batch=5), seed=0)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(InputError, match=r"train\.processes: 2; torchrun has started 1"):
        fit.fit(smoke(processes=2), seed=0)


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
    stated = "2 processes x 1 parts x 8 images on cpu; 4 steps an epoch, 2 epochs; peak learning rate 0.005; fp32"
    assert printed.err.count(stated) == 1
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
            killed.append(ranks(repository)["1"])
            os.kill(killed[0], signal.SIGKILL)

    said = refusal(lambda: fit.fit(p, seed=0, callbacks=[kill]), TrainingError)
    assert "rank 1 was stopped by SIGKILL, and all others with it" in said
    assert list(checkpoints.glob("epoch-*.safetensors"))
    wait_until(lambda: not ranks(repository))


def ranks(folder: Path) -> dict[str, int]:
    """The living processes of a run in this folder, by their ranks."""
    found = {}
    for process in psutil.process_iter(["cwd", "environ"]):
        if process.info["cwd"] == str(folder) and "RANK" in (environment := process.info["environ"] or {}):
            found[environment["RANK"]] = process.pid
    return found


def test_what_a_process_refuses_is_said_in_one_line():
    train = ["train", "--strategy", "uper"]
    assert refusal(lambda: distributed.launch(train, 2, quiet=True), TrainingError).startswith("strategy: 'uper' ")


def test_several_processes_need_accelerate(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(InputError, match=r"need Accelerate, which is not installed: pip install 'famba\[paper\]'"):
        distributed.launch([], 2, quiet=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="need Accelerate"):
        distributed.join(torch.device("cpu"))


def test_an_error_that_is_not_of_the_connection_stays_as_it_is():
    with pytest.raises(RuntimeError, match=r"^out of memory$"), distributed.Processes(torch.device("cpu")).connected():
        raise RuntimeError("out of memory")


def test_every_image_of_an_evaluation_counts_once_however_many_share_it():
    p, count, shares = smoke(), 7, []
    images = data.load(p.data)
    model = fit.build(p, classes=10, seed=0)
    hits = torch.zeros(count + 1, len(images.val))
    for i in range(count):
        process = distributed.Processes(torch.device("cpu"))
        process.rank, process.count = i, count  # but its sums are its own
        shares.append(evaluate(model, images.val, images, batch_size=50, processes=process, correct=hits[i]))
    alone = evaluate(model, images.val, images, batch_size=50, correct=hits[count])
    assert 0 < hits[count].sum() < len(images.val)
    assert torch.equal(hits[:count].sum(0), hits[count])
    assert {key: sum(scores[key] for scores in shares) for key in alone} == pytest.approx(alone, rel=1e-6)


@pytest.fixture
def machines(tmp_path):
    """Two network namespaces with a cable between them: what stands before a command that runs in each.

    10.77.0.1 and 10.77.0.2 are the addresses of the two ends, which are both named cable.
    """
    spaces = [f"famba-{os.getpid()}-{i}" for i in range(2)]
    commands = [f"netns add {space}" for space in spaces]
    commands += [f"link add cable netns {spaces[0]} type veth peer name cable netns {spaces[1]}"]
    for i, space in enumerate(spaces):
        commands += [f"-n {space} addr add 10.77.0.{i + 1}/24 dev cable"]
        commands += [f"-n {space} link set {device} up" for device in ("lo", "cable")]
    try:
        for command in commands:
            done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"ip {command}: {done.stderr.strip()}; network namespaces need root")
        yield [["ip", "netns", "exec", space] for space in spaces]
    finally:
        for space in spaces:
            left = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True).stdout
            for pid in left.split():
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", space], capture_output=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ip") is None, reason="network namespaces are made by `ip`, of iproute2")
def test_two_machines_stop_when_their_link_is_cut_and_go_on_to_the_losses_of_one(machines, repository, monkeypatch):
    # Without fusion: over so many steps rounding may change a match.
    p = smoke({"limit": 600}, strategy="none", batch_size=64, epochs=4)
    alone = fit.fit(p, seed=5)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "cable")
    folders = [repository / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
        for name in ("params.yaml", "dvc.yaml"):  # what makes it a repository
            shutil.copy(name, folder)
        (folder / "asked.json").write_text(json.dumps(p.as_dict()))

    def train() -> list[subprocess.Popen]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        torchrun += ["--master-addr=10.77.0.1", "--master-port=29500"]
        given = ["-m", "famba", "train", "--resolved", "asked.json", "--seed", "5", "--out", "run"]
        return [
            subprocess.Popen(
                [*there, *torchrun, f"--node-rank={i}", *given], cwd=folder, stderr=subprocess.PIPE, text=True
            )
            for i, (there, folder) in enumerate(zip(machines, folders, strict=True))
        ]

    cut = train()
    wait_until(lambda: list(folders[0].glob("build/checkpoints/*/epoch-00001.safetensors")), cut[0])
    subprocess.run([*machines[0], "ip", "link", "set", "cable", "down"], check=True)
    for rank, process in enumerate(cut):
        _, stderr = process.communicate(timeout=PATIENCE_S)
        (said,) = [line for line in stderr.splitlines() if line.startswith("famba: ")]
        assert said.startswith(f"famba: rank {rank} lost the other processes: ")
        assert said.endswith("run it again to go on from the last checkpoint")
        assert process.returncode == 1

    subprocess.run([*machines[0], "ip", "link", "set", "cable", "up"], check=True)
    resumed = train()
    errors = [process.communicate(timeout=FOREVER_S)[1] for process in resumed]
    assert [process.returncode for process in resumed] == [0, 0], errors
    assert "going on after epoch" in errors[0]
    assert numbers(runs.read(folders[0] / "run")) == pytest.approx(numbers(alone), rel=1e-5)
    assert not (folders[1] / "run").exists()

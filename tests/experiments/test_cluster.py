"""`famba sweep`: each run is trained once, whatever is killed, and ends with the same bytes on Slurm as here.

The Slurm is a real one, started for these tests under their own user: a controller, two nodes, two partitions.
"""

import contextlib
import getpass
import json
import os
import pickle
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from processes import FOREVER_S, PATIENCE_S, wait_until
from refusals import refused

from famba import config
from famba.cli import main
from famba.experiments import cluster, sweep
from famba.training import fit

SAME = ("metrics.json", "history.csv", "schedule.json", "model.safetensors")
RUNS = Path("build/smoke/runs")
SEEDS = int(os.environ.get("FAMBA_SWEEP_SEEDS", "1"))  # of five strategies each: 40 are two hundred runs
JOBS = min(8, SEEDS + 1)


def checkout(folder: Path, monkeypatch, *, seeds: int, epochs: int = 2) -> Path:
    """A folder that is a repository's root, with so many seeds for each strategy."""
    text = (Path(__file__).parents[2] / "params.yaml").read_text()
    for old, new in {
        "seeds: [0, 1, 2, 3, 4, 5, 6, 7]": f"seeds: {list(range(seeds))}",
        "train: {epochs: 2, warmup_epochs: 0}": f"train: {{epochs: {epochs}, warmup_epochs: 0}}",
    }.items():
        assert old in text
        text = text.replace(old, new)
    folder.mkdir()
    (folder / "params.yaml").write_text(text)
    (folder / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(folder)
    return folder


def start(*options: str) -> subprocess.Popen:
    """`famba sweep` of the smoke profile in the working directory; its log is log.txt."""
    command = [sys.executable, "-m", "famba", "sweep", "--profile", "smoke", *options]
    with open("log.txt", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def cells() -> list[sweep.Cell]:
    asked = config.load_sweep()
    return sweep.cells(asked.params("smoke"), asked.seeds, runs_dir=RUNS)


def written() -> dict[str, int]:
    """When each finished run was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in RUNS.glob("*/metrics.json")}


@pytest.mark.slow
def test_many_runs_at_once_are_each_trained_once_though_the_sweep_is_killed(tmp_path, monkeypatch):
    checkout(tmp_path / "here", monkeypatch, seeds=SEEDS)
    wanted, rng, seen = {cell.run_dir.name for cell in cells()}, random.Random(SEEDS), {}
    for point in sorted(rng.sample(range(1, len(wanted) - JOBS), max(1, min(5, SEEDS // 2)))):
        with start("--jobs", f"{JOBS}") as sweeping:
            wait_until(lambda point=point: len(written()) >= point, sweeping)
            wait_until(lambda: rng.random() < 0.05, sweeping)
            started, others = (psutil.Process(sweeping.pid).children(recursive=each) for each in (False, True))
            sweeping.kill()
        assert len(started) <= JOBS + 1, "more than the workers and multiprocessing's resource tracker"
        assert not psutil.wait_procs(others, timeout=PATIENCE_S)[1]
        assert written().items() >= seen.items()
        seen = written()
    assert len(seen) < len(wanted)
    with start("--jobs", "1") as sweeping:
        assert sweeping.wait(FOREVER_S) == 0, Path("log.txt").read_text()
    assert set(written()) == wanted
    assert written().items() >= seen.items()
    assert not list(Path("build/checkpoints").glob("*/epoch-*"))
    assert sweep.missing(cells()) == []

    cost = json.loads((RUNS / "upper-0" / "cost.json").read_text())
    del cost["made_of"]
    (RUNS / "upper-0" / "cost.json").write_text(json.dumps(cost))
    assert [cell.run_dir.name for cell in sweep.missing(cells())] == ["upper-0"], "it does not say by what code"


def test_without_submitit_or_slurm_one_line_says_so(tmp_path, monkeypatch, capsys):
    checkout(tmp_path / "here", monkeypatch, seeds=1)
    command = ["sweep", "--profile", "smoke", "--cluster", "slurm"]
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "submitit", None)
        assert main(command) == 1
        needs = "famba: --cluster slurm: needs submitit: pip install 'famba[cluster]'\n"
        assert capsys.readouterr().err.endswith(needs)
    pytest.importorskip("submitit", reason="submitit is not here: make env installs it")
    monkeypatch.setenv("PATH", "")
    assert main(command) == 1
    assert capsys.readouterr().err.endswith('Could not detect "srun", are you indeed on a slurm cluster?\n')


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--jobs", "0"], "--jobs: 0; must be 1 to 1000"),
        (["--slurm", "mem", "8G"], "--slurm: {'mem': '8G'}; allowed with --cluster slurm only"),
        (["--cluster", "slurm", "--slurm", "time", "4h"], "--slurm time: '4h'; must be a whole number of minutes"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_anything_is_trained(arguments, said, capsys):
    assert refused(capsys, "sweep", "--profile", "smoke", *arguments) == f"famba: {said}\n"


def test_a_controller_that_does_not_answer_is_asked_again(tmp_path, monkeypatch):
    squeue = tmp_path / "squeue"
    squeue.write_text(
        f"#!/bin/sh\n[ -e {tmp_path}/asked ] || {{ touch {tmp_path}/asked; exit 1; }}\necho 3_1; echo 4\n"
    )
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(cluster, "_POLL_S", 0)
    assert cluster._active() == {"3_1", "4"}


def ask(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A Slurm of this user's own, whose programs take it as theirs; jobs of `high` displace those of `low`."""
    pytest.importorskip("submitit", reason="submitit is not here: make env installs it")
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
    programs = {name: shutil.which(name, path=path) for name in ("munged", "slurmctld", "slurmd", "sbatch")}
    if absent := [name for name, found in programs.items() if not found]:
        pytest.skip(f"no Slurm here: {', '.join(absent)} not on PATH; Debian's slurm-wlm and munge have them")
    home = tmp_path / "slurm"
    for name in ("state", "spool-a", "spool-b"):
        (home / name).mkdir(parents=True)
    (home / "key-file").write_bytes(random.randbytes(128))
    (home / "key-file").chmod(0o400)
    with socket.socket() as one, socket.socket() as two, socket.socket() as three:
        for each in (one, two, three):
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in (one, two, three)]
    host = socket.gethostname()
    settings = {
        "ClusterName": "test",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmUser": getpass.getuser(),
        "SlurmdUser": getpass.getuser(),
        "AuthInfo": f"socket={home}/socket,cred_expire=5",  # s until a job that was queued again may start
        "SlurmctldPort": ports[0],
        "SlurmctldPidFile": home / "slurmctld.pid",
        "SlurmctldLogFile": home / "slurmctld.log",
        "SlurmdPidFile": home / "slurmd-%n.pid",
        "SlurmdLogFile": home / "slurmd-%n.log",
        "SlurmdSpoolDir": home / "spool-%n",
        "StateSaveLocation": home / "state",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "SlurmdParameters": "config_overrides",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "KillWait": 5,
        "MinJobAge": 3600,
        "NodeName": f"a,b NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]},{ports[2]} CPUs=2 RealMemory=4000",
    }
    lines = [f"{name}={value}" for name, value in settings.items()]
    lines += [f"PartitionName={name} Nodes=a,b PriorityTier={tier}" for tier, name in enumerate(("low", "high"), 1)]
    (home / "slurm.conf").write_text("\n".join([*lines, ""]))
    monkeypatch.setenv("SLURM_CONF", str(home / "slurm.conf"))
    munge = [f"--{name}={home}/{name}" for name in ("socket", "key-file", "log-file", "seed-file", "pid-file")]
    try:
        ask(programs["munged"], "--force", *munge)
        ask(programs["slurmctld"], "-i")
        for node in "ab":
            ask(programs["slurmd"], "-N", node)
        wait_until(lambda: ask("sinfo", "--noheader", "--format=%t", "--partition=low").split() == ["idle"])
        yield home
    finally:
        if (home / "slurmctld.pid").exists():
            ask("scancel", "--me")
            wait_until(lambda: not ask("squeue", "--noheader"))
        for file in ("slurmd-a.pid", "slurmd-b.pid", "slurmctld.pid", "pid-file"):
            if (home / file).exists():
                daemon = psutil.Process(int((home / file).read_text()))
                daemon.terminate()
                daemon.wait(PATIENCE_S)


def jobs() -> dict[str, str]:
    """The number of each run's job, as Slurm writes it."""
    submitted = Path("build/slurm", RUNS).glob("*_submitted.pkl")
    return {
        pickle.loads(path.read_bytes()).function.cell.run_dir.name: path.name.split("_sub")[0] for path in submitted
    }


def suspend(process: psutil.Process) -> None:
    """For good, though Slurm resumes what it is about to kill."""
    with contextlib.suppress(psutil.NoSuchProcess):
        while True:
            process.suspend()
            time.sleep(0.005)


def hold(number: int) -> dict[str, psutil.Process]:
    """Stop the workers of so many jobs after an epoch, by run; Slurm may still kill them."""
    held = {}

    def one_more() -> bool:
        for process in psutil.process_iter(["cmdline", "environ"]):
            environ, command = process.info["environ"] or {}, " ".join(process.info["cmdline"] or [])
            if environ.get("SLURM_CONF") != os.environ["SLURM_CONF"] or "spawn_main" not in command:
                continue
            cell = cells()[int(environ["SLURM_ARRAY_TASK_ID"])]
            name = cell.run_dir.name
            if name not in held and list(fit.folder(cell.p, seed=cell.seed).glob("epoch-*")):
                threading.Thread(target=suspend, args=(process,), daemon=True).start()
                held[name] = process
        return len(held) == number

    wait_until(one_more)
    assert not set(held) & set(written())
    return held


@pytest.mark.slow
def test_on_slurm_runs_end_with_the_same_bytes_whatever_happens_to_their_jobs(tmp_path, monkeypatch, slurm, capsys):
    expected = checkout(tmp_path / "here", monkeypatch, seeds=1, epochs=5)
    sweep.ensure_runs(config.load_sweep(), profile="smoke", runs_dir=RUNS, train_missing=True)

    checkout(tmp_path / "there", monkeypatch, seeds=1, epochs=5)
    options = ("--cluster", "slurm", "--slurm", "partition", "low", "--slurm", "time", "10")
    with start(*options) as sweeping:
        preempted = hold(4)
        sweeping.kill()
    submitted = jobs()
    assert len(submitted) == 5

    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("train: {epochs: 5,", "train: {epochs: 6,"))
    assert main(["sweep", "--profile", "smoke", *options]) == 1
    assert "has other parameters; wait for it, or cancel it" in capsys.readouterr().err
    Path("params.yaml").write_text(text)

    with start(*options) as sweeping:
        wait_until(lambda: "5 jobs, 0 of them submitted now" in Path("log.txt").read_text(), sweeping)
        preempts = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
        ask("sbatch", *preempts)
        assert not psutil.wait_procs(preempted.values(), timeout=PATIENCE_S)[1]
        held = hold(4)
        on = {node: [name for name in held if held[name].environ()["SLURMD_NODENAME"] == node] for node in "ab"}
        assert [len(names) for names in on.values()] == [2, 2]
        ask("scontrol", "update", "nodename=b", "state=drain", "reason=test")
        for name in on["b"]:
            ask("scontrol", "requeue", submitted[name])
        killed, limited = on["a"]
        held[killed].parent().kill()  # the step; what runs in it ends too
        minutes = int(ask("squeue", "--noheader", "--format=%M", f"--jobs={submitted[limited]}").split(":")[-2])
        ask("scontrol", "update", f"jobid={submitted[limited]}", f"timelimit={minutes + 2}")
        said = Path("build/slurm", RUNS, f"{submitted[limited]}_0_log.out")
        wait_until(lambda: "remaining timeouts" in said.read_text(), sweeping)
        ask("scontrol", "update", f"jobid={submitted[limited]}", "timelimit=10")
        assert sweeping.wait(FOREVER_S) == 1
    log, logs = Path("log.txt").read_text(), Path("build/slurm", RUNS).absolute()
    assert f"{killed}: job {submitted[killed]} ended without a result; log: {logs}/" in log
    assert log.endswith(f"famba: 1 of 5 runs failed, the first {RUNS / killed}; logs: {logs}\n")
    assert "this job is timed-out" in said.read_text()
    assert set(written()) == set(submitted) - {killed}
    for name in held:
        restarts = ask("scontrol", "show", "job", submitted[name]).split("Restarts=")[1].split()[0]
        assert int(restarts) >= (name in preempted) + (name != killed), name

    before = written()
    with start(*options) as sweeping:
        assert sweeping.wait(FOREVER_S) == 0, Path("log.txt").read_text()
    assert written().items() > before.items()
    for name in submitted:
        for file in SAME:
            assert (RUNS / name / file).read_bytes() == (expected / RUNS / name / file).read_bytes(), (name, file)
    assert not logs.exists()

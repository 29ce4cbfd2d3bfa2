"""Runs that are killed, ended or interrupted anywhere, and finish later as if they had not been.

Most kills are of processes forked off one that has imported everything, so that twenty of them are cheap, and real.
"""

import functools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import nbformat
import psutil
import pytest
from checkout import ROOT, copy_to
from dvc.utils.serialize import modify_yaml
from processes import FOREVER_S, PATIENCE_S, start, wait_until

from famba import supervision
from famba.storage import checkpoint, runs

TRAIN = ["train", "--profile", "smoke", "--strategy", "upper", "--out", "run"]
ENDS = [(signal.SIGINT, 130, "famba: interrupted\n"), (signal.SIGTERM, 143, "famba: terminated\n")]
FILES = {"correct.txt", "cost.json", "history.csv", "metrics.json", "model.safetensors", "params.json", "schedule.json"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc"),
]


class Incubator:
    """A process that has imported all of famba, and forks one child at a time to run a command line."""

    def __init__(self, folder: Path) -> None:
        code = "import test_interruption; test_interruption.incubate()"
        self.process = start("-c", code, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, *command: str, **disturbance: Any) -> dict[str, Any]:
        """Its exit status (minus the signal that ended it), seconds, file operations and stderr.

        Args:
            disturbance: `how`, a signal, with either `after_s`, or `operation`, the number of the file operation, and
                `when`: before it, after it, or half-way in the first write from there on; or `full`: no signal, but
                files can hold no more than 1000 bytes from there on.
        """
        self.process.stdin.write(json.dumps({"command": command, **disturbance}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def incubate() -> None:
    """The incubator's own side: a line of JSON in, a line of JSON out."""
    import torch

    from famba import config, data
    from famba.cli import main
    from famba.training import fit

    torch.set_num_threads(1)  # a fork has none of its parent's threads
    fit.build(config.load("smoke", strategy="upper"), classes=10, seed=0)
    data.load(config.load("smoke", strategy="upper").data)  # imports what it needs
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            print(json.dumps(_disturbed(main, json.loads(line), Path(folder))), flush=True)


def _disturbed(main, asked: dict[str, Any], folder: Path) -> dict[str, Any]:
    report, said, begun = folder / "operations", folder / "stderr", folder / "begun"
    begun.unlink(missing_ok=True)
    report.write_text("0")
    said.write_text("")
    start = time.monotonic()
    if (pid := os.fork()) == 0:
        _live(main, asked, report, said, begun)
    if "after_s" in asked:
        wait_until(begun.exists)  # on a busy machine a signal would come before there is a handler
        time.sleep(asked["after_s"])
        os.kill(pid, asked["how"])  # not waited for yet, so there is still such a process
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seconds = time.monotonic() - start
    return {"status": status, "seconds": seconds, "operations": int(report.read_text()), "stderr": said.read_text()}


def _live(main, asked: dict[str, Any], report: Path, said: Path, begun: Path) -> None:
    status = 70  # a defect of this file
    signal.alarm(round(PATIENCE_S))  # ends a run that hangs
    try:
        for number, to in ((1, os.devnull), (2, said)):
            os.dup2(os.open(to, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background ignores it
        count = 0

        def counted(operation, *arguments, **options):
            nonlocal count
            count += 1
            mine = count == asked.get("operation")
            if mine and asked["when"] == "before":
                os.kill(os.getpid(), asked["how"])
            if mine and asked["when"] in ("half-way", "full"):
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL if asked["when"] == "half-way" else signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            done = operation(*arguments, **options)
            if mine and asked["when"] == "after":
                os.kill(os.getpid(), asked["how"])
            return done

        for name in ("ftruncate", "fsync", "replace", "unlink", "mkdir", "rmdir"):
            setattr(os, name, functools.partial(counted, getattr(os, name)))
        sys.argv[1:] = asked["command"]
        with mock.patch.object(supervision, "start", lambda answer=supervision.start: (answer(), begun.touch())):
            status = main()
        report.write_text(str(count))
    finally:
        os._exit(status)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A repository of its own, in which a run takes about a second."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copy(ROOT / "dvc.yaml", folder)
    shutil.copy(ROOT / "params.yaml", folder)
    with modify_yaml(folder / "params.yaml") as document:
        document["profiles"]["smoke"]["data"]["limit"] = 64
        document["profiles"]["smoke"]["train"]["epochs"] = 4
    return folder


@pytest.fixture(scope="module")
def incubator(repository) -> Iterator[Incubator]:
    incubator = Incubator(repository)
    yield incubator
    incubator.process.communicate(timeout=PATIENCE_S)
    assert incubator.process.returncode == 0


@pytest.fixture(scope="module")
def undisturbed(incubator, repository) -> dict[str, Any]:
    """What a run reports, and the files that it leaves."""
    incubator.run(*TRAIN)  # the first one pays for what is done once on a machine
    shutil.rmtree(repository / "run")
    done = incubator.run(*TRAIN)
    assert (done["status"], unexpected(done["stderr"])) == (0, [])
    assert done["operations"] > 50
    return {**done, "files": contents(repository, "run")}


@pytest.fixture
def run(repository) -> Iterator[Path]:
    """The run's folder, which is not there yet."""
    shutil.rmtree(repository / "run", ignore_errors=True)
    yield repository / "run"
    for made in ("run", "build"):
        shutil.rmtree(repository / made, ignore_errors=True)


def contents(folder: Path, run: str) -> dict[str, bytes]:
    """The files of a run that must not change from run to run; that nothing else lies there or with its checkpoints."""
    assert {path.name for path in (folder / run).iterdir()} == FILES
    assert not list((folder / "build").rglob("*.safetensors"))
    stray = [path for path in folder.rglob("*") if path.name.endswith((".tmp", "lock")) and ".dvc" not in path.parts]
    assert [path for path in stray if path.name != "dvc.lock"] == []
    return {name: (folder / run / name).read_bytes() for name in ("metrics.json", "history.csv", "model.safetensors")}


def check_that_nothing_half_is_read_as_whole(repository: Path) -> None:
    for path in repository.rglob("*.safetensors"):
        if not path.name.startswith("."):
            checkpoint.read(path)
    if (repository / "run" / "metrics.json").exists():
        runs.read(repository / "run")


def points(undisturbed: dict[str, Any]) -> list[dict[str, Any]]:
    """Twenty kills: at moments spread over the life of the run, and around and within what it does to files.

    The first half of that are checkpoints, the second half is the run.
    """
    chance = random.Random(7)
    moments = [{"after_s": undisturbed["seconds"] * (k + chance.random()) / 9} for k in range(9)]
    places = [chance.randint(1, undisturbed["operations"]) for _ in range(8)]
    around = [{"operation": k, "when": chance.choice(["before", "after"])} for k in places]
    within = [{"operation": undisturbed["operations"] * k // 8, "when": "half-way"} for k in (1, 2, 5)]
    return [*moments, *around, *within]


def unexpected(stderr: str) -> list[str]:
    """Lines beside the two that a run says at its start: how it shares a step, and where it goes on."""
    return [line for line in stderr.splitlines() if not re.match(r"a step takes 32 images|going on after epoch", line)]


def test_a_disk_that_fills_up_stops_the_run_in_one_line_that_names_the_file_and_leaves_what_was_there(
    incubator, repository, undisturbed, run
):
    done = incubator.run(*TRAIN, operation=undisturbed["operations"] // 4, when="full")
    kept = sorted(repository.glob("build/checkpoints/*/*"))
    assert {path.name for path in kept if path.suffix != ".safetensors"} == {"history.csv"}
    kept = [path for path in kept if path.suffix == ".safetensors"]
    checkpoint.read(kept[-1])
    refused = rf"famba: {kept[-1].parent}/epoch-\d{{5}}\.safetensors: cannot be written \(File too large\)\n"
    assert (done["status"], bool(re.fullmatch(refused, done["stderr"].splitlines(True)[-1]))) == (1, True), done
    assert not list(run.iterdir())
    assert incubator.run(*TRAIN)["status"] == 0
    assert contents(repository, "run") == undisturbed["files"]


def test_twenty_kills_anywhere_leave_the_same_run_and_nothing_else(incubator, repository, undisturbed, run):
    asked = points(undisturbed)
    assert len(asked) == 20
    for index, point in enumerate(asked):
        while not killed(incubator, run, point):  # too late: the machine is less busy than before
            shutil.rmtree(run)
            point["after_s"] /= 2
        check_that_nothing_half_is_read_as_whole(repository)
        if index % 4 == 3:  # and once more on its way
            killed(incubator, run, point)
            check_that_nothing_half_is_read_as_whole(repository)
        done = incubator.run(*train_again(run))
        assert (done["status"], unexpected(done["stderr"])) == (0, []), point
        assert contents(repository, "run") == undisturbed["files"], point
        shutil.rmtree(run)


def train_again(run: Path) -> list[str]:
    """What a user types after a kill: a run that had been written whole is replaced on demand only."""
    return [*TRAIN, "--force"] if (run / "metrics.json").exists() else TRAIN


def killed(incubator: Incubator, run: Path, point: dict[str, Any]) -> bool:
    """Whether that killed the run, which otherwise had finished."""
    done = incubator.run(*train_again(run), **point, how=signal.SIGKILL)
    assert done["status"] in (-signal.SIGKILL, -signal.SIGXFSZ, 0), (point, done)
    return done["status"] < 0


def test_a_folder_where_another_process_makes_a_run_is_refused_before_training(incubator, repository, run):
    with runs.held(run):
        done = incubator.run(*TRAIN)
        said = f"famba: {run}: another process is making a run there\n"
        assert (done["status"], done["stderr"].splitlines(True)[-1]) == (1, said)
        assert [path.name for path in run.iterdir()] == [".lock"]
    assert not list(repository.glob("build/checkpoints/*"))


@pytest.mark.parametrize(("how", "status", "said"), ENDS)
def test_a_run_that_is_told_to_end_says_so_in_one_line_and_goes_on_later(
    incubator, repository, undisturbed, run, how, status, said
):
    for share in (0.2, 0.7):
        after_s = share * undisturbed["seconds"]
        while not (done := incubator.run(*TRAIN, after_s=after_s, how=how))["status"]:  # too late: it had little left
            shutil.rmtree(run)
            after_s /= 2
        assert (done["status"], done["stderr"].splitlines(True)[-1]) == (status, said)
        assert not list(repository.rglob(".*.tmp"))
    assert incubator.run(*TRAIN)["status"] == 0
    assert contents(repository, "run") == undisturbed["files"]


def alive(folder: Path) -> list[str]:
    """The commands of the processes that work in a folder or name it; those that have ended do not count."""
    found = []
    for process in psutil.process_iter(["cwd", "cmdline"]):
        command, here = " ".join(process.info["cmdline"] or []), Path(process.info["cwd"] or "/")
        if folder in (here, *here.parents) or str(folder) in command:
            found.append(command)
    return found


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The tracked files under git, the pipeline cut down to training one run, which takes some seconds."""
    folder = copy_to(tmp_path_factory.mktemp("copy"), without=("tests/", "figures/", "results/", "dvc.lock"))
    with modify_yaml(folder / "params.yaml") as document:
        document["profile"] = "smoke"
        document["profiles"]["smoke"]["train"]["epochs"] = 24  # so many that it does not end before it is ended
        document["profiles"]["smoke"]["data"]["limit"] = 64
        document["sweep"].update(strategies=["upper"], seeds=[0])
    with modify_yaml(folder / "dvc.yaml") as document:
        document["stages"] = {"train": document["stages"]["train"]}
    (folder / "build").mkdir()
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()  # for make; PATH has the environment already
    return folder


def start_in(folder: Path, *command: str) -> subprocess.Popen:
    path = os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])
    given = {"PYTHONPATH": path, "DVC_SITE_CACHE_DIR": str(folder.parent / "dvc-site")}
    to = subprocess.PIPE
    return start(*command, environment=given, cwd=folder, start_new_session=True, stdout=to, stderr=to)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    """What it printed on stderr."""
    printed, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == status, printed + said
    return said


def trains(folder: Path, since: float) -> bool:
    return any(path.stat().st_mtime > since for path in folder.glob("build/checkpoints/*/epoch-*.safetensors"))


SLEEP = ["from pathlib import Path; import time", f"Path('build/sleeps').touch()\ntime.sleep({FOREVER_S})"]


@pytest.mark.parametrize(("how", "status", "said"), ENDS)
def test_a_notebook_that_is_told_to_end_leaves_no_process(copy, how, status, said):
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    cells = [nbformat.v4.new_code_cell(source) for source in SLEEP]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), copy / "build" / "sleep.ipynb")
    words = [sys.executable, "-m", "famba", "notebook", "build/sleep.ipynb", "build/slept.ipynb"]
    interruptible = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # whatever started these tests
    notebook = start_in(copy, "-c", f"import os, signal; {interruptible}; os.execv({words[0]!r}, {words})")
    sleeps = copy / "build" / "sleeps"
    wait_until(sleeps.exists, notebook)
    sleeps.unlink()
    assert len(alive(copy)) == 1
    notebook.send_signal(how)
    assert finish(notebook, status) == said
    wait_until(lambda: not alive(copy))


def test_sigterm_to_dvc_or_make_leaves_nothing_that_trains_on_and_dvc_finishes_it(copy):
    """The same run each time, which goes on from where the one before was ended."""
    for command in (["dvc", "repro", "train@upper-0"], ["make", "-o", "env", "repro"]):
        since = time.time()
        process = start_in(copy, *command)
        wait_until(functools.partial(trains, copy, since), process)
        assert len(alive(copy)) >= 2
        process.terminate()
        finish(process, -signal.SIGTERM)
        wait_until(lambda: not alive(copy))
        assert not (copy / "results" / "runs" / "upper-0" / "metrics.json").exists()
    finish(start_in(copy, "dvc", "repro", "-s", "train@upper-0"))
    assert contents(copy, "results/runs/upper-0")  # and no checkpoint is left

"""`famba sweep`: what is missing of a stage's runs, trained in processes of this machine or as the jobs of a cluster.

On Slurm each run is a job, through submitit. One that is preempted or reaches its time limit is queued again and
continues from its last epoch. Jobs outlive the command that submitted them; the same command waits for those that have
not ended. On this machine, worker processes take run after run: submitit's own would import torch for each, start all
at once and hide the GPUs.
"""

import logging
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from famba import config
from famba.errors import FambaError, InputError
from famba.experiments import ablations, launcher, sweep
from famba.experiments.sweep import Cell
from famba.storage.files import claimed

STAGES = {"train": "runs", "ablation": "experiments/ablation"}

_TIME_LIMITS = 1000  # that one run may reach, each time continuing in the next job
_POLL_S = 5.0
_POLLS = 6  # until a job that has ended without a result is given up: a shared file system may show it late

_log = logging.getLogger(__name__)


def train(stage: str, *, profile: str | None, cluster: str, jobs: int | None, slurm: dict[str, Any]) -> Path:
    """Train what is missing of a stage's runs; their folder, which is the pipeline's or one of another profile.

    Args:
        stage: of `STAGES`.
        cluster: local or slurm.
        jobs: runs at the same time; None is 1 here, and all on Slurm.
        slurm: parameters of `submitit.SlurmExecutor`.

    Raises:
        InputError: an argument that is not allowed; no Slurm or submitit; what Slurm refuses; jobs of an earlier sweep
            that have other parameters.
        FambaError: runs that failed. On Slurm the others are finished.
    """
    if slurm and cluster == "local":
        raise InputError(f"--slurm: {slurm}; allowed with --cluster slurm only")
    if not isinstance(slurm.get("time", 0), int):
        raise InputError(f"--slurm time: {slurm['time']!r}; must be a whole number of minutes")
    from famba.training import fit  # imports torch, which a job needs in its worker process only

    own = config.load(None, strategy="none").profile
    results = Path("results") if profile in (None, own) else Path("build") / profile
    for folder, cells in _cells(stage, profile or own, results).items():
        logs = config.root() / "build" / "slurm" / folder
        with claimed(logs.with_suffix(".lock"), f"{folder}: another famba sweep trains these runs"):
            missing = sweep.missing(cells)
            _log.info("%s: %d runs, %d of them missing", folder, len(cells), len(missing))
            if cluster == "local":
                launcher.run(sweep.train, {str(cell.run_dir): cell for cell in missing}, jobs=jobs or 1)
            else:
                _run_on_slurm(cells, missing, logs, {"array_parallelism": jobs or len(cells)} | slurm)
            if failed := sweep.missing(cells):
                first = failed[0].run_dir
                raise FambaError(f"{len(failed)} of {len(cells)} runs failed, the first {first}; logs: {logs}")
            shutil.rmtree(logs, ignore_errors=True)
            for cell in cells:  # a worker that was killed may have left those of a finished run
                fit.forget(cell.p, seed=cell.seed)
    return config.root() / results / STAGES[stage]


def _cells(stage: str, profile: str, results: Path) -> dict[Path, list[Cell]]:
    """The runs of a stage by their folders; all ablations of one profile share theirs."""
    folder = results / STAGES[stage]
    if stage == "ablation":
        found: dict[Path, dict[Path, Cell]] = {}
        for name, each in config.load_ablations().items():
            runs_dir, params = folder / (each.profile or profile), each.params(profile)
            for cell in sweep.cells(params, each.seeds, runs_dir=runs_dir, command=ablations.command(name)):
                found.setdefault(runs_dir, {}).setdefault(cell.run_dir, cell)
        return {each: list(cells.values()) for each, cells in found.items()}
    asked = config.load_sweep()
    return {folder: sweep.cells(asked.params(profile), asked.seeds, runs_dir=folder)}


class Job:
    """What submitit pickles, and calls in a job: trains one run."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell

    def __call__(self) -> str:
        """Empty, or the error in a line. The run has a process of its own, which ignores the signals of Slurm."""
        import submitit

        submitit.JobEnvironment().paths.result_pickle.unlink(missing_ok=True)  # of the same job before a preemption
        try:
            launcher.run(sweep.train, {str(self.cell.run_dir): self.cell}, jobs=1)
        except FambaError as error:
            return str(error)
        return ""

    def checkpoint(self) -> Any:
        """What is queued again: the same, since a run continues from its last epoch by itself."""
        from submitit.core.utils import DelayedSubmission

        return DelayedSubmission(self)


def _run_on_slurm(cells: Sequence[Cell], missing: Sequence[Cell], logs: Path, parameters: dict[str, Any]) -> None:
    """Submit a job for each missing run that has none, and wait until all jobs have ended; failures are logged."""
    try:
        import submitit
        from submitit.core.utils import FailedJobError, pickle_load
    except ImportError:
        raise InputError("--cluster slurm: needs submitit: pip install 'famba[cluster]'") from None
    try:
        executor = submitit.SlurmExecutor(logs, max_num_timeout=_TIME_LIMITS)
        executor.update_parameters(**{"job_name": "famba", "time": 240} | parameters)
        running = _running(logs, {cell.run_dir: cell for cell in cells})
        wanted = [Job(cell) for cell in missing if cell.run_dir not in running]
        submitted = executor.submit_array(wanted) if wanted else []
    except (FailedJobError, RuntimeError, ValueError) as error:  # no Slurm, an unknown parameter, or sbatch's refusal
        raise InputError(f"--cluster slurm: {' '.join(str(error).split())}") from None
    running |= {job.cell.run_dir: found for job, found in zip(wanted, submitted, strict=True)}
    count, polls = len(running), Counter[Path]()
    _log.info("%d jobs, %d of them submitted now; they outlive this command; logs: %s", count, len(wanted), logs)
    while running:
        time.sleep(_POLL_S)
        active = _active()
        for run_dir, job in list(running.items()):
            result = job.paths.result_pickle
            polls[run_dir] += job.job_id not in active
            if job.job_id in active or (not result.exists() and polls[run_dir] < _POLLS):
                continue
            del running[run_dir]
            state, value = pickle_load(result) if result.exists() else ("", f"job {job.job_id} ended without a result")
            if state != "success" or value:
                _log.error("%s: %s; log: %s", run_dir, value.strip().splitlines()[-1], job.paths.stderr)
            _log.info("%d of %d jobs have ended", count - len(running), count)


def _running(logs: Path, cells: Mapping[Path, Cell]) -> dict[Path, Any]:
    """The jobs of an earlier sweep that have not ended, by the folders of their runs."""
    import submitit

    active, found = _active(), {}
    for path in logs.glob("*_submitted.pkl"):
        job = submitit.SlurmJob(logs, path.name.removesuffix("_submitted.pkl"))
        if job.job_id in active:
            submitted: Any = job.submission().function
            cell = submitted.cell
            if cells.get(cell.run_dir) != cell:
                raise InputError(f"{cell.run_dir}: job {job.job_id} has other parameters; wait for it, or cancel it")
            found[cell.run_dir] = job
    return found


def _active() -> set[str]:
    """The numbers of this user's jobs that have not ended; of all, since sacct would need an accounting database."""
    while True:
        squeue = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
        done = subprocess.run(squeue, capture_output=True, text=True)
        if not done.returncode:
            return set(done.stdout.split())
        _log.warning("squeue: %s; asked again", " ".join(done.stderr.split()))
        time.sleep(_POLL_S)

"""The trained models that the notebook `tokens` looks into: a run of the sweep, a published one, else a smoke run."""

import contextlib
import os
from pathlib import Path

from famba import config, data
from famba.analysis import tokens, trained
from famba.analysis.tokens import Traced
from famba.errors import InputError
from famba.experiments import sweep
from famba.reports import SMOKE, Report, profile_name, smoke_report
from famba.storage import runs

MODELS = "results/records/photographs/models"


def opened(profile: str | None, *, strategy: str, seed: int, pipeline: bool) -> tuple[Report, Path]:
    """The report of one model, and the folder that holds it.

    Args:
        profile: None is the one that params.yaml names.
        pipeline: the finished run or an error.
    """
    root, name = config.root(), runs.run_name(strategy, seed)
    runs_dir = root / "results" / "runs"
    asked = profile_name(profile if pipeline else os.environ.get("FAMBA_PROFILE", profile))
    wanted = {"strategy": strategy, "seed": seed}
    try:
        folder = sweep.ensure_run(runs_dir / name, **wanted, profile=asked, train_missing=False)
        shown = f"The finished run results/runs/{name} of the profile `{asked}`."
    except InputError as error:
        folder = root / MODELS / runs.run_name(strategy, 0)
        if pipeline:
            raise
        if asked == SMOKE or not folder.is_dir():
            report = smoke_report(f"{error}. `make repro` trains the real one.")
            folder = report.runs_dir / name
            return report, sweep.ensure_run(folder, **wanted, profile=SMOKE, train_missing=True)
        shown = f"The trained model {folder.relative_to(root)}. No run of the sweep is here: `make repro` trains them."
    return Report(asked, shown, root, runs_dir, made=pipeline), folder


def traced(folder: Path, *, count: int) -> Traced:
    """A model and the first `count` images of its test split, or photographs if it came without its data set."""
    if (folder / "config.json").is_file():
        return tokens.trace(*trained.load(folder), PHOTOGRAPHS[:count])
    return tokens.trace_run(folder, count=count)


def all_traced(folder: Path) -> dict[str, Traced]:
    """Every model that can be played with, by name: the one in a folder, runs of its seed beside it, the published."""
    found = {folder.name: folder}
    if not (folder / "config.json").is_file():
        profile, seed = runs.read(folder).profile, folder.name.rpartition("-")[2]
        for file in sorted(folder.parent.glob(f"*-{seed}/metrics.json")):
            name, wanted = file.parent.name, {"strategy": file.parent.name.rpartition("-")[0], "seed": int(seed)}
            with contextlib.suppress(InputError):  # of another profile, or being made
                found[name] = sweep.ensure_run(file.parent, **wanted, profile=profile, train_missing=False)
    for file in sorted((config.root() / MODELS).glob("*-0/config.json")):
        if file.parent != folder:
            found[f"photographs, {file.parent.name}"] = file.parent
    return {name: traced(each, count=10) for name, each in found.items()}


PHOTOGRAPHS = [data.shipped(f"images/{name}.jpg") for name in ("china", "flower")]

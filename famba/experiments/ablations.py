"""The runs of an ablation: trained where they are not known, and what they found written into results/records/<name>.

That is in git. So tables and figures are drawn anywhere in seconds, and no run is trained twice: one is known where a
line says that it was made of the parameters and the code of today, whoever trained it.

    runs.csv     a line for each run (`analysis.records`)
    curves.csv   a line for each epoch, of another profile's strategies as they are
    cost.csv     what a training step of each variant costs, measured in turn; step_times.csv has each round
    models/      trained models that are looked into (`analysis.trained`)
"""

import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pandas as pd

from famba import config
from famba.analysis import records, trained
from famba.analysis.cost import BASELINE
from famba.config import AblationParams
from famba.errors import InputError
from famba.experiments import launcher, sweep
from famba.storage import runs


def command(name: str) -> str:
    """What to type for the runs of an ablation."""
    return f"make ablation NAME={name}"


def runs_dir(profile: str) -> Path:
    """The folder of the runs of all ablations of a profile."""
    return Path("results") / "experiments" / "ablation" / profile


def make(name: str, *, profile: str | None, jobs: int) -> Path:
    """Record the ablation of that name in params.yaml, and return the folder.

    Args:
        profile: of an ablation that names none; None is the one that params.yaml names.
        jobs: runs trained at the same time.

    Raises:
        InputError: a name that params.yaml has not; as from `sweep.resolve` and `sweep.ensure`.
    """
    asked = sweep.load_ablation(name)
    profile = asked.profile or config.load(profile, strategy="none").profile
    folder = config.root() / "results" / "records" / name
    record(name, asked, folder, profile=profile, runs_dir=runs_dir(profile), jobs=jobs)
    return folder


def record(name: str, asked: AblationParams, folder: Path, *, profile: str, runs_dir: Path, jobs: int = 1) -> None:
    """Train what is not known of an ablation's runs, and write what all of them found; a line as soon as it is known.

    Args:
        folder: of the record; lines of other ablations, beside it, and of the sweep, above, serve as well.
    """
    params = asked.params(profile)
    sweep.check_schedules(params)
    cells = sweep.cells(params, asked.seeds, runs_dir=runs_dir, command=command(name))
    known = _Record(folder, asked, dict(zip([(x, seed) for x in params for seed in asked.seeds], cells, strict=True)))
    missing = {runs.run_name(*run): run for run in known.missing()}
    untrained = sweep.missing([known.cells[run] for run in missing.values()])
    todo = {cell.run_dir.name: cell for cell in untrained}
    for name in [name for name in missing if name not in todo]:
        known.add(missing[name])
    if jobs > 1 and todo:
        launcher.run(sweep.train, todo, jobs=jobs, done=lambda name: known.add(missing[name]))
    else:
        for name, cell in todo.items():
            sweep.train(cell)
            known.add(missing[name])
    known.write()
    sweep.measure_costs(asked, profile=profile, results_dir=folder)


class _Record:
    """What is known of the runs that an ablation asks for, each a variant and a seed."""

    def __init__(self, folder: Path, asked: AblationParams, cells: dict[tuple[str, int], sweep.Cell]) -> None:
        from famba.training import fit

        self.folder, self.cells = folder, cells
        self.made_of = {run: fit.made_of(cell.p, seed=cell.seed) for run, cell in cells.items()}
        as_they_are = bool(asked.profile and not asked.changes)
        self.shown = [run for run in cells if as_they_are and (run[0] == BASELINE or run[1] == asked.seeds[0])]
        if any(name.startswith("by_") for name in asked.strategies) and not self.shown:
            self.shown = [(BASELINE, asked.seeds[0])]  # for calibration
        others = [] if as_they_are else [folder.parents[1] / "runs.csv", *folder.parent.glob("*/runs.csv")]
        self.lines = {line.get("made_of"): line for file in [*others, folder / "runs.csv"] for line in rows(file)}
        self.curves: dict[tuple[str, int], list[dict[Any, Any]]] | None = None
        if as_they_are:
            self.curves = defaultdict(list)
            for row in rows(folder / "curves.csv"):
                self.curves[row["strategy"], int(row["seed"])].append(row)

    def model(self, run: tuple[str, int]) -> Path:
        return self.folder / "models" / runs.run_name(*run)

    def missing(self) -> list[tuple[str, int]]:
        """The runs without a line, or whose model is looked into and is not there."""
        made = self.made_of | {run: trained.made_of(self.model(run)) for run in self.shown}
        return [run for run, of in self.made_of.items() if of not in self.lines or made[run] != of]

    def add(self, run: tuple[str, int]) -> None:
        """What a run found that is finished."""
        run_dir, made_of = self.cells[run].run_dir, self.made_of[run]
        found = runs.read(run_dir)
        self.lines[made_of] = records.line(run[0], found)
        if self.curves is not None:
            self.curves[run] = records.epochs(run[0], found)
        if run in self.shown:
            trained.publish(run_dir, self.model(run), made_of=made_of)
        self.write()

    def write(self) -> None:
        known = [run for run in self.cells if self.made_of[run] in self.lines]
        lines = [self.lines[self.made_of[run]] | {"strategy": run[0]} for run in known]
        records.write(pd.DataFrame(lines), self.folder)
        if self.curves is not None:
            curves = [row for run in known for row in self.curves[run]]
            records.write(pd.DataFrame(curves, columns=list(records.CURVES)), self.folder, "curves.csv")
        for path in (self.folder / "models").glob("*"):
            if path not in map(self.model, self.shown):
                shutil.rmtree(path)


def rows(file: Path) -> list[dict[Any, Any]]:
    """What is written again as it is."""
    try:
        return pd.read_csv(file, dtype=str, keep_default_na=False).to_dict("records") if file.is_file() else []
    except ValueError as error:
        raise InputError(f"{file}: not readable as CSV: {' '.join(str(error).split())}") from None

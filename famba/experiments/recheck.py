"""Whether changed training code still trains the recorded runs, so that they need not be trained again.

A change for a GPU, say, should change nothing of what was trained on a CPU. That is seen, not assumed: runs are trained
again and must find the same, bit for bit.
"""

import functools
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from famba import config
from famba.analysis import records
from famba.errors import InputError, TrainingError
from famba.experiments import launcher, sweep
from famba.storage import provenance, runs
from famba.storage.files import json_bytes, write_atomic

_FOLDER = Path("build") / "recheck"
_MAY_DIFFER = ("device", "versions", "command", "made_of", "peak_memory_mib")  # the last: cost.csv is measured anew


def recheck(names: Sequence[str], *, variants: Collection[str] = (), jobs: int = 1) -> Path:
    """Train runs of recorded ablations again, and write down that today's code trains the same as the code before it.

    From then on what that code trained counts as known. Of each variant the first seed's run is trained, and its line
    must be the recorded one in all but device, versions, command and peak memory; so it takes a processor like the one
    that trained it, and as many runs as it takes to be sure: the file names them.

    Args:
        variants: these alone.
        jobs: runs trained at the same time.

    Raises:
        InputError: an ablation, variant or run that is not recorded, or one recorded of other parameters; runs that
            were recorded of different code.
        TrainingError: a run that finds something else; names the run and what differs. Nothing is written.
    """
    cells: dict[str, tuple[str, sweep.Cell, dict[str, str]]] = {}
    for name in names:
        asked = sweep.load_ablation(name)
        profile = asked.profile or config.load(None, strategy="none").profile
        recorded = {
            (x["strategy"], x["seed"]): x for x in _lines(config.root() / "results/records" / name / "runs.csv")
        }
        wanted = {key: p for key, p in asked.params(profile).items() if not variants or key in variants}
        for cell in sweep.cells(wanted, asked.seeds[:1], runs_dir=_FOLDER / profile):
            variant = cell.run_dir.name.removesuffix(f"-{cell.seed}")
            line = recorded.get((variant, str(cell.seed)))
            if line is None or line["made_of"].split("-")[0] != cell.p.digest(cell.seed):
                raise InputError(
                    f"{name}: {cell.run_dir.name}: not recorded with these parameters; make ablation NAME={name}"
                )
            cells[f"{profile} {cell.run_dir.name}"] = variant, cell, line
    codes = {line["made_of"].split("-")[1] for _, _, line in cells.values()}
    if len(codes) != 1:
        raise InputError(
            f"recheck: {' '.join(names)}: {len(cells)} runs recorded of {len(codes)} codes; must be of one"
        )
    train = functools.partial(sweep.ensure, train_missing=True)
    launcher.run(train, {name: cell for name, (_, cell, _) in cells.items()}, jobs=jobs)
    for name, (variant, cell, line) in cells.items():
        records.write(pd.DataFrame([records.line(variant, runs.read(cell.run_dir))]), cell.run_dir)
        (found,) = _lines(config.root() / cell.run_dir / "runs.csv")
        if differ := [key for key in line if key not in _MAY_DIFFER and found[key] != line[key]]:
            raise TrainingError(f"{name}: {differ[0]}: {found[differ[0]]}; recorded was {line[differ[0]]}")
    path, code, (same_as,) = config.root() / provenance.SAME_RUNS, provenance.of_module("famba.training.fit"), codes
    known = provenance.same_runs()
    before = known["runs"] if (known.get("code"), known.get("same_as")) == (code, same_as) else []
    write_atomic(path, json_bytes({"code": code, "same_as": same_as, "runs": sorted({*before, *cells})}))
    shutil.rmtree(config.root() / _FOLDER)
    return path


def _lines(file: Path) -> list[dict[Any, Any]]:
    if not file.is_file():
        raise InputError(f"{file}: missing, so nothing is recorded")
    return pd.read_csv(file, dtype=str, keep_default_na=False).to_dict("records")

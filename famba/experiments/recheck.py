"""Whether changed training code still trains the recorded runs, so that they need not be trained again.

A change for a GPU, say, should change nothing of what was trained on a CPU. That is seen, not assumed: runs are trained
again and must find the same, bit for bit.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from famba import config
from famba.analysis import records
from famba.errors import InputError, TrainingError
from famba.experiments import ablations, launcher, sweep
from famba.storage import provenance, runs
from famba.storage.files import json_bytes, write_atomic

_FOLDER = Path("build") / "recheck"
_MAY_DIFFER = ("device", "versions", "command", "made_of", "peak_memory_mib")  # the last: cost.csv is measured anew


def recheck(names: Sequence[str], *, jobs: int = 1) -> Path:
    """Train runs of recorded ablations again, and write down that today's code trains the same as the code before it.

    From then on what that code trained on a CPU counts as known. A variant's run with the first seed is trained, and
    its line must be the recorded one in all but device, versions, command and peak memory; so it takes a processor like
    the one that trained it, and as many runs as it takes to be sure: the file names them.

    Args:
        names: of ablations, of which each variant is trained; or `ablation:variant`.
        jobs: runs trained at the same time, begun in that order.

    Raises:
        InputError: an ablation, variant or run that is not recorded, or one recorded of other parameters; runs that
            were recorded of different code.
        TrainingError: a run that finds something else, which it names; then earlier code no longer counts as the same.
    """
    code, path = provenance.of_module("famba.training.fit"), config.root() / provenance.SAME_RUNS
    asked = {}
    for name, _, variant in (name.partition(":") for name in names):
        asked |= _recorded(name, variant)
    codes = {line["made_of"].split("-")[1] for _, line in asked.values()}
    if len(codes) != 1:
        raise InputError(
            f"{' '.join(names)}: recorded of different code, {' and '.join(sorted(codes))}; must be of one"
        )
    earlier = path.read_bytes() if provenance.of_training() != code else None
    if earlier is not None:
        path.unlink()  # so that the runs say by which code they were trained
    try:
        _compare(asked, code, jobs=jobs)
    except TrainingError:
        raise
    except BaseException:  # nothing was found out
        if earlier is not None:
            write_atomic(path, earlier)
        raise
    write_atomic(path, json_bytes({"code": code, "same_as": codes.pop(), "runs": sorted(asked)}))
    for cell, _ in asked.values():
        shutil.rmtree(config.root() / cell.run_dir)
    return path


def _compare(asked: dict[str, tuple[sweep.Cell, dict[str, str]]], code: str, *, jobs: int) -> None:
    """Train the runs, and raise TrainingError of the first whose line is not the recorded one."""
    launcher.run(sweep.train, {run: cell for run, (cell, _) in asked.items()}, jobs=jobs)
    for run, (cell, line) in asked.items():
        records.write(pd.DataFrame([records.line(line["strategy"], runs.read(cell.run_dir))]), cell.run_dir)
        (found,) = ablations.rows(config.root() / cell.run_dir / "runs.csv")
        for key in line:
            new, old = (x.get(key, "").rstrip("-") for x in (found, line))  # images at the end that were not tested
            if key not in _MAY_DIFFER and new != old:
                raise TrainingError(f"{run}: {key}: {new:.60}; recorded was {old:.60}")
        if found["made_of"].split("-")[1] != code:
            raise TrainingError(f"{run}: trained by {found['made_of']}; the code was {code} when recheck began")


def _recorded(name: str, variant: str) -> dict[str, tuple[sweep.Cell, dict[str, str]]]:
    """Of each variant, or of one, the run with the first seed, and its recorded line."""
    asked = sweep.load_ablation(name)
    params = asked.params(None)
    if variant and variant not in params:
        raise InputError(f"{name}: {variant!r} is not one of {', '.join(params)}")
    lines = {
        (x["strategy"], x["seed"]): x for x in ablations.rows(config.root() / "results/records" / name / "runs.csv")
    }
    found = {}
    for key in [variant] if variant else params:
        p = params[key]
        (cell,) = sweep.cells({key: p}, asked.seeds[:1], runs_dir=_FOLDER / p.profile)
        line = lines.get((key, str(cell.seed)))
        if line is None or line["made_of"].split("-")[0] != p.digest(cell.seed):
            raise InputError(f"{name}: {key}: not recorded with these parameters; make ablation NAME={name}")
        found[f"{p.profile} {cell.run_dir.name}"] = cell, line
    return found

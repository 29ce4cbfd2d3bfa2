"""The runs of a sweep, on disk: each complete and made of the parameters of today, or trained now if that is allowed.

The pipeline trains runs in stages of their own and only checks them here. A notebook that is opened by itself, in a
checkout without runs, trains the small ones that it shows.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from famba import config
from famba.config import SweepParams
from famba.errors import InputError
from famba.experiments import launcher
from famba.fusion import strategies
from famba.models import presets
from famba.storage import runs

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True)
class Cell:
    """What one run is trained from, as `ensure` takes it."""

    run_dir: Path
    p: config.Params
    seed: int
    command: str | None = None  # to type for it, where it is more than a strategy and a seed of a profile


def resolve(profile: str | None) -> list[config.Params]:
    """The parameters of each strategy of the sweep, whose schedules are checked to fit the model.

    Raises:
        InputError: as from `config.load`; or a layer that would remove more tokens than it can, by `fusion.<strategy>`.
    """
    sweep = config.load_sweep()
    params = sweep.params(profile)
    _check_schedules(params)
    return list(params.values())


def _check_schedules(params: Mapping[str, config.Params]) -> None:
    """Before hours of training, that each variant's schedule fits its model."""
    for variant, p in params.items():
        given = {key: getattr(p.model, key) for key in ("patch_size", "stride", "depth")}
        built = presets.sizes(p.model.name, img_size=p.data.img_size, **given)
        has_cls = p.model.cls_position != "none"
        schedule, tokens = p.schedule(built["depth"]), presets.grid(built) ** 2 + has_cls
        try:
            strategies.token_counts(schedule, tokens, protected=int(has_cls))
        except InputError as error:
            where = f"fusion.{p.strategy}" + ("" if variant == p.strategy else f", {variant}")
            raise InputError(f"params.yaml: {where} under profile {p.profile}: {error}") from None


def ensure_runs(
    sweep: SweepParams,
    *,
    profile: str,
    runs_dir: str | Path,
    train_missing: bool,
    jobs: int = 1,
    command: str | None = None,
) -> list[Path]:
    """The folders of all runs that a sweep names, in its order; arguments and errors as in `ensure` and `resolve`.

    Args:
        jobs: runs trained at the same time, each in a process of its own if there are several.
    """
    params = sweep.params(profile)
    _check_schedules(params)
    wanted = cells(params, sweep.seeds, runs_dir=runs_dir, command=command)
    one = functools.partial(ensure, train_missing=train_missing)
    if jobs > 1 and train_missing:
        launcher.run(one, {cell.run_dir.name: cell for cell in missing(wanted)}, jobs=jobs)
    return [one(cell) for cell in wanted]


def cells(
    params: Mapping[str, config.Params], seeds: Sequence[int], *, runs_dir: str | Path, command: str | None = None
) -> list[Cell]:
    """A run of each variant with each seed, in a folder of its own there."""
    return [
        Cell(Path(runs_dir) / runs.run_name(name, seed), p, seed, command)
        for name, p in params.items()
        for seed in seeds
    ]


def missing(cells: Sequence[Cell]) -> list[Cell]:
    """Those whose runs are not there, complete, with these parameters and trained by the code of today."""
    from famba.training import fit

    return [cell for cell in cells if _why_not(cell, fit.made_of(cell.p, seed=cell.seed), known_code=True)]


def ensure_costs(sweep: SweepParams, *, profile: str, results_dir: str | Path, rounds: int | None) -> "pd.DataFrame":
    """What training each variant costs, as `analysis.cost.table` has it.

    Args:
        results_dir: where cost.csv is.
        rounds: measure now, in so many rounds, and write it there; None reads what has been measured.

    Raises:
        InputError: nothing has been measured; as from `training.cost.measure`.
    """
    from famba.analysis import cost

    if rounds is not None:
        from famba.training.cost import measure

        cost.write(cost.table(measure(sweep.params(profile), rounds=rounds)), results_dir)
    return cost.load(results_dir)


def ensure_run(run_dir: str | Path, *, strategy: str, seed: int, profile: str, train_missing: bool) -> Path:
    """The folder of one run, checked.

    Args:
        run_dir: if relative, from the repository root.
        train_missing: train and write the run if it is not there, not complete, or made of other parameters.

    Raises:
        InputError: the run is not what was asked for, and must not be trained; says why.
    """
    return ensure(Cell(Path(run_dir), config.load(profile, strategy=strategy), seed), train_missing=train_missing)


def ensure(cell: Cell, *, train_missing: bool, known_code: bool = False) -> Path:
    """The folder of the run of any parameters, checked; arguments and errors as in `ensure_run`.

    A run that was trained here says by what code, and is trained again by other code where that is allowed. The
    pipeline, which must not train here, sees to that itself. A run that another process is making is waited for.

    Args:
        known_code: train a run again that does not say by what code it was trained.
    """
    folder = config.root() / cell.run_dir
    if not train_missing:
        if wrong := _why_not(cell):
            raise InputError(wrong)
        return folder
    from famba.training import fit

    made_of = fit.made_of(cell.p, seed=cell.seed)
    if _why_not(cell, made_of, known_code):
        with runs.held(folder, wait=True):
            if _why_not(cell, made_of, known_code):  # else a process that was waited for has made it
                run = fit.fit(cell.p, seed=cell.seed)
                cost = {**run.cost, "made_of": made_of, "command": cell.command or run.cost["command"]}
                runs.write(dataclasses.replace(run, cost=cost), folder)
                fit.forget(cell.p, seed=cell.seed)
    return folder


def _why_not(cell: Cell, made_of: str | None = None, known_code: bool = False) -> str:
    """Empty if the cell's folder holds its run, else the reason."""
    folder, p, seed = config.root() / cell.run_dir, cell.p, cell.seed
    try:
        run = runs.read(folder)
    except InputError as error:
        return str(error)
    if run.seed != seed:
        return f"{folder / 'metrics.json'}: seed: {run.seed}; asked for {seed}"
    if config.identity(run.params) != config.identity(p.as_dict()):
        return f"{folder / 'params.json'}: other parameters than params.yaml gives for {p.strategy} in {p.profile}"
    if run.metrics.get("init_sha256") != p.init_sha256(seed):
        return f"{folder / 'metrics.json'}: init_sha256: started from other weights than {p.init_path(seed)} holds now"
    if made_of is not None and run.cost.get("made_of", "" if known_code else made_of) != made_of:
        return f"{folder / 'cost.json'}: made_of: {run.cost.get('made_of')}, other code than today's"
    return ""

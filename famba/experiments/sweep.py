"""The runs of a sweep, on disk: each complete and made of the parameters of today, or trained now if that is allowed.

The pipeline trains runs in stages of their own and only checks them here. A notebook that is opened by itself, in a
checkout without runs, trains the small ones that it shows.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from famba import config
from famba.config import AblationParams, SweepParams
from famba.errors import InputError
from famba.fusion import strategies
from famba.models import presets
from famba.params import Params, identity
from famba.storage import runs

SMOKE = "smoke"  # the profile whose numbers mean nothing


@dataclasses.dataclass(frozen=True)
class Cell:
    """What one run is trained from, as `ensure` takes it."""

    run_dir: Path
    p: Params
    seed: int
    command: str | None = None  # to type for it, where it is more than a strategy and a seed of a profile


def resolve(profile: str | None) -> list[Params]:
    """The parameters of each strategy of the sweep, whose schedules are checked to fit the model.

    Raises:
        InputError: as from `config.load`; or a layer that would remove more tokens than it can, by `fusion.<strategy>`.
    """
    params = config.load_sweep().params(profile)
    check_schedules(params)
    return list(params.values())


def resolve_ablation(name: str) -> dict[str, Any]:
    """What an ablation's runs and figures rest on besides code; errors as in `resolve` and `load_ablation`."""
    asked = load_ablation(name)
    params = asked.params(None)
    check_schedules(params)
    return {
        "seeds": asked.seeds,
        "adaptive": dataclasses.asdict(config.load_adaptive(asked.profile)),
        "variants": {variant: p.as_dict() for variant, p in params.items()},
    }


def load_ablation(name: str) -> AblationParams:
    """The ablation of that name; InputError where params.yaml has none."""
    found = config.load_ablations()
    if name not in found:
        raise InputError(f"params.yaml: ablation: {name!r} is not one of {', '.join(found)}")
    return found[name]


def check_schedules(params: Mapping[str, Params]) -> None:
    """Before hours of training, that each variant's schedule fits its model."""
    for variant, p in params.items():
        depth, tokens = depth_and_tokens(p)
        try:
            strategies.token_counts(p.schedule(depth), tokens, protected=int(p.model.cls_position != "none"))
        except InputError as error:
            rule = f"fusion.{p.strategy}"
            where = rule + ("" if variant == p.strategy else f", {variant}")
            said = str(error).removeprefix(rule).lstrip(".: ")
            raise InputError(f"{where} under profile {p.profile}: {said}") from None


def depth_and_tokens(p: Params) -> tuple[int, int]:
    """The layers of a run's model, and the tokens at its input, class token included."""
    given = {key: getattr(p.model, key) for key in ("patch_size", "stride", "depth")}
    sizes = presets.sizes(p.model.name, img_size=p.data.img_size, **given)
    return sizes["depth"], presets.tokens({**sizes, "cls_position": p.model.cls_position})


def ensure_runs(sweep: SweepParams, *, profile: str, runs_dir: str | Path, train_missing: bool) -> list[Path]:
    """The folders of all runs that a sweep names, in its order; arguments and errors as in `ensure` and `resolve`."""
    params = sweep.params(profile)
    check_schedules(params)
    return [ensure(cell, train_missing=train_missing) for cell in cells(params, sweep.seeds, runs_dir=runs_dir)]


def cells(
    params: Mapping[str, Params], seeds: Sequence[int], *, runs_dir: str | Path, command: str | None = None
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

    return [cell for cell in cells if _why_not(cell, fit.made_of(cell.p, seed=cell.seed))]


def measure_costs(sweep: SweepParams, *, profile: str, results_dir: str | Path) -> None:
    """Measure what training each variant costs, and write it as `analysis.cost.write`; errors as in `measure`."""
    from famba.analysis import cost
    from famba.training.cost import measure

    params = sweep.params(profile)
    check_schedules(params)
    cost.write(measure(params, rounds=3 if profile == SMOKE else 60), results_dir)


def ensure_run(run_dir: str | Path, *, strategy: str, seed: int, profile: str, train_missing: bool) -> Path:
    """The folder of one run, checked.

    Args:
        run_dir: if relative, from the repository root.
        train_missing: train and write the run if it is not there, not complete, or made of other parameters.

    Raises:
        InputError: the run is not what was asked for, and must not be trained; says why.
    """
    return ensure(Cell(Path(run_dir), config.load(profile, strategy=strategy), seed), train_missing=train_missing)


def ensure(cell: Cell, *, train_missing: bool) -> Path:
    """The folder of the run of any parameters, checked; arguments and errors as in `ensure_run`."""
    if train_missing:
        return train(cell)
    if wrong := _why_not(cell):
        raise InputError(wrong)
    return config.root() / cell.run_dir


def train(cell: Cell) -> Path:
    """The folder of the run, which is trained unless it is there, complete, with these parameters and by today's code.

    A run that another process is making is waited for.
    """
    from famba.training import fit

    folder, made_of = config.root() / cell.run_dir, fit.made_of(cell.p, seed=cell.seed)
    if _why_not(cell, made_of):
        with runs.held(folder, wait=True):
            if _why_not(cell, made_of):  # else a process that was waited for has made it
                run = fit.fit(cell.p, seed=cell.seed)
                cost = {**run.cost, "command": cell.command or run.cost["command"]}
                runs.write(dataclasses.replace(run, cost=cost), folder)
                fit.forget(cell.p, seed=cell.seed)
    return folder


def _why_not(cell: Cell, made_of: str | None = None) -> str:
    """Empty if the cell's folder holds its run, else the reason."""
    folder, p, seed = config.root() / cell.run_dir, cell.p, cell.seed
    try:
        run = runs.read(folder)
    except InputError as error:
        return str(error)
    if run.seed != seed:
        return f"{folder / 'metrics.json'}: seed: {run.seed}; asked for {seed}"
    if identity(run.params) != identity(p.as_dict()):
        return f"{folder / 'params.json'}: other parameters than params.yaml gives for {p.strategy} in {p.profile}"
    if run.metrics.get("init_sha256") != config.init_sha256(p, seed):
        path = config.init_path(p, seed)
        return f"{folder / 'metrics.json'}: init_sha256: started from other weights than {path} holds now"
    if made_of is not None and run.cost.get("made_of") != made_of:
        return f"{folder / 'cost.json'}: made_of: {run.cost.get('made_of')}, other code than today's"
    return ""

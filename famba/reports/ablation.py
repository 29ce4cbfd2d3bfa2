"""The results that the notebook `ablation` shows, of one ablation at a time."""

import dataclasses
import functools

from IPython.display import Image, Markdown, display

from famba import config, plots
from famba.analysis import ablation, summary
from famba.config import SweepParams
from famba.experiments import sweep
from famba.reports import SMOKE_ROUNDS, Report, opened

_ROUNDS = 60
_JOBS = 2  # runs trained at the same time, each on one thread
_SMOKE = {
    "strategies": ("none", "upper"),
    "varied": ("upper",),
    "changes": {
        "from_1": {"fusion.upper.first_layer": 1, "fusion.upper.total": 24},
        "from_3": {"fusion.upper.first_layer": 3, "fusion.upper.total": 24},
    },
}


def open_report(name: str, *, profile: str | None, pipeline: bool) -> Report:
    """The report of the ablation of that name in params.yaml; arguments as of `reports.opened`."""
    return opened(
        functools.partial(make, name=name),
        f"ablation/{name}/effects.md",
        command="make ablation",
        profile=profile,
        pipeline=pipeline,
        runs_dir=f"results/experiments/ablation/{name}",
        of=f"ablation/{name}/runs.csv",
    )


def asked(report: Report, name: str) -> SweepParams:
    """The runs of an ablation; of smoke runs a few are enough."""
    found = config.load_ablations()[name]
    return dataclasses.replace(found, **_SMOKE, seeds=report.sweep().seeds) if report.smoke else found


def make(report: Report, name: str) -> None:
    """Train what is missing of the runs, measure what training each variant costs, and compare them."""
    variants, results_dir = asked(report, name), report.results_dir / "ablation" / name
    given = {"profile": report.profile, "runs_dir": report.runs_dir}
    sweep.ensure_runs(variants, **given, train_missing=True, jobs=1 if report.smoke else _JOBS, command="make ablation")
    rounds = SMOKE_ROUNDS if report.smoke else _ROUNDS
    costs = sweep.ensure_costs(variants, profile=report.profile, results_dir=results_dir, rounds=rounds)
    runs = summary.load_runs(variants, report.runs_dir)
    table = summary.write_summary(runs, costs, results_dir)
    effects = ablation.effects(variants, runs)
    ablation.write(effects, results_dir)
    figures = plots.ablations(effects, runs, table)
    report.save(**{f"ablation/{name}/{kind}": figure for kind, figure in figures.items()})


def show_figures(report: Report, name: str) -> None:
    display(*(Image(path) for path in sorted((report.folder / "figures" / "ablation" / name).glob("*.png"))))


def changes(report: Report, name: str) -> Markdown:
    """What each change sets, as a list."""
    lines = [f"- `{change}`: `{given}`" for change, given in asked(report, name).changes.items()]
    return Markdown("\n".join(lines))

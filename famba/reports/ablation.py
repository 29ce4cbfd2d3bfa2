"""The results that the notebook `ablation` shows, of one ablation at a time."""

import dataclasses
import functools
from typing import Any

from IPython.display import Image, Markdown, display

from famba import config, plots
from famba.analysis import ablation, summary
from famba.config import AblationParams
from famba.experiments import sweep
from famba.reports import Report, calibration, compare, models, opened, profile_name, similarity
from famba.storage.files import write_atomic
from famba.storage.runs import run_name

_TEXTS = ("effects.md", "calibration.md", "similarity.md")
_JOBS = 2  # runs trained at the same time, each on one thread
_SMOKE: dict[str, Any] = {
    "varied": ("upper",),
    "changes": {
        "from_1": {"fusion.upper.first_layer": 1, "fusion.upper.total": 24},
        "from_3": {"fusion.upper.first_layer": 3, "fusion.upper.total": 24},
    },
}


def open_report(name: str, *, profile: str | None, pipeline: bool) -> Report:
    """The report of the ablation of that name in params.yaml; arguments as of `reports.opened`."""
    profile = config.load_ablations()[name].profile or profile_name(profile)
    return opened(
        functools.partial(make, name=name),
        f"ablation/{name}/summary.md",
        command=_command(name),
        profile=profile,
        pipeline=pipeline,
        runs_dir=f"results/experiments/ablation/{profile}",
        of=f"ablation/{name}/runs.csv",
    )


def _command(name: str) -> str:
    return f"make ablation NAME={name}"


def asked(report: Report, name: str) -> AblationParams:
    """The runs of an ablation; of smoke runs a few are enough."""
    found = config.load_ablations()[name]
    if not report.smoke:
        return found
    few: dict[str, Any] = {"profile": None, "strategies": ("none", "upper"), "seeds": report.sweep().seeds}
    return dataclasses.replace(found, **few, **(_SMOKE if found.changes else {}))


def make(report: Report, name: str) -> None:
    """Train what is missing of the runs, measure what training each variant costs, and compare them.

    Of another profile's strategies as they are, curves and similarity are shown, and the first seed's models published.
    """
    variants, results_dir = asked(report, name), report.results_dir / "ablation" / name
    given = {"profile": report.profile, "runs_dir": report.runs_dir}
    jobs = 1 if report.smoke else _JOBS
    sweep.ensure_runs(variants, **given, train_missing=True, jobs=jobs, command=_command(name))
    costs = sweep.ensure_costs(variants, profile=report.profile, results_dir=results_dir, rounds=report.rounds)
    runs = summary.load_runs(variants, report.runs_dir)
    table = summary.write_summary(runs, costs, results_dir)
    figures = plots.ablations(runs, table) | calibration.measure(report, variants, results_dir)
    if variants.changes:
        effects = ablation.effects(variants, runs)
        write_atomic(results_dir / "effects.md", ablation.markdown(effects).encode())
        figures |= {"effects": plots.ablation(effects)}
    elif variants.profile:
        history = summary.load_history(variants, report.runs_dir)
        figures |= {"curves": plots.training_curves(summary.write_curves(history, results_dir))}
        figures |= similarity.measure(report, variants, results_dir)
        for strategy in variants.strategies:
            run = report.runs_dir / run_name(strategy, variants.seeds[0])
            models.publish(run, report.folder / models.WEIGHTS / strategy)
    report.save(**{f"ablation/{name}/{kind}": figure for kind, figure in figures.items()})


def findings(report: Report, name: str) -> Markdown:
    """What each change does to accuracy, or how the strategies compare; and what else was measured."""
    folder = report.results_dir / "ablation" / name
    texts = [(folder / file).read_text() for file in _TEXTS if (folder / file).is_file()]
    if not asked(report, name).changes:
        table = report.table(f"ablation/{name}/summary.csv")
        texts.insert(0, str(compare.accuracy_in_words(table, "time_ratio").data))
    return Markdown("\n\n".join(texts))


def show_figures(report: Report, name: str) -> None:
    display(*(Image(path) for path in sorted((report.folder / "figures" / "ablation" / name).glob("*.png"))))


def changes(report: Report, name: str) -> Markdown:
    """What each change sets, as a list."""
    lines = [f"- `{change}`: `{given}`" for change, given in asked(report, name).changes.items()]
    return Markdown("\n".join(lines))

"""The results that the notebook `ablation` shows, of one ablation at a time."""

import dataclasses
import functools
from typing import Any

from IPython.display import Image, Markdown, display

from famba import plots
from famba.analysis import ablation, cost, records, summary
from famba.config import AblationParams
from famba.experiments import ablations, sweep
from famba.reports import Report, calibration, opened, profile_name, similarity
from famba.storage.files import write_atomic

_TEXTS = ("effects.md", "calibration.md", "similarity.md")
_SMOKE: dict[str, Any] = {
    "varied": ("upper",),
    "changes": {f"from_{x}": {"fusion.upper.first_layer": x, "fusion.upper.total": 24} for x in (1, 3)},
}


def open_report(name: str, *, profile: str | None, pipeline: bool) -> Report:
    """The report of the ablation of that name in params.yaml; arguments as of `reports.opened`."""
    profile = sweep.load_ablation(name).profile or profile_name(profile)
    return opened(
        functools.partial(make, name=name),
        f"ablation/{name}/summary.md",
        command=ablations.command(name),
        profile=profile,
        pipeline=pipeline,
        runs_dir=str(ablations.runs_dir(profile)),
        of=f"records/{name}/runs.csv",
        again="draws them again, and trains only runs that are not recorded",
    )


def asked(report: Report, name: str) -> AblationParams:
    """The runs of an ablation; of smoke runs a few are enough."""
    found = sweep.load_ablation(name)
    if not report.smoke:
        return found
    few: dict[str, Any] = {"profile": None, "strategies": ("none", "upper"), "seeds": report.sweep().seeds}
    return dataclasses.replace(found, **few, **(_SMOKE if found.changes else {}))


def make(report: Report, name: str) -> None:
    """Compare the runs by their record; of another profile's strategies as they are, with curves and similarity.

    Only smoke runs are trained.
    """
    variants, record = asked(report, name), report.results_dir / "records" / name
    results_dir = report.results_dir / "ablation" / name
    if report.smoke:
        ablations.record(name, variants, record, profile=report.profile, runs_dir=report.runs_dir)
    runs = records.published(variants, record)
    table = summary.write_summary(runs, cost.load(record), results_dir)
    figures = plots.ablations(runs, table) | calibration.measure(report, variants, record / "models", results_dir)
    if variants.changes:
        effects = ablation.effects(variants, runs)
        write_atomic(results_dir / "effects.md", ablation.markdown(effects).encode())
        figures |= {"effects": plots.ablation(effects)}
    elif variants.profile:
        figures |= {"curves": plots.training_curves(report.table(f"records/{name}/curves.csv"))}
        figures |= similarity.measure(report, variants, record / "models", results_dir)
    report.save(**{f"ablation/{name}/{kind}": figure for kind, figure in figures.items()})


def findings(report: Report, name: str) -> Markdown:
    """What each change does to accuracy, and what else was measured."""
    folder = report.results_dir / "ablation" / name
    return Markdown("\n\n".join((folder / file).read_text() for file in _TEXTS if (folder / file).is_file()))


def show_figures(report: Report, name: str) -> None:
    display(*(Image(path) for path in sorted((report.folder / "figures" / "ablation" / name).glob("*.png"))))


def changes(report: Report, name: str) -> Markdown:
    """What each change sets, as a list."""
    lines = [f"- `{change}`: `{given}`" for change, given in asked(report, name).changes.items()]
    return Markdown("\n".join(lines) or "No change: other schedules.")

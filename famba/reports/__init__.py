"""What a notebook shows, under a banner that says so: finished runs, else the results in git, else smoke runs.

Opened by hand, a notebook reads results/ and figures/ and changes nothing there; the pipeline makes them first. Where
they are missing or of another profile, smoke runs are trained and all is made of them in build/smoke. The environment
variable FAMBA_PROFILE names the profile of notebooks that are opened by hand: `smoke` for tests.
"""

import html
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import Image, Markdown

from famba import config, plots
from famba.analysis import records
from famba.errors import InputError
from famba.experiments.sweep import SMOKE
from famba.storage.runs import run_name

_BOX = "border-left: 6px solid {}; background: {}; color: #222; padding: 0.6em 1em; font-size: 105%"


@dataclass(frozen=True, repr=False)
class Report:
    """What there is to show; as the value of a cell it is the banner.

    Attributes:
        shown: what that is, in a sentence.
        folder: which holds results/ and figures/.
        runs_dir: the runs behind them.
        made: now, so that figures are to be written as well.
    """

    profile: str
    shown: str
    folder: Path
    runs_dir: Path
    made: bool

    @property
    def smoke(self) -> bool:
        return self.folder != config.root()

    @property
    def results_dir(self) -> Path:
        return self.folder / "results"

    def sweep(self) -> config.SweepParams:
        """The sweep of params.yaml; of smoke runs two seeds are enough."""
        return config.load_sweep(seeds=(0, 1) if self.smoke else None)

    def text(self, name: str) -> Markdown:
        return Markdown((self.results_dir / name).read_text(encoding="utf-8"))

    def table(self, name: str) -> pd.DataFrame:
        return records.load(self.results_dir / name)

    def figure(self, name: str) -> Image:
        return Image(self.folder / "figures" / name)

    def save(self, **figures: plots.Figure | plots.Animation) -> None:
        """Write figures by their names if this report was made now; else those that it shows are written already."""
        for name, figure in figures.items() if self.made else ():
            suffix = ".gif" if isinstance(figure, plots.Animation) else ".png"
            plots.save(figure, self.folder / "figures" / f"{name}{suffix}")

    def __repr__(self) -> str:
        return self.shown

    def _repr_html_(self) -> str:
        warning, colours = "", ("#2ca02c", "#e8f5e9")
        if self.smoke:
            warning = "<b>Smoke run: these numbers mean nothing.</b> Tiny models were trained for seconds. "
            colours = ("#d62728", "#fde0dd")
        shown = self.shown.replace(f"{config.root()}/", "")  # a published page names no machine's folders
        said = re.sub("`(.+?)`", r"<code>\1</code>", html.escape(shown))
        return f'<div style="{_BOX.format(*colours)}">{warning}{said}</div>'


def opened(
    make: Callable[[Report], Any],
    file: str,
    *,
    command: str = "make repro",
    profile: str | None,
    pipeline: bool,
    runs_dir: str = "results/runs",
    of: str = "runs.csv",
    again: str = "makes them again",
) -> Report:
    """The report that a notebook shows.

    Args:
        make: writes what the notebook reads, into the report's folder.
        file: of results/, that the notebook reads.
        command: that makes it.
        profile: None is the one that params.yaml names.
        pipeline: make it now, of finished runs.
        of: the table in results/ of the runs that `file` was made of; `file` itself if it was made apart from runs.
        again: what the command does with committed results.
    """
    root = config.root()
    if pipeline:
        name = profile_name(profile)
        report = Report(name, f"Made now under the profile `{name}`.", root, root / runs_dir, made=True)
    else:
        asked = profile_name(os.environ.get("FAMBA_PROFILE", profile))
        try:
            shown = _shown(root / "results" / file, root / "results" / of, root / runs_dir, asked)
            return Report(asked, shown.format(command=command, again=again), root, root / runs_dir, made=False)
        except InputError as error:
            report = smoke_report(f"{error}. `{command}` makes the real results.")
    make(report)
    return report


def smoke_report(why: str) -> Report:
    folder = config.root() / "build" / SMOKE
    return Report(SMOKE, why, folder, folder / "runs", made=True)


def profile_name(profile: str | None) -> str:
    return config.load(profile, strategy="none").profile


def _shown(file: Path, of: Path, runs_dir: Path, profile: str) -> str:
    """What a file of results shows.

    Raises:
        InputError: it is not there, or of another profile.
    """
    if profile == SMOKE:
        raise InputError("FAMBA_PROFILE=smoke asks for it")
    if missing := [path for path in (file, of) if not path.is_file()]:
        raise InputError(f"{missing[0]}: missing")
    runs = pd.read_csv(of)
    if set(runs["profile"]) != {profile}:
        raise InputError(f"{of}: of the profile {runs['profile'][0]!r}; {profile!r} is asked for")
    if of == file:
        return f"Measurements of the profile `{profile}`, made apart from its runs: `{{command}}` {{again}}."
    if all(_is_run(runs_dir, row) for row in runs.to_dict("records")):
        return f"Finished runs of the profile `{profile}`: {runs_dir.relative_to(config.root())}."
    return f"Committed results of the profile `{profile}`, not the runs behind them: `{{command}}` {{again}}."


def _is_run(runs_dir: Path, row: dict[Any, Any]) -> bool:
    """Whether the run of a row is there, with the row's accuracy."""
    file = runs_dir / run_name(row["strategy"], row["seed"]) / "metrics.json"
    return file.is_file() and math.isclose(json.loads(file.read_bytes())["top1_percent"], row["top1_percent"])

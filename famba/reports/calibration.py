"""Where fusing costs least, asked of a model without fusion: calibration.json, calibration.md and a figure."""

import dataclasses
from pathlib import Path

from famba import config, plots
from famba.analysis import calibration
from famba.analysis.summary import BASELINE
from famba.config import SweepParams
from famba.reports import Report
from famba.storage import runs
from famba.storage.files import json_bytes, write_atomic

_IMAGES = 256  # of the validation split


def measure(report: Report, asked: SweepParams, models: Path, results_dir: Path) -> dict[str, plots.Figure]:
    """Calibrate with the first seed's model without fusion, once for each strategy of a sweep that is called by_<kind>.

    The schedules that params.yaml has are compared with those that are found; nothing is changed there.
    """
    kinds = [kind for kind in calibration.KINDS if f"by_{kind}" in asked.strategies]
    if not kinds:
        return {}
    rule = config.load_adaptive(report.profile)
    folder = models / runs.run_name(BASELINE, asked.seeds[0])
    plans = [calibration.plan(folder, rule, kind=kind, count=_IMAGES) for kind in kinds]
    params = asked.params(report.profile)
    schedules = {name: params[name].schedule(len(plans[0].schedule)) for name in asked.variants}
    content = {plan.kind: dataclasses.asdict(plan) for plan in plans}
    write_atomic(results_dir / "calibration.json", json_bytes(content))
    write_atomic(results_dir / "calibration.md", calibration.markdown(plans, schedules).encode())
    return {"fusing_costs": plots.fusing_costs(plans)}

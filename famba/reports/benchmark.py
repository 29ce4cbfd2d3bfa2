"""The benchmark that the notebook `benchmark` shows: results/benchmark.json, or what is measured now."""

import json
import os
from collections.abc import Sequence
from typing import Any

from famba import bench, config
from famba.reports import SMOKE, Report, smoke_report

_PARTS = ("scan", "model", "fusion", "memory", "precision")


def opened(measure: Sequence[str] | None) -> tuple[Report, dict[str, Any]]:
    """The report and the result.

    Args:
        measure: parts to measure now; None reads what `make bench` has written.
    """
    root, file = config.root(), config.root() / "results" / "benchmark.json"
    if os.environ.get("FAMBA_PROFILE") == SMOKE or (measure is None and not file.is_file()):
        return smoke_report("Sizes that take seconds. `make bench` measures real ones."), bench.run(_PARTS, quick=True)
    if measure is not None:
        result, shown = bench.run(measure), "Measured now."
    else:
        result = json.loads(file.read_bytes())
        shown = f"Committed results: results/benchmark.json, made by `{result['command']}` on {result['device']}."
    return Report("", shown, root, root, made=False), result

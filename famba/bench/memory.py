"""Peak memory of a training step: by backend, and by strategy, against the formula."""

from typing import Any

from famba.bench.model import Training, able
from famba.bench.setting import Setting
from famba.profiling import flops, memory

_MIB = 2**20


def bench_memory(setting: Setting) -> list[dict[str, Any]]:
    """One row per backend without fusion, and one per strategy with the fastest backend.

    `of_torch` is the peak in units of the torch backend's, `of_predicted` in units of `flops.analyse`'s.
    """
    rows: list[dict[str, Any]] = []
    for backend in able("torch", "native"):
        training = Training(setting, backend)
        depth = training.model.depth
        schedules = {"none": [0] * depth}
        if backend == able("torch", "native")[-1]:
            schedules |= setting.schedules(depth)
        training.step()  # makes the optimiser's moments
        for strategy, schedule in schedules.items():
            peak = memory.peak_memory(lambda x=training, s=schedule: x.step(s), training.resident(), "cpu")
            predicted = flops.analyse(training.model.config, schedule, batch=setting.batch, backend=backend).peak_bytes
            rows.append(
                {
                    "backend": backend,
                    "strategy": strategy,
                    "peak_mib": peak / _MIB,
                    "predicted_mib": predicted / _MIB,
                    "of_predicted": peak / predicted,
                }
            )
    return [{**row, "of_torch": row["peak_mib"] / rows[0]["peak_mib"]} for row in rows]

"""Time and memory of a training step against tokens, width, depth and batch: `python -m famba.bench.growth`.

Both are a + b x in tokens, depth and batch, and a + b x + c x^2 in width, since weights grow with its square. The laws
are fitted to small sizes with relative errors weighted equally; larger ones, 224 and 448 px among them, are predictions
that one measurement each tests.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from famba import config
from famba.bench.model import FULL, Setting, Training, available
from famba.bench.timing import table
from famba.kernels import precision
from famba.profiling import environment, memory
from famba.storage.files import json_bytes, write_atomic

_BASE = replace(FULL, depth=4, batch=4, img_sizes=(112,), rounds=3)
_TOLERANCE = 0.1  # relative, within which a law holds


@dataclass(frozen=True)
class Axis:
    """One size that grows, by the setting's field; `fitted` values give the law, `predicted` ones test it."""

    field: str
    fitted: tuple[int, ...]
    predicted: tuple[int, ...]
    degree: int = 1


AXES = {
    "tokens": Axis("img_sizes", (64, 96, 128, 160), (224, 448)),
    "d_model": Axis("d_model", (64, 128, 192, 384), (768,), degree=2),
    "depth": Axis("depth", (1, 2, 4, 8), (16,)),
    "batch": Axis("batch", (1, 2, 4, 8), (16,)),
}


def bench_growth(base: Setting = _BASE, axes: dict[str, Axis] = AXES) -> pd.DataFrame:
    """One row for each axis, backend and size: all sizes, time and memory.

    For each of these `_law` is the law's value, `_off` the measured value over it, and `_coefficients` are the law's,
    constant first.
    """
    parts = []
    for axis, law in axes.items():
        for backend in available():
            trainings, rows = {}, []
            for size in (*law.fitted, *law.predicted):
                value = (size,) if law.field == "img_sizes" else size
                training = trainings[str(size)] = Training(replace(base, **{law.field: value}), backend)
                training.step()  # creates the optimiser's moments
                model, peak = training.model, memory.peak_memory(training.step, training.resident(), "cpu")
                sizes = {"tokens": model.tokens, "d_model": model.num_features, "depth": model.depth}
                rows.append({**sizes, "batch": len(training.images), "memory_mib": peak / 2**20})
            times = base.times({name: training.step for name, training in trainings.items()}, rounds=base.rounds)
            part = pd.DataFrame(rows).assign(axis=axis, backend=backend, rounds=base.rounds)
            part["time_ms"] = [row["median_ms"] for row in times.values()]
            part["fitted"] = np.arange(len(part)) < len(law.fitted)
            known = part[part["fitted"]]
            for name in ("time_ms", "memory_mib"):
                fit = np.polynomial.Polynomial.fit(known[axis], known[name], law.degree, w=1 / known[name]).convert()
                part[f"{name}_law"] = fit(part[axis].to_numpy(float))
                part[f"{name}_off"] = part[name] / part[f"{name}_law"]
                part[f"{name}_coefficients"] = [fit.coef.tolist()] * len(part)
            parts.append(part)
    return pd.concat(parts, ignore_index=True)


def main() -> None:
    """Measure, write results/growth.json, draw figures/growth.png, and print the sizes that are off their law."""
    from famba import plots

    precision.configure()
    frame = bench_growth()
    at = {**environment.environment("cpu"), "command": "python -m famba.bench.growth"}
    write_atomic(config.root() / "results/growth.json", json_bytes({**at, "growth": frame.to_dict("records")}))
    plots.save(plots.growth(frame, at), "figures/growth.png")
    print(table(frame.to_dict("records")))
    ratios = ["time_ms_off", "memory_mib_off"]
    off = frame.loc[frame[ratios].sub(1).abs().gt(_TOLERANCE).any(axis=1), ["axis", "backend", *AXES, *ratios]]
    print(f"\nmore than {_TOLERANCE:.0%} off the law:")
    print(table(off.to_dict("records")))


if __name__ == "__main__":
    main()

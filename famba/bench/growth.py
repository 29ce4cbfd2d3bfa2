"""Time and memory of a training step against tokens, width, depth and batch: `python -m famba.bench.growth CSV PNG`.

Time and memory are a + b x in tokens, depth and batch, and a + b x + c x^2 in width, whose weights and products grow
with its square. The laws are fitted to small sizes, relative errors weighted equally; 224 and 448 px are predictions.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from famba.bench.model import FULL, Setting, Training, available
from famba.profiling import memory
from famba.storage.files import write_atomic

_BASE = replace(FULL, depth=4, batch=4, img_sizes=(112,), rounds=3)


@dataclass(frozen=True)
class Axis:
    """One size that grows, by the setting's field; `fitted` values give the law, `predicted` ones test it."""

    field: str
    fitted: tuple[int, ...]
    predicted: tuple[int, ...] = ()
    degree: int = 1


AXES = {
    "tokens": Axis("img_sizes", (64, 96, 128, 160), (224, 448)),
    "d_model": Axis("d_model", (64, 128, 192, 384), (768,), degree=2),
    "depth": Axis("depth", (1, 2, 4, 8), (16,)),
    "batch": Axis("batch", (1, 2, 4, 8), (16,)),
}


def bench_growth(base: Setting = _BASE, axes: dict[str, Axis] | None = None) -> pd.DataFrame:
    """One row for each axis, backend and size: time and memory, their laws, and `_off`, the measured over the law."""
    rows: list[dict[str, Any]] = []
    for axis, law in (axes or AXES).items():
        for backend in available("native", "torch"):
            trainings, peaks = {}, {}
            for size in (*law.fitted, *law.predicted):
                value = (size,) if law.field == "img_sizes" else size
                training = Training(replace(base, **{law.field: value}), backend)
                training.step()  # creates the optimiser's moments
                x = training.model.tokens if axis == "tokens" else size
                trainings[x] = training
                peaks[x] = memory.peak_memory(training.step, training.resident(), "cpu") / 2**20
            times = base.times({str(x): training.step for x, training in trainings.items()}, rounds=base.rounds)
            x = np.array(list(trainings), float)
            ms, mib = np.array([times[str(k)]["median_ms"] for k in trainings]), np.array(list(peaks.values()))
            n = len(law.fitted)
            for i, size in enumerate((*law.fitted, *law.predicted)):
                row = {"axis": axis, "backend": backend, "size": size, "x": int(x[i]), "fitted": i < n}
                for name, y in (("time_ms", ms), ("memory_mib", mib)):
                    fit = np.polyfit(x[:n], y[:n], law.degree, w=1 / y[:n])
                    row |= {
                        name: y[i],
                        f"{name}_law": np.polyval(fit, x[i]),
                        f"{name}_off": y[i] / np.polyval(fit, x[i]),
                    }
                rows.append(row)
    return pd.DataFrame(rows)


def main(csv: Path, png: Path) -> None:
    """Measure, write and draw, and print where a size is more than 10% off its law."""
    from famba import plots

    frame = bench_growth()
    write_atomic(csv.absolute(), frame.round(4).to_csv(index=False).encode())
    plots.save(plots.growth(frame), png.absolute())
    print(frame.to_string(index=False, float_format="%.2f"))
    off = frame.loc[frame[["time_ms_off", "memory_mib_off"]].sub(1).abs().gt(0.1).any(axis=1)]
    print(f"more than 10% off the law:\n{off[['axis', 'backend', 'x']].to_string(index=False)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

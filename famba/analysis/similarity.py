"""Summaries of measured token similarity: quantiles by layer, and whether it rises towards the upper layers.

Famba-V (arXiv:2409.09808, section 3.2) asks whether fusing is cheaper in the upper layers. Similarity is one side of
that; the cost in accuracy is in the comparison of the strategies. Intervals are Student's, over trained models. Frames
are those of `tokens.similarity_in_runs`.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from famba import config
from famba.analysis import records
from famba.analysis.intervals import student, with_interval
from famba.analysis.summary import BASELINE
from famba.errors import InputError
from famba.fusion.strategies import ordered
from famba.storage.files import write_atomic

QUANTITIES = ("similarity", "distance", "size")
WEIGHTS = ("trained", "untrained")
QUANTILES = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}


def quantiles(frame: pd.DataFrame) -> pd.DataFrame:
    """Five quantiles over images and tokens, one row for each quantity, strategy, weights and layer."""
    names = ordered(list(frame["strategy"]))
    order = {name: place for place, name in enumerate((*QUANTITIES, *names, *WEIGHTS))}
    by = ["quantity", "strategy", "weights", "layer"]
    values = frame.groupby(by)["value"]
    columns = {"n": values.size()} | {name: values.quantile(level) for name, level in QUANTILES.items()}
    table = pd.DataFrame(columns).reset_index()
    return table.sort_values(by, key=lambda column: column.map(lambda name: order.get(name, name)), ignore_index=True)


def rise(frame: pd.DataFrame) -> pd.DataFrame:
    """Median best-match similarity in the upper third of the layers minus that in the lower third, without fusion.

    Returns:
        Mean over the images: one row for each model, by its seed, a column for each of `WEIGHTS`.

    Raises:
        InputError: no run of `none`, or fewer than two layers.
    """
    unfused = frame.loc[(frame["quantity"] == "similarity") & (frame["strategy"] == BASELINE)]
    if unfused.empty:
        raise InputError(f"strategies: {', '.join(frame['strategy'].unique())}; {BASELINE!r} is needed")
    lower, upper = thirds(max(unfused["layer"]))
    medians = [
        unfused.loc[unfused["layer"].isin(layers)].groupby(["seed", "image", "weights"])["value"].median().unstack()
        for layers in (upper, lower)
    ]
    return (medians[0] - medians[1]).groupby("seed").mean().loc[:, list(WEIGHTS)]


def thirds(depth: int) -> tuple[list[int], list[int]]:
    """The layers of the lower and the upper third; a remainder is left in the middle."""
    if depth < 2:
        raise InputError(f"depth: {depth}; at least 2 layers needed to compare lower with upper ones")
    each = max(1, depth // 3)
    return list(range(1, each + 1)), list(range(depth - each + 1, depth + 1))


def chance_distance(frame: pd.DataFrame) -> float:
    """Median distance between two different patches of an image, in patches: the distance of random pairs."""
    # The sizes of an image's tokens sum to its number of patches, fused or not.
    sizes = frame.loc[frame["quantity"] == "size"]
    grid = math.isqrt(round(sizes.groupby(["strategy", "seed", "weights", "image"])["value"].sum().max()))
    at = np.stack(np.meshgrid(np.arange(grid), np.arange(grid)), axis=-1).reshape(-1, 2)
    one, two = np.triu_indices(len(at), k=1)
    return float(np.median(np.linalg.norm(at[one] - at[two], axis=-1)))


def text(frame: pd.DataFrame) -> str:
    """The findings as Markdown, derived from the numbers alone; errors as in `rise`."""
    rises = rise(frame)
    lower, upper = (f"layers {layers[0]}..{layers[-1]}" for layers in thirds(max(frame["layer"])))
    rises["trained minus untrained"] = rises["trained"] - rises["untrained"]
    intervals = {name: student(values.to_list()) for name, values in rises.items()}
    of_images: Any = frame.groupby(["quantity", "strategy", "weights", "image"])["value"]
    shown = {"distance of a pair": of_images.median().xs("distance"), "largest final token": of_images.max().xs("size")}
    columns = {
        f"{name}, {weights}": values.xs(weights, level="weights").groupby("strategy").median()
        for name, values in shown.items()
        for weights in WEIGHTS
    }
    fusing = [name for name in ordered(list(frame["strategy"])) if name != BASELINE]
    table = pd.DataFrame(columns).reindex(fusing).dropna()
    parts = [
        _verdict(*intervals["trained"][1:], *intervals["trained minus untrained"][1:]),
        f"Similarity of an unfused token (`{BASELINE}`) with its most similar token: median of the upper third "
        f"({upper}) minus median of the lower third ({lower}), mean over {frame['image'].nunique()} images of each of "
        f"{len(rises)} model{'' if len(rises) == 1 else 's'}, with its 95% interval over models:",
        "\n".join(f"- {name}: {with_interval('{:+z.4f}'.format, *interval)}" for name, interval in intervals.items()),
        f"What fuses, in patches, medians over the images; random patches are {chance_distance(frame):.2f} apart:",
        table.to_markdown(floatfmt=".2f"),
    ]
    return "\n\n".join(parts) + "\n"


def write(frame: pd.DataFrame, folder: str | Path, *, seed: int, profile: str) -> None:
    """Write similarity.csv (quantiles) and similarity.md (`text`).

    Args:
        folder: if relative, from the repository root.
        seed: of the runs that fuse.
    """
    records.write(quantiles(frame).round(dict.fromkeys(QUANTILES, 4)), folder, "similarity.csv")
    setting = (
        f"Profile `{profile}`; what fuses, in runs with seed {seed}. Untrained is the initialisation of the same seed."
    )
    write_atomic(config.root() / folder / "similarity.md", f"{text(frame)}\n{setting}\n".encode())


def _verdict(low: float, high: float, gain_low: float, gain_high: float) -> str:
    """A sentence on two intervals: of the rise after training, and of its change by training."""
    if math.isnan(low):
        return "One trained model does not show how similar the tokens of others are."
    if low > 0:
        finding = "more similar in the upper layers than in the lower ones, which is a reason for"
    elif high < 0:
        finding = "less similar in the upper layers than in the lower ones, which is no reason for"
    else:
        finding = "as similar in the upper layers as in the lower ones, as far as can be told, which says nothing of"
    change = "is not shown to change this difference"
    if gain_low > 0 or gain_high < 0:
        change = f"made upper tokens {'more' if gain_low > 0 else 'less'} similar relative to lower ones"
    return f"After training, unfused tokens are {finding} fusing in the upper ones. Training {change}."

"""What measured similarities (`tokens.token_similarity`) say: quantiles by layer, and whether upper layers have more.

Whether fusing is cheaper in the upper layers is Famba-V's question (arXiv:2409.09808, section 3.2). Likeness is only
one side of it: what fusing costs in accuracy is in the comparison of the strategies. Intervals are percentile
bootstraps over images, of one trained model: they say how much depends on the choice of images, not on the seed.
"""

import math
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from famba import config
from famba.analysis.summary import BASELINE
from famba.errors import InputError
from famba.fusion.strategies import STRATEGIES
from famba.storage.files import write_atomic

QUANTITIES = ("similarity", "distance", "size")
WEIGHTS = ("trained", "untrained")
QUANTILES = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}
_RESAMPLES = 2000


def quantiles(frame: pd.DataFrame) -> pd.DataFrame:
    """Five quantiles over images and tokens, one row for each quantity, strategy, weights and layer.

    Args:
        frame: as from `tokens.similarity_in_runs`.
    """
    order = {name: place for place, name in enumerate((*QUANTITIES, *STRATEGIES, *WEIGHTS))}
    by = ["quantity", "strategy", "weights", "layer"]
    values = frame.groupby(by)["value"]
    columns = {"n": values.size()} | {name: values.quantile(level) for name, level in QUANTILES.items()}
    table = pd.DataFrame(columns).reset_index()
    return table.sort_values(by, key=lambda column: column.map(lambda name: order.get(name, name)), ignore_index=True)


def rise(frame: pd.DataFrame) -> pd.DataFrame:
    """How much more alike an image's tokens are in the upper third of the layers than in the lower third, unfused.

    For each image, the median best-match similarity in the upper third less that in the lower third.

    Args:
        frame: as from `tokens.similarity_in_runs`; `none` must be among its strategies.

    Returns:
        One row for each image, a column for each of `WEIGHTS`.

    Raises:
        InputError: no unfused run, or fewer than two layers.
    """
    unfused = frame.loc[(frame["quantity"] == "similarity") & (frame["strategy"] == BASELINE)]
    if unfused.empty:
        raise InputError(f"strategies: {', '.join(frame['strategy'].unique())}; {BASELINE!r} is needed")
    lower, upper = thirds(max(unfused["layer"]))
    medians = [
        unfused.loc[unfused["layer"].isin(layers)].groupby(["image", "weights"])["value"].median().unstack()
        for layers in (upper, lower)
    ]
    return (medians[0] - medians[1]).loc[:, list(WEIGHTS)]


def thirds(depth: int) -> tuple[list[int], list[int]]:
    """The layers of the lower third and of the upper third; without what does not divide by three in between."""
    if depth < 2:
        raise InputError(f"depth: {depth}; at least 2 layers needed to compare lower with upper ones")
    each = max(1, depth // 3)
    return list(range(1, each + 1)), list(range(depth - each + 1, depth + 1))


def bootstrap(values: Float[np.ndarray, "n"], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and percentile bootstrap interval of the mean: (mean, low, high); always the same resamples.

    Raises:
        InputError: no values.
    """
    if not len(values):
        raise InputError("values: none; at least 1 needed")
    how = {"method": "percentile", "n_resamples": _RESAMPLES, "confidence_level": confidence}
    low, high = stats.bootstrap((values,), np.mean, rng=np.random.default_rng(0), **how).confidence_interval
    return float(values.mean()), float(low), float(high)


def chance_distance(frame: pd.DataFrame) -> float:
    """Median distance of two different patches of an image, in patches: how far apart chance alone would fuse.

    Args:
        frame: as from `tokens.similarity_in_runs`; the sizes of an image's tokens add up to its patches, whatever
        fused.
    """
    sizes = frame.loc[frame["quantity"] == "size"]
    grid = math.isqrt(round(sizes.groupby(["strategy", "weights", "image"])["value"].sum().max()))
    at = np.stack(np.meshgrid(np.arange(grid), np.arange(grid)), axis=-1).reshape(-1, 2)
    one, two = np.triu_indices(len(at), k=1)
    return float(np.median(np.linalg.norm(at[one] - at[two], axis=-1)))


def text(frame: pd.DataFrame) -> str:
    """What the numbers say, made from them alone, as Markdown.

    Args:
        frame: as from `tokens.similarity_in_runs`.

    Raises:
        InputError: as in `rise`.
    """
    rises = rise(frame)
    lower, upper = (f"layers {layers[0]}..{layers[-1]}" for layers in thirds(max(frame["layer"])))
    differences = {weights: rises[weights].to_numpy() for weights in WEIGHTS}
    differences["trained minus untrained"] = differences["trained"] - differences["untrained"]
    intervals = {name: bootstrap(values) for name, values in differences.items()}
    lines = [
        _verdict(*intervals["trained"][1:], *intervals["trained minus untrained"][1:]),
        "",
        f"Similarity of an unfused token (`{BASELINE}`) with the token most like it, median of the upper third "
        f"({upper}) minus median of the lower third ({lower}), mean over {len(rises)} images with its 95% "
        "bootstrap interval:",
        "",
        *(f"- {name}: {_interval(*interval)}" for name, interval in intervals.items()),
        "",
        f"What fuses, in patches, as medians over the images; two patches at random are {chance_distance(frame):.2f} "
        "apart:",
        "",
        "| strategy | distance of a pair | untrained | largest token at the end | untrained |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    of_images = frame.groupby(["quantity", "strategy", "weights", "image"])["value"]
    shown = {"distance": of_images.median(), "size": of_images.max()}
    middle = {quantity: values.groupby(level=[0, 1, 2]).median() for quantity, values in shown.items()}
    for name in [name for name in STRATEGIES if ("distance", name, WEIGHTS[0]) in middle["distance"]]:
        cells = [f"{middle[key][key, name, weights]:.2f}" for key in shown for weights in WEIGHTS]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines) + "\n"


def write(frame: pd.DataFrame, folder: str | Path, *, seed: int, profile: str) -> pd.DataFrame:
    """Write similarity.csv (quantiles) and similarity.md (what they say); return the quantiles.

    Args:
        frame: as from `tokens.similarity_in_runs`.
        folder: if relative, from the repository root.
        seed, profile: of the runs that it was made from.
    """
    table, folder = quantiles(frame), config.root() / folder
    rounded = table.round(dict.fromkeys(QUANTILES, 4))
    write_atomic(folder / "similarity.csv", rounded.to_csv(index=False, lineterminator="\n").encode())
    setting = (
        f"Profile `{profile}`, each strategy's run with seed {seed}; untrained is that seed's initialisation. The "
        "intervals are over images, for one trained model: another seed may differ by more."
    )
    write_atomic(folder / "similarity.md", f"{text(frame)}\n{setting}\n".encode())
    return table


def _interval(mean: float, low: float, high: float) -> str:
    return f"{mean:+.4f} ({low:+.4f} to {high:+.4f})".replace("-", "\N{MINUS SIGN}")


def _verdict(low: float, high: float, gain_low: float, gain_high: float) -> str:
    """Plain words for two intervals: of the upper layers' lead after training, and of what training added to it."""
    if low > 0:
        lead = "more alike in the upper layers than in the lower ones: as far as likeness goes, that speaks for"
    elif high < 0:
        lead = "less alike in the upper layers than in the lower ones: as far as likeness goes, that speaks against"
    else:
        lead = "about as alike in the upper layers as in the lower ones: likeness says nothing for or against"
    moved = (
        "towards the upper layers" if gain_low > 0 else "towards the lower layers" if gain_high < 0 else "to neither"
    )
    return f"After training, unfused tokens are {lead} fusing in the upper ones. Training moved likeness {moved}."

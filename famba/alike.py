"""Where tokens are alike: at each layer, over many images, with trained and with untrained weights.

Axes: n images, b of them at a time, t tokens at a layer, d d_model. Famba-V (arXiv:2409.09808, section 3.2) chooses
layers by a guess about where tokens are alike; these are the measurements, which `evidence` sums up.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from famba import config, data
from famba.analysis import similarity
from famba.errors import InputError
from famba.experiments import sweep
from famba.models.vim import VisionMamba
from famba.storage import checkpoint, runs
from famba.training import fit

_BATCH = 50  # images: a trace holds every layer's tokens


@torch.no_grad()
def alikeness(model: VisionMamba, images: Float[Tensor, "n 3 h w"]) -> pd.DataFrame:
    """How alike the tokens are at each layer, and what fuses there: one row for each thing that was measured.

    The class token is left out everywhere. Quantities:
        similarity: of each token as it enters a layer, normed, the cosine similarity with the token most like it.
        distance: of each pair that a layer fuses, between the centres of the patches they stand for, in patches
            (steps of the patch grid).
        size: of each token at the end, the patches that it stands for.

    Returns:
        Columns quantity, image (counted from 0), layer (counted from 1; of a size the last) and value.
    """
    found: list[pd.DataFrame] = []
    for start in range(0, len(images), _BATCH):
        _, trace = model.forward_with_trace(images[start : start + _BATCH])
        of_layers = zip(trace.normed, trace.matchings, strict=True)
        centres = _grid_positions(model).expand(len(trace.normed[0]), -1, -1)
        place = torch.arange(model.tokens).expand(len(centres), -1)
        for layer, (normed, matching) in enumerate(of_layers, start=1):
            found.append(_rows("similarity", start, layer, _best_matches(normed, _cls_in(place, model))))
            if matching is not None:
                at = _centres(centres, place, normed.shape[1])
                pairs = [at.gather(1, side[..., None].expand(-1, -1, 2)) for side in (matching.source, matching.target)]
                found.append(_rows("distance", start, layer, (pairs[0] - pairs[1]).norm(dim=-1)))
            place = trace.groups[layer - 1]
        found.append(_rows("size", start, model.depth, _without(trace.sizes[-1], _cls_in(place, model))))
    return pd.concat(found, ignore_index=True)


def in_runs(
    asked: config.SweepParams, *, seed: int, profile: str, runs_dir: str | Path, images: int, train_missing: bool
) -> pd.DataFrame:
    """`alikeness` of every strategy's run with one seed, and of the same architecture with that seed's first weights.

    Args:
        images: the first so many of the test split.
        runs_dir, train_missing: as in `sweep.ensure_run`.

    Returns:
        The columns of `alikeness`, and strategy and weights (trained, untrained).

    Raises:
        InputError: a run that is not there, more images than the test split has.
    """
    frames = []
    for strategy in asked.strategies:
        run = sweep.ensure_run(
            Path(runs_dir) / runs.run_name(strategy, seed),
            strategy=strategy,
            seed=seed,
            profile=profile,
            train_missing=train_missing,
        )
        trained, described = checkpoint.load_model(run / runs.MODEL_FILE)
        p = config.load(profile, strategy=strategy)
        dataset = data.load(p.data)
        if not 1 <= images <= len(dataset.test):
            raise InputError(f"images: {images}; must be in 1..{len(dataset.test)}, the test images")
        inputs = data.normalise(dataset.test.images[:images], described["mean"], described["std"])
        untrained = fit.build(p, classes=len(dataset.classes), seed=seed)
        for weights, model in zip(similarity.WEIGHTS, (trained, untrained), strict=True):
            frames.append(alikeness(model.eval(), inputs).assign(strategy=strategy, weights=weights))
    return pd.concat(frames, ignore_index=True)


def _rows(quantity: str, start: int, layer: int, values: Float[Tensor, "b m"]) -> pd.DataFrame:
    b, m = values.shape
    image = np.repeat(np.arange(start, start + b), m)
    return pd.DataFrame({"quantity": quantity, "image": image, "layer": layer, "value": values.double().flatten()})


def _best_matches(normed: Float[Tensor, "b t d"], cls_index: Int[Tensor, "b"] | None) -> Float[Tensor, "b _"]:
    """Each token's similarity with the other that is most like it; a token of zero length is like none (0)."""
    tokens = normed.double()
    if cls_index is not None:
        kept = _without(torch.arange(tokens.shape[1]).expand(len(tokens), -1), cls_index)
        tokens = tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))
    unit = functional.normalize(tokens, dim=-1)
    similarity = unit @ unit.mT
    similarity.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    return similarity.amax(-1).clamp(-1, 1)  # rounding alone leads outside


def _without(values: Tensor, position: Int[Tensor, "b"] | None) -> Tensor:
    """(b, t) values without the one at each row's position."""
    if position is None:
        return values
    b, t = values.shape
    stays = torch.ones(b, t, dtype=torch.bool).scatter_(1, position[:, None], False)
    return values[stays].view(b, t - 1)


def _cls_in(place: Int[Tensor, "b tokens"], model: VisionMamba) -> Int[Tensor, "b"] | None:
    """Where the class token stands now, from where each input token stands."""
    return None if model.cls_index is None else place[:, model.cls_index]


def _grid_positions(model: VisionMamba) -> Float[Tensor, "tokens 2"]:
    """Row and column of each input token's patch; of the class token, which is none and never fuses, nothing (NaN)."""
    at = torch.cartesian_prod(torch.arange(model.grid), torch.arange(model.grid)).double().view(-1, 2)
    if model.cls_index is None:
        return at
    nowhere = torch.full((1, 2), torch.nan, dtype=at.dtype)
    return torch.cat([at[: model.cls_index], nowhere, at[model.cls_index :]])


def _centres(positions: Float[Tensor, "b tokens 2"], place: Int[Tensor, "b tokens"], t: int) -> Float[Tensor, "b t 2"]:
    """The centre of the patches that each of the t tokens stands for."""
    b = len(positions)
    into = place[..., None].expand(-1, -1, 2)
    total = torch.zeros(b, t, 2, dtype=positions.dtype).scatter_add(1, into, positions)
    count = torch.zeros(b, t, 2, dtype=positions.dtype).scatter_add(1, into, torch.ones_like(positions))
    return total / count

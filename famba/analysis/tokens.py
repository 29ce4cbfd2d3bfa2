"""What a trained model does to its tokens, as arrays for the figures: which patches fuse, and how alike tokens are.

Axes: b images, t tokens at a layer, h and w pixels. Weights are only read: to watch the same images under another
schedule makes another `Watched`.
"""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from famba import config, data
from famba.analysis import similarity, summary
from famba.config import DataParams
from famba.errors import InputError
from famba.fusion import strategies
from famba.models import saved
from famba.models.vim import Trace, VisionMamba
from famba.storage import runs
from famba.training import fit

_BATCH = 50  # images: a trace holds every layer's tokens
_SHOWN_PX = 224  # images of one's own are kept at about this size beside what the model sees of them


@dataclass(frozen=True, eq=False)
class Watched:
    """A model of a finished run, some images, and what happened to them on their way through it.

    Attributes:
        strategy: that the model was trained with.
        images: as they are, not normalised, `scale` times as large as the model takes them.
        labels: the class names of the images, or the names of one's own files.
        predicted: the class names that the model gives them.
        inputs: what the model saw.
        classes: a prediction is an index into these names.
    """

    model: VisionMamba
    strategy: str
    images: UInt8[np.ndarray, "b h w 3"]
    labels: list[str]
    predicted: list[str]
    trace: Trace
    inputs: Float[Tensor, "b 3 _ _"]
    classes: tuple[str, ...]
    scale: int = 1

    @property
    def patches(self) -> dict[str, Any]:
        """Where the patches of `images` are, as the pictures take it: patch_size and stride in pixels, cls_index."""
        sizes = {key: self.scale * self.model.config[key] for key in ("patch_size", "stride")}
        return sizes | {"cls_index": self.model.cls_index}


def watch(run_dir: str | Path, *, count: int) -> Watched:
    """Send the first test image of each of the first `count` classes through the model of a finished run.

    Args:
        run_dir: if relative, from the repository root. The images are of the data set that it was trained on.
        count: images; a data set with fewer classes gives fewer.

    Raises:
        InputError: a run that is missing or spoilt; data that cannot be read.
    """
    run = runs.read(run_dir)
    model, described = saved.load_model(config.root() / run_dir / runs.MODEL_FILE)
    dataset = data.load(DataParams(**run.params["data"]), seed=run.seed)
    chosen = [int((dataset.test.labels == label).nonzero()[0]) for label in range(len(dataset.classes))][:count]
    images = dataset.test.images[chosen]
    labels = [dataset.classes[label] for label in dataset.test.labels[chosen].tolist()]
    return _watched(model, described, images, images, labels)


def watch_images(run_dir: str | Path, sources: Sequence[str | Path | np.ndarray]) -> Watched:
    """Send images of one's own, of any size, through the model of a finished run.

    Each is resized and cropped at the centre to what the model takes; it is shown larger, as the same square.

    Args:
        run_dir: if relative, from the repository root.
        sources: files, or arrays, as in `data.read_image`.

    Raises:
        InputError: no images, or one that cannot be read; a run that is missing or spoilt.
    """
    if not sources:
        raise InputError("sources: no images; at least 1 needed")
    runs.read(run_dir)
    model, described = saved.load_model(config.root() / run_dir / runs.MODEL_FILE)
    scale = max(1, _SHOWN_PX // model.img_size)
    seen, shown = (
        torch.stack([data.read_image(source, size) for source in sources])
        for size in (model.img_size, scale * model.img_size)
    )
    labels = [
        f"image {number}" if isinstance(source, np.ndarray) else Path(source).name
        for number, source in enumerate(sources, start=1)
    ]
    return _watched(model, described, seen, shown, labels, scale)


@torch.no_grad()
def under(seen: Watched, schedule: Sequence[int]) -> Watched:
    """The same images through the same weights, fusing by another schedule.

    Raises:
        InputError: a schedule that does not fit the model.
    """
    model = copy.copy(seen.model)  # shares the weights, not the schedule
    model.set_fusion(schedule, seen.model.options)
    logits, trace = model.forward_with_trace(seen.inputs)
    predicted = [seen.classes[label] for label in logits.argmax(-1).tolist()]
    return dataclasses.replace(seen, model=model, trace=trace, predicted=predicted)


def largest_r(model: VisionMamba, strategy: str) -> int:
    """The most tokens that each fusing layer of a strategy can remove from this model's sequence; 0 for `none`."""
    if not strategies.fused_layers(strategy, depth=model.depth):
        return 0
    trial, r = copy.copy(model), 0
    while True:
        try:
            trial.set_fusion(strategies.schedule(strategy, depth=model.depth, r=r + 1), model.options)
        except InputError:
            return r
        r += 1


def groups(trace: Trace) -> list[Int[np.ndarray, "b _"]]:
    """For each layer, the token that each input token has ended in."""
    return [layer.numpy(force=True) for layer in trace.groups]


def similarities(trace: Trace, image: int = 0) -> list[Float[np.ndarray, "_ _"]]:
    """For each layer, the cosine similarity of each normed token of one image with every other, before it fuses."""
    return [summary.cosine_similarity(layer[image].double().numpy(force=True)) for layer in trace.normed]


@torch.no_grad()
def _watched(
    model: VisionMamba, described: dict[str, Any], seen: Tensor, shown: Tensor, labels: list[str], scale: int = 1
) -> Watched:
    inputs = data.normalise(seen, described["mean"], described["std"])
    logits, trace = model.eval().forward_with_trace(inputs)
    return Watched(
        model=model,
        strategy=described["strategy"],
        images=shown.permute(0, 2, 3, 1).numpy(),
        labels=labels,
        predicted=[described["classes"][label] for label in logits.argmax(-1).tolist()],
        trace=trace,
        inputs=inputs,
        classes=tuple(described["classes"]),
        scale=scale,
    )


@torch.no_grad()
def token_similarity(model: VisionMamba, images: Float[Tensor, "n 3 h w"]) -> pd.DataFrame:
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


def similarity_in_runs(run_dirs: Sequence[Path], *, images: int) -> pd.DataFrame:
    """`token_similarity` of finished runs, and of the same architectures with the initial weights of each run's seed.

    Args:
        images: the first so many of the test split.

    Returns:
        The columns of `token_similarity`, and strategy and weights (trained, untrained).

    Raises:
        InputError: a run that is not there, more images than the test split has.
    """
    frames = []
    for folder in run_dirs:
        run = runs.read(folder)
        trained, described = saved.load_model(folder / runs.MODEL_FILE)
        p = config.load(run.profile, strategy=run.strategy)
        dataset = data.load(p.data, seed=run.seed)
        if not 1 <= images <= len(dataset.test):
            raise InputError(f"images: {images}; must be in 1..{len(dataset.test)}, the test images")
        inputs = data.normalise(dataset.test.images[:images], described["mean"], described["std"])
        untrained = fit.build(p, classes=len(dataset.classes), seed=run.seed)
        for weights, model in zip(similarity.WEIGHTS, (trained, untrained), strict=True):
            frames.append(token_similarity(model.eval(), inputs).assign(strategy=run.strategy, weights=weights))
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

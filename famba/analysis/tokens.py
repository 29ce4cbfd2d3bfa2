"""The tokens of a trained model as arrays for figures: which patches fuse, and how similar tokens are.

Axes: b images, t tokens at a layer, h and w pixels. Weights are only read: another schedule gives another `Traced`.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
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
from famba.analysis import similarity, trained
from famba.errors import InputError
from famba.fusion import strategies
from famba.models.vim import Trace, VisionMamba
from famba.params import DataParams
from famba.training import fit

_BATCH = 50  # images: a trace holds every layer's tokens
_SHOWN_PX = 224  # a user's images are drawn at about this size


@dataclass(frozen=True, eq=False)
class Traced:
    """A model of a finished run, some images, and the trace of their way through it.

    Attributes:
        described: the strategy that the model was trained with, the names of its classes, and the mean and standard
            deviation (std) of its training images.
        images: not normalised, `scale` times as large as the model's input.
        labels: class names, or names of a user's files.
        predicted: class names.
        inputs: of the model.
    """

    model: VisionMamba
    described: Mapping[str, Any]
    images: UInt8[np.ndarray, "b h w 3"]
    labels: list[str]
    predicted: list[str]
    trace: Trace
    inputs: Float[Tensor, "b 3 _ _"]
    scale: int = 1

    @property
    def patches(self) -> dict[str, Any]:
        """Fields of `plots.Patches`, in pixels of `images`."""
        sizes = {key: self.scale * self.model.config[key] for key in ("patch_size", "stride")}
        return sizes | {"cls_index": self.model.cls_index}


def trace_run(run_dir: str | Path, *, count: int) -> Traced:
    """Trace the first test image of each of the first `count` classes through the model of a finished run.

    Args:
        run_dir: if relative, from the repository root. The images are of its data set.
        count: images; a data set with fewer classes gives fewer.

    Raises:
        InputError: a missing or damaged run; data that cannot be read.
    """
    model, known = trained.load(run_dir)
    dataset = data.load(DataParams(**known["params"]["data"]), seed=known["seed"])
    chosen = [int((dataset.test.labels == label).nonzero()[0]) for label in range(len(dataset.classes))][:count]
    images = dataset.test.images[chosen]
    return _traced(model, known, images, images, list(dataset.classes[:count]))


def trace(model: VisionMamba, described: Mapping[str, Any], sources: Sequence[str | Path | np.ndarray]) -> Traced:
    """Trace a user's images, of any size, through a model that is described as in `Traced`.

    Each is resized and cropped at the centre to the model's size; the same square is kept larger for drawing.

    Args:
        sources: files, or arrays, as in `data.read_image`.

    Raises:
        InputError: no images, or one that cannot be read.
    """
    if not sources:
        raise InputError("sources: no images; at least 1 needed")
    scale = max(1, _SHOWN_PX // model.img_size)
    sizes = model.img_size, scale * model.img_size
    small, large = (torch.stack([data.read_image(source, size) for source in sources]) for size in sizes)
    labels = [f"image {i}" if isinstance(x, np.ndarray) else Path(x).name for i, x in enumerate(sources, start=1)]
    return _traced(model, described, small, large, labels, scale)


@torch.no_grad()
def with_schedule(traced: Traced, schedule: Sequence[int]) -> Traced:
    """The same images through the same weights with another schedule.

    Raises:
        InputError: a schedule that does not fit the model.
    """
    model = copy.copy(traced.model)  # shares the weights, not the schedule
    model.set_fusion(schedule, traced.model.options)
    logits, trace = model.forward_with_trace(traced.inputs)
    return dataclasses.replace(traced, model=model, trace=trace, predicted=_names(traced.described, logits))


def largest_r(model: VisionMamba, strategy: str) -> int:
    """The largest r of a strategy for this model; 0 for `none`."""
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
    """For each layer, the token that each input token has become part of."""
    return [layer.numpy(force=True) for layer in trace.groups]


def similarities(trace: Trace, image: int = 0) -> list[Float[np.ndarray, "_ _"]]:
    """For each layer, the cosine similarity of all pairs of one image's normed tokens; 0 for one without length."""
    return [_cosines(layer[image]).numpy(force=True) for layer in trace.normed]


@torch.no_grad()
def _traced(
    model: VisionMamba, described: Mapping[str, Any], images: Tensor, shown: Tensor, labels: list[str], scale: int = 1
) -> Traced:
    inputs = data.normalise(images, described["mean"], described["std"])
    logits, trace = model.eval().forward_with_trace(inputs)
    pixels, predicted = shown.permute(0, 2, 3, 1).numpy(), _names(described, logits)
    return Traced(model, described, pixels, labels, predicted, trace, inputs, scale)


def _names(described: Mapping[str, Any], logits: Float[Tensor, "b _"]) -> list[str]:
    return [described["classes"][label] for label in logits.argmax(-1).tolist()]


@torch.no_grad()
def token_similarity(model: VisionMamba, images: Float[Tensor, "n 3 h w"]) -> pd.DataFrame:
    """How similar the tokens are at each layer, and which fuse there: one row per value, class token excluded.

    Quantities:
        similarity: of each normed token that enters a layer, the cosine similarity with its most similar token.
        distance: of each fused pair, between the centres of their patches, in steps of the patch grid.
        size: of each token after the last layer, in patches.

    Returns:
        Columns quantity, image (from 0), layer (from 1; the last for a size) and value.
    """
    found: list[pd.DataFrame] = []
    for start in range(0, len(images), _BATCH):
        _, trace = model.forward_with_trace(images[start : start + _BATCH])
        centres = _grid_positions(model).expand(len(trace.normed[0]), -1, -1)
        place = torch.arange(model.tokens).expand(len(centres), -1)
        for layer, (normed, matching) in enumerate(zip(trace.normed, trace.matchings, strict=True), start=1):
            with_others = _cosines(_of_patches(normed, place, model))
            with_others.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
            found.append(_rows("similarity", start, layer, with_others.amax(-1).clamp(min=-1)))  # of one token alone
            if matching is not None:
                at = _centres(centres, place, normed.shape[1])
                pairs = [at.gather(1, side[..., None].expand(-1, -1, 2)) for side in (matching.source, matching.target)]
                found.append(_rows("distance", start, layer, (pairs[0] - pairs[1]).norm(dim=-1)))
            place = trace.groups[layer - 1]
        found.append(_rows("size", start, model.depth, _of_patches(trace.sizes[-1], place, model)))
    return pd.concat(found, ignore_index=True)


def similarity_in_runs(folders: Sequence[Path], *, images: int) -> pd.DataFrame:
    """`token_similarity` of finished runs, and of the initial weights of their seeds.

    Args:
        folders: of runs or of published models, as `trained.load` takes them.
        images: number of images, from the start of the test split.

    Returns:
        The columns of `token_similarity`, and strategy, seed and weights (trained, untrained).

    Raises:
        InputError: a run that does not exist, more images than the test split has.
    """
    frames = []
    for folder in folders:
        model, known = trained.load(folder)
        p = config.load(known["params"]["profile"], strategy=known["strategy"])
        dataset = data.load(p.data, seed=known["seed"])
        if not 1 <= images <= len(dataset.test):
            raise InputError(f"images: {images}; must be in 1..{len(dataset.test)}, the test images")
        inputs = data.normalise(dataset.test.images[:images], known["mean"], known["std"])
        untrained = fit.build(p, classes=len(dataset.classes), seed=known["seed"])
        for weights, each in zip(similarity.WEIGHTS, (model, untrained), strict=True):
            names = {"strategy": known["strategy"], "seed": known["seed"], "weights": weights}
            frames.append(token_similarity(each.eval(), inputs).assign(**names))
    return pd.concat(frames, ignore_index=True)


def _rows(quantity: str, start: int, layer: int, values: Float[Tensor, "b m"]) -> pd.DataFrame:
    b, m = values.shape
    image = np.repeat(np.arange(start, start + b), m)
    return pd.DataFrame({"quantity": quantity, "image": image, "layer": layer, "value": values.double().flatten()})


def _cosines(tokens: Float[Tensor, "*b t d"]) -> Float[Tensor, "*b t t"]:
    """The similarity of all pairs of tokens; 0 for a token of zero length."""
    unit = functional.normalize(tokens.double(), dim=-1)
    return (unit @ unit.mT).clamp(-1, 1)  # outside by rounding only


def _of_patches(values: Tensor, place: Int[Tensor, "b tokens"], model: VisionMamba) -> Tensor:
    """(b, t, ..) values without the class token's, from the position of each input token."""
    if model.cls_index is None:
        return values
    b, t, *others = values.shape
    stays = torch.ones(b, t, dtype=torch.bool).scatter_(1, place[:, [model.cls_index]], False)
    return values[stays].view(b, t - 1, *others)


def _grid_positions(model: VisionMamba) -> Float[Tensor, "tokens 2"]:
    """Row and column of each input token's patch; NaN for the class token, which never fuses."""
    at = np.indices((model.grid, model.grid), dtype=float).reshape(2, -1).T
    return torch.from_numpy(at if model.cls_index is None else np.insert(at, model.cls_index, np.nan, axis=0))


def _centres(positions: Float[Tensor, "b tokens 2"], place: Int[Tensor, "b tokens"], t: int) -> Float[Tensor, "b t 2"]:
    """The centre of the patches of each of the t tokens."""
    into = place[..., None].expand(-1, -1, 2)
    return positions.new_zeros(len(positions), t, 2).scatter_reduce(1, into, positions, "mean", include_self=False)

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
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from famba import config, data
from famba.analysis import summary
from famba.config import DataParams
from famba.errors import InputError
from famba.fusion import strategies
from famba.models.vim import Trace, VisionMamba
from famba.storage import checkpoint, runs

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
    model, described = checkpoint.load_model(config.root() / run_dir / runs.MODEL_FILE)
    dataset = data.load(DataParams(**run.params["data"]))
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
    model, described = checkpoint.load_model(config.root() / run_dir / runs.MODEL_FILE)
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

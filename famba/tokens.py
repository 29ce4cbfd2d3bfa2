"""What a trained model does to its tokens, as arrays for the figures: which patches fuse, and how alike tokens are.

Axes: b images, t tokens at a layer, h and w pixels.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8

from famba import checkpoint, data, metrics, params, records
from famba.model import Trace, VisionMamba
from famba.params import DataParams


@dataclass(frozen=True, eq=False)
class Watched:
    """A model of a finished run, some images, and what happened to them on their way through it.

    Attributes:
        images: as they are, not normalised.
        labels: the class names of the images.
        predicted: the class names that the model gives them.
    """

    model: VisionMamba
    images: UInt8[np.ndarray, "b h w 3"]
    labels: list[str]
    predicted: list[str]
    trace: Trace


@torch.no_grad()
def watch(run_dir: str | Path, *, count: int) -> Watched:
    """Send the first test image of each of the first `count` classes through the model of a finished run.

    Args:
        run_dir: if relative, from the repository root. The images are of the data set that it was trained on.
        count: images; a data set with fewer classes gives fewer.

    Raises:
        InputError: a run that is missing or spoilt; data that cannot be read.
    """
    run = records.read(run_dir)
    model, described = checkpoint.load_model(params.root() / run_dir / records.MODEL_FILE)
    dataset = data.load(DataParams(**run.params["data"]))
    chosen = [int((dataset.test.labels == label).nonzero()[0]) for label in range(len(dataset.classes))][:count]
    images = dataset.test.images[chosen]
    logits, trace = model.eval().forward_with_trace(data.normalise(images, described["mean"], described["std"]))
    return Watched(
        model=model,
        images=images.permute(0, 2, 3, 1).numpy(),
        labels=[dataset.classes[label] for label in dataset.test.labels[chosen].tolist()],
        predicted=[dataset.classes[label] for label in logits.argmax(-1).tolist()],
        trace=trace,
    )


def groups(trace: Trace) -> list[Int[np.ndarray, "b _"]]:
    """For each layer, the token that each input token has ended in."""
    return [layer.numpy(force=True) for layer in trace.groups]


def similarities(trace: Trace, image: int = 0) -> list[Float[np.ndarray, "_ _"]]:
    """For each layer, the cosine similarity of each normed token of one image with every other, before it fuses."""
    return [metrics.cosine_similarity(layer[image].double().numpy(force=True)) for layer in trace.normed]

"""Images: where they come from, how they are split and varied, and the batches that training takes."""

from famba.data.splits import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Dataset,
    Split,
    batches,
    load,
    normalise,
    pictures,
    read_image,
    renormalised,
    to_device,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Dataset",
    "Split",
    "batches",
    "load",
    "normalise",
    "pictures",
    "read_image",
    "renormalised",
    "to_device",
]

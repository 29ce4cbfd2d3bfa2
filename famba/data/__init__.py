"""Images: where they come from, how they are split and varied, and the batches that training takes."""

from famba.data.datasets import DATASETS, shipped
from famba.data.loader import Streamed
from famba.data.splits import (
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
    "DATASETS",
    "Dataset",
    "Split",
    "Streamed",
    "batches",
    "load",
    "normalise",
    "pictures",
    "read_image",
    "renormalised",
    "shipped",
    "to_device",
]

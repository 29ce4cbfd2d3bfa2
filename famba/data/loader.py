"""Images that are decoded when they are needed, by worker processes, because all of them would not fit into memory.

Axes as in splits.py. What an image becomes follows from its place in the split and a seed, never from the worker that
it falls to: any number of workers gives the same batches.
"""

import multiprocessing
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int64, Shaped, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from famba import supervision
from famba.data import datasets
from famba.data.datasets import Encoded
from famba.data.timm_transforms import TimmAugmentation, image_seed
from famba.errors import FambaError, InputError


@dataclass(frozen=True, eq=False)
class Images:
    """Some images of a set, to be indexed like the tensor (n, 3, h, w) that they would be; each is decoded every time.

    On the CPU always: worker processes index them, and a worker must neither start CUDA nor send a tensor of a GPU.

    Attributes:
        rows: which images of `encoded`, in their order.
        img_size, crop: as in `datasets.fit`.
    """

    encoded: Encoded
    rows: Int64[Tensor, "n"]
    img_size: int
    crop: float

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: slice | list[int] | Int64[Tensor, "b"]) -> UInt8[Tensor, "b 3 h w"]:
        """Decoded in this process; an InputError names an image that is not whole."""
        rows = self.rows[chosen.cpu() if isinstance(chosen, Tensor) else chosen].tolist()
        found = np.empty((len(rows), 3, self.img_size, self.img_size), dtype=np.uint8)
        for i, row in enumerate(rows):
            found[i] = datasets.pixels(self.encoded, row, self.img_size, self.crop)
        return torch.from_numpy(found)


@dataclass(frozen=True, eq=False)
class Streamed:
    """A split whose images are decoded when they are needed.

    Attributes:
        images, labels: as those of `data.Split`, the images on the CPU; batches are moved to where the labels lie.
        augmentation: varies and normalises what is trained on; None leaves that to whoever takes the batches.
        workers: processes that decode; 0 decodes in this one.
    """

    images: Images
    labels: Int64[Tensor, "n"]
    augmentation: TimmAugmentation | None
    workers: int

    def __len__(self) -> int:
        return len(self.labels)


def read(
    split: Streamed, parts: Sequence[Int64[Tensor, "_"]], seed: int | None
) -> Iterator[tuple[Shaped[Tensor, "b 3 h w"], Int64[Tensor, "b"]]]:
    """The batches whose images have these places in the split.

    Worker processes live from the first batch to the last, or until the iterator is given up.

    Args:
        seed: what the augmentation draws follows from it and the image's place; None varies nothing.

    Raises:
        InputError: an image that is not whole.
        FambaError: a worker was killed.
    """
    items = _Items(split.images, split.augmentation, seed)
    places = [part.tolist() for part in parts]
    device = split.labels.device
    loaded = _loader(items, places, split.workers, device) if split.workers else map(items.__getitem__, places)
    batches = iter(loaded)
    try:
        for part in parts:
            images = next(batches)
            if isinstance(images, InputError):
                raise images
            yield images.to(device, non_blocking=True), split.labels[part.to(device, non_blocking=True)]
    except (RuntimeError, OSError, EOFError) as error:  # as a killed worker shows depends on what it was about to do
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise
        said = "a worker was killed while it loaded images; most often the machine ran out of memory, or of /dev/shm"
        raise FambaError(f"data.workers: {said}") from None
    finally:
        del batches  # its workers end with it; an error that is kept would keep them


@dataclass(frozen=True, eq=False)
class _Items(Dataset):
    """Batches by the places of their images: what a worker gets, and does."""

    images: Images
    augmentation: TimmAugmentation | None
    seed: int | None

    def __getitem__(self, places: list[int]) -> UInt8[Tensor, "b 3 h w"] | Float32[Tensor, "b 3 h w"] | InputError:
        """An error is handed over, since torch would raise it with a traceback in its message."""
        try:
            if self.augmentation is None or self.seed is None:
                return self.images[torch.tensor(places, dtype=torch.int64)]
            return self.augmentation(map(self._plain, places), [image_seed(self.seed, place) for place in places])
        except InputError as error:
            return error

    def _plain(self, place: int) -> Image.Image:
        with datasets.opened(self.images.encoded, int(self.images.rows[place])) as image:
            return datasets.rgb(image)


def _loader(items: _Items, places: list[list[int]], workers: int, device: torch.device) -> DataLoader:
    # Workers are forked, in no time, from a server that has imported all they need but done nothing yet: to fork this
    # process, with its threads and CUDA, might hang, and to start each anew takes seconds in every epoch.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["famba.data.preload" if "timm" in sys.modules else "famba.data.loader"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # as many as were asked for
        return DataLoader(
            items,
            batch_size=None,
            sampler=places,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            multiprocessing_context=context,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # its own: torch draws a seed for the workers, which nothing here uses
        )


def _start_worker(worker: int) -> None:
    supervision.start_worker()

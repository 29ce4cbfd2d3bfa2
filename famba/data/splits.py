"""Data sets as training sees them: fixed splits, batches, and what brings images to mean 0.

Axes: n images of a split, b images of a batch, 3 channels (red, green, blue), h and w pixels.

Images that fit into memory are one uint8 tensor, and a batch is one indexing. Those of a larger set, and those that are
varied one by one, stream. Every choice comes from a seed or a generator: the same parameters give the same bytes.
"""

import dataclasses
import hashlib
import json
import logging
import os
import random
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch
from jaxtyping import Float32, Int64, Shaped, UInt8
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from famba import config
from famba.data import datasets, loader
from famba.data.datasets import Files, Found
from famba.data.loader import Streamed
from famba.data.timm_transforms import TimmAugmentation
from famba.errors import InputError
from famba.params import IMAGENET_MEAN, IMAGENET_STD, DataParams
from famba.storage.files import json_bytes, write_atomic

_log = logging.getLogger(__name__)

_DECODED = 256  # images that one thread decodes at a time, at most

_Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean, standard deviation


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels, in an order that depends on the parameters alone."""

    images: UInt8[Tensor, "n 3 h w"]
    labels: Int64[Tensor, "n"]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """What one run sees.

    Attributes:
        train: what weights are fitted to, after `limit`.
        val: held out of the training images; the epoch is chosen by it.
        test: read once, at the end.
        classes: a label is an index into these names.
        mean, std: per channel, black being 0 and white 1, of `train` alone or of ImageNet; what `normalise` takes.
        test_ids: which images of the data set `test` holds.
    """

    train: Split | Streamed
    val: Split | Streamed
    test: Split | Streamed
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    test_ids: Int64[Tensor, "n"] | None = None


def load(p: DataParams, *, seed: int = 0) -> Dataset:
    """The data set that the parameters name, split and brought to `img_size`.

    Images of another size are resized by Pillow's bicubic filter, their shorter side to img_size, and cropped at the
    centre; this holds for `digits` too (8x8 pixels as scanned: a larger size adds pixels, not information). Validation
    and test see the share eval_crop of a side. A set that takes more than memory_mib streams, and so do training
    images that timm varies, each from its file.

    Args:
        seed: of the run; chooses the test split where there are `folds`, and nothing else.

    Raises:
        InputError: what `datasets.find` raises; a broken image; a shift that can leave nothing of an image; a limit
            above what there is; a class without an image in a split; augmentation by timm without timm.
    """
    if p.shift >= p.img_size:
        raise InputError(f"data.shift: {p.shift}: must be less than data.img_size, {p.img_size}")
    found = datasets.find(p)
    if p.folds is not None:
        found = dataclasses.replace(found, test=datasets.fold(found.labels, p.folds, seed % p.folds))
    rows = _rows(p, found)
    in_memory = len(found.labels) * 3 * p.img_size**2 <= p.memory_mib * 2**20
    decoded: dict[float, Tensor] = {}  # by crop

    def split(part: str, crop: float) -> Split | Streamed:
        labels = found.labels[rows[part]]
        if not in_memory:
            return Streamed(loader.Images(found.images, rows[part], p.img_size, crop), labels, None, p.workers)
        if crop not in decoded:
            decoded[crop] = _decoded(found, p.img_size, crop)
        return Split(decoded[crop][rows[part]], labels)

    val, test = split("val", p.eval_crop), split("test", p.eval_crop)
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    train = split("train", 1.0) if p.augment == "tensor" or p.normalise == "train" else None
    if p.normalise == "train":
        assert train is not None
        if isinstance(train, Split):
            mean, std = _moments(_counts(train.images))
        else:
            mean, std = _streamed_statistics(found, train)
    if p.augment == "timm":
        augmentation = TimmAugmentation(p, mean, std)
        augmentation.transform  # noqa: B018 (said now if it cannot be had)
        images = loader.Images(found.images, rows["train"], p.img_size, 1.0)
        train = Streamed(images, found.labels[rows["train"]], augmentation, p.workers)
    assert train is not None
    return Dataset(train, val, test, found.classes, mean, std, rows["test"])


def batches(
    split: Split | Streamed,
    batch_size: int,
    *,
    generator: torch.Generator | None = None,
    drop_last: bool = False,
    rows: slice = slice(None),
) -> Iterator[tuple[Shaped[Tensor, "b 3 h w"], Int64[Tensor, "b"]]]:
    """Images and labels, batch_size at a time: uint8, or varied and normalised already where timm does that.

    Args:
        split: may lie on any device; so do the batches.
        batch_size: images.
        generator: shuffles, in one draw made when this is called, and in a second one seeds what timm draws; None keeps
            the order and varies nothing.
        drop_last: leave out a last batch that is smaller.
        rows: of each batch only these are loaded: one process's part, where several share a step. A part of a smaller
            last batch may be empty.

    Raises:
        InputError: batch_size is below 1, or drop_last leaves no batch at all; while streaming, a broken image.
    """
    if batch_size < 1:
        raise InputError(f"batch_size: {batch_size}: must be at least 1")
    if drop_last and batch_size > len(split):
        raise InputError(f"batch_size: {batch_size}: the split has {len(split)} images, less than one full batch")
    end = len(split) - len(split) % batch_size if drop_last else len(split)
    if generator is None:
        order = torch.arange(end)
    else:
        order = torch.randperm(len(split), generator=generator, device=generator.device)[:end]
    if isinstance(split, Split):
        order = order.to(split.labels.device)
        return ((split.images[part[rows]], split.labels[part[rows]]) for part in order.split(batch_size))
    seed = None
    if generator is not None and split.augmentation is not None:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return loader.read(split, [part[rows] for part in order.cpu().split(batch_size)], seed)


def to_device(images: Dataset, device: torch.device) -> Dataset:
    """The splits that lie in memory moved, the batches of those that stream moved as they come."""

    def moved(split: Split | Streamed) -> Split | Streamed:
        if isinstance(split, Split):
            return Split(split.images.to(device), split.labels.to(device))
        return dataclasses.replace(split, labels=split.labels.to(device))

    return dataclasses.replace(images, train=moved(images.train), val=moved(images.val), test=moved(images.test))


def renormalised(images: Dataset, mean: tuple[float, ...], std: tuple[float, ...]) -> Dataset:
    """The same images, to be normalised as the weights know them."""
    train = images.train
    if isinstance(train, Streamed) and train.augmentation is not None:
        train = dataclasses.replace(train, augmentation=dataclasses.replace(train.augmentation, mean=mean, std=std))
    return dataclasses.replace(images, train=train, mean=mean, std=std)


def read_image(source: str | Path | np.ndarray, img_size: int) -> UInt8[Tensor, "3 h w"]:
    """One image of any size, brought to img_size pixels as `load` does it.

    Args:
        source: a file of any format that Pillow reads, relative paths from the repository root; or an image as an array
            of 8-bit numbers, (h, w) or (h, w, 3).

    Raises:
        InputError: a file that is missing or not a whole image; an array of another type or shape.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or not (source.ndim == 2 or source.shape[2:] == (3,)) or 0 in source.shape:
            raise InputError(f"image: {source.dtype} of shape {source.shape}; must be uint8 of (h, w) or (h, w, 3)")
        return torch.from_numpy(datasets.fit(Image.fromarray(source), img_size).copy())
    path = source if Path(source).is_absolute() else config.root() / source
    return torch.from_numpy(datasets.pixels(Files([str(path)]), 0, img_size).copy())


def normalise(
    images: UInt8[Tensor, "b 3 h w"], mean: Sequence[float], std: Sequence[float]
) -> Float32[Tensor, "b 3 h w"]:
    """Images of mean 0 and standard deviation 1 per channel, if mean and std (0 black, 1 white) are their own."""
    scale = _scale(mean, std, images.device)
    return images.to(torch.float32).sub_(scale[0]).div_(scale[1])


def pictures(
    images: Float32[Tensor, "b 3 h w"], mean: Sequence[float], std: Sequence[float]
) -> UInt8[Tensor, "b 3 h w"]:
    """Normalised images as pixels again, to be looked at; noise and mixtures are cut off at black and white."""
    scale = _scale(mean, std, images.device)
    return (images * scale[1] + scale[0]).round_().clamp_(0, 255).to(torch.uint8)


def _scale(mean: Sequence[float], std: Sequence[float], device: torch.device) -> Float32[Tensor, "2 3 1 1"]:
    """Mean and standard deviation of pixels from 0 to 255; made on the CPU, since the host waits for other copies."""
    scale = torch.tensor([mean, std], dtype=torch.float32).mul_(255)[:, :, None, None]
    return scale.to(device, non_blocking=True)


def _rows(p: DataParams, found: Found) -> dict[str, Int64[Tensor, "_"]]:
    """Which images of a set are whose."""
    trainable, draw = (~found.test).nonzero().flatten(), random.Random(p.split_seed)
    labels = found.labels[trainable]
    held_out = datasets.stratified(labels, round(p.val_fraction * len(trainable)), draw)
    val, train = trainable[held_out], trainable[~held_out]
    if p.limit is not None:
        if p.limit > len(train):
            raise InputError(f"data.limit: {p.limit}: there are {len(train)} training images; null takes all")
        train = train[datasets.stratified(found.labels[train], p.limit, draw)]
    for name, rows in {"training": train, "validation": val}.items():
        for label, count in enumerate(torch.bincount(found.labels[rows], minlength=len(found.classes)).tolist()):
            if count == 0:
                way = "a larger one" if name == "validation" else "a smaller one, or a larger limit"
                raise InputError(
                    f"data.val_fraction {p.val_fraction} and data.limit {p.limit} of {len(trainable)} images leave "
                    f"class {found.classes[label]!r} without a {name} image; {way} does not"
                )
    return {"train": train, "val": val, "test": found.test.nonzero().flatten()}


def _decoded(found: Found, img_size: int, crop: float) -> UInt8[Tensor, "n 3 h w"]:
    """All images of a set as one tensor: from build/cache/ if that holds exactly these, else decoded and cached."""
    n, path = len(found.labels), _cache(found, img_size, "safetensors", crop)
    if path is not None and path.exists():
        try:
            with safe_open(path, "pt") as file:
                written, result = (file.metadata() or {}).get("crc32"), file.get_tensor("images")
            if result.shape != (n, img_size, img_size, 3) or result.dtype != torch.uint8:
                raise ValueError(f"{tuple(result.shape)} {result.dtype} where {n} images are due")
            if written != str(zlib.crc32(result.numpy().data)):
                raise ValueError("the checksum does not match")
            return result.permute(0, 3, 1, 2)
        except (SafetensorError, OSError, ValueError) as error:
            _log.warning("%s: damaged (%s); decoding the images again", path, " ".join(str(error).split()))

    images = np.empty((n, img_size, img_size, 3), dtype=np.uint8)  # channels innermost, as they are decoded

    def decode(rows: range) -> None:
        for i in rows:
            images[i] = datasets.pixels(found.images, i, img_size, crop).transpose(1, 2, 0)

    # Threads gain on large images; on tiny ones, which hardly leave the interpreter, more than a few get in each
    # other's way. map keeps the order, so of several broken files it is always the first that is named. Many images at
    # once, since a signal in the middle of the pool's submit would leave its lock taken.
    threads = min(4, os.cpu_count() or 1)
    count = max(1, min(_DECODED, n // (4 * threads)))
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(decode, (range(i, min(n, i + count)) for i in range(0, n, count))):
            pass
    result = torch.from_numpy(images)
    if path is not None:
        write_atomic(path, save({"images": result}, metadata={"crc32": str(zlib.crc32(images.data))}))
    return result.permute(0, 3, 1, 2)


def _cache(found: Found, img_size: int, kind: str, *more: object) -> Path | None:
    """Where something made of a set's images is kept; another content, size or Pillow is another name."""
    if found.key is None:
        return None
    described = f"4 {PIL.__version__} {img_size} {found.key} {' '.join(map(str, more))}"  # 4: how files are decoded
    name = f"{found.name}-{img_size}px-{hashlib.sha256(described.encode()).hexdigest()[:20]}.{kind}"
    return config.root() / "build" / "cache" / name


def _streamed_statistics(found: Found, train: Streamed) -> _Statistics:
    """`_moments` of images that stream, in one pass; kept in build/cache/."""
    rows = hashlib.sha256(train.images.rows.numpy().tobytes()).hexdigest()
    path = _cache(found, train.images.img_size, "json", rows)
    if path is not None and path.exists():
        try:
            (r, g, b), (r_std, g_std, b_std) = json.loads(path.read_text())
            return (float(r), float(g), float(b)), (float(r_std), float(g_std), float(b_std))
        except (OSError, ValueError, TypeError) as error:
            _log.warning("%s: damaged (%s); reading the images again", path, " ".join(str(error).split()))
    counts = torch.zeros(3, 256, dtype=torch.int64)
    for images, _ in batches(train, 64):
        counts += _counts(images)
    result = _moments(counts)
    if path is not None:
        write_atomic(path, json_bytes(result))
    return result


def _counts(images: UInt8[Tensor, "n 3 h w"]) -> Int64[Tensor, "3 256"]:
    return torch.stack([torch.bincount(images[:, channel].flatten(), minlength=256) for channel in range(3)])


def _moments(counts: Int64[Tensor, "3 256"]) -> _Statistics:
    """Mean and standard deviation of each channel, from counts of the 256 values: exact whatever the order."""
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in range(3):
        share = counts[channel].double() / counts[channel].sum()
        mean.append(float(share @ values))
        std.append(float((share @ (values - mean[-1]) ** 2).sqrt()))
    if min(std) == 0:
        raise InputError(f"channel {std.index(0)} is the same in every training pixel; there is nothing to learn from")
    return tuple(mean), tuple(std)

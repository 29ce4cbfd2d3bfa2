"""Datasets by name: uint8 images in memory, fixed splits, batches, and augmentation of whole batches.

Axes: n images of a split, b images of a batch, 3 channels (red, green, blue), h and w pixels.

Small images fit into memory as one tensor, so there are no workers and no queues: a batch is one indexing. Every
choice comes from a seed or a generator, hence the same parameters give the same bytes. `digits` are the test half of
Alpaydin and Kaynak's "Optical Recognition of Handwritten Digits" (UCI, 1998), which ship with scikit-learn.
"""

import hashlib
import logging
import os
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float32, Int64, UInt8
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from famba import params
from famba.errors import InputError
from famba.files import write_atomic
from famba.params import DataParams

_log = logging.getLogger(__name__)


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
        mean, std: per channel, of `train` alone, black being 0 and white 1; what `normalise` takes.
    """

    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def load(p: DataParams) -> Dataset:
    """The data set that the parameters name, split and brought to `img_size`.

    Images of another size are resized by Pillow's bicubic filter, their shorter side to img_size, and cropped at the
    centre; this holds for `digits` too (8x8 pixels as scanned: a larger size adds pixels, not information).

    Raises:
        InputError: an unknown data set; a folder that is not laid out as `_folder` says; a broken image; a shift that
            can leave nothing of an image; a limit above what there is; a class without an image in a split.
    """
    if p.dataset not in _SOURCES:
        raise InputError(f"data.dataset: {p.dataset!r} is not one of {', '.join(_SOURCES)}")
    if p.shift >= p.img_size:
        raise InputError(f"data.shift: {p.shift}: must be less than data.img_size, {p.img_size}")
    trainable, test, classes = _SOURCES[p.dataset](p)

    draw = random.Random(p.split_seed)
    held_out = _stratified(trainable.labels, round(p.val_fraction * len(trainable)), draw)
    val, train = _where(trainable, held_out), _where(trainable, ~held_out)
    if p.limit is not None:
        if p.limit > len(train):
            raise InputError(f"data.limit: {p.limit}: there are {len(train)} training images")
        train = _where(train, _stratified(train.labels, p.limit, draw))
    for name, split in {"training": train, "validation": val}.items():
        for label, count in enumerate(torch.bincount(split.labels, minlength=len(classes)).tolist()):
            if count == 0:
                raise InputError(
                    f"data.val_fraction {p.val_fraction} and data.limit {p.limit} of {len(trainable)} images leave "
                    f"class {classes[label]!r} without a {name} image; at least 1 needed"
                )
    mean, std = _statistics(train.images)
    return Dataset(train, val, test, classes, mean, std)


def batches(
    split: Split, batch_size: int, *, generator: torch.Generator | None = None, drop_last: bool = False
) -> Iterator[tuple[UInt8[Tensor, "b 3 h w"], Int64[Tensor, "b"]]]:
    """Images and labels, batch_size at a time.

    Args:
        split: may lie on any device; so do the batches.
        batch_size: images.
        generator: shuffles, in one draw made when this is called; None keeps the order.
        drop_last: leave out a last batch that is smaller.

    Raises:
        InputError: batch_size is below 1, or drop_last leaves no batch at all.
    """
    if batch_size < 1:
        raise InputError(f"batch_size: {batch_size}: must be at least 1")
    if drop_last and batch_size > len(split):
        raise InputError(f"batch_size: {batch_size}: the split has {len(split)} images, less than one full batch")
    end = len(split) - len(split) % batch_size if drop_last else len(split)
    if generator is None:
        return ((split.images[i : i + batch_size], split.labels[i : i + batch_size]) for i in range(0, end, batch_size))
    order = torch.randperm(len(split), generator=generator, device=generator.device)[:end].to(split.labels.device)
    return ((split.images[chosen], split.labels[chosen]) for chosen in order.split(batch_size))


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
        return torch.from_numpy(_fit(Image.fromarray(source), img_size).copy())
    path = params.root() / source
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return torch.from_numpy(_read_file(path, img_size).copy())


def normalise(
    images: UInt8[Tensor, "b 3 h w"], mean: Sequence[float], std: Sequence[float]
) -> Float32[Tensor, "b 3 h w"]:
    """Images of mean 0 and standard deviation 1 per channel, if mean and std (0 black, 1 white) are their own."""
    scale = torch.tensor([mean, std], dtype=torch.float32, device=images.device).mul_(255)[:, :, None, None]
    return images.to(torch.float32).sub_(scale[0]).div_(scale[1])


def augment(
    images: UInt8[Tensor, "b 3 h w"], *, shift: int, flip: bool, generator: torch.Generator
) -> UInt8[Tensor, "b 3 h w"]:
    """Each image moved by its own offset, up to `shift` pixels along each axis, then mirrored or not.

    Zeros (black) move in. All offsets from -shift to shift are equally likely, and so are the two mirrorings.
    The draws are made on the generator's device, so that a CPU generator gives the same images on every device.

    Raises:
        InputError: shift is negative.
    """
    if shift < 0:
        raise InputError(f"shift: {shift}: must be at least 0")
    b, _, h, w = images.shape
    if shift:
        # Every offset is a window of the padded images; a window is a view, so only the chosen ones are copied.
        windows = F.pad(images, (shift,) * 4).unfold(2, h, 1).unfold(3, w, 1)
        corner = torch.randint(0, 2 * shift + 1, (2, b), generator=generator, device=generator.device)
        y, x = corner.to(images.device)
        images = windows[torch.arange(b, device=images.device), :, y, x]
    if flip:
        mirrored = torch.randint(0, 2, (b, 1, 1, 1), generator=generator, device=generator.device).to(images.device)
        images = torch.where(mirrored.bool(), images.flip(3), images)
    return images


_Source = tuple[Split, Split, tuple[str, ...]]  # training images, test images, classes


def _digits(p: DataParams) -> _Source:
    """1,797 handwritten digits; 500 of them, the same whatever the parameters, are the test split."""
    from sklearn.datasets import load_digits  # a second to import, and only needed here

    pixels, target = load_digits(return_X_y=True)
    grey = np.rint(np.asarray(pixels) * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)  # ink from 0 to 16
    images = torch.from_numpy(np.stack([_fit(Image.fromarray(image), p.img_size) for image in grey]))
    everything = Split(images, torch.from_numpy(np.asarray(target, dtype=np.int64)))
    test = _stratified(everything.labels, 500, random.Random(0))
    return _where(everything, ~test), _where(everything, test), tuple("0123456789")


def _folder(p: DataParams) -> _Source:
    """Image files in root/train/<class>/ and root/test/<class>/, of any format that Pillow reads.

    Hidden files are passed over; anything else that is not an image is an error, since leaving it out in silence
    would train on less than the folder seems to hold. The decoded images are kept in build/cache/, under a name made
    of every file's name, size and time of change: a changed folder is decoded anew.
    """
    if p.root is None:
        raise InputError("data.root: null: dataset 'folder' needs a folder with train/<class>/ and test/<class>/")
    top = params.root() / p.root
    if not top.is_dir():
        raise InputError(f"data.root: {top}: no such folder")
    train, test = _listing(top / "train"), _listing(top / "test")
    if odd := sorted(train.keys() ^ test.keys()):
        where = "train" if odd[0] in train else "test"
        raise InputError(f"{top}: class {odd[0]!r} is in {where}/ only; train/ and test/ must hold the same classes")
    classes = tuple(train)
    files = [file for part in (train, test) for entries in part.values() for file in entries]
    labels = torch.tensor([i for part in (train, test) for i, name in enumerate(classes) for _ in part[name]])
    images = _decoded(files, p.img_size, top.resolve().name)
    n = sum(len(entries) for entries in train.values())
    return Split(images[:n], labels[:n]), Split(images[n:], labels[n:]), classes


_SOURCES: dict[str, Callable[[DataParams], _Source]] = {"digits": _digits, "folder": _folder}
DATASETS = tuple(_SOURCES)


def _listing(folder: Path) -> dict[str, list[os.DirEntry[str]]]:
    """The files of each class, classes and files sorted by name."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a data set has train/<class>/ and test/<class>/")

    def visible(path: Path | str, kind: str) -> list[os.DirEntry[str]]:
        with os.scandir(path) as entries:
            found = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
        for entry in found:
            if entry.is_dir() != (kind == "class folder"):
                raise InputError(f"{entry.path}: not allowed here; {path} may hold only {kind}s")
        if not found:
            raise InputError(f"{path}: no {kind}s; at least 1 needed")
        return found

    return {entry.name: visible(entry.path, "image file") for entry in visible(folder, "class folder")}


def _decoded(files: list[os.DirEntry[str]], img_size: int, name: str) -> UInt8[Tensor, "n 3 h w"]:
    """All files as one tensor: from the cache if it holds exactly these, else decoded and cached."""
    fingerprint = hashlib.sha256(f"1 {PIL.__version__} {img_size}".encode())  # 1: the layout of the cache file
    for file in files:
        try:
            stat = file.stat()
        except OSError as error:
            raise InputError(f"{file.path}: cannot be read ({error.strerror})") from None
        fingerprint.update(os.fsencode(f"\0{file.path}\0{stat.st_size}\0{stat.st_mtime_ns}"))
    path = params.root() / "build" / "cache" / f"{name}-{img_size}px-{fingerprint.hexdigest()[:20]}.safetensors"
    if path.exists():
        try:
            return _read_cache(path, (len(files), 3, img_size, img_size))
        except (SafetensorError, OSError, ValueError) as error:
            _log.warning("%s: damaged (%s); decoding the images again", path, " ".join(str(error).split()))

    images = np.empty((len(files), 3, img_size, img_size), dtype=np.uint8)

    def decode(i: int) -> None:
        images[i] = _read_file(files[i].path, img_size)

    # Threads gain on large images; on tiny ones, which hardly leave the interpreter, more than a few get in each
    # other's way. map keeps the order, so of several broken files it is always the first that is named.
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for _ in pool.map(decode, range(len(files))):
            pass
    result = torch.from_numpy(images)
    write_atomic(path, save({"images": result}, metadata={"crc32": str(zlib.crc32(images.data))}))
    return result


def _read_file(path: str | Path, img_size: int) -> UInt8[np.ndarray, "3 h w"]:
    try:
        with Image.open(path) as image:
            return _fit(image, img_size)
    except Exception as error:  # Pillow's decoders raise anything from OSError to SyntaxError and struct.error
        said = "no known format" if isinstance(error, PIL.UnidentifiedImageError) else " ".join(str(error).split())
        raise InputError(f"{path}: not a whole image that Pillow can read ({said})") from None


def _fit(image: Image.Image, size: int) -> UInt8[np.ndarray, "3 h w"]:
    """Three channels of size x size pixels; the shorter side is resized and the longer one cropped at the centre."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"more than 8 bits per channel (Pillow's mode {image.mode}); convert it to 8 bits")
    if "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns where a palette with transparency loses it in one step
    image = image.convert("RGB")  # drops alpha
    if min(image.size) != size or max(image.size) != size:
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image).transpose(2, 0, 1)


def _read_cache(path: Path, shape: tuple[int, ...]) -> UInt8[Tensor, "n 3 h w"]:
    with safe_open(path, "pt") as file:
        metadata, images = file.metadata() or {}, file.get_tensor("images")
    if images.shape != shape or images.dtype != torch.uint8:
        raise ValueError(f"{tuple(images.shape)} {images.dtype} where {shape} torch.uint8 is due")
    if metadata.get("crc32") != str(zlib.crc32(images.numpy().data)):
        raise ValueError("the checksum does not match")
    return images


def _stratified(labels: Int64[Tensor, "n"], count: int, draw: random.Random) -> Bool[Tensor, "n"]:
    """A choice of `count` images, each class by its share; what is left of rounding goes to the largest remainders.

    Drawn by Python's random.random(), the one stream that is promised never to change between versions: the test
    split must be the same one everywhere.
    """
    n, per_class = len(labels), torch.bincount(labels).tolist()
    quota = [count * size // n for size in per_class]
    by_remainder = sorted(range(len(quota)), key=lambda label: -(count * per_class[label] % n))
    for label in by_remainder[: count - sum(quota)]:
        quota[label] += 1
    listed, chosen = labels.tolist(), torch.zeros(n, dtype=torch.bool)
    lots = [draw.random() for _ in range(n)]
    for i in sorted(range(n), key=lots.__getitem__):
        if quota[listed[i]]:
            quota[listed[i]] -= 1
            chosen[i] = True
    return chosen


def _where(split: Split, chosen: Bool[Tensor, "n"]) -> Split:
    return Split(split.images[chosen], split.labels[chosen])


def _statistics(images: UInt8[Tensor, "n 3 h w"]) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each channel, from counts of the 256 values: exact whatever the order."""
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in range(3):
        share = torch.bincount(images[:, channel].flatten(), minlength=256).double() / images[:, channel].numel()
        mean.append(float(share @ values))
        std.append(float((share @ (values - mean[-1]) ** 2).sqrt()))
    if min(std) == 0:
        raise InputError(f"channel {std.index(0)} is the same in every training pixel; there is nothing to learn from")
    return tuple(mean), tuple(std)

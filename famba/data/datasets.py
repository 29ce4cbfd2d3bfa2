"""Where images come from: a data set's name becomes encoded images, labels and classes.

Sets of the Hugging Face hub are downloaded, checked and kept by its own library, `datasets`; where there is no network,
a copy in a folder is read instead. `digits` are the test half of Alpaydin and Kaynak's "Optical Recognition of
Handwritten Digits" (UCI, 1998), which ship with scikit-learn. Nothing is decoded here but one image at a time.
"""

import contextlib
import hashlib
import importlib.util
import io
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from jaxtyping import Bool, Int64, UInt8
from PIL import ExifTags, Image
from torch import Tensor

from famba import config
from famba.errors import InputError
from famba.params import DataParams

# Repository on the hub, columns of the image and of the label; None where the features tell.
_HUB: dict[str, tuple[str, str | None, str | None]] = {
    "cifar10": ("uoft-cs/cifar10", "img", "label"),
    "cifar100": ("uoft-cs/cifar100", "img", "fine_label"),
}


# By EXIF's orientation, how an image is turned upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# Images that are not decoded yet. They are sent to other processes, so that they must be small or be found on disk.
# `open` raises whatever Pillow raises; `name` is what a user can find an image by.


def _image(path: str) -> Image.Image:
    if not os.path.isfile(path):  # a pipe would wait for its writer, a device never end
        raise ValueError("no regular file there")
    return Image.open(path)


@dataclass(frozen=True)
class Files:
    """Image files of any format that Pillow reads."""

    paths: Sequence[str]

    def open(self, i: int) -> Image.Image:
        return _image(self.paths[i])

    def name(self, i: int) -> str:
        return self.paths[i]


@dataclass(frozen=True)
class Cells:
    """Images in a column of a `datasets.Dataset`: encoded bytes, or the path of a file."""

    table: Any
    column: str
    where: str

    def open(self, i: int) -> Image.Image:
        cell = self.table.data[self.column][i].as_py()
        if cell is None:
            raise ValueError("no image in this row")
        return _image(cell["path"]) if cell["bytes"] is None else Image.open(io.BytesIO(cell["bytes"]))

    def name(self, i: int) -> str:
        return f"{self.where}: row {i}"


@dataclass(frozen=True, eq=False)
class Grey:
    """Images in memory, of one channel."""

    pixels: UInt8[np.ndarray, "n h w"]

    def open(self, i: int) -> Image.Image:
        return Image.fromarray(self.pixels[i])

    def name(self, i: int) -> str:
        return f"image {i}"


Encoded = Files | Cells | Grey


@dataclass(frozen=True, eq=False)
class Found:
    """A data set as it was found.

    Attributes:
        images, labels: of training and test together.
        test: which of them are the test split.
        classes: a label is an index into these names.
        name: of files in which something made of it is kept.
        key: changes with what the set holds; None if it is not worth keeping anything of it.
    """

    images: Encoded
    labels: Int64[Tensor, "n"]
    test: Bool[Tensor, "n"]
    classes: tuple[str, ...]
    name: str
    key: str | None


def find(p: DataParams) -> Found:
    """The data set that the parameters name; a set of the hub without a test split is tested on its validation split.

    Raises:
        InputError: a folder or a set that is not laid out as the data set's kind demands; a set of the
            hub that can be had neither from its cache nor from the hub.
    """
    if p.dataset == "digits":
        return _digits()
    if p.dataset == "folder":
        return _folder(_top(p, "a folder with train/<class>/ and test/<class>/"))
    if p.dataset == "parquet":
        return _parquet(_top(p, "a folder with train-*.parquet and test-*.parquet"), None, None)
    if p.dataset in _HUB:
        repository, image, label = _HUB[p.dataset]
    else:
        repository, image, label = p.dataset.removeprefix("hub:"), None, None
    copy = config.root() / "data" / p.dataset
    if p.root is None and not copy.is_dir():
        return _hub(p.dataset, repository, image, label)
    top = copy if p.root is None else _top(p, "")
    if _parquet_files(top):
        return _parquet(top, image, label)
    if (top / "train").is_dir():
        return _folder(top)
    raise InputError(
        f"data.root: {top}: no copy of {repository}; it must hold train-*.parquet and test-*.parquet, "
        "or train/<class>/ and test/<class>/"
    )


def pixels(images: Encoded, i: int, size: int, crop: float = 1.0) -> UInt8[np.ndarray, "3 h w"]:
    """One image decoded and brought to size x size pixels (`fit`); an InputError names one that is not whole."""
    with opened(images, i) as image:
        return fit(image, size, crop)


@contextlib.contextmanager
def opened(images: Encoded, i: int) -> Iterator[Image.Image]:
    """One image, open; whatever goes wrong with it meanwhile becomes an InputError that names it."""
    try:
        with images.open(i) as image:
            yield image
    except Exception as error:  # Pillow's decoders raise anything from OSError to SyntaxError and struct.error
        said = "no known format" if isinstance(error, PIL.UnidentifiedImageError) else " ".join(str(error).split())
        raise InputError(f"{images.name(i)}: not a whole image that Pillow can read ({said})") from None


def rgb(image: Image.Image) -> Image.Image:
    """Three channels of 8 bits, or ValueError; turned as EXIF says it was held, without transparency."""
    stored = " ".join(str(tile.args) for tile in getattr(image, "tile", ()))  # Pillow makes mode RGB of 48 bits as well
    if image.mode.startswith(("I", "F")) or re.search(";16[BLNS]", stored):
        raise ValueError("more than 8 bits per channel; convert it to 8 bits")
    image.load()  # TIFF turns itself
    # ImageOps.exif_transpose writes all tags anew, and fails at one that is malformed.
    turn = image.getexif().get(ExifTags.Base.Orientation.value)
    if turn in _TURNS:
        image = image.transpose(_TURNS[turn])
    if "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns where a palette with transparency loses it in one step
    return image.convert("RGB")


def fit(image: Image.Image, size: int, crop: float = 1.0) -> UInt8[np.ndarray, "3 h w"]:
    """Three channels of size x size pixels: the centre of the image, its shorter side resized to size / crop pixels."""
    image = rgb(image)
    shorter = round(size / crop)
    if min(image.size) != shorter:
        scale = shorter / min(image.size)
        width, height = (max(shorter, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    if image.size != (size, size):
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image).transpose(2, 0, 1)


def stratified(labels: Int64[Tensor, "n"], count: int, draw: random.Random) -> Bool[Tensor, "n"]:
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


def fold(labels: Int64[Tensor, "n"], folds: int, number: int) -> Bool[Tensor, "n"]:
    """One of so many disjoint parts of a data set, each with its share of every class."""
    draw, chosen = random.Random(0), torch.zeros(len(labels), dtype=torch.bool)
    lots = [(label, draw.random()) for label in labels.tolist()]
    chosen[sorted(range(len(lots)), key=lots.__getitem__)[number::folds]] = True
    return chosen


def _top(p: DataParams, needed: str) -> Path:
    if p.root is None:
        raise InputError(f"data.root: null: dataset {p.dataset!r} needs {needed}")
    top = config.root() / os.path.expanduser(p.root)
    if not top.is_dir():
        raise InputError(f"data.root: {top}: no such folder")
    return top


def _digits() -> Found:
    """1,797 handwritten digits; 500 of them, the same whatever the parameters, are the test split."""
    table = np.loadtxt(shipped("data/digits.csv.gz"), delimiter=",")
    grey = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)  # ink from 0 to 16
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    test = stratified(labels, 500, random.Random(0))
    return Found(Grey(grey), labels, test, tuple("0123456789"), "digits", None)


def shipped(name: str) -> Path:
    """A file of scikit-learn's data sets; to import that package takes more than a second."""
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise InputError(f"{name}: ships with scikit-learn, which is not installed: pip install scikit-learn")
    return Path(package.origin).parent / "datasets" / name


def _folder(top: Path) -> Found:
    """Image files in top/train/<class>/ and top/test/<class>/.

    Hidden files are passed over; anything else that is not an image is an error, since leaving it out in silence
    would train on less than the folder seems to hold.
    """
    train, test = _listing(top / "train"), _listing(top / "test")
    if odd := sorted(train.keys() ^ test.keys()):
        where = "train" if odd[0] in train else "test"
        raise InputError(f"{top}: class {odd[0]!r} is in {where}/ only; train/ and test/ must hold the same classes")
    classes = tuple(train)
    files = [file for part in (train, test) for entries in part.values() for file in entries]
    labels = torch.tensor([i for part in (train, test) for i, name in enumerate(classes) for _ in part[name]])
    tested = torch.arange(len(files)) >= sum(len(entries) for entries in train.values())
    images = Files([file.path for file in files])
    return Found(images, labels, tested, classes, top.resolve().name, _key(files))


def _listing(folder: Path) -> dict[str, list[os.DirEntry[str]]]:
    """The files of each class, classes and files sorted by name."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a data set has train/<class>/ and test/<class>/")

    def visible(path: Path | str, kind: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(path) as entries:
                found = sorted((x for x in entries if not x.name.startswith(".")), key=lambda entry: entry.name)
            wrong = [x for x in found if not (x.is_dir() if kind == "class folder" else x.is_file())]
        except OSError as error:
            raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from None
        if wrong:
            raise InputError(f"{wrong[0].path}: not allowed here; {path} may hold only {kind}s")
        if not found:
            raise InputError(f"{path}: no {kind}s; at least 1 needed")
        return found

    return {entry.name: visible(entry.path, "image file") for entry in visible(folder, "class folder")}


def _key(files: Sequence[os.DirEntry[str] | Path]) -> str:
    """Files' names, sizes and times of change, which tell what they hold."""
    fingerprint = hashlib.sha256()
    for file in files:
        try:
            stat = file.stat()
        except OSError as error:
            raise InputError(f"{os.fspath(file)}: cannot be read ({error.strerror})") from None
        fingerprint.update(os.fsencode(f"\0{os.fspath(file)}\0{stat.st_size}\0{stat.st_mtime_ns}"))
    return fingerprint.hexdigest()


def _hub(dataset: str, repository: str, image: str | None, label: str | None) -> Found:
    """A set of the hub, from the cache of `datasets` if it is there."""
    asked = f"data.dataset: {dataset!r}"
    with _quiet(dataset) as datasets:
        try:
            splits = datasets.load_dataset(repository, keep_in_memory=False)
        except FileNotFoundError as error:
            raise InputError(f"{asked}: the hub shows no such set ({_reason(error)})") from None
        except OSError:
            raise InputError(
                f"{asked}: not in the cache, and the hub cannot be reached; download {repository} on another machine "
                f"(`hf download --repo-type dataset {repository} --local-dir DIR`) and set data.root: DIR"
            ) from None
        except Exception as error:  # the library raises its own kinds, Arrow's, and those of scripts
            raise InputError(f"{asked}: cannot be loaded ({_reason(error)})") from None
    return _table(asked, repository, splits, image, label, None)


def _parquet(top: Path, image: str | None, label: str | None) -> Found:
    """Parquet files in the hub's layout, <split>-*.parquet, in the folder itself or in one below it."""
    files = _parquet_files(top)
    if len(folders := sorted({str(file.parent.relative_to(top)) for file in files})) != 1:
        raise InputError(
            f"data.root: {top}: {'no parquet files' if not files else 'parquet files in ' + ', '.join(folders)}; "
            "train-*.parquet and test-*.parquet must lie together in it or in one folder below"
        )
    with _quiet("parquet") as datasets:
        import pyarrow
        from pyarrow import parquet

        by_split: dict[str, list[str]] = {}
        for file in files:
            try:
                if not file.is_file():
                    raise OSError("no regular file")
                parquet.read_schema(file)
            except (OSError, pyarrow.ArrowException) as error:
                raise InputError(f"{file}: not a whole parquet file ({_reason(error)})") from None
            by_split.setdefault(file.stem.partition("-")[0], []).append(str(file))
        kept = str(config.root() / "build" / "cache" / "datasets")
        try:
            splits = datasets.load_dataset("parquet", data_files=by_split, cache_dir=kept, keep_in_memory=False)
        except Exception as error:  # as in _hub
            raise InputError(f"{files[0].parent}: cannot be loaded ({_reason(error)})") from None
    return _table(str(files[0].parent), top.resolve().name, splits, image, label, files)


def _parquet_files(top: Path) -> list[Path]:
    found = [*top.glob("*.parquet"), *top.glob("*/*.parquet")]
    return sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(top).parts))


def _table(
    where: str, name: str, splits: Mapping[str, Any], image: str | None, label: str | None, files: list[Path] | None
) -> Found:
    """The training and test splits of a set as `datasets` gives it, from these files or, if None, its cache's."""
    import datasets

    tested = next((split for split in ("test", "validation") if split in splits), None)
    if "train" not in splits or tested is None:
        raise InputError(f"{where}: its splits are {', '.join(splits)}; there must be train, and test or validation")
    features = splits["train"].features
    image = _column(where, features, "image", image, [c for c, x in features.items() if _holds_images(x)])
    names = [c for c, x in features.items() if isinstance(x, datasets.ClassLabel)]
    label = _column(where, features, "class label", label, names)
    classes = tuple(features[label].names)
    if (others := splits[tested].features.get(label)) is None or tuple(others.names) != classes:
        raise InputError(f"{where}: column {label!r} of {tested} has other classes than that of train")
    parts = [splits["train"].select_columns([image, label]), splits[tested].select_columns([image, label])]
    numbers = [np.asarray([-1 if x is None else x for x in part[label][:]], dtype=np.int64) for part in parts]
    for split, part in zip(("train", tested), numbers, strict=True):
        if len(odd := np.flatnonzero((part < 0) | (part >= len(classes)))):
            raise InputError(f"{where}: row {odd[0]} of {split} has no class; every image needs one of {len(classes)}")
    labels = torch.from_numpy(np.concatenate(numbers))
    both = datasets.concatenate_datasets(parts)
    kept = [Path(file["filename"]) for file in both.cache_files] if files is None else files
    test = torch.arange(len(labels)) >= len(numbers[0])
    return Found(Cells(both, image, where), labels, test, classes, name.replace("/", "--"), _key(kept))


def _column(where: str, features: Mapping[str, Any], kind: str, asked: str | None, able: list[str]) -> str:
    """The column of this kind: the one asked for, or the only one."""
    if asked in able:
        return str(asked)
    if asked is None and len(able) == 1:
        return able[0]
    wanted = f"exactly one {kind} column" if asked is None else f"{kind} column {asked!r}"
    raise InputError(f"{where}: its {kind} columns are {able or 'none'} of {list(features)}; {wanted} is needed")


def _holds_images(feature: Any) -> bool:
    import datasets

    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


@contextlib.contextmanager
def _quiet(dataset: str) -> Iterator[Any]:
    """The package `datasets`, without bars or warnings, whose content is raised or of no use to whoever trains."""
    try:
        import datasets  # a second to import, and only needed here
    except ImportError as error:
        raise InputError(
            f"data.dataset: {dataset!r} is read by the package datasets ({error}): pip install 'famba[paper]'"
        ) from None
    verbosity, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


def _reason(error: BaseException) -> str:
    """The message of what went wrong first, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__

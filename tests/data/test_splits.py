import hashlib
import logging
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from safetensors.torch import load_file, save_file

from famba import config, data
from famba.config import DataParams
from famba.data.datasets import Cells, Files, pixels
from famba.errors import InputError

DIGITS = {
    "dataset": "digits",
    "root": None,
    "img_size": 8,
    "val_fraction": 0.1,
    "split_seed": 0,
    "limit": None,
    "eval_crop": 1.0,
    "normalise": "train",
    "augment": "tensor",
    "shift": 1,
    "flip": False,
    "erase": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "rand_augment": None,
    "color_jitter": 0.0,
    "workers": 0,
    "memory_mib": 4096,
}


def digits(seed: int = 0, **changes: object) -> data.Dataset:
    return data.load(DataParams(**{**DIGITS, **changes}), seed=seed)


def photograph(seed: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    """Smooth colours, so that JPEG keeps them nearly as they are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def png_48_bit() -> bytes:
    """A pixel of 16 bits per channel, which Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(7))) + chunk(b"IEND", b"")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository root of its own, whose build/cache is empty."""
    (tmp_path / "params.yaml").touch()
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def folder(checkout: Path) -> Path:
    """Two classes in true file formats: 10 training and 2 test images of each."""
    top = checkout / "images"
    seed = 0
    for part, count in {"train": 10, "test": 2}.items():
        for name in ("cat", "dog"):
            (top / part / name).mkdir(parents=True)
            for i in range(count):
                photograph(seed := seed + 1).save(top / part / name / f"{i}.{('png', 'jpg', 'bmp', 'gif')[i % 4]}")
    return top


def from_folder(**changes: object) -> data.Dataset:
    return digits(**{"dataset": "folder", "root": "images", "val_fraction": 0.2} | changes)


def caches(checkout: Path) -> list[Path]:
    return sorted((checkout / "build" / "cache").iterdir())


def refused(action: Callable[[], object], *parts: str) -> None:
    """The error is one line that holds all these parts."""
    with pytest.raises(InputError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# digits


def test_digits_are_split_into_500_test_images_and_a_tenth_of_the_rest_held_out():
    d = digits()
    assert (len(d.train), len(d.val), len(d.test)) == (1167, 130, 500)
    assert d.classes == tuple("0123456789")
    for split in (d.train, d.val, d.test):
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        assert split.images.shape == (len(split), 3, 8, 8)
        assert split.images.min() == 0
        assert split.images.max() == 255
        assert torch.equal(split.images[:, 0], split.images[:, 1])


def test_digits_hold_the_scans_of_scikit_learn_each_exactly_once():
    from sklearn.datasets import load_digits

    d = digits()
    ours = torch.cat([s.images[:, 0].flatten(1) for s in (d.train, d.val, d.test)]).double() * 16 / 255
    labels = torch.cat([s.labels for s in (d.train, d.val, d.test)])
    pixels, target = load_digits(return_X_y=True)
    found = torch.cat([ours.round().int(), labels[:, None]], 1).tolist()
    assert sorted(found) == sorted([*map(int, row), int(label)] for row, label in zip(pixels, target, strict=True))


def test_every_split_holds_each_class_by_its_share():
    d = digits()
    everything = sum(torch.bincount(s.labels) for s in (d.train, d.val, d.test))
    for split in (d.train, d.val, d.test):
        share = everything * len(split) / 1797
        assert (torch.bincount(split.labels) - share).abs().max() < 1.2  # twice rounded: the test split, then val


def test_the_test_split_is_the_same_one_for_every_parameter_and_for_ever():
    reference = digits().test
    for changes in ({"split_seed": 7}, {"val_fraction": 0.3}, {"limit": 100}):
        other = digits(**changes).test
        assert torch.equal(other.images, reference.images)
        assert torch.equal(other.labels, reference.labels)
    # Accuracies of other days are of this very split: if this changes, no result can be compared with an older one.
    assert hashlib.sha256(reference.images.numpy().tobytes()).hexdigest()[:16] == "0e7d6e34c27d9eff"


def test_over_the_seeds_every_image_is_tested_once_in_folds_that_hold_each_class_by_its_share():
    folds = [digits(seed, folds=4) for seed in range(4)]
    ids = torch.cat([d.test_ids for d in folds])
    assert ids.sort().values.tolist() == list(range(1797))
    pixels = digits(limit=None)
    whole = torch.cat([x.images for x in (pixels.train, pixels.val, pixels.test)]).flatten(1)
    for d in folds:
        assert len(d.test) in (449, 450)
        assert (
            torch.bincount(d.test.labels) - torch.bincount(torch.cat([f.test.labels for f in folds])) / 4
        ).abs().max() < 1
        learnt = torch.cat([d.train.images, d.val.images]).flatten(1)
        assert len(learnt) + len(d.test) == len(whole)
    assert torch.equal(digits(5, folds=4).test_ids, folds[1].test_ids)
    assert torch.equal(digits(5).test.images, digits().test.images), "without folds the seed chooses nothing"


def test_the_same_parameters_give_the_same_splits_and_another_seed_gives_others():
    first, again, other = digits(limit=200), digits(limit=200), digits(limit=200, split_seed=1)
    for name in ("train", "val"):
        assert torch.equal(getattr(first, name).images, getattr(again, name).images)
        assert not torch.equal(getattr(first, name).images, getattr(other, name).images)
    assert (first.mean, first.std) == (again.mean, again.std)


def test_limit_takes_a_stratified_part_of_the_training_images_and_leaves_the_validation_split():
    whole, part = digits(), digits(limit=128)
    assert len(part.train) == 128
    assert set(torch.bincount(part.train.labels).tolist()) <= {12, 13, 14}
    assert torch.equal(part.val.images, whole.val.images)
    rows = {image.numpy().tobytes() for image in whole.train.images}
    assert {image.numpy().tobytes() for image in part.train.images} <= rows
    assert torch.equal(digits(limit=1167).train.images, whole.train.images), "all there are"


def test_digits_of_another_size_are_those_that_pillow_resizes():
    small, large = digits(), digits(img_size=16)
    assert large.train.images.shape == (1167, 3, 16, 16)
    scan = Image.fromarray(small.train.images[5, 0].numpy())
    expected = np.asarray(scan.convert("RGB").resize((16, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(large.train.images[5].numpy(), expected.transpose(2, 0, 1))


def test_mean_and_std_are_those_of_the_training_split_alone():
    for d in (digits(), digits(limit=50)):
        x = d.train.images.double() / 255
        assert d.mean == pytest.approx(x.mean((0, 2, 3)).tolist(), rel=1e-12)
        assert d.std == pytest.approx(x.std((0, 2, 3), correction=0).tolist(), rel=1e-12)
        assert all(type(value) is float for value in (*d.mean, *d.std))
    assert digits().mean != digits(limit=50).mean


# folder


def test_a_folder_gives_its_images_with_the_classes_and_files_sorted_by_name(folder: Path):
    d = from_folder()
    assert d.classes == ("cat", "dog")
    assert (len(d.train), len(d.val), len(d.test)) == (16, 4, 4)
    assert torch.bincount(d.train.labels).tolist() == [8, 8]
    assert torch.bincount(d.val.labels).tolist() == [2, 2]
    assert d.test.labels.tolist() == [0, 0, 1, 1]
    files = [folder / "test" / name / file for name in ("cat", "dog") for file in ("0.png", "1.jpg")]
    for image, file in zip(d.test.images, files, strict=True):
        assert np.array_equal(image.numpy(), np.asarray(Image.open(file).convert("RGB")).transpose(2, 0, 1))


def test_the_second_load_reads_the_cache_and_no_image(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    first = from_folder()

    def refuse(*args: object) -> None:
        raise AssertionError("an image was opened")

    monkeypatch.setattr(Image, "open", refuse)
    second = from_folder()
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.test.images, second.test.images)
    assert len(caches(folder.parent)) == 1
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "tested", "size"),
    [
        pytest.param(lambda file: photograph(99, (9, 9)).save(file), 4, 8, id="content"),
        pytest.param(lambda file: os.utime(file, ns=(1, 1)), 4, 8, id="time"),
        pytest.param(lambda file: file.rename(file.with_name("5.png")), 4, 8, id="name"),
        pytest.param(lambda file: photograph(99).save(file.with_name("6.png")), 5, 8, id="more"),
        pytest.param(lambda file: None, 4, 10, id="img_size"),
    ],
)
def test_a_changed_folder_is_decoded_anew(folder: Path, change: Callable[[Path], object], tested: int, size: int):
    from_folder()
    change(folder / "test" / "cat" / "0.png")
    d = from_folder(img_size=size)
    assert len(caches(folder.parent)) == 2
    assert d.test.images.shape == (tested, 3, size, size)


def foreign(path: Path) -> None:
    save_file({"images": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, path)


def one_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


def other_name(path: Path) -> None:
    images = load_file(path)["images"]
    save_file({"pictures": images}, path, metadata={"crc32": str(zlib.crc32(images.numpy().data))})


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-100]), id="truncated"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_bytes(b"not a tensor" * 50), id="nonsense"),
        pytest.param(one_bit, id="one bit"),
        pytest.param(foreign, id="foreign"),
        pytest.param(other_name, id="other name"),
    ],
)
def test_a_damaged_cache_is_rebuilt_with_a_warning_of_one_line(
    folder: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
):
    first = from_folder()
    (cache,) = caches(folder.parent)
    whole = cache.read_bytes()
    damage(cache)
    assert cache.read_bytes() != whole
    second = from_folder()
    assert torch.equal(first.train.images, second.train.images)
    assert caches(folder.parent) == [cache]
    assert cache.read_bytes() == whole
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert cache.name in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_cache_that_cannot_be_written_is_an_error_that_names_it_and_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(from_folder, "build/cache/images-8px-", "No space left on device")
    assert caches(folder.parent) == []


def test_the_root_is_found_from_a_folder_below_it_and_may_be_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch):
    here = from_folder()
    (folder.parent / "notebooks").mkdir()
    monkeypatch.chdir(folder.parent / "notebooks")
    assert torch.equal(from_folder().train.images, here.train.images)
    assert torch.equal(from_folder(root=str(folder)).train.images, here.train.images)
    assert len(caches(folder.parent)) == 1


@pytest.mark.parametrize(
    ("mode", "pixel", "colour"),
    [
        ("1", 1, [255, 255, 255]),
        ("L", 77, [77, 77, 77]),
        ("LA", (77, 30), [77, 77, 77]),
        ("RGBA", (200, 30, 10, 128), [200, 30, 10]),
        ("P", 1, [200, 30, 10]),
        ("P, transparent", 1, [200, 30, 10]),
    ],
)
def test_grey_palette_and_transparent_images_become_rgb(folder: Path, mode: str, pixel: object, colour: list[int]):
    image = Image.new(mode.split(",")[0], (8, 8), pixel)
    if image.mode == "P":
        image.putpalette([0, 0, 0, 200, 30, 10])
    if "transparent" in mode:
        image.info["transparency"] = bytes([255, 128])
    image.save(folder / "test" / "cat" / "0.png")
    assert from_folder().test.images[0].flatten(1).unique(dim=1).flatten().tolist() == colour


@pytest.mark.parametrize(("size", "box"), [((40, 16), (12, 0, 28, 16)), ((16, 40), (0, 12, 16, 28)), ((16, 16), None)])
def test_larger_images_are_resized_by_the_shorter_side_and_cropped_at_the_centre(
    folder: Path, size: tuple[int, int], box: tuple[int, int, int, int] | None
):
    image = photograph(5, size)
    image.save(folder / "test" / "cat" / "0.png")
    got = from_folder().test.images[0].int()
    # Cropping first differs from cropping last where the filter looks over the edge, and by rounding.
    square = image.crop(box) if box else image
    expected = np.asarray(square.resize((8, 8), Image.Resampling.BICUBIC)).transpose(2, 0, 1).astype(int)
    assert (got - torch.from_numpy(expected)).abs().max() <= 6
    assert (got - torch.from_numpy(expected))[:, 2:-2, 2:-2].abs().max() <= 1


def test_hidden_files_are_passed_over(folder: Path):
    (folder / "train" / "cat" / ".DS_Store").write_bytes(b"x")
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    assert from_folder().classes == ("cat", "dog")


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-30])


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (shutil.rmtree, ("data.root", "images", "no such folder")),
        (lambda top: shutil.rmtree(top / "train"), ("images/train", "train/<class>/ and test/<class>/")),
        (lambda top: shutil.rmtree(top / "test"), ("images/test", "train/<class>/ and test/<class>/")),
        (lambda top: empty(top / "train"), ("images/train", "no class folders")),
        (lambda top: empty(top / "train" / "dog"), ("images/train/dog", "no image files")),
        (lambda top: empty(top / "test" / "cat"), ("images/test/cat", "no image files")),
        (lambda top: shutil.rmtree(top / "test" / "cat"), ("'cat'", "train/ only")),
        (lambda top: shutil.rmtree(top / "train" / "dog"), ("'dog'", "test/ only")),
        (lambda top: (top / "train" / "list.txt").write_text("x"), ("train/list.txt", "only class folders")),
        (lambda top: (top / "train" / "cat" / "more").mkdir(), ("train/cat/more", "only image files")),
        (lambda top: (top / "train" / "cat" / "a.txt").write_text("x"), ("train/cat/a.txt", "no known format")),
        (lambda top: (top / "train" / "cat" / "a.png").touch(), ("train/cat/a.png", "no known format")),
        (lambda top: truncate(top / "train" / "cat" / "0.png"), ("train/cat/0.png", "not a whole image")),
        (lambda top: truncate(top / "train" / "dog" / "1.jpg"), ("train/dog/1.jpg", "truncated")),
        (lambda top: truncate(top / "train" / "dog" / "2.bmp"), ("train/dog/2.bmp", "not a whole image")),
        (lambda top: (top / "test" / "cat" / "9").symlink_to("nowhere"), ("test/cat/9", "only image files")),
        (lambda top: (top / "test" / "cat" / "9").symlink_to("9"), ("test/cat/9", "symbolic links")),
        (lambda top: (top / "test" / "cat" / "9").symlink_to("/dev/zero"), ("test/cat/9", "only image files")),
        (lambda top: os.mkfifo(top / "test" / "cat" / "9"), ("test/cat/9", "only image files")),
        (lambda top: (top / "test" / "cat" / "\x1b9\n.png").touch(), (r"test/cat/\x1b9\n.png", "no known format")),
        (lambda top: (top / "test" / "cat" / "9.png").write_bytes(png_48_bit()), ("test/cat/9.png", "8 bits")),
        (
            lambda top: Image.new("I;16", (8, 8), 999).save(top / "test" / "cat" / "9.png"),
            ("test/cat/9.png", "8 bits"),
        ),
    ],
)
def test_a_folder_that_is_not_laid_out_right_is_an_error_of_one_line_and_caches_nothing(
    folder: Path, spoil: Callable[[Path], object], parts: tuple[str, ...]
):
    spoil(folder)
    refused(from_folder, *parts)
    assert not (folder.parent / "build").exists()


def test_a_folder_that_may_not_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def denied(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", denied)
    refused(from_folder, f"{folder / 'train'}: cannot be read (Permission denied)")


def test_a_pipe_is_not_waited_for_wherever_its_path_comes_from(checkout: Path):
    os.mkfifo(checkout / "pipe")
    table = pa.table({"image": [{"bytes": None, "path": str(checkout / "pipe")}]})
    for images in (Files([str(checkout / "pipe")]), Cells(SimpleNamespace(data=table), "image", "set")):
        with pytest.raises(InputError, match="no regular file there"):
            pixels(images, 0, 8)


def test_an_image_is_turned_as_its_exif_data_says(checkout: Path):
    image = photograph(3, (12, 8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees clockwise
    image.save(checkout / "held.png", exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(checkout / "turned.png")
    assert torch.equal(data.read_image("held.png", 8), data.read_image("turned.png", 8))


def test_of_several_broken_images_the_first_is_named(folder: Path):
    for i in range(10):
        for name in ("dog", "cat"):
            (folder / "train" / name / f"{i}.{('png', 'jpg', 'bmp', 'gif')[i % 4]}").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"train/cat/0\.png"):
        from_folder()


# what the parameters may ask for


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"dataset": "cifar11"}, ("data.dataset", "'cifar11'", "digits, folder")),
        ({"dataset": "folder"}, ("data.root", "null")),
        ({"dataset": "folder", "root": "nowhere"}, ("data.root", "nowhere")),
        ({"limit": 1168}, ("data.limit", "1168", "1167")),
        ({"limit": 9}, ("data.limit 9", "training image")),
        ({"val_fraction": 0.001}, ("data.val_fraction 0.001", "validation image")),
        ({"val_fraction": 1e-9}, ("data.val_fraction 1e-09", "validation image")),
        ({"val_fraction": 0.9999}, ("data.val_fraction 0.9999", "training image")),
        ({"shift": 8}, ("data.shift", "8", "data.img_size")),
    ],
)
def test_what_cannot_be_had_is_an_error_of_one_line(checkout: Path, changes: dict[str, object], parts: tuple[str, ...]):
    refused(lambda: digits(**changes), *parts)


def test_images_without_any_contrast_are_an_error(folder: Path):
    for file in (folder / "train").rglob("*.*"):
        Image.new("RGB", (8, 8), (5, 6, 7)).save(file.with_suffix(".png"))
        if file.suffix != ".png":
            file.unlink()
    with pytest.raises(InputError, match="channel 0"):
        from_folder()


def test_every_profile_of_the_repository_names_a_known_dataset():
    for profile in config.load(strategy="none").profile, "smoke":
        assert config.load(profile, strategy="none").data.dataset in data.DATASETS


# batches


def numbered(n: int) -> data.Split:
    labels = torch.arange(n)
    return data.Split(labels.to(torch.uint8)[:, None, None, None].expand(n, 3, 2, 2).contiguous(), labels)


@given(n=st.integers(1, 40), batch_size=st.integers(1, 50), drop_last=st.booleans(), seed=st.none() | st.integers(0, 9))
@settings(deadline=None)
def test_batches_hold_every_image_once_beside_its_own_label(n: int, batch_size: int, drop_last: bool, seed: int | None):
    split = numbered(n)
    if drop_last and batch_size > n:
        with pytest.raises(InputError, match="batch_size"):
            data.batches(split, batch_size, drop_last=True)
        return
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    got = list(data.batches(split, batch_size, generator=generator, drop_last=drop_last))
    assert all(torch.equal(images[:, 0, 0, 0].long(), labels) for images, labels in got)
    sizes = [len(labels) for _, labels in got]
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
    seen = torch.cat([labels for _, labels in got]).tolist()
    if drop_last:
        assert sizes[-1] == batch_size
        assert len(seen) == n - n % batch_size
        assert len(set(seen)) == len(seen)
    else:
        assert sorted(seen) == list(range(n))
    if seed is None:
        assert seen == list(range(len(seen)))


def test_the_order_follows_from_the_generator_and_differs_from_pass_to_pass():
    def order(generator: torch.Generator) -> list[int]:
        return torch.cat([labels for _, labels in data.batches(numbered(50), 7, generator=generator)]).tolist()

    generator, twin = (torch.Generator().manual_seed(3) for _ in range(2))
    first, second = order(generator), order(generator)
    assert first != second
    assert first != list(range(50))
    assert [first, second] == [order(twin), order(twin)]


def test_a_batch_size_below_one_is_refused_when_it_is_asked_for():
    with pytest.raises(InputError, match="batch_size: 0"):
        data.batches(numbered(3), 0)


# normalise and augment


def test_normalise_by_hand():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8)[None, :, None, None]
    got = data.normalise(images, (0.5, 0.2, 0.0), (0.5, 0.1, 0.25))
    torch.testing.assert_close(got.flatten(), torch.tensor([-1.0, 0.0, 4.0]), atol=1e-6, rtol=0)


def test_one_image_is_read_from_a_file_or_an_array_as_a_folder_reads_it(folder: Path):
    path = folder / "train" / "cat" / "0.png"
    loaded = data.load(DataParams(**{**DIGITS, "dataset": "folder", "root": str(folder)}))
    read = data.read_image(path, 8)
    assert any(torch.equal(read, image) for image in torch.cat([loaded.train.images, loaded.val.images]))
    with Image.open(path) as image:
        pixels = np.asarray(image)
    assert torch.equal(data.read_image(pixels, 8), read)
    assert data.read_image(pixels[:5, :, 0], 8).shape == (3, 8, 8), "grey, and of another shape"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere.png", "nowhere.png: not a whole image that Pillow can read .no regular file there"),
        ("params.yaml", "params.yaml: not a whole image that Pillow can read"),
        (np.zeros((4, 4), np.float32), r"image: float32 of shape \(4, 4\); must be uint8 of \(h, w\) or \(h, w, 3\)"),
        (np.zeros((4, 4, 4), np.uint8), r"image: uint8 of shape \(4, 4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), r"image: uint8 of shape \(0, 4, 3\)"),
    ],
)
def test_what_is_no_image_is_refused_by_name(checkout: Path, source: object, said: str):
    with pytest.raises(InputError, match=said):
        data.read_image(source, 8)

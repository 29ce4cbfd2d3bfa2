import functools
import hashlib
import os
import shutil
import struct
import threading
from base64 import b64decode
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from images import DIGITS, one_line, photograph
from PIL import ExifTags, Image, ImageOps
from safetensors.torch import save_file

from famba import data
from famba.data import splits
from famba.data.datasets import Cells, pixels
from famba.errors import InputError
from famba.params import DataParams


def load(seed: int = 0, **changes: object) -> data.Dataset:
    return data.load(DataParams(**{**DIGITS, **changes}), seed=seed)


digits = functools.cache(load)


# A pixel of 16 bits per channel, which Pillow cannot write.
PNG_48_BIT = b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABEAIAAADA54+dAAAAC0lEQVR4nGNgAAMAAAcAAbKGrPQAAAAASUVORK5CYII=")
JPEG = "train/dog/1.jpg"


def from_folder(**changes: object) -> data.Dataset:
    return load(**{"dataset": "folder", "root": "images", "val_fraction": 0.2} | changes)


def caches(repository: Path) -> list[Path]:
    return sorted((repository / "build" / "cache").iterdir())


# digits


def test_digits_are_scikit_learns_500_for_testing_and_a_tenth_of_the_rest_held_out():
    from sklearn.datasets import load_digits

    d = digits()
    splits = (d.train, d.val, d.test)
    assert [len(split) for split in splits] == [1167, 130, 500]
    assert d.classes == tuple("0123456789")
    images, labels = torch.cat([x.images for x in splits]), torch.cat([x.labels for x in splits])
    assert torch.equal(images, images[:, :1].expand(-1, 3, 8, 8))
    scans = (images[:, 0].flatten(1).double() * 16 / 255).round()
    found, expected = torch.cat([scans, labels[:, None]], 1), np.column_stack(load_digits(return_X_y=True))
    assert sorted(found.tolist()) == sorted(expected.tolist())
    for split in splits:  # each class by its share, twice rounded: the test split, then val
        share = torch.bincount(labels) * len(split) / 1797
        assert (torch.bincount(split.labels) - share).abs().max() < 1.2


def test_the_test_split_is_the_same_one_for_every_parameter_and_for_ever():
    reference = digits().test
    for changes in ({"split_seed": 7}, {"val_fraction": 0.3}, {"limit": 100}):
        assert torch.equal(digits(**changes).test.images, reference.images)
    # Accuracies of other days are of this very split: if this changes, no result can be compared with an older one.
    assert hashlib.sha256(reference.images.numpy().tobytes()).hexdigest()[:16] == "0e7d6e34c27d9eff"


def test_over_the_seeds_every_image_is_tested_once_in_folds_that_hold_each_class_by_its_share():
    folds = [digits(seed, folds=4) for seed in range(4)]
    assert torch.cat([d.test_ids for d in folds]).sort().values.tolist() == list(range(1797))
    share = torch.bincount(torch.cat([d.test.labels for d in folds])) / 4
    for d in folds:
        assert (torch.bincount(d.test.labels) - share).abs().max() < 1
        assert len(d.train) + len(d.val) + len(d.test) == 1797
    assert torch.equal(digits(5, folds=4).test_ids, folds[1].test_ids)
    assert torch.equal(digits(5).test.images, digits().test.images), "without folds the seed chooses nothing"


def test_the_same_parameters_give_the_same_splits_and_another_seed_gives_others():
    first, again, other = load(limit=200), load(limit=200), load(limit=200, split_seed=1)
    for name in ("train", "val"):
        assert torch.equal(getattr(first, name).images, getattr(again, name).images)
        assert not torch.equal(getattr(first, name).images, getattr(other, name).images)


def test_limit_takes_a_stratified_part_of_the_training_images_and_leaves_the_validation_split():
    whole, part = digits(), digits(limit=128)
    assert len(part.train) == 128
    assert set(torch.bincount(part.train.labels).tolist()) <= {12, 13, 14}
    assert torch.equal(part.val.images, whole.val.images)
    assert torch.equal(digits(limit=1167).train.images, whole.train.images), "a limit of all changes nothing"
    rows = {image.numpy().tobytes() for image in whole.train.images}
    assert {image.numpy().tobytes() for image in part.train.images} <= rows


def test_mean_and_std_are_those_of_the_training_split_alone():
    for d in (digits(), digits(limit=50)):
        x = d.train.images.double() / 255
        assert d.mean == pytest.approx(x.mean((0, 2, 3)).tolist(), rel=1e-12)
        assert d.std == pytest.approx(x.std((0, 2, 3), correction=0).tolist(), rel=1e-12)
    assert digits().mean != digits(limit=50).mean


# folder


def test_a_folder_gives_its_images_with_the_classes_and_files_sorted_by_name(folder):
    d = from_folder()
    assert d.classes == ("cat", "dog")
    assert (len(d.train), len(d.val), len(d.test)) == (16, 4, 4)
    assert d.test.labels.tolist() == [0, 0, 1, 1]
    files = [folder / "test" / name / file for name in ("cat", "dog") for file in ("0.png", "1.jpg")]
    for image, file in zip(d.test.images, files, strict=True):
        assert np.array_equal(image.numpy(), np.asarray(Image.open(file).convert("RGB")).transpose(2, 0, 1))


def test_the_second_load_reads_the_cache_and_no_image(folder, monkeypatch, caplog):
    first = from_folder()
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("an image was opened"))
    second = from_folder()
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.test.images, second.test.images)
    assert len(caches(folder.parent)) == 1
    assert not caplog.records


def test_a_changed_folder_and_another_size_are_decoded_anew(folder):
    from_folder()
    file = folder / "test" / "cat" / "0.png"
    os.utime(file, ns=(1, 1))
    from_folder()
    file.rename(file.with_name("5.png"))
    from_folder()
    assert from_folder(img_size=10).test.images.shape == (4, 3, 10, 10)
    assert len(caches(folder.parent)) == 4


def foreign(path: Path) -> None:
    save_file({"images": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, path)


def one_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-100]), id="truncated"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(one_bit, id="one bit"),
        pytest.param(foreign, id="foreign"),
    ],
)
def test_a_damaged_cache_is_rebuilt_with_a_warning_of_one_line(folder, damage, caplog):
    first = from_folder()
    (cache,) = caches(folder.parent)
    whole = cache.read_bytes()
    damage(cache)
    assert torch.equal(first.train.images, from_folder().train.images)
    assert caches(folder.parent) == [cache]
    assert cache.read_bytes() == whole
    (record,) = caplog.records
    assert f"{cache.name}: damaged (" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_the_root_is_found_from_a_folder_below_it_and_may_be_absolute(folder, monkeypatch):
    (folder.parent / "notebooks").mkdir()
    monkeypatch.chdir(folder.parent / "notebooks")
    for root in ("images", str(folder)):
        assert from_folder(root=root).classes == ("cat", "dog")
    assert len(caches(folder.parent)) == 1


def test_grey_palette_and_transparent_images_become_rgb(repository):
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 200, 30, 10])
    palette.info["transparency"] = bytes([255, 128])
    grey, colours = Image.new("LA", (8, 8), (77, 30)), Image.new("RGBA", (8, 8), (200, 30, 10, 128))
    for image, colour in ((palette, [200, 30, 10]), (grey, [77, 77, 77]), (colours, [200, 30, 10])):
        image.save("it.png")
        assert data.read_image("it.png", 8).flatten(1).unique(dim=1).flatten().tolist() == colour


def test_hidden_files_are_passed_over(folder):
    (folder / "train" / "cat" / ".DS_Store").write_bytes(b"x")
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    assert from_folder().classes == ("cat", "dog")


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (lambda top: shutil.rmtree(top / "train"), ("images/train", "train/<class>/ and test/<class>/")),
        (lambda top: empty(top / "train"), ("images/train", "no class folders")),
        (lambda top: empty(top / "train" / "dog"), ("images/train/dog", "no image files")),
        (lambda top: shutil.rmtree(top / "test" / "cat"), ("'cat'", "train/ only")),
        (lambda top: shutil.rmtree(top / "train" / "dog"), ("'dog'", "test/ only")),
        (lambda top: (top / "train" / "list.txt").write_text("x"), ("train/list.txt", "only class folders")),
        (lambda top: (top / "train" / "cat" / "more").mkdir(), ("train/cat/more", "only image files")),
        (lambda top: (top / JPEG).write_bytes((top / JPEG).read_bytes()[:-30]), (JPEG, "not a whole", "truncated")),
        (lambda top: (top / "test" / "cat" / "9").symlink_to("9"), ("test/cat/9", "symbolic links")),
        (lambda top: os.mkfifo(top / "test" / "cat" / "9"), ("test/cat/9", "only image files")),
        (lambda top: (top / "test" / "cat" / "\x1b9\n.png").touch(), (r"test/cat/\x1b9\n.png", "no known format")),
        (lambda top: (top / "test" / "cat" / "9.png").write_bytes(PNG_48_BIT), ("test/cat/9.png", "8 bits")),
        (lambda top: Image.new("I;16", (8, 8), 999).save(top / "test" / "cat" / "9.png"), ("test/cat/9.png", "8 bits")),
    ],
)
def test_a_folder_that_is_not_laid_out_right_is_an_error_of_one_line_and_caches_nothing(folder, spoil, parts):
    spoil(folder)
    one_line(from_folder, *parts)
    assert not (folder.parent / "build").exists()


def test_a_pipe_that_a_parquet_file_names_is_not_waited_for(repository):
    os.mkfifo(repository / "pipe")
    table = pa.table({"image": [{"bytes": None, "path": str(repository / "pipe")}]})
    with pytest.raises(InputError, match="no regular file there"):
        pixels(Cells(SimpleNamespace(data=table), "image", "set"), 0, 8)


def test_an_image_is_turned_as_its_exif_data_says(repository):
    image = photograph(3, (12, 8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees clockwise
    image.save(repository / "held.png", exif=exif)
    image.save(repository / "held.tif", exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(repository / "turned.png")
    for name in ("held.png", "held.tif"):
        assert torch.equal(data.read_image(name, 8), data.read_image("turned.png", 8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_data_that_is_malformed_besides_still_turns_the_image(repository, orientation):
    image = photograph(3, (12, 8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(repository / "whole.png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(repository / "whole.png"))
    resolution = struct.pack("<HHI4s", ExifTags.Base.XResolution, 2, 4, b"abc\0")  # a text where a ratio belongs
    entries = struct.pack("<HHIHH", ExifTags.Base.Orientation, 3, 1, orientation, 0) + resolution
    image.save(repository / "held.png", exif=b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4))
    expected.save(repository / "turned.png", exif=b"")
    assert torch.equal(data.read_image("held.png", 8), data.read_image("turned.png", 8))


def test_of_several_broken_images_the_first_is_named(folder, monkeypatch):
    monkeypatch.setattr(splits, "_DECODED", 1)
    for file in (folder / "train").rglob("*.*"):
        file.write_bytes(b"broken")
    with pytest.raises(InputError, match=r"train/cat/0\.png"):
        from_folder()


def test_a_small_set_is_decoded_by_several_threads(folder, monkeypatch):
    together, decode = threading.Barrier(2, timeout=60), splits.datasets.pixels

    def pixels(images, i, *how):
        if i in (0, 23):  # the first and the last; in one thread they would never meet
            together.wait()
        return decode(images, i, *how)

    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(splits.datasets, "pixels", pixels)
    assert len(from_folder().test) == 4


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
        ({"shift": 8}, ("data.shift", "8", "data.img_size")),
    ],
)
def test_what_cannot_be_had_is_an_error_of_one_line(repository, changes, parts):
    one_line(lambda: digits(**changes), *parts)


def test_images_without_any_contrast_are_an_error(folder):
    for file in (folder / "train").rglob("*.*"):
        Image.new("RGB", (8, 8)).save(file)
    with pytest.raises(InputError, match="channel 0"):
        from_folder()


# batches


def numbered(n: int) -> data.Split:
    labels = torch.arange(n)
    return data.Split(labels.to(torch.uint8)[:, None, None, None].expand(n, 3, 2, 2).contiguous(), labels)


@given(n=st.integers(1, 40), batch_size=st.integers(1, 50), drop_last=st.booleans(), seed=st.none() | st.integers(0, 9))
def test_batches_hold_every_image_once_beside_its_own_label(n, batch_size, drop_last, seed):
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
    assert len(set(seen)) == len(seen) == (n - n % batch_size if drop_last else n)
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


def test_one_image_is_read_from_a_file_or_an_array_as_a_folder_reads_it(folder):
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
        (np.zeros((4, 4), np.float32), r"image: float32 of shape \(4, 4\); must be uint8 of \(h, w\) or \(h, w, 3\)"),
        (np.zeros((4, 4, 4), np.uint8), r"image: uint8 of shape \(4, 4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), r"image: uint8 of shape \(0, 4, 3\)"),
    ],
)
def test_what_is_no_image_is_refused_by_name(repository, source, said):
    with pytest.raises(InputError, match=said):
        data.read_image(source, 8)

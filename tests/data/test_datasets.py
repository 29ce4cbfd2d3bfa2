import io
import json
import os
import sys
from pathlib import Path
from unittest.mock import Mock

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from images import DIGITS, one_line, photograph
from PIL import Image
from pyarrow import parquet

from famba import data
from famba.data import datasets as sources
from famba.params import DataParams

COLUMNS = {"img": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write(path, labels, *, seed=0, columns=COLUMNS, images=None):
    """A parquet file as the hub has them: encoded images, integers, and in the metadata what they are."""
    n = len(next(iter(labels.values())))
    encoded = [png(photograph(seed + i)) for i in range(n)] if images is None else images
    cells = [None if image is None else {"bytes": image, "path": f"{i}.png"} for i, image in enumerate(encoded)]
    kinds = {"img": pa.struct([("bytes", pa.binary()), ("path", pa.string())])} | dict.fromkeys(labels, pa.int64())
    table = pa.table({"img": cells, **labels}, schema=pa.schema(list(kinds.items())))
    if columns:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": columns}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path)


FIRST, SECOND = (f"plain_text/train-0000{i}-of-00002.parquet" for i in range(2))
TEST = "plain_text/test-00000-of-00001.parquet"


@pytest.fixture
def copied(repository: Path) -> Path:
    """A copy of a set of the hub: 20 training and 6 test images of two classes, the training ones in two files."""
    top = repository / "copied"
    write(top / FIRST, {"label": [0, 1] * 5})
    write(top / SECOND, {"label": [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]}, seed=10)
    write(top / TEST, {"label": [1, 0, 0, 1, 0, 1]}, seed=20)
    (top / "README.md").write_text("---\n")
    return top


def load(**changes: object) -> data.Dataset:
    return data.load(DataParams(**{**DIGITS, "dataset": "parquet", "root": "copied", "val_fraction": 0.2} | changes))


def find(**changes: object) -> sources.Found:
    return sources.find(DataParams(**{**DIGITS, "dataset": "parquet", "root": "copied"} | changes))


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


# parquet


@pytest.mark.parametrize("dataset", ["parquet", "cifar10", "hub:someone/something"])
def test_a_copy_of_a_set_gives_its_images_file_by_file_with_their_classes(copied, dataset):
    found = find(dataset=dataset)
    assert found.classes == ("cat", "dog")
    assert found.labels.tolist() == [0, 1] * 5 + [1] * 5 + [0] * 5 + [1, 0, 0, 1, 0, 1]
    assert found.test.tolist() == [False] * 20 + [True] * 6
    for i in range(26):
        assert np.array_equal(sources.pixels(found.images, i, 8), np.asarray(photograph(i)).transpose(2, 0, 1))
    d = load(dataset=dataset)
    assert (len(d.train), len(d.val), len(d.test)) == (16, 4, 6)
    assert torch.equal(d.test.images[4], as_tensor(photograph(24)))
    assert d.test.labels.tolist() == [1, 0, 0, 1, 0, 1]


def test_parquet_files_may_lie_in_the_folder_itself(copied):
    for file in (copied / "plain_text").iterdir():
        file.rename(copied / file.name)
    assert len(load().test) == 6


def test_of_cifar_100_the_fine_label_is_taken_and_others_must_leave_no_choice(copied):
    columns = {
        "img": {"_type": "Image"},
        "fine_label": {"names": ["beaver", "bee", "rose"], "_type": "ClassLabel"},
        "coarse_label": {"names": ["animal", "plant"], "_type": "ClassLabel"},
    }
    for file in (copied / "plain_text").iterdir():
        write(file, {"fine_label": [0, 1, 2] * 5, "coarse_label": [0, 0, 1] * 5}, columns=columns)
    assert find(dataset="cifar100").classes == ("beaver", "bee", "rose")
    one_line(
        lambda: find(dataset="hub:uoft-cs/cifar100"), "['fine_label', 'coarse_label']", "exactly one class label column"
    )
    one_line(lambda: find(dataset="cifar10"), "class label column 'label' is needed", "fine_label")


def test_the_second_load_of_a_copy_decodes_nothing_and_a_changed_one_is_decoded_anew(copied, monkeypatch):
    first = load()
    with monkeypatch.context() as patch:
        patch.setattr(sources.Cells, "open", lambda self, i: pytest.fail("decoded again"))
        assert torch.equal(load().train.images, first.train.images)
    write(copied / TEST, {"label": [1, 0]}, seed=70)
    assert torch.equal(load().test.images, torch.stack([as_tensor(photograph(seed)) for seed in (70, 71)]))


def test_a_copy_that_is_a_folder_of_images_is_read_as_one(folder):
    assert load(dataset="cifar10", root="images").classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (lambda top: (top / FIRST).write_bytes((top / FIRST).read_bytes()[:-20]), (FIRST, "not a whole parquet file")),
        (lambda top: os.mkfifo(top / "plain_text" / "test-1.parquet"), ("test-1.parquet: not a", "no regular file")),
        (lambda top: (top / TEST).unlink(), ("its splits are train;", "train, and test or validation")),
        (lambda top: write(top / "other" / "train-0.parquet", {"label": [0]}), ("other, plain_text", "one folder")),
        (lambda top: write(top / TEST, {"label": [0, None]}), ("row 1 of test has no class",)),
        (lambda top: write(top / TEST, {"label": [0, -1]}), ("row 1 of test has no class", "one of 2")),
        (lambda top: write(top / TEST, {"kind": [0]}, columns=None), ("copied", "cannot be loaded")),
        (lambda top: write(top / TEST, {"label": [0]}, images=[b"GIF"]), ("plain_text: row 20", "not a whole image")),
        (lambda top: write(top / TEST, {"label": [0]}, images=[None]), ("row 20", "no image in this row")),
    ],
)
def test_a_copy_that_is_not_whole_is_an_error_of_one_line(copied, spoil, parts):
    spoil(copied)
    one_line(load, *parts)


def test_integers_without_names_are_no_classes(copied):
    for file in (copied / "plain_text").iterdir():
        write(file, {"label": [0, 1]}, columns=None)
    one_line(find, "its class label columns are none of ['img', 'label']", "exactly one class label column")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"root": None}, ("data.root: null", "'parquet'", "train-*.parquet")),
        ({"root": "empty"}, ("empty", "no parquet files")),
        ({"root": "empty", "dataset": "cifar10"}, ("no copy of uoft-cs/cifar10", "train-*.parquet", "train/<class>/")),
        ({"dataset": "hub:cifar10"}, ("'hub:cifar10': must be one of digits, folder", "hub:<owner>/<name>")),
        ({"dataset": "hub:a/b/c"}, ("'hub:a/b/c'",)),
        ({"dataset": "hub:/b"}, ("'hub:/b'",)),
    ],
)
def test_what_cannot_be_found_is_an_error_of_one_line(copied, changes, parts):
    (copied.parent / "empty").mkdir()
    one_line(lambda: find(**changes), *parts)


# the hub


def test_out_of_reach_of_the_hub_the_error_says_what_to_download_and_where_to_put_it():
    one_line(
        lambda: find(dataset="hub:nobody-here/has-this-set", root=None),
        "data.dataset: 'hub:nobody-here/has-this-set': not in the cache, and the hub cannot be reached",
        "hf download --repo-type dataset nobody-here/has-this-set --local-dir DIR",
        "set data.root: DIR",
    )


def hub(monkeypatch: pytest.MonkeyPatch, answer: object) -> Mock:
    """Stand in for the hub, which is asked once; an exception is raised."""
    asked = Mock(side_effect=[answer])
    monkeypatch.setattr(datasets, "load_dataset", asked)
    return asked


def splits(top: Path, **names: str) -> datasets.DatasetDict:
    """The set in the folder under other names of its splits."""
    files = {"train": str(top / FIRST), "test": str(top / TEST)}
    with sources._quiet("a/b"):
        kept = datasets.load_dataset("parquet", data_files=files, cache_dir=str(top.parent / "build" / "other"))
    return datasets.DatasetDict({names.get(name, name): split for name, split in kept.items()})


@pytest.mark.parametrize(("dataset", "name"), [("cifar10", "uoft-cs/cifar10"), ("hub:a/b", "a/b")])
def test_the_hub_is_asked_for_a_set_by_its_name(copied, monkeypatch, dataset, name):
    asked = hub(monkeypatch, splits(copied))
    d = load(dataset=dataset, root=None)
    assert asked.call_args.args == (name,)
    assert (len(d.train), len(d.test)) == (8, 6)
    assert torch.equal(d.test.images[0], as_tensor(photograph(20)))
    (cached,) = (copied.parent / "build" / "cache").iterdir()
    assert cached.name.startswith(f"{name.replace('/', '--')}-8px-")


def test_a_copy_in_the_checkout_takes_the_place_of_the_hub(copied):
    (copied.parent / "data").mkdir()
    copied.rename(copied.parent / "data" / "cifar10")
    assert len(load(dataset="cifar10", root=None).train) == 16


def test_the_validation_split_serves_where_there_is_no_test_split(copied, monkeypatch):
    hub(monkeypatch, splits(copied, test="validation"))
    assert find(dataset="hub:a/b", root=None).labels[10:].tolist() == [1, 0, 0, 1, 0, 1]


def test_what_goes_wrong_with_the_hub_is_an_error_of_one_line(monkeypatch):
    hub(monkeypatch, datasets.exceptions.DatasetNotFoundError("no 'a/b'\non the Hub"))
    one_line(lambda: find(dataset="hub:a/b", root=None), "'hub:a/b'", "no such set", "on the Hub")
    hub(monkeypatch, ValueError("Config name is missing.\nPick one"))
    one_line(lambda: find(dataset="hub:a/b", root=None), "'hub:a/b'", "cannot be loaded (Config name is missing.")


def test_two_columns_of_images_are_named(copied, monkeypatch):
    both = splits(copied)
    second = {name: x.rename_column("img", "two").select_columns(["two"]) for name, x in both.items()}
    hub(monkeypatch, {name: datasets.concatenate_datasets([x, second[name]], axis=1) for name, x in both.items()})
    one_line(lambda: find(dataset="hub:a/b", root=None), "its image columns are ['img', 'two']", "exactly one image")


def test_without_the_package_the_error_says_what_to_install(copied, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    one_line(find, "datasets", "pip install 'famba[paper]'")


def test_the_librarys_bars_and_log_are_afterwards_as_they_were():
    before = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    with sources._quiet("a/b"):
        assert datasets.are_progress_bars_disabled()
        assert datasets.logging.get_verbosity() == datasets.logging.ERROR
    assert (datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()) == before

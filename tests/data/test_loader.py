"""Images that do not fit into memory: the same batches as if they did, and nothing of the workers is left behind."""

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import PATIENCE_S, is_there, wait_until
from test_splits import DIGITS, checkout, folder, refused  # noqa: F401 (fixtures)

from famba import config, data
from famba.config import DataParams
from famba.data import augment, splits
from famba.data.timm_transforms import TimmAugmentation
from famba.errors import FambaError

ROOT = Path(__file__).resolve().parents[2]
SIZE = 128  # pixels, of which 24 images take 1.1 MiB


def load(**changes: object) -> data.Dataset:
    asked = {"dataset": "folder", "root": "images", "img_size": SIZE, "val_fraction": 0.2, "shift": 0}
    return data.load(DataParams(**{**DIGITS, **asked, **changes}))


def streamed(**changes: object) -> data.Dataset:
    return load(memory_mib=1, **changes)


class Shade(TimmAugmentation):
    """Stands in for timm: as bright as the seed says. None of the global generators matters to it."""

    def __call__(self, images: Iterable[Image.Image], seeds: Sequence[int]) -> torch.Tensor:
        varied = torch.empty(len(seeds), 3, SIZE, SIZE)
        for out, image, seed in zip(varied, images, seeds, strict=True):
            pixels = np.asarray(image.resize((SIZE, SIZE))).transpose(2, 0, 1) / 255
            out.copy_(torch.from_numpy(pixels * random.Random(seed).random()))
        return varied


def varied(**changes: object) -> data.Streamed:
    split = streamed(**changes).train
    assert isinstance(split, data.Streamed)
    return dataclasses.replace(split, augmentation=Shade(DataParams(**DIGITS), (0.0,) * 3, (1.0,) * 3))


def epoch(split: data.Split | data.Streamed, seed: int | None = 0, size: int = 4, **options: object):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return list(data.batches(split, size, generator=generator, **options))


def same(one: list, other: list) -> bool:
    return len(one) == len(other) and all(
        torch.equal(x, y) for a, b in zip(one, other, strict=True) for x, y in zip(a, b, strict=True)
    )


def test_a_set_larger_than_the_memory_allowed_streams_and_a_smaller_one_does_not(folder: Path):  # noqa: F811
    for name in ("train", "val", "test"):
        assert isinstance(getattr(streamed(), name), data.Streamed)
        assert isinstance(getattr(load(memory_mib=2), name), data.Split)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_streamed_batches_are_those_of_the_same_images_in_memory(folder: Path, workers: int):  # noqa: F811
    kept, flowing = load(eval_crop=0.875), streamed(eval_crop=0.875, workers=workers)
    assert (kept.mean, kept.std) == (flowing.mean, flowing.std)
    assert same(epoch(kept.train), epoch(flowing.train))
    for name in ("train", "val", "test") if workers < 2 else ("test",):
        assert same(epoch(getattr(kept, name), None, 3), epoch(getattr(flowing, name), None, 3))
    assert not same(epoch(kept.train, 0), epoch(kept.train, 1))


def test_augmentation_on_tensors_is_the_same_for_both(folder: Path):  # noqa: F811
    def shown(d: data.Dataset) -> list:
        asked = DataParams(**{**DIGITS, "img_size": SIZE, "shift": 2, "flip": True, "erase": 0.5, "mixup": 0.8})
        generator, found = torch.Generator().manual_seed(0), []
        for images, labels in data.batches(d.train, 4, generator=generator):
            draws = augment.draw(asked, len(images), generator, classes=2)
            found.append(augment.apply(images, labels, draws, d.mean, d.std, 0.1))
        return found

    assert same(shown(load()), shown(streamed()))


@pytest.mark.parametrize("workers", [1, 2])
def test_what_an_augmentation_makes_does_not_depend_on_the_workers(folder: Path, workers: int):  # noqa: F811
    expected = epoch(varied())
    assert {images.dtype for images, _ in expected} == {torch.float32}
    random.seed(3)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert same(expected, epoch(varied(workers=workers)))
    assert torch.equal(torch.get_rng_state(), before)


def test_every_epoch_varies_anew_and_one_image_is_varied_alike_wherever_it_comes(folder: Path):  # noqa: F811
    split = varied()
    one, other = epoch(split, 0), epoch(split, 1)
    assert torch.equal(torch.cat([y for _, y in one]).sort().values, torch.cat([y for _, y in other]).sort().values)
    assert not torch.equal(
        torch.cat([x for x, _ in one]).mean((1, 2, 3)).sort().values,
        torch.cat([x for x, _ in other]).mean((1, 2, 3)).sort().values,
    )
    plain = torch.cat([x for x, _ in epoch(streamed().train, 0)]).float().mean((1, 2, 3))
    brightness = torch.cat([x for x, _ in one]).mean((1, 2, 3)) / plain
    assert brightness.std() > 0.1 / 255, "each image has a seed of its own"
    large = epoch(split, 0, 8)
    assert torch.equal(torch.cat([x for x, _ in one]), torch.cat([x for x, _ in large]))


def test_without_a_generator_nothing_is_varied(folder: Path):  # noqa: F811
    assert same(epoch(varied(), None), epoch(streamed().train, None))


@pytest.mark.parametrize("kind", ["memory", "streamed", "varied"])
def test_parts_of_a_batch_make_up_the_whole(folder: Path, kind: str):  # noqa: F811
    split = {"memory": lambda: load().train, "streamed": lambda: streamed().train, "varied": varied}[kind]()
    whole = epoch(split, 5, 6)
    first, second = (epoch(split, 5, 6, rows=rows) for rows in (slice(0, 3), slice(3, 6)))
    assert [len(y) for _, y in whole] == [6, 6, 4]
    assert [len(y) for _, y in second] == [3, 3, 1]
    together = [(torch.cat([a, c]), torch.cat([b, d])) for (a, b), (c, d) in zip(first, second, strict=True)]
    assert same(together, whole)
    assert [len(y) for _, y in epoch(split, 5, 6, rows=slice(4, 6))] == [2, 2, 0]
    assert [len(y) for _, y in epoch(split, 5, 6, rows=slice(4, 6), drop_last=True)] == [2, 2]


def test_images_that_stream_are_indexed_like_a_tensor(folder: Path):  # noqa: F811
    kept, flowing = load().val.images, streamed().val.images
    assert len(flowing) == len(kept)
    for chosen in (slice(0, 2), slice(None), torch.tensor([3, 1, 1]), [2], slice(0, 0)):
        assert torch.equal(flowing[chosen], kept[chosen])


def test_the_statistics_of_a_streamed_set_are_exact_and_kept(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    exact, first = load(), streamed()
    (kept,) = (folder.parent / "build" / "cache").glob("*.json")
    monkeypatch.setattr(splits, "_counts", lambda images: pytest.fail("read again"))
    again = streamed()
    assert (exact.mean, exact.std) == (first.mean, first.std) == (again.mean, again.std)
    monkeypatch.undo()
    monkeypatch.chdir(folder.parent)
    other = streamed(limit=8)
    assert other.mean == load(limit=8).mean != first.mean
    kept.write_text("[[1, 2]")
    assert streamed().mean == exact.mean
    (record,) = caplog.records
    assert kept.name in record.getMessage()


def test_imagenets_normalisation_needs_no_pass_over_the_images(folder: Path):  # noqa: F811
    for d in (load(normalise="imagenet"), streamed(normalise="imagenet")):
        assert (d.mean, d.std) == (config.IMAGENET_MEAN, config.IMAGENET_STD)
    assert not list((folder.parent / "build" / "cache").glob("*.json"))


def test_splits_go_to_a_device_as_they_are_and_streamed_ones_as_they_come(folder: Path):  # noqa: F811
    device = torch.device("meta")
    for d in (load(), streamed()):
        moved = data.to_device(d, device)
        assert moved.classes == d.classes
        for split in (moved.train, moved.val, moved.test):
            assert split.labels.device == device
            (images, labels), *_ = data.batches(split, 2)
            assert (images.device, labels.device) == (device, device)
            on_cpu = isinstance(split, data.Streamed)
            assert split.images[:1].device == (torch.device("cpu") if on_cpu else device)


def test_weights_that_know_other_numbers_see_images_normalised_by_those(folder: Path):  # noqa: F811
    d = dataclasses.replace(streamed(), train=varied())
    other = data.renormalised(d, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (other.mean, other.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert isinstance(other.train, data.Streamed)
    assert isinstance(other.train.augmentation, Shade)
    assert (other.train.augmentation.mean, other.train.augmentation.std) == (other.mean, other.std)
    assert other.val is d.val
    assert data.renormalised(load(), other.mean, other.std).mean == other.mean


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_an_error_of_one_line_wherever_it_is_decoded(folder: Path, workers: int):  # noqa: F811
    d = streamed(workers=workers)
    (folder / "test" / "cat" / "1.jpg").write_bytes(b"broken")
    for split in (d.test, dataclasses.replace(varied(workers=workers), images=d.test.images, labels=d.test.labels)):
        refused(functools.partial(epoch, split), "test/cat/1.jpg", "not a whole image")


def workers_of(pid: int) -> list[int]:
    """Processes two generations below, which is where a server forks them."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, parent = path.read_text().rsplit(")", 1)[1].split()[:2]
            if state != "Z":
                parents[int(path.parent.name)] = int(parent)
    return [child for child, parent in parents.items() if parents.get(parent) == pid]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")
def test_workers_end_with_their_epoch_however_it_ends(folder: Path):  # noqa: F811
    before = set(workers_of(os.getpid()))
    split = streamed(workers=2).train
    batches = data.batches(split, 2, generator=torch.Generator().manual_seed(0))
    next(batches)
    started = set(workers_of(os.getpid())) - before
    assert len(started) == 2
    del batches  # given up
    wait_until(lambda: not any(map(is_there, started)))
    epoch(split)
    wait_until(lambda: not set(workers_of(os.getpid())) - before)
    assert not multiprocessing.active_children()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")
def test_a_worker_that_is_killed_is_an_error_of_one_line(folder: Path):  # noqa: F811
    before = set(workers_of(os.getpid()))
    batches = data.batches(streamed(workers=1).train, 1)
    next(batches)
    (worker,) = set(workers_of(os.getpid())) - before
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(FambaError, match=r"^data\.workers: a worker was killed .* ran out of memory"):
        list(batches)


def wait_in_an_epoch(folder: str, said: str) -> None:  # noqa: F811
    """The life of a process that is stopped in the middle of an epoch."""
    os.chdir(folder)
    batches = data.batches(streamed(workers=2).train, 2)
    next(batches)
    Path(said).write_text("begun")
    signal.pause()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_process_that_started_them(folder: Path, how: int):  # noqa: F811
    said = folder.parent / "said"
    program = (
        "import signal, test_loader\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"if __name__ == '__main__': test_loader.wait_in_an_epoch({str(folder.parent)!r}, {str(said)!r})"
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(ROOT / "tests"), str(ROOT)])
    parent = subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.DEVNULL
    )
    wait_until(said.exists)
    workers = workers_of(parent.pid)
    assert len(workers) == 2
    parent.send_signal(how)
    parent.wait(timeout=PATIENCE_S)
    wait_until(lambda: not any(map(is_there, workers)))

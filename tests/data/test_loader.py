"""Images that do not fit into memory: the same batches as if they did, and nothing of the workers is left behind."""

import contextlib
import dataclasses
import os
import random
import signal
import subprocess
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from images import DIGITS, one_line
from PIL import Image
from processes import PATIENCE_S, is_there, start, wait_until

from famba import data
from famba.data import splits
from famba.data.timm_transforms import TimmAugmentation
from famba.errors import FambaError
from famba.params import IMAGENET_MEAN, IMAGENET_STD, DataParams

looks_into_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")
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
    shade = Shade(DataParams(**DIGITS), (0.0,) * 3, (1.0,) * 3)
    return dataclasses.replace(streamed(**changes).train, augmentation=shade)


def epoch(split: data.Split | data.Streamed, seed: int | None = 0, size: int = 4, **options: object):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return list(data.batches(split, size, generator=generator, **options))


def same(one: list, other: list) -> bool:
    return len(one) == len(other) and all(
        torch.equal(x, y) for a, b in zip(one, other, strict=True) for x, y in zip(a, b, strict=True)
    )


def test_a_set_larger_than_the_memory_allowed_streams_and_a_smaller_one_does_not(folder):
    for name in ("train", "val", "test"):
        assert isinstance(getattr(streamed(), name), data.Streamed)
        assert isinstance(getattr(load(memory_mib=2), name), data.Split)


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_batches_are_those_of_the_same_images_in_memory(folder, workers):
    kept, flowing = load(eval_crop=0.875), streamed(eval_crop=0.875, workers=workers)
    assert (kept.mean, kept.std) == (flowing.mean, flowing.std)
    for name in ("val", "test"):
        assert same(epoch(getattr(kept, name), None, 3), epoch(getattr(flowing, name), None, 3))
    one, other = (torch.Generator().manual_seed(0) for _ in range(2))
    for _ in range(2):  # the first epoch draws as much from either generator
        batches = data.batches(kept.train, 4, generator=one), data.batches(flowing.train, 4, generator=other)
        assert same(*map(list, batches))


def test_what_an_augmentation_makes_does_not_depend_on_the_workers(folder):
    expected = epoch(varied())
    assert {images.dtype for images, _ in expected} == {torch.float32}
    random.seed(3)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert same(expected, epoch(varied(workers=2)))
    assert torch.equal(torch.get_rng_state(), before)


def test_every_epoch_varies_anew_and_one_image_is_varied_alike_wherever_it_comes(folder):
    split, plain = varied(), streamed().train
    one, other, large = (torch.cat([x for x, _ in epoch(split, *how)]) for how in ((0, 4), (1, 4), (0, 8)))
    assert torch.equal(one, large)
    assert not torch.equal(one.mean((1, 2, 3)).sort().values, other.mean((1, 2, 3)).sort().values)
    brightness = one.mean((1, 2, 3)) / torch.cat([x for x, _ in epoch(plain)]).float().mean((1, 2, 3))
    assert brightness.std() > 0.1 / 255, "each image has a seed of its own"
    assert same(epoch(split, None), epoch(plain, None)), "without a generator nothing is varied"


@pytest.mark.parametrize("kind", ["memory", "varied"])
def test_parts_of_a_batch_make_up_the_whole(folder, kind):
    split = load().train if kind == "memory" else varied()
    whole = epoch(split, 5, 6)
    first, second = (epoch(split, 5, 6, rows=rows) for rows in (slice(0, 3), slice(3, 6)))
    assert [len(y) for _, y in whole] == [6, 6, 4]
    assert [len(y) for _, y in second] == [3, 3, 1]
    together = [(torch.cat([a, c]), torch.cat([b, d])) for (a, b), (c, d) in zip(first, second, strict=True)]
    assert same(together, whole)
    assert [len(y) for _, y in epoch(split, 5, 6, rows=slice(4, 6))] == [2, 2, 0]
    assert [len(y) for _, y in epoch(split, 5, 6, rows=slice(4, 6), drop_last=True)] == [2, 2]


def test_images_that_stream_are_indexed_like_a_tensor(folder):
    kept, flowing = load().val.images, streamed().val.images
    assert len(flowing) == len(kept)
    for chosen in (slice(0, 2), slice(None), torch.tensor([3, 1, 1]), [2], slice(0, 0)):
        assert torch.equal(flowing[chosen], kept[chosen])


def test_the_statistics_of_a_streamed_set_are_exact_and_kept(folder, monkeypatch, caplog):
    exact, first = load(), streamed()
    (kept,) = (folder.parent / "build" / "cache").glob("*.json")
    with monkeypatch.context() as patch:
        patch.setattr(splits, "_counts", lambda images: pytest.fail("read again"))
        again = streamed()
    assert (exact.mean, exact.std) == (first.mean, first.std) == (again.mean, again.std)
    assert streamed(limit=8).mean == load(limit=8).mean != first.mean
    kept.write_text("[[1, 2]")
    assert streamed().mean == exact.mean
    (record,) = caplog.records
    assert kept.name in record.getMessage()


def test_imagenets_normalisation_needs_no_pass_over_the_images(folder):
    for d in (load(normalise="imagenet"), streamed(normalise="imagenet")):
        assert (d.mean, d.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert not list((folder.parent / "build" / "cache").glob("*.json"))


def test_splits_go_to_a_device_as_they_are_and_streamed_ones_as_they_come(folder):
    device = torch.device("meta")
    for d in (load(), streamed()):
        moved = data.to_device(d, device)
        for split in (moved.train, moved.val, moved.test):
            assert split.labels.device == device
            (images, labels), *_ = data.batches(split, 2)
            assert (images.device, labels.device) == (device, device)
            on_cpu = isinstance(split, data.Streamed)
            assert split.images[:1].device == (torch.device("cpu") if on_cpu else device)


def test_weights_that_know_other_numbers_see_images_normalised_by_those(folder):
    d = dataclasses.replace(streamed(), train=varied())
    other = data.renormalised(d, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (other.mean, other.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (other.train.augmentation.mean, other.train.augmentation.std) == (other.mean, other.std)
    assert other.val is d.val


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_an_error_of_one_line_wherever_it_is_decoded(folder, workers):
    d = streamed(workers=workers)
    (folder / "test" / "cat" / "1.jpg").write_bytes(b"broken")
    for split in (d.test, dataclasses.replace(varied(workers=workers), images=d.test.images, labels=d.test.labels)):
        one_line(partial(epoch, split), "test/cat/1.jpg", "not a whole image")


def workers_of(pid: int) -> list[int]:
    """Processes two generations below, which is where a server forks them."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, parent = path.read_text().rsplit(")", 1)[1].split()[:2]
            if state != "Z":
                parents[int(path.parent.name)] = int(parent)
    return [child for child, parent in parents.items() if parents.get(parent) == pid]


@looks_into_proc
def test_workers_end_with_their_epoch_however_it_ends(folder):
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


@looks_into_proc
def test_a_worker_that_is_killed_is_an_error_of_one_line(folder):
    before = set(workers_of(os.getpid()))
    batches = data.batches(streamed(workers=1).train, 1)
    next(batches)
    (worker,) = set(workers_of(os.getpid())) - before
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(FambaError, match=r"^data\.workers: a worker was killed .* ran out of memory"):
        list(batches)


def wait_in_an_epoch(folder: str, said: str) -> None:
    """The life of a process that is stopped in the middle of an epoch."""
    os.chdir(folder)
    batches = data.batches(streamed(workers=2).train, 2)
    next(batches)
    Path(said).write_text("begun")
    signal.pause()


@pytest.mark.slow
@looks_into_proc
def test_workers_end_with_the_process_that_started_them(folder):
    said = folder.parent / "said"
    call = f"test_loader.wait_in_an_epoch({str(folder.parent)!r}, {str(said)!r})"
    program = f"import test_loader\nif __name__ == '__main__': {call}"
    parent = start("-c", program, stderr=subprocess.DEVNULL)
    wait_until(said.exists)
    workers = workers_of(parent.pid)
    assert len(workers) == 2
    parent.kill()
    parent.wait(timeout=PATIENCE_S)
    wait_until(lambda: not any(map(is_there, workers)))

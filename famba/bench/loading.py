"""What loading gives beside what a model takes: images varied in whole batches on tensors, and one by one by timm.

Both vary the same images in the same ways. Where timm cannot be had its rows are left out, and `left_out` says why.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from famba import data
from famba.bench.model import Training
from famba.bench.setting import Setting
from famba.bench.timing import interleaved, summary
from famba.config import IMAGENET_MEAN, IMAGENET_STD, DataParams
from famba.data import augment, loader, timm_transforms
from famba.data.datasets import Files
from famba.data.timm_transforms import Recipe
from famba.errors import InputError

_CLASSES = 100
_MEAN, _STD = IMAGENET_MEAN, IMAGENET_STD
_ONE_BY_ONE = "timm, image by image"
_WORKERS = (0, 2)
_PLAIN = DataParams(
    dataset="cifar100", root=None, img_size=32, val_fraction=0.1, split_seed=0, limit=None, eval_crop=1.0,
    normalise="imagenet", augment="tensor", shift=4, flip=True, erase=0.25, mixup=0.8, cutmix=0.0, rand_augment=None,
    color_jitter=0.0, workers=0, memory_mib=4096,
)  # fmt: skip


def bench_loading(setting: Setting) -> list[dict[str, Any]]:
    """One row for each way to load, and for the training step that takes the images; in turn.

    `of_model` is how many images are loaded in the time that the model takes for one; below 1 it waits for them.
    `faster` counts in images that timm loads in this process.
    """
    small, large = setting.loads
    return [*_in_memory(setting, small), *_streamed(setting, large)]


def left_out() -> str | None:
    """Why the rows of timm are not there; None if they are."""
    try:
        Recipe(replace(_PLAIN, augment="timm", shift=0), _MEAN, _STD).transform  # noqa: B018 (made, or refused)
    except InputError as error:
        return str(error)
    return None


def _in_memory(setting: Setting, img_size: int) -> list[dict[str, Any]]:
    """Crop, mirror, erase and mixup of images that are pixels already."""
    model, b = setting.loads[img_size]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4 * b, 3, img_size, img_size), dtype=torch.uint8, generator=generator)
    split = data.Split(images, torch.arange(len(images)) % _CLASSES)
    p = replace(_PLAIN, img_size=img_size)

    def whole_batches() -> None:
        for batch, labels in data.batches(split, b, generator=generator):
            draws = augment.draw(p, len(batch), generator, classes=_CLASSES)
            augment.apply(batch, labels, draws, _MEAN, _STD, 0.1)

    calls: dict[str, tuple[Callable[[], object], int]] = {"tensors, whole batches": (whole_batches, len(split))}
    if not left_out():
        one_by_one = Recipe(replace(p, augment="timm", shift=0), _MEAN, _STD).transform
        mix = timm_transforms.mixer(p, _CLASSES, 0.1)

        def image_by_image() -> None:
            for batch, labels in data.batches(split, b, generator=generator):
                pictures = [Image.fromarray(x) for x in batch.permute(0, 2, 3, 1).contiguous().numpy()]
                mix(torch.stack([one_by_one(picture) for picture in pictures]), labels, 0)

        calls[_ONE_BY_ONE] = image_by_image, len(split)
    return _rows(setting, img_size, model, b, calls)


def _streamed(setting: Setting, img_size: int) -> list[dict[str, Any]]:
    """The paper's recipe on small files, CIFAR's size; whole epochs, the start of the workers included."""
    model, b = setting.loads[img_size]
    calls: dict[str, tuple[Callable[[], object], int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if not left_out():
            p = replace(_PLAIN, img_size=img_size, augment="timm", shift=0, rand_augment="rand-m9-mstd0.5-inc1")
            labels = torch.arange(setting.loaded) % _CLASSES
            files = Files([str(path) for path in itertools.islice(_photographs(Path(folder)), setting.loaded)])
            images = loader.Images(files, torch.arange(setting.loaded), img_size, 1.0)
            for workers in _WORKERS:
                split = loader.Streamed(images, labels, Recipe(p, _MEAN, _STD), workers)
                name = f"{_ONE_BY_ONE}, {workers} workers" if workers else _ONE_BY_ONE
                calls[name] = _epoch(split, b), setting.loaded
        return _rows(setting, img_size, model, b, calls)


def _epoch(split: loader.Streamed, b: int) -> Callable[[], None]:
    def call() -> None:
        for _ in data.batches(split, b, generator=torch.Generator().manual_seed(0)):
            pass

    return call


def _photographs(folder: Path) -> Iterator[Path]:
    """Files of 32 x 32 pixels without end."""
    generator = torch.Generator().manual_seed(0)
    for i in itertools.count():
        coarse = torch.randint(0, 256, (4, 4, 3), dtype=torch.uint8, generator=generator)
        path = folder / f"{i}.png"
        Image.fromarray(coarse.numpy()).resize((32, 32), Image.Resampling.BICUBIC).save(path)
        yield path


def _rows(
    setting: Setting, img_size: int, model: str, b: int, calls: dict[str, tuple[Callable[[], object], int]]
) -> list[dict[str, Any]]:
    training = Training(replace(setting, model=model, batch=b, img_sizes=(img_size,)))
    step = f"training step, {model}"
    calls = {**calls, step: (training.step, b)}
    times = interleaved(
        {name: call for name, (call, _) in calls.items()},
        rounds=setting.rounds,
        turn_s=setting.slow_s / 40,
        budget_s=3 * setting.slow_s,
    )
    found = {name: summary(x) for name, x in times.items()}
    speed = {name: 1e3 * images / found[name]["median_ms"] for name, (_, images) in calls.items()}
    return [
        {
            "what": name,
            "img_size": img_size,
            **row,
            "images": calls[name][1],
            "images_per_s": speed[name],
            "of_model": speed[name] / speed[step],
            "faster": speed[name] / speed[_ONE_BY_ONE] if _ONE_BY_ONE in speed and name != step else None,
        }
        for name, row in found.items()
    ]

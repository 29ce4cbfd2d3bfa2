"""Loading beside the training step that takes the images: whole batches on tensors, and timm image by image."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from famba import config, data
from famba.bench.model import Setting, Training
from famba.bench.timing import Left, tried
from famba.data import augment, loader, timm_transforms
from famba.data.datasets import Files
from famba.data.timm_transforms import TimmAugmentation
from famba.params import IMAGENET_MEAN, IMAGENET_STD, DataParams

_CLASSES = 100
_TIMM = "timm, image by image"
_WORKERS = (0, 2)
_Calls = dict[str, tuple[Callable[[], object], int]]  # each with the images that a call loads


def bench_loading(setting: Setting, left: Left) -> list[dict[str, Any]]:
    """One row for each way to load and for the training step, in turn; without timm its rows are left out.

    `of_model` is images loaded in the time that a step takes for one: below 1 the model waits. `faster` is the speed
    over timm's in this process.
    """
    small, large = setting.loads
    timm = tried({_TIMM: lambda: _augmentation(config.load("paper", strategy="none").data).transform}, left)
    return [*_in_memory(setting, small, bool(timm)), *_streamed(setting, large, bool(timm))]


def _augmentation(p: DataParams) -> TimmAugmentation:
    return TimmAugmentation(p, IMAGENET_MEAN, IMAGENET_STD)


def _in_memory(setting: Setting, img_size: int, timm: bool) -> list[dict[str, Any]]:
    """Crop, mirror, erase and mix images that are already pixels."""
    b = setting.loads[img_size][1]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4 * b, 3, img_size, img_size), dtype=torch.uint8, generator=generator)
    split = data.Split(images, torch.arange(len(images)) % _CLASSES)
    p = replace(config.load("cifar100", strategy="none").data, img_size=img_size)

    def whole_batches() -> None:
        for batch, labels in data.batches(split, b, generator=generator):
            draws = augment.draw(p, len(batch), generator, classes=_CLASSES)
            augment.apply(batch, labels, draws, IMAGENET_MEAN, IMAGENET_STD, 0.1)

    calls: _Calls = {"tensors, whole batches": (whole_batches, len(split))}
    if timm:
        transform = _augmentation(replace(p, augment="timm", shift=0)).transform
        mix = timm_transforms.mixer(p, _CLASSES, 0.1)

        def image_by_image() -> None:
            for batch, labels in data.batches(split, b, generator=generator):
                pictures = [Image.fromarray(x) for x in batch.permute(0, 2, 3, 1).contiguous().numpy()]
                mix(torch.stack([transform(picture) for picture in pictures]), labels, 0)

        calls[_TIMM] = image_by_image, len(split)
    return _rows(setting, img_size, calls)


def _streamed(setting: Setting, img_size: int, timm: bool) -> list[dict[str, Any]]:
    """The paper's recipe on files of CIFAR's size; whole epochs, which include the start of the workers."""
    b, calls = setting.loads[img_size][1], _Calls()
    with tempfile.TemporaryDirectory() as folder:
        if timm:
            generator = torch.Generator().manual_seed(0)
            paths = [str(Path(folder, f"{i}.png")) for i in range(setting.loaded)]
            for path in paths:
                coarse = torch.randint(0, 256, (4, 4, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(coarse.numpy()).resize((32, 32), Image.Resampling.BICUBIC).save(path)
            images = loader.Images(Files(paths), torch.arange(len(paths)), img_size, 1.0)
            augmentation = _augmentation(replace(config.load("paper", strategy="none").data, img_size=img_size))
            for workers in _WORKERS:
                split = loader.Streamed(images, torch.arange(len(paths)) % _CLASSES, augmentation, workers)

                def epoch(split: loader.Streamed = split) -> None:
                    for _ in data.batches(split, b, generator=torch.Generator().manual_seed(0)):
                        pass

                calls[f"{_TIMM}, {workers} workers" if workers else _TIMM] = epoch, len(paths)
        return _rows(setting, img_size, calls)


def _rows(setting: Setting, img_size: int, calls: _Calls) -> list[dict[str, Any]]:
    model, b = setting.loads[img_size]
    step = f"training step, {model}"
    calls[step] = Training(replace(setting, model=model, batch=b, img_sizes=(img_size,))).step, b
    timed = {name: call for name, (call, _) in calls.items()}
    turns = replace(setting, turn_s=setting.slow_s / 40)
    found = turns.times(timed, rounds=setting.rounds, budget_s=3 * setting.slow_s)
    speed = {name: 1e3 * images / found[name]["median_ms"] for name, (_, images) in calls.items()}
    return [
        {"what": name, "img_size": img_size, **row, "images": calls[name][1], "images_per_s": speed[name]}
        | {"of_model": speed[name] / speed[step]}
        | {"faster": speed[name] / speed[_TIMM] if _TIMM in speed and name != step else None}
        for name, row in found.items()
    ]

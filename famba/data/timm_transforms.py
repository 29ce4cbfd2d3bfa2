"""The augmentation of the reference: timm's, image by image, and its mixing.

timm draws from the global generators of Python, NumPy and torch, which are seeded and restored around each call: the
result depends on the call's seed alone. Nothing else in famba imports timm or torchvision.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from PIL import Image
from torch import Tensor

from famba.data import datasets
from famba.errors import InputError
from famba.params import DataParams

_SMALL = 32  # pixels; up to this size DeiT crops a padded image instead of a resized one


@dataclasses.dataclass(frozen=True)
class TimmAugmentation:
    """Augments training images; pickled as its parameters only.

    Attributes:
        mean, std: of each channel, for normalisation.
    """

    p: DataParams
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Iterable[Image.Image], seeds: Sequence[int]) -> Float32[Tensor, "b 3 h w"]:
        """RGB images augmented and normalised, each from its own seed.

        Up to 32 pixels DeiT crops images of that size without resizing; others are first resized to it here.
        """
        size = self.p.img_size
        varied = torch.empty(len(seeds), 3, size, size)
        with _kept_generators():
            for out, image, seed in zip(varied, images, seeds, strict=True):
                if size <= _SMALL and image.size != (size, size):
                    image = Image.fromarray(datasets.fit(image, size).transpose(1, 2, 0))
                _seed(seed)
                out.copy_(self.transform(image))
        return varied

    @functools.cached_property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """timm's transform with the arguments of DeiT's `build_transform`."""
        timm, torchvision = _timm()
        p = self.p
        try:
            made = timm.data.create_transform(
                input_size=p.img_size,
                is_training=True,
                hflip=0.5 if p.flip else 0.0,
                color_jitter=p.color_jitter,
                auto_augment=p.rand_augment,
                interpolation="bicubic",
                re_prob=p.erase,
                re_mode="pixel",
                re_count=1,
                mean=self.mean,
                std=self.std,
            )
        except (AssertionError, ValueError) as error:
            raise InputError(f"data.rand_augment: {p.rand_augment!r}: timm knows no such policy ({error})") from None
        if p.img_size <= _SMALL:
            made.transforms[0] = torchvision.transforms.RandomCrop(p.img_size, padding=4)
        for step in made.transforms:
            for op in itertools.chain(getattr(step, "ops", ()), *getattr(step, "policy", ())):
                if op.name.startswith("Posterize"):
                    op.aug_fn = functools.partial(_posterized, op.aug_fn)
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def mixer(
    p: DataParams, classes: int, label_smoothing: float
) -> Callable[
    [Float32[Tensor, "b 3 h w"], Int64[Tensor, "b"], int],
    tuple[Float32[Tensor, "b 3 h w"], Int64[Tensor, "b"] | Float[Tensor, "b k"]],
]:
    """timm's mixing of a whole batch in place: (images, labels, seed) -> (images, targets with label smoothing).

    A batch has one lambda and one choice of mixup or cutmix. Without these, images and labels are returned unchanged.
    The returned function raises an InputError for an odd number of images.
    """
    if not (p.mixup or p.cutmix):
        return lambda images, labels, seed: (images, labels)
    timm, _ = _timm()
    made = timm.data.Mixup(
        mixup_alpha=p.mixup,
        cutmix_alpha=p.cutmix,
        prob=1.0,
        switch_prob=0.5,
        mode="batch",
        label_smoothing=label_smoothing,
        num_classes=classes,
    )

    def mixed(images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        if len(images) % 2:
            raise InputError(f"batch of {len(images)} images: mixing takes pairs, so that it must be even")
        with _kept_generators():
            _seed(seed)
            return made(images, labels)

    return mixed


def image_seed(seed: int, i: int) -> int:
    """A seed for one image of an epoch, a hash of both numbers."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {i}".encode(), digest_size=8).digest(), "little")


def _posterized(posterize: Callable[..., Image.Image], image: Image.Image, bits: int, **more: Any) -> Image.Image:
    """The strongest posterising keeps 0 bits: black, as in Pillow before version 13, which raises."""
    return posterize(image, bits, **more) if bits else Image.new(image.mode, image.size)


@contextlib.contextmanager
def _kept_generators() -> Iterator[None]:
    """Restore the three global generators that timm draws from."""
    before = random.getstate(), np.random.get_state(), torch.random.get_rng_state()  # noqa: NPY002 (timm's)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.random.set_rng_state(before[2])


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF])  # noqa: NPY002
    torch.default_generator.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)  # of the CPU only


def _timm() -> tuple[Any, Any]:
    try:
        import timm.data
        import torchvision
    except Exception as error:  # a torchvision that does not fit torch raises RuntimeError, or worse
        said = " ".join(str(error).split())
        raise InputError(
            f"data.augment: timm needs the packages timm and torchvision, and a torchvision that fits torch ({said}): "
            "pip install 'famba[paper]'"
        ) from None
    return timm, torchvision

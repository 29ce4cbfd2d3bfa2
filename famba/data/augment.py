"""Augment training images a batch at a time on their device: shift, flip, erase, mix.

`b` batch, `k` classes, `h` and `w` pixels. Random choices are drawn on the CPU for a whole step's batch and applied to
it, or to parts of it on any device, so that splitting a batch over processes changes nothing. Erasing is that of Zhong
et al. (arXiv:1708.04896) with noise in every pixel; mixing is mixup (arXiv:1710.09412) and CutMix (arXiv:1905.04899)
with the choices of the DeiT recipe in timm, except that each image has its own lambda and box.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float32, Int64, UInt8
from torch import Tensor

from famba import data
from famba.errors import InputError
from famba.params import DataParams

_AREA = (0.02, 1 / 3)  # of the erased rectangle, as a share of the image's
_ASPECT = (0.3, 1 / 0.3)  # height over width
_TRIES = 10  # rectangles drawn for each image, of which the first that fits is erased


@dataclass(frozen=True, eq=False)
class Draws:
    """The random choices for each image of a batch, on the CPU; None for a step that is not used.

    Attributes:
        shift: pixels of margin from which the window of each image is cut.
        corner: upper left corner of that window, from (0, 0) to (2 shift, 2 shift).
        mirrored: left-right.
        erased: top, left, height, width of a rectangle; (0, 0, 0, 0) for none.
        noise: seed of the rectangle's noise.
        share: weight of the image itself in a mixture, the rest being its neighbour's: 1 without mixing; with a box,
            the area outside.
        box: top, left, bottom, right of the neighbour's part, an empty box for mixup; None if no image has one.
        classes: number of classes.
    """

    shift: int
    corner: Int64[Tensor, "b 2"] | None
    mirrored: Bool[Tensor, "b"] | None
    erased: Int64[Tensor, "b 4"] | None
    noise: Int64[Tensor, "b"] | None
    share: Float32[Tensor, "b"] | None
    box: Int64[Tensor, "b 4"] | None
    classes: int
    b: int

    def __len__(self) -> int:
        return self.b

    def __getitem__(self, rows: slice) -> "Draws":
        """The choices for a part of the batch, which may not separate mixed images (InputError)."""
        start, stop, step = rows.indices(self.b)
        if self.share is not None and (step != 1 or start % 2 or (stop % 2 and stop < self.b)):
            raise InputError(f"rows {start}:{stop}: mixing takes pairs; parts of a batch must be of even size")
        drawn = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        parts = {name: x[rows] for name, x in drawn.items() if isinstance(x, Tensor)}
        return dataclasses.replace(self, **parts, b=len(range(start, stop, step)))


def draw(p: DataParams, b: int, generator: torch.Generator, *, classes: int) -> Draws:
    """Draw, on the CPU, for the b images of a whole step over all processes.

    Images 2i and 2i + 1 are mixed; the last of an odd batch is not.
    """
    corner = mirrored = erased = noise = share = box = None
    if p.shift:
        # All y before all x, which keeps the numbers of older runs.
        corner = torch.randint(0, 2 * p.shift + 1, (2, b), generator=generator).T
    if p.flip:
        mirrored = torch.randint(0, 2, (b, 1, 1, 1), generator=generator).flatten().bool()
    if p.erase:
        erased = _rectangles(b, p.img_size, generator)
        erased[torch.rand(b, generator=generator) >= p.erase] = 0
        noise = torch.randint(2**32, (b,), generator=generator)
    if p.mixup or p.cutmix:
        share, box = _mixtures(p, b, generator)
    return Draws(p.shift, corner, mirrored, erased, noise, share, box, classes, b)


def apply(
    images: UInt8[Tensor, "b 3 h w"],
    labels: Int64[Tensor, "b"],
    draws: Draws,
    mean: Sequence[float],
    std: Sequence[float],
    label_smoothing: float,
) -> tuple[Float32[Tensor, "b 3 h w"], Int64[Tensor, "b"] | Float32[Tensor, "b k"]]:
    """The augmented and normalised images, and their targets.

    Mixed images have a distribution over classes, with label_smoothing in it. Otherwise the labels are returned, and
    smoothing is left to the loss.
    """
    if len(draws) != len(images):
        raise InputError(f"draws: for {len(draws)} images; allowed: {len(images)}, the number of images")
    shown = data.normalise(_moved(images, draws), mean, std)
    if draws.erased is not None and draws.noise is not None:
        shown = _erase(shown, draws.erased, draws.noise)
    if draws.share is None:
        return shown, labels
    b, device = len(images), images.device
    partner = torch.arange(b) ^ 1
    partner[partner == b] = b - 1  # the last of an odd batch, whose share is 1
    partner, share = partner.to(device, non_blocking=True), draws.share.to(device, non_blocking=True)
    own = share[:, None, None, None]
    if draws.box is not None:
        box = draws.box.to(device, non_blocking=True)
        by_box = (box[:, 2:] > box[:, :2]).all(1)
        outside = 1 - _inside(box, *images.shape[2:]).float()
        own = torch.where(by_box[:, None, None, None], outside, own)
    mixed = torch.lerp(shown[partner], shown, own)
    off = label_smoothing / draws.classes
    targets = torch.full((b, draws.classes), off, device=device)
    targets.scatter_(1, labels[:, None], 1 - label_smoothing + off)
    return mixed, torch.lerp(targets[partner], targets, share[:, None])


def _moved(images: UInt8[Tensor, "b 3 h w"], draws: Draws) -> UInt8[Tensor, "b 3 h w"]:
    """Shifted, with zeros (black) at the edge, then mirrored."""
    b, _, h, w = images.shape
    mirrored = None if draws.mirrored is None else draws.mirrored.to(images.device, non_blocking=True)
    if draws.corner is None:
        return images if mirrored is None else torch.where(mirrored[:, None, None, None], images.flip(3), images)
    top, left = draws.corner.T[:, :, None].to(images.device, non_blocking=True)
    y, x = top + torch.arange(h, device=images.device), torch.arange(w, device=images.device).expand(b, w)
    if mirrored is not None:
        x = torch.where(mirrored[:, None], x.flip(1), x)
    # One look-up per pixel in the padded image gets all channels, which are adjacent.
    place = y[:, :, None] * (w + 2 * draws.shift) + (left + x)[:, None, :]
    padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, *(draws.shift,) * 4)).flatten(1, 2)
    return padded.gather(1, place.view(b, h * w, 1).expand(b, h * w, 3)).view(b, h, w, 3).permute(0, 3, 1, 2)


def _rectangles(b: int, size: int, generator: torch.Generator) -> Int64[Tensor, "b 4"]:
    """Top, left, height, width; area uniform, aspect ratio log-uniform, position uniform."""
    u = torch.rand(4, b, _TRIES, dtype=torch.float64, generator=generator)
    area = size**2 * (_AREA[0] + (_AREA[1] - _AREA[0]) * u[0])
    low, high = map(math.log, _ASPECT)
    aspect = torch.exp(low + (high - low) * u[1])
    sides = torch.stack([area * aspect, area / aspect]).sqrt().round().long()
    fits = (sides < size).all(0)
    places = (u[2:] * (size - sides + 1)).long()
    first = fits.byte().argmax(1)
    found = torch.cat([places, sides])[:, torch.arange(b), first].T
    return torch.where(fits.any(1, keepdim=True), found, 0)


def _mixtures(
    p: DataParams, b: int, generator: torch.Generator
) -> tuple[Float32[Tensor, "b"], Int64[Tensor, "b 4"] | None]:
    """Share and box of each image; the share of a box is the area outside after clipping."""
    # NumPy's legacy generator is frozen, and torch's Beta takes none.
    numbers = np.random.RandomState(int(torch.randint(2**32, (), generator=generator)))
    by_box = numbers.random_sample(b) < (0.5 if p.mixup and p.cutmix else float(p.cutmix > 0))
    share = np.ones(b)
    for alpha, chosen in ((p.mixup, ~by_box), (p.cutmix, by_box)):
        if alpha:
            share[chosen] = numbers.beta(alpha, alpha, b)[chosen]
    if b % 2:
        share[-1], by_box[-1] = 1, False
    if not p.cutmix:
        return torch.from_numpy(share).float(), None
    side = (p.img_size * np.sqrt(1 - share)).astype(np.int64)
    centre = numbers.randint(0, p.img_size, (2, b))
    low, high = (np.clip(edge, 0, p.img_size) for edge in (centre - side // 2, centre + (side + 1) // 2))
    low[:, ~by_box] = high[:, ~by_box] = 0
    share[by_box] = 1 - (high - low).prod(0)[by_box] / p.img_size**2
    return torch.from_numpy(share).float(), torch.from_numpy(np.concatenate([low, high]).T.copy())


def _inside(box: Int64[Tensor, "b 4"], h: int, w: int) -> Bool[Tensor, "b 1 h w"]:
    """Which pixels lie between top and bottom, left and right."""
    top, left, bottom, right = box.T[:, :, None]
    y, x = torch.arange(h, device=box.device), torch.arange(w, device=box.device)
    rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _erase(
    images: Float32[Tensor, "b 3 h w"], rectangle: Int64[Tensor, "b 4"], seed: Int64[Tensor, "b"]
) -> Float32[Tensor, "b 3 h w"]:
    """Fill the rectangles in place with noise of mean 0 and deviation 1."""
    # The rectangles are on the CPU, so that counting their pixels does not synchronise the device.
    area = rectangle[:, 2] * rectangle[:, 3]
    total, device = int(area.sum()), images.device
    described = torch.stack([torch.arange(len(area)), area.cumsum(0) - area, seed, *rectangle.T])
    described, area = described.to(device, non_blocking=True), area.to(device, non_blocking=True)
    described = described.repeat_interleave(area, 1, output_size=total)
    image, start, seed, top, left, _, width = described
    pixel = torch.arange(total, device=device) - start
    y, x = top + pixel // width, left + pixel % width
    images[image, :, y, x] = _noise(seed, y * images.shape[3] + x)
    return images


def _noise(seed: Int64[Tensor, "m"], pixel: Int64[Tensor, "m"]) -> Float32[Tensor, "m 3"]:
    """Standard normal numbers as a function of seed and pixel, equal on all devices up to rounding.

    Box-Muller twice, each from 16 bits for the radius (at most 4.9) and 16 for the angle; the fourth number is unused.
    """
    place = 2 * pixel + torch.arange(1, 3, device=pixel.device)[:, None]
    bits = _hashed(seed ^ _hashed(place))
    radius = ((bits >> 16).float().add_(0.5).div_(2**16)).log_().mul_(-2).sqrt_()
    angle = (bits & 0xFFFF).float().mul_(2 * math.pi / 2**16)
    (red, green), blue = angle.cos().mul_(radius), angle[0].sin().mul_(radius[0])
    return torch.stack([red, green, blue], 1)


def _hashed(x: Int64[Tensor, "*s"]) -> Int64[Tensor, "*s"]:
    """Hash 32 bits by Wellons's lowbias32 (nullprogram.com, 2018)."""
    x = _times(x ^ x >> 16, 0x7FEB352D)
    x = _times(x ^ x >> 15, 0x846CA68B)
    return x ^ x >> 16


def _times(x: Int64[Tensor, "*s"], factor: int) -> Int64[Tensor, "*s"]:
    """The product modulo 2**32, by halves of the factor, so that 64 bits do not overflow."""
    return (x * (factor >> 16)).bitwise_left_shift_(16).add_(x, alpha=factor & 0xFFFF).bitwise_and_(0xFFFFFFFF)

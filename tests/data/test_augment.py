import hashlib
import itertools
import math

import bridge  # noqa: F401 (before timm)
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from images import DIGITS
from scipy import stats

from famba import data
from famba.config import DataParams
from famba.data import augment
from famba.errors import InputError

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
EVERYTHING = {"shift": 2, "flip": True, "erase": 0.5, "mixup": 0.8, "cutmix": 1.0}


def asked(**changes: object) -> DataParams:
    return DataParams(**{**DIGITS, "shift": 0, **changes})


def drawn(b: int, seed: int = 0, **changes: object) -> augment.Draws:
    return augment.draw(asked(**changes), b, torch.Generator().manual_seed(seed), classes=10)


def pictures(b: int, size: int = 8, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(1, 256, (b, 3, size, size), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 10, (b,), generator=generator)


def applied(images: torch.Tensor, labels: torch.Tensor, draws: augment.Draws, smoothing: float = 0.1):
    return augment.apply(images, labels, draws, MEAN, STD, smoothing)


# shift and mirror


def test_without_erasing_and_mixing_images_are_those_of_older_runs():
    images, labels = pictures(64)
    draws = augment.draw(asked(shift=1, flip=True), 64, torch.Generator().manual_seed(5), classes=10)
    shown, targets = applied(images, labels, draws)
    moved = augment._moved(images, draws)
    assert torch.equal(shown, data.normalise(moved, MEAN, STD))
    assert torch.equal(data.pictures(shown, MEAN, STD), moved)
    assert targets is labels
    assert hashlib.sha256(moved.numpy().tobytes()).hexdigest()[:16] == "151b16bbd1686ba9"


def shifted(image: torch.Tensor, dy: int, dx: int) -> torch.Tensor:
    """One image moved down by dy and right by dx, pixel by pixel."""
    out = torch.zeros_like(image)
    _, h, w = image.shape
    for y in range(h):
        for x in range(w):
            if 0 <= y - dy < h and 0 <= x - dx < w:
                out[:, y, x] = image[:, y - dy, x - dx]
    return out


@given(
    b=st.integers(1, 5), size=st.integers(1, 6), shift=st.integers(0, 3), flip=st.booleans(), seed=st.integers(0, 99)
)
def test_each_image_is_moved_and_mirrored_as_drawn_as_a_loop_over_pixels_does(b, size, shift, flip, seed):
    images, labels = pictures(b, size, seed)
    before, draws = images.clone(), drawn(b, seed, shift=shift, flip=flip, img_size=size)
    shown, _ = applied(images, labels, draws)
    assert torch.equal(images, before)  # the stored images are never written to
    for i in range(b):
        dy, dx = (0, 0) if draws.corner is None else (shift - draws.corner[i]).tolist()
        expected = shifted(images[i], dy, dx)
        if draws.mirrored is not None and draws.mirrored[i]:
            expected = expected.flip(2)
        assert torch.equal(shown[i], data.normalise(expected[None], MEAN, STD)[0])


def test_all_offsets_and_both_mirrorings_are_drawn_about_equally_often():
    draws = drawn(9000, shift=1, flip=True)
    assert draws.corner is not None
    assert draws.mirrored is not None
    counts = torch.bincount(draws.corner[:, 0] * 6 + draws.corner[:, 1] * 2 + draws.mirrored)
    assert counts.sum() == 9000
    assert len(counts) == 18
    assert counts.min() > 400  # 500 each on average, standard deviation 22
    assert counts.max() < 600


def test_unused_steps_draw_nothing():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    draws = augment.draw(asked(), 4, generator, classes=10)
    assert torch.equal(generator.get_state(), before)
    images, labels = pictures(4)
    shown, targets = applied(images, labels, draws)
    assert torch.equal(shown, data.normalise(images, MEAN, STD))
    assert targets is labels


# parts of a batch


@pytest.mark.parametrize("cuts", [[0, 6, 12], [0, 2, 4, 6, 8, 10, 12], [0, 4, 12], [0, 0, 12]])
def test_splitting_a_batch_changes_nothing(cuts):
    images, labels = pictures(12)
    draws = drawn(12, **EVERYTHING)
    whole, targets = applied(images, labels, draws)
    slices = [slice(start, stop) for start, stop in itertools.pairwise(cuts)]
    parts = [applied(images[rows], labels[rows], draws[rows]) for rows in slices]
    assert torch.equal(torch.cat([x for x, _ in parts]), whole)
    assert torch.equal(torch.cat([y for _, y in parts]), targets)


@pytest.mark.parametrize("rows", [slice(0, 3), slice(1, 3), slice(3, 12), slice(0, 12, 2)])
def test_mixed_neighbours_are_not_separated(rows):
    with pytest.raises(InputError, match="mixing takes pairs; parts of a batch must be of even size"):
        drawn(12, mixup=1.0)[rows]
    assert len(drawn(12, **{**EVERYTHING, "mixup": 0.0, "cutmix": 0.0})[rows]) == len(range(12)[rows])


def test_the_end_of_an_odd_batch_is_a_part_and_its_last_image_stays_unmixed():
    images, labels = pictures(5)
    draws = drawn(5, mixup=1.0, cutmix=1.0)
    whole, targets = applied(images, labels, draws, 0.0)
    assert torch.equal(whole[4], data.normalise(images, MEAN, STD)[4])
    assert targets[4].tolist() == [float(i == labels[4]) for i in range(10)]
    end, _ = applied(images[4:], labels[4:], draws[4:])
    assert torch.equal(end, whole[4:])


def test_draws_of_another_batch_are_refused():
    images, labels = pictures(4)
    with pytest.raises(InputError, match="draws: for 6 images; allowed: 4"):
        applied(images, labels, drawn(6))


# erasing


def test_erased_rectangles_are_noise_and_other_pixels_are_unchanged():
    images, labels = pictures(400, 16)
    draws = drawn(400, erase=0.5, img_size=16)
    shown, _ = applied(images, labels, draws)
    plain = data.normalise(images, MEAN, STD)
    assert draws.erased is not None
    filled, count = [], 0
    for i, (top, left, height, width) in enumerate(draws.erased.tolist()):
        count += height > 0
        assert top + height <= 16
        assert left + width <= 16
        inside = torch.zeros(16, 16, dtype=torch.bool)
        inside[top : top + height, left : left + width] = True
        assert torch.equal(shown[i][:, ~inside], plain[i][:, ~inside])
        filled.append(shown[i][:, inside].flatten())
    assert 160 < count < 240  # 200 on average, standard deviation 10
    noise = torch.cat(filled)
    assert len(noise) > 20000
    assert stats.kstest(noise.numpy()[:20000], "norm").pvalue > 0.01


def test_noise_depends_on_its_seed_and_differs_between_seeds_pixels_and_channels():
    pixel = torch.arange(4000)
    seven, again, eight = (augment._noise(torch.full((4000,), seed), pixel).numpy() for seed in (7, 7, 8))
    assert np.array_equal(seven, again)
    together = np.concatenate([seven, eight, np.roll(seven, 1, 0)], 1)
    assert np.abs(np.corrcoef(together.T) - np.eye(9)).max() < 0.08  # standard deviation 0.016
    assert np.abs(np.corrcoef((together**2).T) - np.eye(9)).max() < 0.08
    assert np.abs(seven).max() < 4.9


def test_the_hash_is_that_of_its_source():
    """lowbias32, worked in Python's integers."""

    def lowbias32(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    numbers = [0, 1, 2, 12345, 2**31, 2**32 - 1]
    assert augment._hashed(torch.tensor(numbers)).tolist() == [lowbias32(x) for x in numbers]


def test_rectangles_are_distributed_as_timms():
    from timm.data.random_erasing import RandomErasing

    draws = drawn(1500, erase=1.0, img_size=32)
    assert draws.erased is not None
    ours = draws.erased.numpy()
    erasing = RandomErasing(1.0, mode="const", device="cpu")
    theirs = []
    for _ in range(1500):
        erased = erasing(torch.ones(1, 32, 32))[0] == 0
        (rows,), (columns,) = erased.any(1).nonzero(as_tuple=True), erased.any(0).nonzero(as_tuple=True)
        theirs.append([int(rows[0]), int(columns[0]), len(rows), len(columns)])
    theirs = np.array(theirs)
    assert (ours[:, 2:].min(0) > 0).all()
    ours, theirs = (np.column_stack([x, x[:, 2] * x[:, 3]]) for x in (ours, theirs))
    for column in range(5):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 0.001, column


# mixing


@given(
    b=st.integers(1, 7), seed=st.integers(0, 99), mixup=st.sampled_from([0.0, 0.8]), cutmix=st.sampled_from([0.0, 1.0])
)
def test_mixed_images_and_targets_are_those_of_a_loop_over_images_and_pixels(b, seed, mixup, cutmix):
    images, labels = pictures(b, 6, seed)
    draws = drawn(b, seed, mixup=mixup, cutmix=cutmix, img_size=6)
    shown, targets = applied(images, labels, draws, 0.2)
    plain = data.normalise(images, MEAN, STD)
    if not (mixup or cutmix):
        assert targets is labels
        return
    assert draws.share is not None
    for i in range(b):
        other = i ^ 1 if i ^ 1 < b else i
        share, (top, left, bottom, right) = (
            draws.share[i].item(),
            [0] * 4 if draws.box is None else draws.box[i].tolist(),
        )
        expected = plain[i].clone()
        if bottom > top and right > left:
            assert share == pytest.approx(1 - (bottom - top) * (right - left) / 36, abs=1e-6)
            for y in range(top, bottom):
                for x in range(left, right):
                    expected[:, y, x] = plain[other, :, y, x]
        else:
            expected = share * plain[i] + (1 - share) * plain[other]
        torch.testing.assert_close(shown[i], expected, atol=1e-5, rtol=1e-5)
        target = torch.full((10,), 0.02)
        target[labels[i]] += 0.8 * share
        target[labels[other]] += 0.8 * (1 - share)
        torch.testing.assert_close(targets[i], target, atol=1e-6, rtol=0)


def test_shares_are_beta_distributed_and_half_of_the_mixtures_are_by_box():
    draws = drawn(4000, mixup=0.8, cutmix=1.0, img_size=32)
    assert draws.share is not None
    assert draws.box is not None
    by_box = (draws.box[:, 2:] > draws.box[:, :2]).all(1)
    assert 0.46 < by_box.float().mean() < 0.52  # boxes of less than a pixel are none
    assert stats.kstest(draws.share[~by_box].double().numpy(), stats.beta(0.8, 0.8).cdf).pvalue > 0.001
    alone = drawn(4000, mixup=0.2, img_size=32)
    assert alone.share is not None
    assert stats.kstest(alone.share.double().numpy(), stats.beta(0.2, 0.2).cdf).pvalue > 0.001


def test_boxes_and_their_shares_are_distributed_as_timms():
    from timm.data import mixup

    draws = drawn(3000, cutmix=1.0, img_size=32)
    assert draws.share is not None
    assert draws.box is not None
    np.random.seed(0)  # noqa: NPY002 (timm's)
    theirs, shares = [], []
    for lam in stats.beta(1, 1).rvs(3000, random_state=1):
        (top, bottom, left, right), share = mixup.cutmix_bbox_and_lam((32, 32), lam)
        theirs.append([top, left, bottom, right])
        shares.append(share)
    assert stats.ks_2samp(draws.share.numpy(), np.array(shares)).pvalue > 0.001
    some, its = draws.box.numpy(), np.array(theirs)
    some, its = (boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)] for boxes in (some, its))
    for column in range(4):
        assert stats.ks_2samp(some[:, column], its[:, column]).pvalue > 0.001, column


def test_augmentation_depends_on_the_generator_alone():
    images, labels = pictures(16)
    torch.manual_seed(0)
    first, _ = applied(images, labels, drawn(16, 1, **EVERYTHING))
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 (must not matter)
    again, _ = applied(images, labels, drawn(16, 1, **EVERYTHING))
    other, _ = applied(images, labels, drawn(16, 2, **EVERYTHING))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert math.isfinite(first.sum())

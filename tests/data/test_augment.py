import hashlib
import itertools
import random

import bridge  # noqa: F401 (before timm)
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from images import DIGITS
from scipy import stats

from famba import data
from famba.data import augment
from famba.errors import InputError
from famba.params import DataParams

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
    draws = drawn(64, 5, shift=1, flip=True)
    shown, targets = applied(images, labels, draws)
    moved = augment._moved(images, draws)
    assert torch.equal(shown, data.normalise(moved, MEAN, STD))
    assert torch.equal(data.pictures(shown, MEAN, STD), moved)
    assert targets is labels
    assert hashlib.sha256(moved.numpy().tobytes()).hexdigest()[:16] == "151b16bbd1686ba9"


@given(
    b=st.integers(1, 5), size=st.integers(1, 6), shift=st.integers(0, 3), flip=st.booleans(), seed=st.integers(0, 99)
)
def test_each_image_is_the_window_of_the_padded_one_that_was_drawn_and_mirrored(b, size, shift, flip, seed):
    images, labels = pictures(b, size, seed)
    before, draws = images.clone(), drawn(b, seed, shift=shift, flip=flip, img_size=size)
    shown, _ = applied(images, labels, draws)
    assert torch.equal(images, before)  # the stored images are never written to
    for i in range(b):
        top, left = (0, 0) if draws.corner is None else draws.corner[i]
        expected = F.pad(images[i], (shift,) * 4)[:, top : top + size, left : left + size]
        if draws.mirrored is not None and draws.mirrored[i]:
            expected = expected.flip(2)
        assert torch.equal(shown[i], data.normalise(expected[None], MEAN, STD)[0])


def test_all_offsets_and_both_mirrorings_are_drawn_about_equally_often():
    draws = drawn(9000, shift=1, flip=True)
    counts = torch.bincount(draws.corner[:, 0] * 6 + draws.corner[:, 1] * 2 + draws.mirrored)
    assert len(counts) == 18
    assert counts.min() > 400  # 500 each on average, standard deviation 22
    assert counts.max() < 600


def test_draws_depend_on_the_generator_alone_and_unused_steps_draw_nothing():
    first, again, other = (applied(*pictures(16), drawn(16, seed, **EVERYTHING))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    augment.draw(asked(), 4, generator, classes=10)
    assert torch.equal(generator.get_state(), before)


# parts of a batch


def test_splitting_a_batch_changes_nothing():
    images, labels = pictures(13)
    draws = drawn(13, **EVERYTHING)
    whole, targets = applied(images, labels, draws)
    slices = [slice(start, stop) for start, stop in itertools.pairwise([0, 0, 2, 6, 12, 13])]
    parts = [applied(images[rows], labels[rows], draws[rows]) for rows in slices]
    assert torch.equal(torch.cat([x for x, _ in parts]), whole)
    assert torch.equal(torch.cat([y for _, y in parts]), targets)


def test_mixed_neighbours_are_not_separated():
    for rows in (slice(0, 3), slice(3, 12), slice(0, 12, 2)):
        with pytest.raises(InputError, match="mixing takes pairs; parts of a batch must be of even size"):
            drawn(12, mixup=1.0)[rows]
    assert len(drawn(12, shift=2, flip=True, erase=0.5)[3:12:2]) == 5


# erasing


def test_erased_rectangles_are_noise_and_other_pixels_are_unchanged():
    images, labels = pictures(400, 16)
    draws = drawn(400, erase=0.5, img_size=16)
    shown, _ = applied(images, labels, draws)
    plain = data.normalise(images, MEAN, STD)
    filled = []
    for i, (top, left, height, width) in enumerate(draws.erased.tolist()):
        inside = torch.zeros(16, 16, dtype=torch.bool)
        inside[top : top + height, left : left + width] = True
        assert torch.equal(shown[i][:, ~inside], plain[i][:, ~inside])
        filled.append(shown[i][:, inside].flatten())
    assert 160 < sum(len(x) > 0 for x in filled) < 240  # 200 on average, standard deviation 10
    noise = torch.cat(filled)
    assert len(noise) > 20000
    assert stats.kstest(noise.numpy()[:20000], "norm").pvalue > 0.01


def test_noise_differs_between_seeds_pixels_and_channels():
    pixel = torch.arange(4000)
    seven, eight = (augment._noise(torch.full((4000,), seed), pixel).numpy() for seed in (7, 8))
    together = np.concatenate([seven, eight, np.roll(seven, 1, 0)], 1)
    assert np.abs(np.corrcoef(together.T) - np.eye(9)).max() < 0.08  # standard deviation 0.016
    assert np.abs(np.corrcoef((together**2).T) - np.eye(9)).max() < 0.08
    assert np.abs(seven).max() < 4.9


def test_the_hash_is_lowbias32_as_in_pythons_integers():
    def lowbias32(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    numbers = [0, 1, 2, 12345, 2**31, 2**32 - 1]
    assert augment._hashed(torch.tensor(numbers)).tolist() == [lowbias32(x) for x in numbers]


def test_rectangles_are_distributed_as_timms():
    from timm.data.random_erasing import RandomErasing

    ours = drawn(1500, erase=1.0, img_size=32).erased.numpy()
    erasing = RandomErasing(1.0, mode="const", device="cpu")
    random.seed(0)  # timm's
    theirs = []
    for _ in range(1500):
        erased = erasing(torch.ones(1, 32, 32))[0] == 0
        (rows,), (columns,) = erased.any(1).nonzero(as_tuple=True), erased.any(0).nonzero(as_tuple=True)
        theirs.append([int(rows[0]), int(columns[0]), len(rows), len(columns)])
    assert (ours[:, 2:] > 0).all()
    with_area = [np.column_stack([x, x[:, 2] * x[:, 3]]) for x in (ours, np.array(theirs))]
    assert stats.ks_2samp(*with_area, axis=0).pvalue.min() > 0.001


# mixing


@given(
    b=st.integers(1, 7), seed=st.integers(0, 99), mixup=st.sampled_from([0.0, 0.8]), cutmix=st.sampled_from([0.0, 1.0])
)
def test_mixed_images_and_targets_are_those_of_a_loop_over_images(b, seed, mixup, cutmix):
    images, labels = pictures(b, 6, seed)
    draws = drawn(b, seed, mixup=mixup, cutmix=cutmix, img_size=6)
    shown, targets = applied(images, labels, draws, 0.2)
    plain = data.normalise(images, MEAN, STD)
    if not (mixup or cutmix):
        assert targets is labels
        return
    for i in range(b):
        other = i ^ 1 if i ^ 1 < b else i
        share, box = draws.share[i].item(), [0] * 4 if draws.box is None else draws.box[i].tolist()
        top, left, bottom, right = box
        expected = plain[i].clone()
        if bottom > top and right > left:
            assert share == pytest.approx(1 - (bottom - top) * (right - left) / 36, abs=1e-6)
            expected[:, top:bottom, left:right] = plain[other, :, top:bottom, left:right]
        else:
            expected = share * plain[i] + (1 - share) * plain[other]
        torch.testing.assert_close(shown[i], expected, atol=1e-5, rtol=1e-5)
        target = torch.full((10,), 0.02)
        target[labels[i]] += 0.8 * share
        target[labels[other]] += 0.8 * (1 - share)
        torch.testing.assert_close(targets[i], target, atol=1e-6, rtol=0)


def test_shares_are_beta_distributed_and_half_of_the_mixtures_are_by_box():
    draws = drawn(4000, mixup=0.8, cutmix=1.0, img_size=32)
    by_box = (draws.box[:, 2:] > draws.box[:, :2]).all(1)
    assert 0.46 < by_box.float().mean() < 0.52  # boxes of less than a pixel are none
    alone = drawn(4000, mixup=0.2, img_size=32)
    for share, alpha in ((draws.share[~by_box], 0.8), (alone.share, 0.2)):
        assert stats.kstest(share.double().numpy(), stats.beta(alpha, alpha).cdf).pvalue > 0.001


def test_boxes_and_their_shares_are_distributed_as_timms():
    from timm.data import mixup

    draws = drawn(3000, cutmix=1.0, img_size=32)
    np.random.seed(0)  # noqa: NPY002 (timm's)
    theirs, shares = [], []
    for lam in stats.beta(1, 1).rvs(3000, random_state=1):
        (top, bottom, left, right), share = mixup.cutmix_bbox_and_lam((32, 32), lam)
        theirs.append([top, left, bottom, right])
        shares.append(share)
    assert stats.ks_2samp(draws.share.numpy(), shares).pvalue > 0.001
    some, its = (boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)] for boxes in (draws.box.numpy(), np.array(theirs)))
    assert stats.ks_2samp(some, its, axis=0).pvalue.min() > 0.001

import pickle
import random
import sys

import bridge  # before timm
import numpy as np
import pytest
import timm.data
import torch
from checkout import ROOT
from images import DIGITS, one_line, photograph
from PIL import Image
from torchvision import transforms

from famba import config, data
from famba.data import datasets, timm_transforms
from famba.errors import InputError
from famba.params import DataParams
from famba.training import fit

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
PAPER = {"img_size": 48, "shift": 0, "flip": True, "erase": 0.25, "rand_augment": "rand-m9-mstd0.5-inc1"}


def asked(**changes: object) -> DataParams:
    return DataParams(**{**DIGITS, "augment": "timm", **PAPER, **changes})


def made(**changes: object) -> timm_transforms.TimmAugmentation:
    return timm_transforms.TimmAugmentation(asked(**changes), MEAN, STD)


def photographs(count: int) -> list[Image.Image]:
    return [photograph(seed, (60, 50)) for seed in range(count)]


def test_images_become_what_timms_transform_makes_of_them():
    policy = {"auto_augment": PAPER["rand_augment"], "color_jitter": 0.3, "interpolation": "bicubic"}
    erasing = {"re_prob": 0.25, "re_mode": "pixel", "re_count": 1}
    reference = timm.data.create_transform(48, is_training=True, mean=MEAN, std=STD, **policy, **erasing)
    found = made(color_jitter=0.3)(photographs(12), range(12))
    assert found.dtype == torch.float32
    with timm_transforms._kept_generators():
        for seed, image in enumerate(photographs(12)):
            timm_transforms._seed(seed)
            assert torch.equal(found[seed], reference(image))
    assert len({x.numpy().tobytes() for x in made()(photographs(1) * 12, range(12))}) == 12


def test_steps_that_are_not_asked_for_are_left_out():
    plain = made(rand_augment=None, color_jitter=0.4, flip=False, erase=0.0)
    steps = {type(step).__name__: step for step in plain.transform.transforms}
    assert not steps.keys() & {"RandAugment", "RandomHorizontalFlip", "RandomErasing"}
    assert steps["ColorJitter"].brightness == (0.6, 1.4)


def test_the_strongest_posterising_is_black():
    ops = {op.name: op for op in made(rand_augment="rand-m10-inc1").transform.transforms[2].ops}
    op = ops["PosterizeIncreasing"]
    op.prob = 1.0
    (image,) = photographs(1)
    assert op(image).getextrema() == ((0, 0),) * 3
    op.magnitude = 9
    assert np.array_equal(np.asarray(op(image)), np.asarray(image) & 0x80)


def test_small_images_are_padded_by_four_and_cropped_as_deit_does():
    small = made(img_size=32, rand_augment=None, erase=0.0, flip=False)
    white = [Image.new("RGB", (32, 32), (255, 255, 255))]
    borders = [(x[0] < 0).all(1).sum().item() for x in small(white * 60, range(60))]  # rows of black that moved in
    assert set(borders) == {0, 1, 2, 3, 4}


def test_images_of_another_size_are_resized_before_a_small_crop():
    small = made(img_size=32)
    (image,) = photographs(1)
    fitted = Image.fromarray(datasets.fit(image, 32).transpose(1, 2, 0))
    assert torch.equal(small([image], [7]), small([fitted], [7]))


def states() -> tuple[list[int], list[int]]:
    """The states of NumPy's and torch's generators; beartype, which checks types here, draws from Python's."""
    return np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002 (timm's)


def test_pythons_generator_is_restored():
    before = random.getstate()
    with timm_transforms._kept_generators():
        timm_transforms._seed(2)
        assert random.getstate() != before
    assert random.getstate() == before


def test_an_image_depends_on_its_own_seed():
    vary, images, before = made(), photographs(6), states()
    whole = vary(images, [11, 12, 13, 14, 15, 16])
    assert states() == before
    parts = [vary(images[4:], [15, 16]), vary(images[:4], [11, 12, 13, 14])]
    assert torch.equal(torch.cat(parts[::-1]), whole)
    assert not torch.equal(vary(images[:1], [12]), whole[:1])
    assert vary([], []).shape == (0, 3, 48, 48)


def test_a_pickled_augmentation_gives_the_same_images():
    vary = made()
    expected = vary(photographs(2), [1, 2])
    sent = pickle.dumps(vary)
    assert len(sent) < 2000
    assert torch.equal(pickle.loads(sent)(photographs(2), [1, 2]), expected)


def test_image_seeds_are_distinct():
    assert len({timm_transforms.image_seed(epoch, i) for epoch in range(30) for i in range(1000)}) == 30000


def test_batches_are_mixed_as_timm_mixes_them():
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8)
    mixed = timm_transforms.mixer(asked(mixup=0.8, cutmix=1.0), 10, 0.1)
    reference = timm.data.Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=10)
    before = states()
    for seed in range(6):
        found = mixed(images.clone(), labels, seed)
        with timm_transforms._kept_generators():
            timm_transforms._seed(seed)
            expected = reference(images.clone(), labels)
        assert all(map(torch.equal, found, expected))
    assert states() == before
    with pytest.raises(InputError, match="batch of 7 images: mixing takes pairs"):
        mixed(images[:7], labels[:7], 0)


def test_without_mixing_images_and_labels_come_back():
    images, labels = torch.rand(3, 3, 4, 4), torch.arange(3)
    found = timm_transforms.mixer(asked(), 10, 0.1)(images, labels, 0)
    assert found[0] is images
    assert found[1] is labels


def test_a_broken_torchvision_is_an_error_of_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    one_line(lambda: made().transform, "torchvision", "pip install 'famba[paper]'")


@pytest.mark.parametrize("size", [(60, 50), (50, 60), (48, 48), (300, 90), (31, 77)])
@pytest.mark.parametrize("crop", [1.0, 0.875, 0.8])
def test_evaluation_images_are_torchvisions_resize_and_centre_crop(size, crop):
    shorter = round(48 / crop)
    reference = transforms.Compose(
        [transforms.Resize(shorter, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(48)]
    )
    image = photograph(3, size)
    found = datasets.fit(image, 48, crop)
    expected = np.asarray(reference(image)).transpose(2, 0, 1)
    longer, rest = divmod(max(size) * shorter, min(size))
    if rest or (longer - 48) % 2 or (shorter - 48) % 2:
        # The longer side, or half of what is cut, is no whole number: torchvision rounds it another way.
        assert np.abs(found.astype(int) - expected).mean() < 3
    else:
        assert np.array_equal(found, expected)


def test_a_run_mixes_every_part_of_every_step_anew_and_ends_with_the_same_bytes_again(folder, monkeypatch):
    images = {"dataset": "folder", "root": "images", "val_fraction": 0.2, "folds": None, "limit": None, "shift": 0}
    given = {f"data.{key}": value for key, value in (images | {"augment": "timm", "mixup": 0.8}).items()}
    given |= {"train.batch_size": 8, "train.device_batch": 4, "train.epochs": 1}
    p = config.load("smoke", strategy="upper", path=ROOT / "params.yaml", given=given)
    d = data.load(p.data)
    assert d.train.augmentation == timm_transforms.TimmAugmentation(p.data, d.mean, d.std)
    seeds, make = [], timm_transforms.mixer

    def noting(*how):
        mix = make(*how)
        return lambda images, labels, seed: seeds.append(seed) or mix(images, labels, seed)

    monkeypatch.setattr(timm_transforms, "mixer", noting)
    first = fit.fit(p, seed=0)
    fit.forget(p, seed=0)
    assert fit.fit(p, seed=0).model_bytes == first.model_bytes
    half = len(seeds) // 2
    assert seeds[:half] == seeds[half:]
    assert len(set(seeds)) == half >= 2 * 16 // 8


@pytest.mark.parametrize("policy", ["nonsense", "rand-m9-w0", "rand-m1e9"])
def test_a_policy_that_timm_does_not_know_is_refused(policy):
    augmentation = bridge.Bridged(asked(rand_augment=policy), MEAN, STD)
    with pytest.raises(InputError, match=f"^data.rand_augment: '{policy}': timm knows no such policy"):
        augmentation([Image.new("RGB", (48, 48))], [0])


def test_an_auto_augment_policy_posterises_to_black_as_random_ones_do():
    augmentation = bridge.Bridged(asked(rand_augment="v0"), MEAN, STD)
    assert augmentation(40 * [Image.new("RGB", (48, 48))], range(40)).shape == (40, 3, 48, 48)

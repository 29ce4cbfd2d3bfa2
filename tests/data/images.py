"""What the tests of data share: the parameters of the digits, small images, and errors of one line."""

import numpy as np
from PIL import Image
from refusals import refusal

DIGITS = {"dataset": "digits", "root": None, "img_size": 8, "val_fraction": 0.1, "split_seed": 0, "limit": None}
DIGITS |= {"eval_crop": 1.0, "normalise": "train", "workers": 0, "memory_mib": 4096, "augment": "tensor", "shift": 1}
DIGITS |= {"flip": False, "erase": 0.0, "mixup": 0.0, "cutmix": 0.0, "rand_augment": None, "color_jitter": 0.0}


def photograph(seed: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    """Smooth colours, so that JPEG keeps them nearly as they are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def one_line(action, *parts: str) -> None:
    """An action is refused in one line that has these parts."""
    message = refusal(action)
    for part in parts:
        assert part in message

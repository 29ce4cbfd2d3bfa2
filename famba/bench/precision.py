"""bfloat16 against float32: the time of a training step, and whether the loss falls alike.

Under autocast the matrix products, convolutions, scans and gates take and give bfloat16; weights, the residual stream,
norms, states of the scan and losses stay float32.
"""

from typing import Any

import numpy as np
import torch
from torch.nn import functional

from famba import data
from famba.bench.model import Training
from famba.bench.setting import Setting
from famba.bench.timing import ratio
from famba.config import DataParams
from famba.data import augment
from famba.kernels.precision import autocast
from famba.models.vim import create_model
from famba.training import optim

_DIGITS = DataParams(
    dataset="digits", root=None, img_size=8, val_fraction=0.1, split_seed=0, limit=None, eval_crop=1.0,
    normalise="train", augment="tensor", shift=1, flip=False, erase=0.0, mixup=0.0, cutmix=0.0, rand_augment=None,
    color_jitter=0.0, workers=0, memory_mib=4096,
)  # fmt: skip
_BATCH = 32
_POINTS = 20  # of a curve


def bench_precision(setting: Setting) -> list[dict[str, Any]]:
    """A training step in fp32 and in bf16, in turn; `faster` is the time in fp32 over the row's."""
    calls = {precision: Training(setting, precision=precision).step for precision in ("fp32", "bf16")}
    found = setting.times(calls, rounds=setting.rounds)
    return [{"precision": name, **row, **ratio(found["fp32"], row, "faster")} for name, row in found.items()]


def bench_curves(setting: Setting) -> list[dict[str, Any]]:
    """The training loss of vim_nano on digits, each point the mean of a twentieth of all steps.

    Beside fp32 and bf16 it is fp32 with the images in another order, which shows how far apart two curves lie whose
    difference means nothing.
    """
    curves = {
        "fp32": loss_curve("fp32", steps=setting.curve_steps),
        "bf16": loss_curve("bf16", steps=setting.curve_steps),
        "fp32, other order": loss_curve("fp32", steps=setting.curve_steps, order=1),
    }
    points = {name: np.array(curve).reshape(_POINTS, -1).mean(1) for name, curve in curves.items()}
    each = setting.curve_steps // _POINTS
    return [{"step": (i + 1) * each, **{name: float(x[i]) for name, x in points.items()}} for i in range(_POINTS)]


def loss_curve(precision: str, *, steps: int, depth: int | None = None, order: int = 0) -> list[float]:
    """The loss of every training step of vim_nano on digits, from the same weights every time.

    Args:
        depth: of the model; its own if not given.
        order: seed of the order and the shifts of the images.
    """
    torch.manual_seed(0)
    images = data.load(_DIGITS)
    model = create_model("vim_nano", num_classes=len(images.classes), depth=depth)
    optimiser = torch.optim.AdamW(optim.parameter_groups(model, 0.05), lr=1e-3, fused=True)
    generator = torch.Generator().manual_seed(order)
    losses: list[float] = []
    while len(losses) < steps:
        for batch, labels in data.batches(images.train, _BATCH, generator=generator, drop_last=True):
            draws = augment.draw(_DIGITS, _BATCH, generator, classes=len(images.classes))
            shown, _ = augment.apply(batch, labels, draws, images.mean, images.std, 0.0)
            with autocast(batch.device, precision):
                logits = model(shown).float()
            loss = functional.cross_entropy(logits, labels)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            losses.append(loss.item())
            if len(losses) == steps:
                break
    return losses

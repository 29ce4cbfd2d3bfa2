"""The optimiser's settings: what decays, and the learning rate of each step.

AdamW with a linear warm-up and half a cosine (Famba-V section 4.1 and the DeiT recipe that Vim follows).
"""

import inspect
import math
from typing import Any

import torch
from torch import nn

from famba.models.vim import VisionMamba
from famba.params import TrainParams


class AdamW(torch.optim.AdamW):
    """torch's own, without what imports torch's compiler before each of these: nothing here is compiled by it."""

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)


def peak_lr(p: TrainParams) -> float:
    """The learning rate at the end of the warm-up: `lr`, scaled linearly by the batch if it is meant for another.

    Source: Goyal et al. 2017, arXiv:1706.02677; the released scripts of Vim scale 5e-4 by batch / 512.
    """
    return p.lr if p.lr_batch is None else p.lr * p.batch_size / p.lr_batch


def learning_rate(p: TrainParams, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step, counted from 0: a linear rise from 0, then half a cosine down to min_lr."""
    warmup, total, peak = p.warmup_epochs * steps_per_epoch, p.epochs * steps_per_epoch, peak_lr(p)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return p.min_lr + (peak - p.min_lr) * (1 + math.cos(math.pi * done)) / 2


def parameter_groups(model: VisionMamba, weight_decay: float) -> list[dict[str, Any]]:
    """Weights that decay, and those that do not: norms, biases, A_log, D, class token and position embedding."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    named = model.no_weight_decay()
    for name, weight in model.named_parameters():
        (kept if name in named or weight.dim() == 1 else decayed).append(weight)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]

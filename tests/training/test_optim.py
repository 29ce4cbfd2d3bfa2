"""The optimiser's settings, by hand."""

import dataclasses
import math

import pytest

from famba import config
from famba.training import fit
from famba.training.optim import learning_rate, parameter_groups, peak_lr

SMOKE = config.load("smoke", strategy="upper")


def test_the_learning_rate_rises_linearly_then_falls_along_a_cosine():
    p = dataclasses.replace(SMOKE.train, epochs=4, warmup_epochs=1, lr=1.0, min_lr=0.2)
    rates = [learning_rate(p, step, 4) for step in range(16)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[10] == pytest.approx(0.6)  # half way between lr and min_lr, half way down
    assert rates[15] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * 11 / 12)) / 2)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_a_rate_that_is_meant_for_another_batch_is_scaled_by_it():
    p = dataclasses.replace(SMOKE.train, lr=5e-4, lr_batch=512, batch_size=1024, warmup_epochs=1)
    assert peak_lr(p) == pytest.approx(1e-3)
    assert learning_rate(p, 0, 10) == pytest.approx(1e-4)
    assert learning_rate(p, 10, 10) == pytest.approx(1e-3)
    assert peak_lr(dataclasses.replace(p, lr_batch=None)) == 5e-4


def test_norms_biases_and_what_the_scan_and_the_positions_are_made_of_do_not_decay():
    model = fit.build(SMOKE, classes=10, seed=0)
    decayed, kept = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert len(names) == len(decayed["params"]) + len(kept["params"])
    parts = {"in_proj", "conv1d", "x_proj", "dt_proj", "conv1d_b", "x_proj_b", "dt_proj_b", "out_proj"}
    layers = {f"layers.{layer}.mixer.{part}.weight" for layer in range(4) for part in parts}
    assert {names[id(weight)] for weight in decayed["params"]} == {"patch_embed.proj.weight", "head.weight"} | layers

"""The estimate of a sweep's time: arithmetic, models, and refused arguments."""

import dataclasses
from unittest.mock import Mock

import pytest
import torch
from refusals import refused

from famba import config
from famba.bench import estimate
from famba.cli import main
from famba.data import timm_transforms
from famba.training.trainer import Trainer


def test_the_hours_of_both_models_and_each_strategy_by_hand(monkeypatch):
    """A step takes 100 ms in each strategy of each model."""

    def measured(p, steps, images):
        epoch_s = images // p.train.batch_size * 0.1
        row = {"step_ms": 100.0, "least_ms": 90.0, "peak_mib": 9.0, "epoch_s": epoch_s, "epochs": p.train.epochs}
        row |= {"hours": p.train.epochs * epoch_s / 3600, "batch_size": 128, "precision": p.train.precision}
        row |= {"profile": p.profile, "device": "cpu: one", "versions": "torch 2"}
        return {"model": p.model.name, "strategy": p.strategy, **row}

    monkeypatch.setattr(estimate, "_row", measured)
    # 45,000 // 128 = 351 steps of 0.1 s are 35.1 s an epoch, 300 epochs 2.925 h, five strategies of two models 29.25 h
    found, strategies = estimate.estimate("paper", device="cpu"), config.load_sweep().strategies
    assert [(row["model"], row["strategy"]) for row in found] == [(m, s) for m in estimate.MODELS for s in strategies]
    assert [row["epoch_s"] for row in found] == pytest.approx([35.1] * len(found))
    assert [row["hours"] for row in found] == pytest.approx([2.925] * len(found))
    said = estimate.text(found)
    count = len(strategies)
    assert f"vim_tiny, {count} strategies: {2.925 * count:.1f} hours" in said
    assert f"vim_small, {count} strategies: {2.925 * count:.1f} hours" in said
    assert f"total for one seed: {2 * 2.925 * count:.1f} hours" in said
    assert "profile paper: 300 epochs, 128 images a step, fp32; cpu: one; torch 2\n" in said


def test_the_command_times_the_steps_of_training_on_the_smoke_profile(capsys):
    assert main(["estimate", "--profile", "smoke", "--steps", "2", "--images", "128"]) == 0
    printed = capsys.readouterr().out
    assert "profile smoke: 2 epochs, 32 images a step" in printed
    strategies = config.load_sweep().strategies
    for strategy in strategies:
        assert f" {strategy} " in printed
    assert f"vim_nano, {len(strategies)} strategies: " in printed
    assert "total for one seed: " in printed


def test_a_row_counts_whole_steps_of_the_images_and_fuses_as_its_strategy_says(monkeypatch):
    seen, step = [], Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda s, *rest: seen.append(s.token_counts) or step(s, *rest))
    row = estimate._row(config.load("smoke", strategy="upper"), 2, 100)
    assert row["epoch_s"] == pytest.approx(100 // 32 * row["step_ms"] / 1000)
    assert row["hours"] == pytest.approx(2 * row["epoch_s"] / 3600)
    assert row["least_ms"] <= row["step_ms"]
    assert seen[0][-1] < seen[0][0]


def test_the_papers_recipe_is_timed_without_timm_in_its_parts_and_with_mixed_labels(monkeypatch):
    p = config.load("paper", strategy="all")
    small = dataclasses.replace(
        p,
        data=dataclasses.replace(p.data, img_size=32),
        model=dataclasses.replace(p.model, depth=2, d_model=16, patch_size=8, stride=8),
        train=dataclasses.replace(p.train, batch_size=4, device_batch=2, device="cpu"),
        fusion=dataclasses.replace(p.fusion, r=2),
    )
    seen, step = [], Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda s, parts, *rest: seen.append((s, parts)) or step(s, parts, *rest))
    monkeypatch.setattr(timm_transforms, "mixer", Mock(side_effect=AssertionError("timm is not needed")))
    assert estimate._row(small, 2, 100)["step_ms"] > 0
    trainer, parts = seen[-1]
    assert [(images.shape, labels.shape) for images, labels in parts] == 2 * [((2, 3, 32, 32), (2, 100))]
    assert trainer.ema is not None


DEVICES = f"train.device: 'cuda:99'; torch sees {torch.cuda.device_count()} CUDA devices here"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--profile", "paper", "--device", "cuda:99"], f"{DEVICES}; to try it here: --device cpu"),
        (["--profile", "paper", "--device", "tpu"], "'tpu': must be auto, cpu, cuda or cuda:N; to try"),
        (["--profile", "smoke", "--images", "3"], "images: 3: must be at least train.batch_size, 32"),
        (["--profile", "smoke", "--steps", "1"], "steps: 1: must be at least 2"),
        (["--profile", "evaluate"], "train.epochs: 0: profile 'evaluate' trains nothing"),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(options, said, capsys):
    assert said in refused(capsys, "estimate", *options)


def test_too_little_memory_is_said_with_model_and_batch(monkeypatch, capsys):
    monkeypatch.setattr(estimate, "_row", Mock(side_effect=torch.OutOfMemoryError))
    said = refused(capsys, "estimate", "--profile", "paper", "--device", "cpu")
    assert said == "famba: vim_tiny, none: 128 images at once need more memory than there is\n"

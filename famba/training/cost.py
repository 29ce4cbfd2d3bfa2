"""What a training step of each variant costs, measured in turn, in one process that does nothing else.

Steps that take turns are slowed alike by what slows the machine; so ratios hold where a run's own wall-clock does not.
"""

import dataclasses
import random
import time
from collections.abc import Mapping
from typing import Any

import pandas as pd
import psutil
import torch

from famba import config, data
from famba.data import Dataset
from famba.errors import InputError
from famba.kernels import precision
from famba.params import Params
from famba.profiling import environment, flops, timing
from famba.training import fit
from famba.training.distributed import Processes
from famba.training.trainer import Trainer

_WARMUP = 2  # rounds: the first step makes the optimiser's moments
_OTHERS_PERCENT = 10  # of all CPUs, above which other processes disturb a measurement


@precision.settings_restored()
def measure(params: Mapping[str, Params], *, rounds: int, images: Dataset | None = None) -> pd.DataFrame:
    """Time a training step of every variant in every round, all on the same batch of training images.

    Each round has an order of its own, drawn from its number, since a step finds the caches as the one before it left
    them. The learning rate is 0, which changes no time; loading and augmentation are left out. Also where a profile
    trains nothing.

    Args:
        params: of each variant, by the name that its rows have as their strategy.
        rounds: after two for warming up.
        images: instead of the variants' data set.

    Returns:
        One row per variant and round: strategy, round, step_time_ms. The same in all rows of a variant: batch_size,
        epochs, peak_memory_mib, flops_per_image, tokens_left, r (the largest of a layer), first_layer (that fuses; 0 if
        none does); in all rows: profile, device, threads, versions, and disturbed, which says how the machine was busy,
        "" if it was not. The spread of the times does not tell: on a virtual machine they spread when it is idle, too.

    Raises:
        InputError: fewer than 2 rounds; variants that differ in data or batch size.
    """
    if rounds < 2:
        raise InputError(f"rounds: {rounds}; must be 2 or more, for an interval")
    (name, first), *others = params.items()
    for other, p in others:
        if (p.data, p.train.batch_size) != (first.data, first.train.batch_size):
            raise InputError(f"{other}: other data or train.batch_size than {name}; steps are timed on one batch")
    device = fit._device(first.train)
    if first.train.threads is not None:
        torch.set_num_threads(first.train.threads)
    precision.configure()
    images = data.to_device(images or data.load(first.data), device)
    steps: dict[str, Trainer] = {}
    for name, p in params.items():
        alone = dataclasses.replace(p.train, init_from=None, epochs=max(1, p.train.epochs), processes=1)
        model = fit.build(p, classes=len(images.classes), seed=0).to(device)
        p, folder = dataclasses.replace(p, train=alone), config.root() / "build" / "cost"
        steps[name] = Trainer(p, 0, model, images, Processes(device), folder)
        steps[name].measure_memory()
        model.train()
    batch = next(next(iter(steps.values()))._steps(torch.Generator().manual_seed(0)))
    clocks = {name: timing.StepClock(device, warmup_steps=_WARMUP) for name in steps}
    psutil.cpu_percent()  # the next call gives the mean from here on
    began, used = time.perf_counter(), time.process_time()
    for number in range(_WARMUP + rounds):
        for name in random.Random(number).sample(list(steps), len(steps)):
            with clocks[name].step():
                steps[name]._step(batch, 0.0, number)
    own_percent = 100 * (time.process_time() - used) / (time.perf_counter() - began) / (psutil.cpu_count() or 1)
    others_percent = psutil.cpu_percent() - own_percent
    found = environment.environment(device)
    setting = {
        "profile": first.profile,
        "device": found["device"],
        "threads": found["threads"],
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(found["versions"].items())),
        "disturbed": f"other processes used {others_percent:.0f}% of the CPU"
        if others_percent > _OTHERS_PERCENT
        else "",
    }
    rows: list[dict[str, Any]] = []
    for name, trainer in steps.items():
        schedule = trainer.model.schedule
        cost = flops.analyse(trainer.model.config, schedule, options=trainer.model.options)
        own = {
            "batch_size": trainer.p.train.batch_size,
            "epochs": trainer.p.train.epochs,
            "peak_memory_mib": trainer.peak_memory_mib,
            "flops_per_image": cost.flops,
            "tokens_left": cost.token_counts[-1],
            "r": max(schedule),
            "first_layer": next((layer for layer, r in enumerate(schedule, start=1) if r), 0),
        }
        times = enumerate(clocks[name].step_time_ms, start=1)
        rows += [{"strategy": name, "round": i, "step_time_ms": ms, **own, **setting} for i, ms in times]
    return pd.DataFrame(rows)

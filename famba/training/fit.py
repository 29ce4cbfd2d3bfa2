"""Training: from parameters to a finished run.

What happens from step to step is famba.training.trainer's; several processes on one run are
famba.training.distributed's.
"""

import contextlib
import dataclasses
import hashlib
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from famba import config, data
from famba.data import Dataset
from famba.errors import InputError
from famba.kernels import precision
from famba.kernels.triton import runtime
from famba.models import pretrained
from famba.models.presets import sizes
from famba.models.vim import VisionMamba, create_model, kernels
from famba.params import Params, TrainParams
from famba.profiling import environment
from famba.storage import provenance, runs
from famba.storage.files import claimed, json_bytes, write_atomic
from famba.storage.runs import Run
from famba.training import distributed
from famba.training.callbacks import Events
from famba.training.trainer import Callback, Trainer

LIVE_HISTORY = "history.csv"  # beside the checkpoints, rewritten after every epoch

_log = logging.getLogger(__name__)


@precision.settings_restored()
def fit(p: Params, *, seed: int, progress: bool = False, callbacks: Sequence[Callback] = ()) -> Run:
    """Train one model from its parameters to a finished run; the caller writes it (`runs.write`).

    A checkpoint is kept for each epoch under build/checkpoints, named by all parameters, the seed, the code and the
    kernels that run it. A run that was killed goes on from there, and ends with the same metrics, bit for bit on a CPU;
    where other kernels would run it, it starts anew and says so. `forget` removes them. While another process trains
    this very run, this one waits, and says so.

    With `train.init_from` the weights of that file are where it starts, and their normalisation of the images is kept.
    With `train.epochs` 0 as well they are evaluated as they are, fused by the strategy's schedule.

    With `train.processes` above 1 so many are started here, each of which comes to this function again; while such a
    run is being made, starting it once more is refused. Under torchrun all of its processes call this, and each returns
    the same run; one of them (rank 0) should write it.

    Args:
        seed: of the initial weights, the order of the images and their augmentation.
        progress: show a bar for each epoch on stderr.
        callbacks: each is called after every epoch, with the history and with the cost so far.

    Raises:
        InputError: parameters that do not fit each other, the data, or the weights to start from, before anything is
            trained.
        TrainingError: a loss or gradient that is not finite (names step, learning rate, layer and the last good
            checkpoint), tokens that were not fused as the schedule promises, or one of several processes was stopped
            or lost.
    """
    if p.train.processes > 1 and not distributed.started():
        return _fit_in_processes(p, seed, progress, callbacks)
    if distributed.started() and p.train.processes not in (1, distributed.started()):
        raise InputError(f"train.processes: {p.train.processes}; torchrun has started {distributed.started()}")
    device = _device(p.train)
    if p.train.threads is not None:
        torch.set_num_threads(p.train.threads)
    precision.configure()
    processes = distributed.join(device)
    images = data.load(p.data, seed=seed)
    model = build(p, classes=len(images.classes), seed=seed).to(processes.device)
    checkpoints, code = folder(p, seed=seed), made_of(p, seed=seed)
    if processes.rank == 0 and not any(checkpoints.glob("epoch-*")):
        for other in sorted({path.parent for path in checkpoints.parent.glob(f"{p.digest(seed)}-*/epoch-*")}):
            _log.warning("%s: not continued: of other code, kernels, processor or weights to start from", other)
    mine = claimed(checkpoints / "lock", f"{checkpoints}: another process is training this run", wait=True)
    with mine if processes.rank == 0 else contextlib.nullcontext():
        images = data.to_device(_start(p, seed, model, images), processes.device)
        trainer = Trainer(p, seed, model, images, processes, checkpoints, progress=progress)
        if folder(p, seed=seed) != checkpoints:
            raise InputError(f"{config.init_path(p, seed)}: changed while it was read")
        trainer.restore()
        if processes.rank == 0:
            _log.info("%s; its history so far: %s", trainer.describe(), checkpoints / LIVE_HISTORY)
        with _callbacks(p, seed, trainer, callbacks) as trainer.callbacks, processes.connected():
            if p.train.epochs:
                trainer.measure_memory()
            else:
                trainer.only_evaluate()
            while trainer.epoch < p.train.epochs:
                trainer.run_epoch()
            run = trainer.finish()
            return dataclasses.replace(run, cost={**run.cost, "made_of": code})


def build(p: Params, *, classes: int, seed: int) -> VisionMamba:
    """The untrained model of a run, fusing by its strategy's schedule."""
    torch.manual_seed(seed)
    given = {**dataclasses.asdict(p.model), "img_size": p.data.img_size}
    model = create_model(**given, num_classes=classes, backend=p.train.backend)
    model.set_fusion(p.schedule(model.depth), p.options)
    return model


def folder(p: Params, *, seed: int) -> Path:
    """Where the checkpoints of a run are: one made of something else, or run by other kernels, has another folder."""
    launched = _launched(p, seed)
    return launched.with_name(f"{launched.name}-{_kernel_digest(p)}")


def made_of(p: Params, *, seed: int) -> str:
    """What a run is made of, on whichever machine: parameters, seed, code and weights to start from, as one name.

    Of a run for the CPU the code is that of `provenance.of_training`; what was found out there says nothing of a GPU's
    kernels.
    """
    code = provenance.of_training() if p.train.device == "cpu" else provenance.of_module(__name__)
    return _made_of(p, seed, code)


def _launched(p: Params, seed: int) -> Path:
    """Where the run of several processes passes between them and the one that starts them, which touches no GPU."""
    return config.root() / "build" / "checkpoints" / _made_of(p, seed, provenance.of_module(__name__))


def _made_of(p: Params, seed: int, code: str) -> str:
    start = config.init_sha256(p, seed)
    return f"{p.digest(seed)}-{code}" + ("" if start is None else f"-{start[:12]}")


def forget(p: Params, *, seed: int) -> None:
    """Remove the checkpoints of a run that is finished and written."""
    for each in (folder(p, seed=seed), _launched(p, seed)):
        if each.exists():
            shutil.rmtree(each)


def _fit_in_processes(p: Params, seed: int, progress: bool, callbacks: Sequence[Callback]) -> Run:
    """The run as `train.processes` processes make it, each by `fit`, and as the first of them writes it."""
    if _device(p.train).type == "cuda" and p.train.processes > torch.cuda.device_count():
        raise InputError(
            f"train.processes: {p.train.processes}, each on a GPU; torch sees {torch.cuda.device_count()} CUDA devices"
        )
    mine, last_ns = _launched(p, seed), 0
    out = mine / "run"

    def run_callbacks() -> None:
        nonlocal last_ns
        found = {path.stat().st_mtime_ns: path for path in mine.parent.glob(f"{mine.name}-*/{LIVE_HISTORY}")}
        if callbacks and found and (changed_ns := max(found)) != last_ns:
            last_ns, history = changed_ns, runs.read_history(found[changed_ns])
            for callback in callbacks:
                callback(history, {})

    write_atomic(mine / "asked.json", json_bytes(p.as_dict()))
    arguments = ["train", "--resolved", mine / "asked.json", "--seed", seed, "--out", out, "--keep-checkpoints"]
    command = [*map(str, arguments), "--force"]
    distributed.launch(command, p.train.processes, quiet=not progress, on_poll=run_callbacks)
    run_callbacks()
    return Run(**vars(runs.read(out)), model_bytes=(out / runs.MODEL_FILE).read_bytes())


@contextlib.contextmanager
def _callbacks(p: Params, seed: int, trainer: Trainer, given: Sequence[Callback]) -> Iterator[list[Callback]]:
    """What is called after each epoch: history.csv beside the checkpoints, the given ones, TensorBoard's events."""

    live = trainer.folder / LIVE_HISTORY  # a function that held the trainer would keep its memory, in a cycle

    def write_history(history: Sequence[Mapping[str, Any]], cost: Mapping[str, Any]) -> None:
        write_atomic(live, runs.history_bytes(history))

    callbacks: list[Callback] = [write_history, *given]
    with contextlib.ExitStack() as closing:
        if p.train.tensorboard and trainer.processes.rank == 0:
            name = f"{p.profile}-{runs.run_name(p.strategy, seed)}-{trainer.folder.name}"
            events = Events(config.root() / "build" / "tensorboard" / name, start_epoch=trainer.epoch)
            closing.callback(events.close)
            callbacks.append(events)
        yield callbacks


def _start(p: Params, seed: int, model: VisionMamba, images: Dataset) -> Dataset:
    """Put the weights to start from into the model, if there are any; the images, normalised as those know them."""
    path = config.init_path(p, seed)
    if path is None:
        return images
    origin = pretrained.take_weights(model, path)
    if p.train.epochs == 0 and origin.num_classes != len(images.classes):
        raise InputError(
            f"{path}: its head tells {origin.num_classes} classes apart, data.dataset {p.data.dataset!r} has "
            f"{len(images.classes)}, and train.epochs 0 trains no new head"
        )
    if p.train.epochs == 0 and origin.classes not in (None, images.classes):
        raise InputError(f"{path}: trained on other classes than data.dataset {p.data.dataset!r} has: {origin.classes}")
    return data.renormalised(images, origin.mean, origin.std)


def _kernel_digest(p: Params) -> str:
    """What runs the code on this machine, on which the bits depend as well: a run never mixes two of them."""
    device, m = _device(p.train), p.model
    given = {"patch_size": m.patch_size, "stride": m.stride, "d_model": m.d_model, "d_state": m.d_state}
    built = sizes(m.name, img_size=p.data.img_size, **given) | {"cls_position": m.cls_position}
    used = kernels(p.train.backend, device, built, p.train.precision)
    compiler = runtime.triton.__version__ if "triton" in used.values() else None
    return hashlib.sha256(json_bytes([used, environment.instruction_set(device), compiler])).hexdigest()[:12]


def _device(t: TrainParams) -> torch.device:
    name = t.device if t.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"train.device: {t.device!r}; torch sees {torch.cuda.device_count()} CUDA devices here")
    return device

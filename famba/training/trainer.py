"""The training loop of one run, its checkpoints, and resuming after an interruption.

`b` batch, `h` and `w` pixels. Everything random comes from the run's seed and the epoch's number, so a run that was
killed resumes after its last epoch and ends with the same bytes. Where several processes train together, each takes its
rows of the same batch, whose augmentation is drawn for the whole batch; so their number changes a result by rounding
only.
"""

import contextlib
import copy
import dataclasses
import itertools
import logging
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from famba import config, data
from famba.data import Dataset, augment, timm_transforms
from famba.data.loader import Streamed
from famba.errors import InputError, TrainingError
from famba.kernels.precision import autocast, first_not_finite, nondeterministic, uses_tf32
from famba.models import saved
from famba.models.vim import VisionMamba, kernels
from famba.params import Params
from famba.profiling import environment, flops, memory, timing
from famba.storage import checkpoint
from famba.storage.files import write_atomic
from famba.storage.runs import Run
from famba.training import cuda_graph
from famba.training.distributed import Processes
from famba.training.optim import AdamW, learning_rate, parameter_groups, peak_lr

_log = logging.getLogger(__name__)
_MIB = 2**20
_FORWARD_PASSES = 50  # timed, where nothing is trained
_KEPT = 2  # checkpoints: the newest, and the one before in case the newest cannot be read
_TIMES = ("epoch_time_s", "step_time_ms", "data_time_ms")
_DESCRIBED = ("epoch", "history", "validation", "chosen", *_TIMES, "peak_memory_mib")  # in a checkpoint, beside tensors

# The training images of a step, varied, and their labels: a class each, or a share of every class if they are mixed.
Part = tuple[Float[Tensor, "b 3 h w"], Tensor]
Callback = Callable[[Sequence[Mapping[str, Any]], Mapping[str, Any]], None]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: data.Split | Streamed,
    images: Dataset,
    *,
    batch_size: int,
    precision: str = "fp32",
    processes: Processes | None = None,
    correct: Float[Tensor, "n"] | None = None,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent and the mean cross-entropy over a split, without label smoothing.

    Top-5 is top-k over all classes where there are fewer than five. Several processes share the images, each of which
    counts once.

    Args:
        correct: where given, set to 1 for each image that is classified correctly and to 0 for all others.
    """
    model.eval()
    processes = processes or Processes(next(model.parameters(), torch.empty(0)).device)
    sums = torch.zeros(2, dtype=torch.float64, device=processes.device)
    first = torch.zeros(len(split), device=processes.device)
    rows = slice(processes.rank, None, processes.count)
    batches = data.batches(split, batch_size, rows=rows)
    for (batch, labels), place in zip(batches, first.split(batch_size), strict=True):
        if not len(labels):
            continue
        batch, labels = (x.to(processes.device, non_blocking=True) for x in (batch, labels))
        with autocast(batch.device, precision):
            logits = model(data.normalise(batch, images.mean, images.std)).float()
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        hits = logits.topk(min(5, logits.shape[-1])).indices == labels[:, None]
        sums += torch.stack([loss.double(), hits.sum().double()])
        place[rows] = hits[:, 0].float()
    loss, top5, *found = processes.sum(torch.cat([sums, first]).tolist())  # the one time that it waits for a GPU
    if correct is not None:
        correct.copy_(torch.tensor(found))
    n = len(split)
    return {"top1_percent": 100 * math.fsum(found) / n, "top5_percent": 100 * top5 / n, "loss": loss / n}


class Trainer:
    """One process's part in a run: everything that changes from step to step, and how it is kept.

    Args:
        model: on the device already.
        images: on the device already, as far as they lie in memory.
        folder: of the checkpoints.
        progress: show a bar for each epoch on stderr.

    Raises:
        InputError: a batch that the processes cannot share, or that there are too few images for.
        TrainingError: tokens that were not fused as the schedule promises.
    """

    def __init__(
        self,
        p: Params,
        seed: int,
        model: VisionMamba,
        images: Dataset,
        processes: Processes,
        folder: Path,
        *,
        progress: bool = False,
    ) -> None:
        self.p, self.seed, self.model, self.images, self.processes = p, seed, model, images, processes
        self.device, self.folder = processes.device, folder
        self.callbacks: Sequence[Callback] = ()  # each called with the history and the cost so far
        self.progress = progress and processes.rank == 0
        self.init_sha256 = config.init_sha256(p, seed)
        t = p.train
        if t.batch_size % (share := processes.count * (t.device_batch or 1)):
            raise InputError(
                f"train.batch_size: {t.batch_size}: must be a multiple of {processes.count} processes"
                + (f" times train.device_batch, {share}" if t.device_batch else "")
            )
        self.parts = 1 if t.device_batch is None else t.batch_size // share
        if t.cuda_graph and (reason := cuda_graph.unavailable(self.device, processes.count)):
            raise InputError(f"train.cuda_graph: true: {reason}")
        if t.batch_size > len(images.train):
            raise InputError(f"train.batch_size: {t.batch_size}; there are {len(images.train)} training images")
        if max(p.data.mixup, p.data.cutmix) and t.batch_size // (processes.count * self.parts) % 2:
            raise InputError(
                f"train.batch_size: {t.batch_size}: {t.batch_size // (processes.count * self.parts)} images at once in "
                "each process; data.mixup and data.cutmix take pairs, so that it must be even"
            )
        self.steps_per_epoch = len(images.train) // t.batch_size
        self.mixer = None
        if p.data.augment == "timm":
            self.mixer = timm_transforms.mixer(p.data, len(images.classes), t.label_smoothing)
        self.weights: list[Tensor] = list(model.parameters())
        groups = parameter_groups(model, t.weight_decay)
        self.optimiser = AdamW(groups, lr=t.lr, betas=t.betas, fused=True)
        self.ema = None
        if t.ema_decay is not None and t.epochs:
            # Not torch's AveragedModel: it counts its steps in a tensor, which it copies to the GPU and waits for.
            self.ema, self.average = copy.deepcopy(model), get_ema_multi_avg_fn(t.ema_decay)
        self.wrapped = processes.wrap(model)
        self.is_warmed_up = False
        self.given: list[Part] = []  # where a captured step reads its images and labels
        self.replay: Callable[[], tuple[Tensor, Tensor]] | None = None
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self.validation: dict[str, Any] = {"raw": None, "ema": None}
        self.best: dict[str, Tensor] = {}
        self.chosen: dict[str, Any] = {}
        self.epoch_time_s: list[float] = []
        self.step_time_ms: list[float] = []
        self.data_time_ms: list[float] = []
        self.peak_memory_mib: float | None = None
        self.token_counts = self._traced_token_counts()

    def run_epoch(self) -> None:
        """One pass over the training images, validation, and a checkpoint."""
        epoch = self.epoch + 1
        left = (self.p.train.epochs - self.epoch) * self.steps_per_epoch
        clock = timing.StepClock(self.device, warmup_steps=int(not self.is_warmed_up and self.steps_per_epoch > 1))
        self.is_warmed_up = True
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        self.model.train()
        loss_sum, hits, seen, lr = 0.0, 0, 0, 0.0
        bar = tqdm(
            clock.batches(self._steps(generator)),
            f"epoch {epoch}/{self.p.train.epochs}",
            self.steps_per_epoch,
            disable=not self.progress,
        )
        for index, parts in enumerate(bar):
            step = self.epoch * self.steps_per_epoch + index
            lr = learning_rate(self.p.train, step, self.steps_per_epoch)
            with clock.step():
                loss, correct = self._step(parts, lr, step)
            count = sum(len(images) for images, _ in parts)
            loss_sum, hits, seen = loss_sum + loss * count, hits + correct, seen + count
            if self.progress:
                bar.set_postfix(self._postfix(loss_sum / seen, 100 * hits / seen, clock, left - index - 1))
        loss_sum, hits, seen = self.processes.sum([loss_sum, hits, seen])
        self.epoch_time_s.append(clock.total_s)
        self.step_time_ms += clock.step_time_ms
        self.data_time_ms += clock.data_time_ms
        self.epoch = epoch
        learned = {"lr": lr, "train_loss": loss_sum / seen, "train_top1_percent": 100 * hits / seen}
        self.history.append({"epoch": epoch, **learned, **self._validate()})
        if self.processes.rank == 0:
            for callback in self.callbacks:  # before saving: a resumed run does not replay them
                callback(self.history, self._measured())
        self._save()

    @torch.no_grad()
    def only_evaluate(self) -> None:
        """Instead of epochs: the weights as they came, and what a forward pass costs in place of a training step."""
        self._validate()
        val = self.images.val
        size, count = min(self.p.train.batch_size, len(val)), min(self.steps_per_epoch, _FORWARD_PASSES)
        clock = timing.StepClock(self.device, warmup_steps=int(count > 1))
        again = itertools.chain.from_iterable(data.batches(val, size, drop_last=True) for _ in itertools.count())
        shown = torch.empty(0)
        for batch, _ in clock.batches(itertools.islice(again, count)):
            shown = data.normalise(batch.to(self.device), self.images.mean, self.images.std)
            with clock.step():
                self._logits(self.model, shown)
        self.step_time_ms, self.data_time_ms = clock.step_time_ms, clock.data_time_ms
        resident = [shown, *self.model.state_dict().values()]
        peak = memory.peak_memory(lambda: self._logits(self.model, shown), resident, self.device)
        self.peak_memory_mib = peak / _MIB

    def finish(self) -> Run:
        """Read the test split, once, with the weights that validation chose."""
        if self._traced_token_counts() != self.token_counts:
            raise TrainingError(f"the model's token counts changed while it trained: {self.token_counts} at first")
        self.model.load_state_dict(self.best)
        correct = torch.zeros(len(self.images.test))
        tested = self._evaluate(self.model, self.images.test, correct)
        assert self.images.test_ids is not None
        answers = ["-"] * (int(self.images.test_ids.max()) + 1)
        for i, right in zip(self.images.test_ids.tolist(), correct.tolist(), strict=True):
            answers[i] = str(int(right))
        metrics = {**tested, "chosen": self.chosen, "validation": self.validation}
        if self.init_sha256 is not None:
            metrics["init_sha256"] = self.init_sha256
        used = kernels(self.p.train.backend, self.device, self.model.config, self.p.train.precision)
        analysed = flops.analyse(self.model.config, self.model.schedule, options=self.model.options)
        measured = {
            **self._measured(),
            "train_time_s": math.fsum(self.epoch_time_s),
            "epoch_time_s": self.epoch_time_s,
            "flops_per_image": analysed.flops,
            "params_count": sum(weight.numel() for weight in self.model.parameters()),
            "processes": self.processes.count,
            "kernels": used,
            "tf32": uses_tf32(),
            "nondeterministic": nondeterministic(self.device, used["scan"]),
            "command": self._command(),
            **environment.environment(self.device),
        }
        identity = {"strategy": self.p.strategy, "seed": self.seed, "profile": self.p.profile}
        known = {key: list(getattr(self.images, key)) for key in ("classes", "mean", "std")}
        return Run(
            **identity,
            schedule=self.model.schedule,
            token_counts=self.token_counts,
            metrics=metrics,
            cost=measured,
            history=self.history,
            correct="".join(answers),
            params=self.p.as_dict(),
            model_bytes=saved.model_bytes(self.model, self.best, {**identity, **known}),
        )

    def restore(self) -> None:
        """Go on from the newest checkpoint that can be read, if there is one."""
        found = self._last_checkpoint() if self.processes.rank == 0 else None
        _, described = self.processes.from_first({}, found and found[1])
        if described is None:
            return
        tensors, _ = self.processes.from_first(found[0] if found else self._state(blank=True), None)
        self._load_state(tensors, described)
        if self.processes.rank == 0:
            _log.info("going on after epoch %d of %d", self.epoch, self.p.train.epochs)

    def measure_memory(self) -> None:
        """Peak memory of a training step, taken on a copy before training, so that it costs the run no time.

        It is the second step: by then the gradients' buffers and the optimiser's moments exist. It is called by Python;
        a graph's memory is as much, and stays its own.
        """
        if self.peak_memory_mib is not None:
            return
        p, alone = self.p, Processes(self.device)
        p = dataclasses.replace(p, train=dataclasses.replace(p.train, cuda_graph=False))
        probe = Trainer(p, self.seed, copy.deepcopy(self.model), self.images, alone, self.folder)
        probe.parts = self.parts
        size = p.train.batch_size // (self.processes.count * self.parts)
        labels = torch.arange(size, device=self.device) % len(self.images.classes)
        if p.data.mixup or p.data.cutmix:
            labels = functional.one_hot(labels, len(self.images.classes)).float()
        parts = [(self._noise(size), labels.clone()) for _ in range(self.parts)]  # a step has all of them at once
        probe.model.train()
        probe._step(parts, 0.0, 0)
        probe.optimiser.zero_grad(set_to_none=True)
        moments = (x for state in probe.optimiser.state.values() for x in state.values() if isinstance(x, Tensor))
        resident = [*itertools.chain(*parts), *probe.model.state_dict().values(), *moments]
        if probe.ema is not None:
            resident += probe.ema.state_dict().values()
        peak = memory.peak_memory(lambda: probe._step(parts, 0.0, 1), resident, self.device)
        self.peak_memory_mib = peak / _MIB

    def describe(self) -> str:
        """How the images of a step are shared, and the learning rate that goes with them."""
        t = self.p.train
        size = t.batch_size // (self.processes.count * self.parts)
        lr = f"{peak_lr(t):.3g}"
        if t.lr_batch is not None:
            lr += f" ({t.lr:.3g} x {t.batch_size} / {t.lr_batch})"
        return (
            f"a step takes {t.batch_size} images: {self.processes.count} processes x {self.parts} parts x {size} "
            f"images on {self.device.type}; {self.steps_per_epoch} steps an epoch, {t.epochs} epochs; peak learning "
            f"rate {lr}; {t.precision}"
        )

    def _steps(self, generator: torch.Generator) -> Iterator[list[Part]]:
        """The training images of one epoch, step by step: this process's share, in parts that are taken at once."""
        p, size = self.p, self.p.train.batch_size
        share = self.processes.share(size)
        length = (share.stop - share.start) // self.parts
        rows = [slice(i * length, (i + 1) * length) for i in range(self.parts)]
        batches = data.batches(self.images.train, size, generator=generator, drop_last=True, rows=share)
        for images, labels in batches:
            images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
            if self.mixer is not None:
                # A lambda for each part, as in the reference for each device.
                seeds = torch.randint(2**31, (self.processes.count, self.parts), generator=generator)
                own = seeds[self.processes.rank].tolist()
                yield [self.mixer(images[part], labels[part], seed) for part, seed in zip(rows, own, strict=True)]
                continue
            draws = augment.draw(p.data, size, generator, classes=len(self.images.classes))[share]
            fixed = self.images.mean, self.images.std, p.train.label_smoothing
            yield [augment.apply(images[part], labels[part], draws[part], *fixed) for part in rows]

    def _step(self, parts: Sequence[Part], lr: float, step: int) -> tuple[float, int]:
        """Forward, backward, optimiser: the mean loss of this process's images and how many are classified right."""
        t = self.p.train
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        loss, correct = self._loss_and_gradients(parts)
        limit = math.inf if t.clip_grad_norm is None else t.clip_grad_norm
        norm = nn.utils.clip_grad_norm_(self.weights, limit)
        value, length, hits = torch.stack([loss, norm, correct]).tolist()  # the one time that a step waits for a GPU
        # The norm is that of all processes' gradients, so that all of them stop, or none.
        if not (math.isfinite(length) and math.isfinite(value)):
            self._raise_not_finite(parts, value, length, lr, step)
        self.optimiser.step()
        if self.ema is not None and step == 0:
            self.ema.load_state_dict(self.model.state_dict())
        elif self.ema is not None:
            self.average(list(self.ema.parameters()), self.weights, step)
        return value, int(hits)

    def _loss_and_gradients(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
        """`_forward_backward` of a step's parts, by a CUDA graph if that is asked for."""
        if not self.p.train.cuda_graph:
            return self._forward_backward(parts)
        if self.replay is None:
            self.given = [(images.clone(), targets.clone()) for images, targets in parts]
            self.replay = cuda_graph.captured(lambda: self._forward_backward(self.given), self.device)
        for mine, part in zip(self.given, parts, strict=True):
            for place, x in zip(mine, part, strict=True):
                place.copy_(x)
        return self.replay()

    def _forward_backward(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
        """Forward and backward: the mean loss of this process's images and how many are classified correctly."""
        t = self.p.train
        self.optimiser.zero_grad(set_to_none=True)
        loss, correct = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for number, (images, targets) in enumerate(parts, start=1):
            waits = number < len(parts)
            with self.processes.no_sync(self.wrapped) if waits else contextlib.nullcontext():
                logits = self._logits(self.wrapped, images)
                # Mixed targets are smooth already.
                smoothing = 0.0 if targets.is_floating_point() else t.label_smoothing
                part = functional.cross_entropy(logits, targets, label_smoothing=smoothing) / len(parts)
                part.backward()
            loss = loss + part.detach()
            labels = targets.argmax(-1) if targets.is_floating_point() else targets
            correct = correct + (logits.argmax(-1) == labels).sum()
        return loss, correct

    def _raise_not_finite(self, parts: Sequence[Part], loss: float, norm: float, lr: float, step: int) -> None:
        """Name the module of the first value that is not finite; the weights are those before the step."""
        if not math.isfinite(norm):  # which all processes know: clipping has spoilt all gradients; they are made again
            self._forward_backward(parts)
        place = ""
        for images, _ in parts:
            with autocast(self.device, self.p.train.precision):
                place = place or first_not_finite(self.model, images)
        raise TrainingError(
            f"step {step + 1} (epoch {self.epoch + 1}): loss {loss}, gradient norm {norm} at learning rate {lr:.3g}, "
            f"first not finite in {place or 'the loss'}; {self._last_good()}"
        )

    def _last_good(self) -> str:
        newest = max(self.folder.glob("epoch-*.safetensors"), default=None)
        kept = f"the last good checkpoint is {newest}" if newest else "no checkpoint was written yet"
        return f"training stopped, {kept}"

    def _logits(self, model: nn.Module, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b classes"]:
        with autocast(self.device, self.p.train.precision):
            return model(images).float()

    def _evaluate(
        self, model: nn.Module, split: data.Split | Streamed, correct: Tensor | None = None
    ) -> dict[str, float]:
        how = {"precision": self.p.train.precision, "processes": self.processes, "correct": correct}
        size = 2 * self.p.train.batch_size // self.parts  # no activations are kept
        return evaluate(model, split, self.images, batch_size=size, **how)

    def _validate(self) -> dict[str, Any]:
        """Evaluate on the validation split, keep the weights if they are to be tested; what history says of it."""
        row: dict[str, Any] = {"ema_val_loss": None, "ema_val_top1_percent": None}
        for kind, model in {"raw": self.model, "ema": self.ema}.items():
            if model is None:
                continue
            scores = self._evaluate(model, self.images.val)
            if not math.isfinite(scores["loss"]):
                raise TrainingError(f"validation after epoch {self.epoch}: loss {scores['loss']}; {self._last_good()}")
            entry = {"epoch": self.epoch, **scores}
            before = self.validation[kind]
            best = entry if before is None or _is_better(entry, before["best"]) else before["best"]
            self.validation[kind] = {"last": entry, "best": best}
            if self._is_chosen(entry, best):
                self.chosen = {"weights": kind, "epoch": self.epoch}
                self.best = {key: t.detach().clone() for key, t in model.state_dict().items()}
            prefix = "ema_" if kind == "ema" else ""
            row |= {f"{prefix}val_loss": scores["loss"], f"{prefix}val_top1_percent": scores["top1_percent"]}
            if kind == "raw":
                row["val_top5_percent"] = scores["top5_percent"]
        return row

    def _is_chosen(self, entry: Mapping[str, Any], best: Mapping[str, Any]) -> bool:
        """Whether the weights just validated are those to test, should training end here."""
        if not self.chosen:
            return True
        rival = self.validation[self.chosen["weights"]]
        if self.p.train.choose == "last":
            return self.chosen["epoch"] < self.epoch or _is_better(entry, rival["last"])
        return best is entry and (rival["best"] is entry or _is_better(entry, rival["best"]))

    def _traced_token_counts(self) -> list[int]:
        """Token counts that a forward pass shows, which must be those that the schedule promises."""
        images, _ = next(iter(data.batches(self.images.val, min(2, len(self.images.val)))))
        two = data.normalise(images.to(self.device), self.images.mean, self.images.std)
        self.model.eval()
        with torch.no_grad(), autocast(self.device, self.p.train.precision):
            _, trace = self.model.forward_with_trace(two)
        if trace.token_counts != self.model.token_counts:
            raise TrainingError(
                f"strategy {self.p.strategy!r}: the trace shows {trace.token_counts} tokens; promised were "
                f"{self.model.token_counts}"
            )
        return trace.token_counts

    def _noise(self, count: int) -> Float[Tensor, "b 3 h w"]:
        """Images of noise, for what does not depend on what is in them."""
        side = self.p.data.img_size
        return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0)).to(self.device)

    def _measured(self) -> dict[str, float]:
        """What the steps so far have cost, those of all processes together."""
        step_ms, data_ms = statistics.median(self.step_time_ms), statistics.median(self.data_time_ms)
        assert self.peak_memory_mib is not None
        size = self.p.train.batch_size if self.p.train.epochs else min(self.p.train.batch_size, len(self.images.val))
        return {
            "step_time_ms": step_ms,
            "data_time_ms": data_ms,
            "throughput_img_s": 1000 * size / (step_ms + data_ms),
            "peak_memory_mib": self.peak_memory_mib,
        }

    def _postfix(self, loss: float, top1: float, clock: timing.StepClock, left: int) -> dict[str, str]:
        """What the bar says: of this epoch so far, and how long the whole run still takes."""
        shown = {"loss": f"{loss:.3f}", "top1": f"{top1:.1f}%"}
        if clock.step_time_ms:
            each_s = (statistics.fmean(clock.step_time_ms) + statistics.fmean(clock.data_time_ms)) / 1000
            shown |= {
                "img/s": f"{self.p.train.batch_size / each_s:.0f}",
                "run left": tqdm.format_interval(left * each_s),
            }
        if self.peak_memory_mib is not None:
            shown["MiB"] = f"{self.peak_memory_mib:.0f}"
        return shown

    def _command(self) -> str:
        asked = f"train --profile {self.p.profile} --strategy {self.p.strategy} --seed {self.seed}"
        if self.processes.count > 1:
            return f"torchrun --nproc-per-node {self.processes.count} -m famba {asked}"
        return f"python -m famba {asked}"

    def _save(self) -> None:
        """Rank 0 writes; all wait, so that no process is an epoch ahead of what is kept."""
        if self.processes.rank == 0:
            described = {"kind": "training state", "run": self.folder.name}
            described |= {name: getattr(self, name) for name in _DESCRIBED}
            path = self.folder / f"epoch-{self.epoch:05d}.safetensors"
            write_atomic(path, checkpoint.pack(self._state(), described))
            for old in sorted(self.folder.glob("epoch-*.safetensors"))[:-_KEPT]:
                old.unlink()
        self.processes.wait()

    def _last_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest checkpoint of this run that can be read: its tensors, and what it says of itself."""
        for path in sorted(self.folder.glob("epoch-*.safetensors"), reverse=True):
            try:
                tensors, described = checkpoint.unpack(path, "training state")
                checkpoint.check_state(path, tensors, self._state(blank=True))
                if (run := described.get("run")) != self.folder.name:  # put among this one's by hand
                    raise InputError(f"{path}: run: {run!r}; expected {self.folder.name!r}, so it is another run's")
            except InputError as error:
                _log.warning("%s; going on from the checkpoint before it", error)
                continue
            return tensors, described
        return None

    def _state(self, *, blank: bool = False) -> dict[str, Tensor]:
        """All that a checkpoint holds; blank: names and shapes alone, before the first step has made the moments."""
        weights = self.model.state_dict()
        state = {f"model.{key}": t for key, t in weights.items()}
        state |= {f"best.{key}": t for key, t in (weights if blank else self.best).items()}
        if self.ema is not None:
            state |= {f"ema.{key}": t for key, t in self.ema.state_dict().items()}
        moments = self.optimiser.state_dict()["state"]
        if blank:
            every = itertools.chain.from_iterable(group["params"] for group in self.optimiser.param_groups)
            moments = {i: {"step": torch.zeros(()), "exp_avg": x, "exp_avg_sq": x} for i, x in enumerate(every)}
        return state | {f"optimiser.{i}.{name}": t for i, kept in moments.items() for name, t in kept.items()}

    def _load_state(self, tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}

        self.model.load_state_dict(part("model."))
        self.best = {key: t.to(self.device) for key, t in part("best.").items()}
        if self.ema is not None:
            self.ema.load_state_dict(part("ema."))
        moments: dict[int, dict[str, Tensor]] = {}
        for key, t in part("optimiser.").items():
            index, name = key.split(".")
            moments.setdefault(int(index), {})[name] = t
        # torch knows which of them must lie beside the weights: AdamW's step where it is fused, too. Settings stay.
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": moments})
        for name in _DESCRIBED:
            setattr(self, name, described[name])


def _is_better(entry: Mapping[str, Any], than: Mapping[str, Any]) -> bool:
    """Higher accuracy; at equal accuracy the lower loss. Equal in both: the earlier one stays."""
    return (entry["top1_percent"], -entry["loss"]) > (than["top1_percent"], -than["loss"])

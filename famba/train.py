"""Training: seeding, optimiser, schedule, loop, resume.

`b` batch, `h` and `w` pixels. The recipe is AdamW with a linear warm-up and a cosine (Famba-V section 4.1 and the
DeiT recipe that Vim follows), without decay on what is not a matrix product's weight. Everything random comes from
the run's seed and the epoch's number, so a run that was killed goes on from its last epoch to the same bytes.
"""

import contextlib
import copy
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import logging
import math
import shutil
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from famba import checkpoint, cost, data, params, pretrained, strategies
from famba.data import Dataset, Split, Streamed
from famba.errors import InputError, TrainingError
from famba.model import VisionMamba, create_model
from famba.params import Params, TrainParams
from famba.records import Run

_log = logging.getLogger(__name__)
_MIB = 2**20
# With native/, what makes a result.
CODE = (
    "sources",
    "recipe",
    "stream",
    "data",
    "scan",
    "ops",
    "fusion",
    "strategies",
    "mixer",
    "model",
    "pretrained",
    "train",
)
_FORWARD_PASSES = 50  # timed, where nothing is trained
_KEPT = 2  # checkpoints: the newest, and the one before in case the newest cannot be read


def fit(p: Params, *, seed: int, progress: bool = False) -> Run:
    """Train one model from its parameters to a finished run; the caller writes it (`records.write`).

    A checkpoint is kept for each epoch under build/checkpoints, named by all parameters and the seed. A run that
    was killed goes on from there, and ends with the same metrics, bit for bit on a CPU. `forget` removes them.

    With `train.init_from` the weights of that file are where it starts, and their normalisation of the images is kept.
    With `train.epochs` 0 as well they are evaluated as they are, fused by the strategy's schedule.

    Args:
        seed: of the initial weights, the order of the images and their augmentation.
        progress: show a bar for each epoch on stderr.

    Raises:
        InputError: parameters that do not fit each other, the data, or the weights to start from, before anything is
            trained; another process that is training this very run.
        TrainingError: a loss or gradient that is not finite (names step, learning rate and the last good
            checkpoint), or tokens that were not fused as the schedule promises.
    """
    device = _device(p.train)
    if p.train.threads is not None:
        torch.set_num_threads(p.train.threads)
    torch.set_flush_denormal(True)  # a decaying scan makes denormals, which a CPU is slow at
    images = data.load(p.data)
    model = build(p, classes=len(images.classes), seed=seed).to(device)
    with _claimed(folder(p, seed=seed)) as claimed:
        images = _start(p, seed, model, images)
        session = _Session(p, seed, model, _on(images, device), device, progress)
        if session.folder != claimed:
            raise InputError(f"{p.init_path(seed)}: changed while it was read")
        session.restore()
        if p.train.epochs:
            session.measure_memory()
        else:
            session.only_evaluate()
        while session.epoch < p.train.epochs:
            session.run_epoch()
        return session.finish()


def build(p: Params, *, classes: int, seed: int) -> VisionMamba:
    """The untrained model of a run, fusing by its strategy's schedule.

    Raises:
        InputError: sizes that do not fit each other, or a schedule that removes more tokens than there are.
    """
    torch.manual_seed(seed)
    model = create_model(
        p.model.name,
        num_classes=classes,
        img_size=p.data.img_size,
        patch_size=p.model.patch_size,
        stride=p.model.stride,
        depth=p.model.depth,
        d_model=p.model.d_model,
        d_state=p.model.d_state,
        cls_position=p.model.cls_position,
        pool=p.model.pool,
        average_directions=p.model.average_directions,
        backend=p.train.backend,
    )
    model.set_fusion(strategies.from_rule(p.strategy, p.fusion, depth=model.depth), p.options)
    return model


def folder(p: Params, *, seed: int) -> Path:
    """Where the checkpoints of a run are: other parameters, weights to start from or code are another folder."""
    start = p.init_sha256(seed)
    name = f"{p.digest(seed)}-{_code_digest()}" + ("" if start is None else f"-{start[:12]}")
    return params.root() / "build" / "checkpoints" / name


def forget(p: Params, *, seed: int) -> None:
    """Remove the checkpoints of a run that is finished and written."""
    if folder(p, seed=seed).exists():
        shutil.rmtree(folder(p, seed=seed))


def learning_rate(p: TrainParams, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step, counted from 0: a linear rise from 0, then half a cosine down to min_lr."""
    warmup, total = p.warmup_epochs * steps_per_epoch, p.epochs * steps_per_epoch
    if step < warmup:
        return p.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return p.min_lr + (p.lr - p.min_lr) * (1 + math.cos(math.pi * done)) / 2


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights that decay, and those that do not: norms, biases, A_log, D, class token and position embedding."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, weight in model.named_parameters():
        scanned = name.rsplit(".", 1)[-1] in ("A_log", "A_b_log", "D", "D_b", "cls_token", "pos_embed")
        (kept if scanned or weight.dim() == 1 else decayed).append(weight)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


@torch.no_grad()
def evaluate(
    model: nn.Module, split: Split | Streamed, images: Dataset, *, batch_size: int, precision: str = "fp32"
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent and the mean cross-entropy over a split, without label smoothing.

    Top-5 is top-k over all classes where there are fewer than five.
    """
    model.eval()
    loss, top1, top5 = 0.0, 0, 0
    for batch, labels in data.batches(split, batch_size):
        with _autocast(batch.device, precision):
            logits = model(data.normalise(batch, images.mean, images.std)).float()
        loss += functional.cross_entropy(logits, labels, reduction="sum").item()
        hits = logits.topk(min(5, logits.shape[-1])).indices == labels[:, None]
        top1 += int(hits[:, 0].sum())
        top5 += int(hits.sum())
    n = len(split)
    return {"top1_percent": 100 * top1 / n, "top5_percent": 100 * top5 / n, "loss": loss / n}


class _Session:
    """One process's part in a run: everything that changes from step to step, and how it is kept."""

    def __init__(
        self, p: Params, seed: int, model: VisionMamba, images: Dataset, device: torch.device, progress: bool
    ) -> None:
        self.p, self.seed, self.model, self.images, self.device = p, seed, model, images, device
        self.progress = progress
        self.folder, self.init_sha256 = folder(p, seed=seed), p.init_sha256(seed)
        t = p.train
        groups = parameter_groups(model, t.weight_decay)
        self.optimiser = torch.optim.AdamW(groups, lr=t.lr, betas=t.betas, fused=True)
        self.ema = None
        if t.ema_decay is not None and t.epochs:
            self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(t.ema_decay))
        if t.batch_size > len(images.train):
            raise InputError(f"train.batch_size: {t.batch_size}; there are {len(images.train)} training images")
        self.steps_per_epoch = len(images.train) // t.batch_size
        self.warm = False
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self.validation: dict[str, Any] = {"raw": None, "ema": None}
        self.best: dict[str, Tensor] = {}
        self.chosen: dict[str, Any] = {}
        self.epoch_time_s: list[float] = []
        self.step_time_ms: list[float] = []
        self.data_time_ms: list[float] = []
        self.peak_memory_mib: float | None = None
        self.token_counts = self._traced()

    def run_epoch(self) -> None:
        """One pass over the training images, validation, and a checkpoint."""
        epoch = self.epoch + 1
        left = (self.p.train.epochs - self.epoch) * self.steps_per_epoch
        clock = cost.StepClock(self.device, warmup_steps=int(not self.warm and left > 1))
        self.warm = True
        generator = torch.Generator().manual_seed(_epoch_seed(self.seed, epoch))
        self.model.train()
        loss_sum, hits, seen, lr = 0.0, 0, 0, 0.0
        batches = data.batches(self.images.train, self.p.train.batch_size, generator=generator, drop_last=True)
        bar = tqdm(batches, f"epoch {epoch}/{self.p.train.epochs}", self.steps_per_epoch, disable=not self.progress)
        for index, (batch, labels) in enumerate(clock.batches(bar)):
            step = self.epoch * self.steps_per_epoch + index
            lr = learning_rate(self.p.train, step, self.steps_per_epoch)
            shown = data.augment(batch, shift=self.p.data.shift, flip=self.p.data.flip, generator=generator)
            shown = data.normalise(shown, self.images.mean, self.images.std)
            with clock.step():
                loss, correct = self._step(shown, labels, lr, step)
            loss_sum, hits, seen = loss_sum + loss * len(labels), hits + correct, seen + len(labels)
            bar.set_postfix(loss=f"{loss_sum / seen:.3f}", top1=f"{100 * hits / seen:.1f}%", lr=f"{lr:.1e}")
        self.epoch_time_s.append(clock.total_s)
        self.step_time_ms += clock.step_time_ms
        self.data_time_ms += clock.data_time_ms
        self.epoch = epoch
        learned = {"lr": lr, "train_loss": loss_sum / seen, "train_top1_percent": 100 * hits / seen}
        self.history.append({"epoch": epoch, **learned, **self._validate()})
        self._save()

    @torch.no_grad()
    def only_evaluate(self) -> None:
        """Instead of epochs: the weights as they came, and what a forward pass costs in place of a training step."""
        self._validate()
        size, count = self.p.train.batch_size, min(self.steps_per_epoch, _FORWARD_PASSES)
        clock = cost.StepClock(self.device, warmup_steps=int(count > 1))
        batches = data.batches(self.images.train, size, drop_last=True)
        for batch, _ in clock.batches(itertools.islice(batches, count)):
            shown = data.normalise(batch, self.images.mean, self.images.std)
            with clock.step():
                self._logits(shown)
        self.step_time_ms, self.data_time_ms = clock.step_time_ms, clock.data_time_ms
        shown = data.normalise(self.images.train.images[:size], self.images.mean, self.images.std)
        resident = [shown, *self.model.state_dict().values()]
        self.peak_memory_mib = cost.peak_memory(lambda: self._logits(shown), resident, self.device) / _MIB

    def finish(self) -> Run:
        """Read the test split, once, with the weights that validation chose."""
        t = self.p.train
        if self._traced() != self.token_counts:
            raise TrainingError(f"the model's token counts changed while it trained: {self.token_counts} at first")
        self.model.load_state_dict(self.best)
        tested = evaluate(self.model, self.images.test, self.images, batch_size=_eval_batch(t), precision=t.precision)
        metrics = {**tested, "chosen": self.chosen, "validation": self.validation}
        if self.init_sha256 is not None:
            metrics["init_sha256"] = self.init_sha256
        step_ms, data_ms = statistics.median(self.step_time_ms), statistics.median(self.data_time_ms)
        analysed = cost.analyse(self.model.config, self.model.schedule, options=self.model.options)
        one = data.normalise(self.images.val.images[:1], self.images.mean, self.images.std)
        assert self.peak_memory_mib is not None
        measured = {
            "train_time_s": math.fsum(self.epoch_time_s),
            "step_time_ms": step_ms,
            "data_time_ms": data_ms,
            "epoch_time_s": self.epoch_time_s,
            "peak_memory_mib": self.peak_memory_mib,
            "throughput_img_s": 1000 * t.batch_size / (step_ms + data_ms),
            "flops_per_image": analysed.flops,
            "flops_per_image_counted": cost.flops_counted(self.model, one),
            "params_count": sum(weight.numel() for weight in self.model.parameters()),
            "nondeterministic": ["index_add", "scatter_add"] if self.device.type == "cuda" else [],
            "command": f"python -m famba train --profile {self.p.profile} --strategy {self.p.strategy}"
            f" --seed {self.seed}",
            **cost.environment(self.device),
        }
        described = {
            "strategy": self.p.strategy,
            "seed": self.seed,
            "profile": self.p.profile,
            "classes": list(self.images.classes),
            "mean": list(self.images.mean),
            "std": list(self.images.std),
        }
        return Run(
            strategy=self.p.strategy,
            seed=self.seed,
            profile=self.p.profile,
            schedule=self.model.schedule,
            token_counts=self.token_counts,
            metrics=metrics,
            cost=measured,
            history=self.history,
            params=self.p.as_dict(),
            model_bytes=checkpoint.model_bytes(self.model, self.best, described),
        )

    def restore(self) -> None:
        """Go on from the newest checkpoint that can be read, if there is one."""
        for path in sorted(self.folder.glob("epoch-*.safetensors"), reverse=True):
            try:
                tensors, described = checkpoint.unpack(path, "training state")
                checkpoint.check_state(path, tensors, self._tensors(blank=True))
            except InputError as error:
                _log.warning("%s; going on from the checkpoint before it", error)
                continue
            self._take(tensors, described)
            _log.info("going on after epoch %d of %d", self.epoch, self.p.train.epochs)
            return

    def measure_memory(self) -> None:
        """Peak memory of a training step, taken on a copy before training, so that it costs the run no time.

        It is the second step: by then the gradients' buffers and the optimiser's moments exist.
        """
        if self.peak_memory_mib is not None:
            return
        probe = _Session(self.p, self.seed, copy.deepcopy(self.model), self.images, self.device, False)
        size, lr = self.p.train.batch_size, self.p.train.lr
        images = data.normalise(self.images.train.images[:size], self.images.mean, self.images.std)
        labels = self.images.train.labels[:size]
        probe.model.train()
        probe._step(images, labels, lr, 0)
        probe.optimiser.zero_grad(set_to_none=True)
        resident = [images, labels, *probe.model.state_dict().values(), *probe._moments()]
        if probe.ema is not None:
            resident += list(probe.ema.state_dict().values())
        peak = cost.peak_memory(lambda: probe._step(images, labels, lr, 1), resident, self.device)
        self.peak_memory_mib = peak / _MIB

    def _step(
        self, images: Float[Tensor, "b 3 h w"], labels: Int64[Tensor, "b"], lr: float, step: int
    ) -> tuple[float, int]:
        """Forward, backward, optimiser; the loss and how many images were right."""
        t = self.p.train
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.zero_grad(set_to_none=True)
        logits = self._logits(images)
        loss = functional.cross_entropy(logits, labels, label_smoothing=t.label_smoothing)
        loss.backward()
        limit = math.inf if t.clip_grad_norm is None else t.clip_grad_norm
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        value = loss.item()
        if not (math.isfinite(value) and math.isfinite(norm.item())):
            newest = max(self.folder.glob("epoch-*.safetensors"), default=None)
            kept = f"the last good checkpoint is {newest}" if newest else "no checkpoint was written yet"
            raise TrainingError(
                f"step {step + 1} (epoch {self.epoch + 1}): loss {value}, gradient norm {norm.item()} at learning rate "
                f"{lr:.3g}; training stopped, {kept}"
            )
        self.optimiser.step()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return value, int((logits.argmax(-1) == labels).sum())

    def _logits(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b classes"]:
        with _autocast(self.device, self.p.train.precision):
            return self.model(images).float()

    def _validate(self) -> dict[str, Any]:
        """Evaluate on the validation split, keep the weights if they are to be tested; what history says of it."""
        row: dict[str, Any] = {"ema_val_loss": None, "ema_val_top1_percent": None}
        averaged = None if self.ema is None else self.ema.module
        for kind, model in {"raw": self.model, "ema": averaged}.items():
            if model is None:
                continue
            t = self.p.train
            scores = evaluate(model, self.images.val, self.images, batch_size=_eval_batch(t), precision=t.precision)
            entry = {"epoch": self.epoch, **scores}
            before = self.validation[kind]
            best = entry if before is None or _better(entry, before["best"]) else before["best"]
            self.validation[kind] = {"last": entry, "best": best}
            if self._is_choice(entry, best):
                self.chosen = {"weights": kind, "epoch": self.epoch}
                self.best = {key: t.detach().clone() for key, t in model.state_dict().items()}
            prefix = "ema_" if kind == "ema" else ""
            row |= {f"{prefix}val_loss": scores["loss"], f"{prefix}val_top1_percent": scores["top1_percent"]}
            if kind == "raw":
                row["val_top5_percent"] = scores["top5_percent"]
        return row

    def _is_choice(self, entry: Mapping[str, Any], best: Mapping[str, Any]) -> bool:
        """Whether the weights just validated are those to test, should training end here."""
        if not self.chosen:
            return True
        rival = self.validation[self.chosen["weights"]]
        if self.p.train.choose == "last":
            return self.chosen["epoch"] < self.epoch or _better(entry, rival["last"])
        return best is entry and (rival["best"] is entry or _better(entry, rival["best"]))

    def _traced(self) -> list[int]:
        """Token counts that a forward pass shows, which must be those that the schedule promises."""
        one = data.normalise(self.images.val.images[:2], self.images.mean, self.images.std)
        self.model.eval()
        with torch.no_grad(), _autocast(self.device, self.p.train.precision):
            _, trace = self.model.forward_with_trace(one)
        promised = strategies.token_counts(
            self.model.schedule, self.model.tokens, protected=int(self.model.cls_token is not None)
        )
        if trace.token_counts != promised:
            raise TrainingError(
                f"strategy {self.p.strategy!r}: the trace shows {trace.token_counts} tokens; promised were {promised}"
            )
        return trace.token_counts

    def _save(self) -> None:
        described = {
            "kind": "training state",
            "epoch": self.epoch,
            "history": self.history,
            "validation": self.validation,
            "chosen": self.chosen,
            "epoch_time_s": self.epoch_time_s,
            "step_time_ms": self.step_time_ms,
            "data_time_ms": self.data_time_ms,
            "peak_memory_mib": self.peak_memory_mib,
        }
        checkpoint.save_file(self.folder / f"epoch-{self.epoch:05d}.safetensors", self._tensors(), described)
        for old in sorted(self.folder.glob("epoch-*.safetensors"))[:-_KEPT]:
            old.unlink()

    def _tensors(self, *, blank: bool = False) -> dict[str, Tensor]:
        """All that a checkpoint holds; blank: names and shapes alone, before the first step has made the moments."""
        weights = self.model.state_dict()
        state = {f"model.{key}": t for key, t in weights.items()}
        state |= {f"best.{key}": t for key, t in (weights if blank else self.best).items()}
        if self.ema is not None:
            state |= {f"ema.{key}": t for key, t in self.ema.state_dict().items()}
        for index, weight in enumerate(self._weights()):
            moments = self.optimiser.state[weight] if not blank else {}
            for name in ("exp_avg", "exp_avg_sq"):
                state[f"optimiser.{index}.{name}"] = moments.get(name, weight)
            state[f"optimiser.{index}.step"] = moments.get("step", torch.tensor(0.0))
        return state

    def _take(self, tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}

        self.model.load_state_dict(part("model."))
        self.best = {key: t.to(self.device) for key, t in part("best.").items()}
        if self.ema is not None:
            self.ema.load_state_dict(part("ema."))
        for index, weight in enumerate(self._weights()):
            moments = part(f"optimiser.{index}.")
            step = moments.pop("step")
            self.optimiser.state[weight] = {"step": step, **{k: t.to(self.device) for k, t in moments.items()}}
        for name in ("epoch", "history", "validation", "chosen", "epoch_time_s", "step_time_ms", "data_time_ms"):
            setattr(self, name, described[name])
        self.peak_memory_mib = described["peak_memory_mib"]

    def _weights(self) -> list[nn.Parameter]:
        return [weight for group in self.optimiser.param_groups for weight in group["params"]]

    def _moments(self) -> list[Tensor]:
        return [t for state in self.optimiser.state.values() for t in state.values() if isinstance(t, Tensor)]


def _start(p: Params, seed: int, model: VisionMamba, images: Dataset) -> Dataset:
    """Put the weights to start from into the model, if there are any; the images, normalised as those know them.

    Raises:
        InputError: a file that does not fit the model; nothing to train, and a head that is not for these classes.
    """
    path = p.init_path(seed)
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
    return dataclasses.replace(images, mean=origin.mean, std=origin.std)


@functools.cache
def _code_digest() -> str:
    """What the numbers depend on beside the parameters: the modules between parameters and this one, and torch."""
    package = Path(__file__).parent
    files = [package / f"{name}.py" for name in CODE] + sorted((package / "native").glob("*.[cph]*"))
    content = hashlib.sha256(torch.__version__.encode())
    for path in files:
        content.update(path.read_bytes())
    return content.hexdigest()[:12]


def _better(entry: Mapping[str, Any], than: Mapping[str, Any]) -> bool:
    """Higher accuracy; at equal accuracy the lower loss. Equal in both: the earlier one stays."""
    return (entry["top1_percent"], -entry["loss"]) > (than["top1_percent"], -than["loss"])


def _epoch_seed(seed: int, epoch: int) -> int:
    """A seed for each epoch of each run; neighbouring ones must not be alike, which the generator sees to."""
    return seed * 1_000_003 + epoch


def _eval_batch(t: TrainParams) -> int:
    return 2 * t.batch_size  # no activations are kept


def _autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def _device(t: TrainParams) -> torch.device:
    name = t.device if t.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"train.device: {t.device!r} is not one of auto, cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"train.device: {t.device!r} is not one of auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"train.device: {t.device!r}; torch sees {torch.cuda.device_count()} CUDA devices here")
    return device


def _on(images: Dataset, device: torch.device) -> Dataset:
    """Small data sets live on the training device as uint8."""
    return data.to_device(images, device)


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[Path]:
    """Hold the run's folder; a second process that wants it is refused, and a killed one leaves nothing behind."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{folder}: another process is training this run") from None
        yield folder

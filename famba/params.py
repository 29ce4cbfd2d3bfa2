"""Everything that determines a run, as frozen dataclasses: the sections of params.yaml and what is allowed in them.

No torch, and no file is read here.

Upper bounds are far above any experiment's values. They refuse a slip of the pen in one line, before it exhausts the
machine's memory, starts a thousand processes or overflows a float.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, model_validator

from famba.errors import InputError
from famba.fusion import strategies
from famba.fusion.options import FusionOptions
from famba.fusion.strategies import STRATEGIES
from famba.validation import Bool, Float, Int, one_given, section

# Per channel, of ImageNet's training images.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

DATASETS = ("digits", "folder", "parquet", "cifar10", "cifar100")

T = TypeVar("T")


def _unique(values: tuple[T, ...]) -> tuple[T, ...]:
    if len(set(values)) < len(values):
        raise ValueError("each may be named only once")
    return values


Text = Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[^\x00-\x1f]*$")]
Positive = Annotated[Int, Field(ge=1, le=1_000_000)]
NotNegative = Annotated[Int, Field(ge=0, le=1_000_000)]
Pixels = Annotated[Int, Field(ge=1, le=4096)]
Jobs = Annotated[Int, Field(ge=1, le=256)]
Layer = Annotated[Int, Field(ge=1, le=1000)]
Fraction = Annotated[Float, Field(ge=0, lt=1)]
Probability = Annotated[Float, Field(ge=0, le=1)]
Share = Annotated[Float, Field(gt=0, le=1)]
Beta = Annotated[Float, Field(ge=0, le=100)]  # beyond 100 every mixture is half and half
Seed = Annotated[Int, Field(ge=0, lt=2**32)]  # what NumPy's generators take
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1, max_length=1000), AfterValidator(_unique)]
Strategy = Annotated[str, Field(pattern="^[a-z][a-z0-9_]{0,39}$")]  # part of the names of folders
Strategies = Annotated[tuple[Strategy, ...], Field(max_length=100), AfterValidator(_unique)]


def _is_device(name: str) -> str:
    if not re.fullmatch("auto|cpu|cuda(:[0-9]{1,2})?", name):
        raise ValueError("must be auto, cpu, cuda or cuda:N")
    return name


def _is_dataset(name: str) -> str:
    if name not in DATASETS and not re.fullmatch("hub:[^/]+/[^/]+", name):
        raise ValueError(f"must be one of {', '.join(DATASETS)}, hub:<owner>/<name>")
    return name


@section
class DataParams:
    """Which images, and how they are split and varied."""

    dataset: Annotated[Text, AfterValidator(_is_dataset)]  # `hub:<owner>/<name>` is a set of the Hugging Face hub
    # Its folder, from the repository root: of `folder` and `parquet`, or a copy of a hub's set. Null: the copy in
    # data/<dataset> if there is one, else the hub.
    root: Text | None
    img_size: Pixels  # height and width that the images are brought to
    val_fraction: Annotated[Float, Field(gt=0, lt=1)]  # share of the training images held out to choose by
    split_seed: Seed  # of the held-out choice; the same for every run, so that runs compare
    limit: Annotated[Int, Field(ge=1, le=10**9)] | None  # use only so many training images (after the split)
    # Share of an image's side that validation and test see, at its centre.
    eval_crop: Annotated[Float, Field(ge=0.1, le=1)]
    normalise: Literal["train", "imagenet"]  # to mean 0 and deviation 1, by the training images' numbers or ImageNet's
    # `tensor` varies whole batches on the training device; `timm` image by image on the CPU, as the reference does.
    augment: Literal["tensor", "timm"]
    shift: Annotated[Int, Field(ge=0, le=4096)]  # moved by up to so many pixels, zeros move in; `tensor` only
    flip: Bool  # mirrored left-right half of the time
    erase: Probability  # share of the training images in which a rectangle is replaced by noise
    # Parameter of the Beta distribution that mixes two images and their labels, as a whole (mixup) or by a rectangle
    # (cutmix); 0 never does. With both above 0, each is taken half of the time.
    mixup: Beta
    cutmix: Beta
    rand_augment: Text | None  # a policy in timm's words, such as rand-m9-mstd0.5-inc1; `timm` only
    color_jitter: Annotated[Float, Field(ge=0, le=10)]  # `timm` only, and of no effect there beside a policy
    workers: Annotated[Int, Field(ge=0, le=256)]  # processes that load images which stream; no effect on what they give
    memory_mib: Annotated[Int, Field(ge=1, le=2**24)]  # a larger data set (as uint8) streams, another is kept in memory
    folds: Annotated[Int, Field(ge=2, le=1000)] | None = None  # a run's seed tests one of so many parts; null: its own

    @model_validator(mode="after")
    def _check(self) -> "DataParams":
        if self.dataset == "digits" and self.root is not None:
            raise ValueError("root: must be null with data.dataset: digits, which scikit-learn brings along")
        for key, off in (("rand_augment", None), ("color_jitter", 0)):
            if self.augment != "timm" and getattr(self, key) != off:
                raise ValueError(f"{key}: only data.augment: timm does that")
        if self.augment == "timm" and self.shift:
            raise ValueError("shift: must be 0 with data.augment: timm, which crops by itself")
        if self.folds is not None and self.dataset != "digits":
            raise ValueError(f"folds: must be null with data.dataset: {self.dataset}, which has test images of its own")
        return self


@section
class ModelParams:
    """The Vision Mamba; null takes the value of the named model."""

    name: Text  # that `create_model` knows
    patch_size: Pixels | None
    stride: Pixels | None  # below the patch size the patches overlap
    depth: Layer | None
    d_model: Annotated[Int, Field(ge=1, le=8192)] | None
    d_state: Annotated[Int, Field(ge=1, le=256)] | None
    cls_position: Literal["middle", "head", "none"]  # of the class token
    pool: Literal["cls", "mean"]  # what the head sees: the class token or the mean of all tokens
    average_directions: Bool  # of the scan, as released; false sums them


@section
class FusionRule:
    """How many tokens one strategy removes: exactly one of r, total and schedule. Layers count from 1."""

    r: NotNegative | None = None  # by each fusing layer
    total: NotNegative | None = None  # by all layers together; the r that comes nearest is taken
    schedule: Annotated[tuple[NotNegative, ...], Field(max_length=1000)] | None = None  # by each layer, outright
    first_layer: Layer | None = None  # among which the strategy fuses; null is the strategy's own choice
    last_layer: Layer | None = None

    @model_validator(mode="after")
    def _check(self) -> "FusionRule":
        for key in ("first_layer", "last_layer"):
            if self.schedule is not None and getattr(self, key) is not None:
                raise ValueError(f"{key}: must be left out beside schedule, which names each layer's number")
        return one_given(self, "r", "total", "schedule")


@section
class AdaptiveRule:
    """The budget of the schedule that calibration makes: exactly one of the three."""

    total: NotNegative | None = None  # tokens removed by all layers together
    memory: Share | None = None  # of the unfused model's peak memory in a training step, by formula
    flops: Share | None = None  # of the unfused model's forward pass, scans included; they stand for time

    @model_validator(mode="after")
    def _check(self) -> "AdaptiveRule":
        return one_given(self, "total", "memory", "flops")


@section
class TrainParams:
    """The optimisation."""

    # File of the weights to start from, from the repository root, `{seed}` standing for the run's seed: the
    # model.safetensors of a run, or a released Vim checkpoint. Null draws new ones.
    init_from: Text | None
    epochs: NotNegative  # passes over the training images; 0 evaluates the weights of init_from as they are
    batch_size: Positive  # images per step, of all processes together
    # Images that a process takes at once; it sums the gradients of as many such parts as its share of a step needs.
    device_batch: Positive | None
    processes: Jobs  # that train together, each on its device, unless torchrun has started them
    lr: Annotated[Float, Field(gt=0, le=1000)]  # peak, after warm-up
    lr_batch: Positive | None  # the batch size that lr is meant for; it is scaled by batch_size / lr_batch
    min_lr: Annotated[Float, Field(ge=0, le=1000)]  # at the end of the cosine
    warmup_epochs: NotNegative  # of linear rise from 0
    weight_decay: Annotated[Float, Field(ge=0, le=1000)]  # AdamW's, on matrices only
    betas: tuple[Fraction, Fraction]  # AdamW's
    label_smoothing: Fraction  # share of the target spread over all classes
    clip_grad_norm: Annotated[Float, Field(gt=0)] | None  # gradients are scaled down to this norm
    ema_decay: Fraction | None  # of the moving average of the weights, per step; null keeps none
    # Whose weights are tested: those of the epoch that did best in validation, or of the last. Between the weights and
    # their moving average, validation decides in either.
    choose: Literal["best", "last"]
    precision: Literal["fp32", "bf16"]  # bf16 for the matrix products; SSM parameters and states stay fp32
    device: Annotated[str, AfterValidator(_is_device)]  # auto: CUDA where it is, else the CPU
    backend: Text  # of the selective scan; auto takes the fastest that runs
    cuda_graph: Bool  # replay a step's forward and backward pass as one CUDA graph: faster for small models
    threads: Annotated[Int, Field(ge=1, le=1024)] | None  # of the CPU; part of what makes a run repeatable bit for bit
    tensorboard: Bool  # write TensorBoard events under build/tensorboard

    @model_validator(mode="after")
    def _check(self) -> "TrainParams":
        if self.epochs == 0 and self.init_from is None:
            raise ValueError("epochs: trains nothing; give train.init_from, the weights to evaluate")
        if self.warmup_epochs > self.epochs > 0:
            raise ValueError(f"warmup_epochs: must be at most train.epochs, {self.epochs}")
        peak = self.lr * self.batch_size / (self.lr_batch or self.batch_size)
        if self.min_lr > peak:
            raise ValueError(f"min_lr: must be at most train.lr, which train.lr_batch may scale, {peak}")
        if self.batch_size % (share := self.processes * (self.device_batch or 1)):
            raise ValueError(f"batch_size: must be a multiple of train.processes times train.device_batch, {share}")
        return self


# How a run is carried out; it makes the same of it, to rounding.
EXECUTION: dict[str, tuple[str, ...]] = {"data": ("workers", "memory_mib"), "train": ("processes", "tensorboard")}


@section
class Params:
    """Everything that determines one run but its seed."""

    profile: str
    strategy: Strategy
    data: DataParams
    model: ModelParams
    fusion: FusionRule
    options: FusionOptions
    train: TrainParams

    def schedule(self, depth: int) -> list[int]:
        """Tokens removed by each layer of a model of that depth; errors as in `famba.schedule`.

        A strategy whose name is none of the paper's fuses in every layer from first_layer to last_layer.
        """
        rule = dataclasses.asdict(self.fusion)
        given = rule.pop("schedule")
        if given is None:
            name = self.strategy if self.strategy in STRATEGIES else "all"
            try:
                return strategies.schedule(name, depth=depth, **rule)
            except InputError as error:
                said = str(error).removeprefix(f"strategy {name!r}: ")
                raise InputError(f"fusion.{self.strategy}: {said}") from None
        if len(given) != depth:
            raise InputError(
                f"fusion.{self.strategy}.schedule: {list(given)} has {len(given)} layers; the model has {depth}"
            )
        return list(given)

    def as_dict(self) -> dict[str, Any]:
        """The resolved configuration as plain data, the form in which a run records it."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def digest(self, seed: int) -> str:
        """Hexadecimal name of this configuration with this seed: another value anywhere is another name.

        But not of `EXECUTION`, so that a run may go on with other numbers of processes or workers.
        """
        text = json.dumps(identity(self.as_dict()) | {"seed": seed}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]


def identity(params: Mapping[str, Any]) -> dict[str, Any]:
    """What tells one run from another, of `Params.as_dict()` or of what a run's params.json holds: no `EXECUTION`."""
    kept = dict(params)
    for name, keys in EXECUTION.items():
        kept[name] = {key: value for key, value in params[name].items() if key not in keys}
    return kept

"""What a model costs: tokens, FLOPs and bytes by formula, and the same measured.

Axes: `b` batch, `t` tokens that enter a layer, `s` = t - r tokens left after its fusion, `d` d_model, `e` d_inner
= 2 d, `n` d_state, `k` = 4 taps of the convolutions. A multiply and an add are two FLOPs. Bytes are those of tensors,
as torch's allocator hands them out; the interpreter and the libraries' own buffers are not among them.

The formulas follow famba.models.vim, famba.models.mixer and famba.fusion.merge line by line; the tests compare them
with torch's FLOP counter, with what autograd keeps, and with the allocator. The scan's FLOPs, 9 per token, channel and
state, are those that Mamba's authors give (https://github.com/state-spaces/mamba/issues/110) and the literature on it
uses.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from famba.errors import InputError
from famba.fusion import strategies
from famba.fusion.options import FusionOptions
from famba.kernels import scan
from famba.kernels.triton import scan as gpu_scan

_EXPAND, _CONV = 2, 4  # d_inner / d_model and the convolutions' taps, as released
_FLOAT, _INDEX = 4, 8  # bytes of a float32 and of a position
_PRODUCT = {"fp32": 4, "bf16": 2}  # bytes of a number that a matrix product or a convolution reads or makes
_SCAN_FLOPS = 9  # per token, channel and state, in one direction


@dataclass(frozen=True)
class Part:
    """The cost of one part of the model for one batch.

    Attributes:
        tokens: tokens per image that it passes on.
        flops: of its matrix products and convolutions, in one forward pass.
        scan_flops: of its selective scans, both directions, in one forward pass.
        parameter_bytes: of its weights.
        largest_weight_bytes: of the largest of them.
        activation_bytes: kept from forward to backward, weights apart: every storage once.
        transient_bytes: the most that its backward holds beyond what was kept before it and the gradients of weights.
    """

    tokens: int
    flops: int
    scan_flops: int
    parameter_bytes: int
    largest_weight_bytes: int
    activation_bytes: int
    transient_bytes: int


@dataclass(frozen=True)
class Cost:
    """The cost of a model for one batch; the totals are sums over its parts.

    Attributes:
        stem: patch, class-token and position embedding.
        layers: layer 1 first.
        head: final norm, pooling and classifier.
    """

    stem: Part
    layers: tuple[Part, ...]
    head: Part

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.stem, *self.layers, self.head)

    @property
    def token_counts(self) -> list[int]:
        """Tokens at the input and after each layer's fusion: depth + 1 numbers."""
        return [self.stem.tokens, *(layer.tokens for layer in self.layers)]

    @property
    def flops(self) -> int:
        """Of matrix products, convolutions and scans."""
        return sum(part.flops + part.scan_flops for part in self.parts)

    @property
    def product_flops(self) -> int:
        """Without the scans: what `flops_counted` counts."""
        return sum(part.flops for part in self.parts)

    @property
    def parameter_bytes(self) -> int:
        return sum(part.parameter_bytes for part in self.parts)

    @property
    def activation_bytes(self) -> int:
        return sum(part.activation_bytes for part in self.parts)

    @property
    def peak_bytes(self) -> int:
        """An estimate of the most that one training step holds: weights, AdamW's two moments, and the larger of

        - backward, walked from the head to the stem: when it reaches a part, what that part and those before it have
          kept, what it needs for a while, and the gradients of the weights after it;
        - the optimiser's step: every gradient, and two temporaries as large as the largest weight.
        """
        backward, kept, gradients = 0, self.activation_bytes, 0
        for part in reversed(self.parts):
            backward = max(backward, kept + part.transient_bytes + gradients)
            gradients += part.parameter_bytes
            kept -= part.activation_bytes
        update = gradients + 2 * max(part.largest_weight_bytes for part in self.parts)
        return 3 * self.parameter_bytes + max(backward, update)


def analyse(
    config: Mapping[str, Any],
    schedule: Sequence[int],
    *,
    batch: int = 1,
    options: FusionOptions = FusionOptions(),  # noqa: B008 (frozen)
    backend: str = "torch",
    precision: str = "fp32",
) -> Cost:
    """The cost of a model (`VisionMamba.config`) that trains with a fusion schedule, by formula.

    Args:
        batch: images; FLOPs and activation bytes are for all of them together.
        backend: of the scan: `torch` on a CPU, `native` or `triton`. It decides what backward keeps and needs, nothing
            else here.
        precision: `fp32`, or `bf16` as autocast has it: products and convolutions in bfloat16, with copies of their
            weights; norms, the residual stream, the scan's states, weights, gradients and moments in float32.
    """
    if backend not in _SCANS:
        raise InputError(f"backend: {backend!r}; the memory of {', '.join(_SCANS)} is known")
    if precision not in _PRODUCT:
        raise InputError(f"precision: {precision!r} is not one of {', '.join(_PRODUCT)}")
    if len(schedule) != config["depth"]:
        raise InputError(f"schedule: {len(schedule)} entries; must be one for each of {config['depth']} layers")
    has_cls = config["cls_position"] != "none"
    patches = ((config["img_size"] - config["patch_size"]) // config["stride"] + 1) ** 2
    counts = strategies.token_counts(schedule, patches + has_cls, protected=int(has_cls))
    d = config["d_model"]
    width = _Width(batch, d, _EXPAND * d, config["d_state"], math.ceil(d / 16), _PRODUCT[precision])
    layers = [
        _layer(width, t, s, options, _SCANS[backend], average=config["average_directions"])
        for t, s in itertools.pairwise(counts)
    ]
    return Cost(_stem(width, config, patches, counts[0]), tuple(layers), _head(width, config, counts[-1], options))


class _Width(NamedTuple):
    """What all layers share."""

    b: int
    d: int
    e: int
    n: int
    rank: int  # of the step's projection
    product: int  # bytes of a number that a product reads or makes

    def copied(self, numbers: int) -> int:
        """Bytes of the copies of that many weights that are kept beside them: none if products read the weights."""
        return self.product * numbers if self.product < _FLOAT else 0

    @property
    def selected(self) -> int:
        """Numbers that x_proj makes of a token: the step's factor, B and C."""
        return self.rank + 2 * self.n


class _ScanMemory(NamedTuple):
    """Bytes that a mixer's scans need: one scan of (b, e, t) between its two passes, beside its inputs, with what A is
    made of; and backward, beside the gradient that comes in, in one scan, or, where `fused`, in both with all between
    the mixer's projections.
    """

    kept: Callable[[_Width, int], int]
    transient: Callable[[_Width, int], int]
    fused: bool


def _torch_transient(w: _Width, t: int) -> int:
    gradients = w.b * t * (2 * w.e + 2 * w.n)
    rows = min(w.b, scan._rows(w.e, w.n, torch.device("cpu")))  # other devices have larger blocks
    first = min(t, scan._CHUNK)
    following = min(t - first, first) if t > first or rows == w.b else first
    # decay, states and their gradient of one block, and the next one's decay and states when they are made
    blocks = rows * w.e * (first * (3 * w.n + 6) + following * (2 * w.n + 2))
    return _FLOAT * (gradients + max(blocks, 2 * w.b * t * w.e))


def _triton_transient(w: _Width, t: int) -> int:
    """Of both directions at once, beside the gradient that comes in: their deltas, and what backward writes; B's and
    C's gradients summed in float32, and as they are handed on."""
    wide, narrow = w.b * t * w.e, w.b * t * w.n
    return w.product * 7 * wide + gpu_scan.scratch_bytes(w.b, w.e, t, w.n) + 4 * (_FLOAT + w.product) * narrow


# A backend of the scan that keeps something else is one more entry.
_SCANS: dict[str, _ScanMemory] = {
    "torch": _ScanMemory(
        lambda w, t: _FLOAT * w.e * w.n * (2 + math.ceil(t / scan._CHUNK) * w.b), _torch_transient, False
    ),
    "native": _ScanMemory(
        lambda w, t: _FLOAT * w.b * ((t - 1) // 16) * math.ceil(w.e / 16) * 16 * w.n,
        lambda w, t: w.product * w.b * t * (4 * w.e + 2 * w.selected),  # gradients of x, z, and of u, dt, B, C twice
        True,
    ),
    "triton": _ScanMemory(
        # x_proj as autocast casts it; exp(A_log), A
        lambda w, t: gpu_scan.kept_bytes(w.b, w.e, t, w.n) + w.copied(w.e * w.selected) + 2 * _FLOAT * w.e * w.n,
        _triton_transient,
        True,
    ),
}


def _stem(w: _Width, config: Mapping[str, Any], patches: int, tokens: int) -> Part:
    channels = config.get("in_chans", 3)
    patch = channels * config["patch_size"] ** 2
    return Part(
        tokens=tokens,
        flops=2 * w.b * patches * patch * w.d,
        scan_flops=0,
        parameter_bytes=_FLOAT * w.d * (patch + 1 + tokens + (tokens - patches)),
        largest_weight_bytes=_FLOAT * w.d * max(patch, tokens),
        activation_bytes=w.product * w.b * channels * config["img_size"] ** 2 + w.copied(w.d * patch),  # the images
        transient_bytes=_FLOAT * w.b * (tokens + patches) * w.d,
    )


def _layer(w: _Width, t: int, s: int, options: FusionOptions, scans: _ScanMemory, *, average: bool) -> Part:
    m = t if options.position == "after_scan" else s  # tokens that are scanned
    flops = _select_flops(w, m) + _project_flops(w, m) + 2 * w.b * s * w.e * w.d
    if s < t and options.matching == "similarity":
        compared = {"normed": w.d, "residual": w.d, "delta": 2 * w.e, "B": 2 * w.n, "C": 2 * w.n}[options.feature]
        flops += 2 * w.b * ((t + 1) // 2) * (t // 2) * compared
        if options.feature not in ("normed", "residual"):
            flops += _select_flops(w, t)  # a selection made for the comparison alone
        if options.feature == "delta":
            flops += _project_flops(w, t)
    return Part(
        tokens=s,
        flops=flops,
        scan_flops=2 * _SCAN_FLOPS * w.b * m * w.e * w.n,
        parameter_bytes=_FLOAT
        * (
            w.d  # norm
            + 3 * w.d * w.e  # in_proj, out_proj
            + 2 * w.e * (_CONV + 1 + w.selected + w.rank + 1 + w.n + 1)  # conv1d, x_proj, dt_proj, A_log, D
        ),
        largest_weight_bytes=_FLOAT * w.e * max(2 * w.d, w.selected),
        activation_bytes=sum(_kept(w, t, s, m, scans).values()),
        transient_bytes=_FLOAT * 2 * w.b * s * w.d + _mixer_transient(w, m, scans, average=average),
    )


def _mixer_transient(w: _Width, m: int, scans: _ScanMemory, *, average: bool) -> int:
    """Bytes that the mixer's backward needs for a while, less what it has released by then.

    In plain torch the product with the gate is undone first: three (b, m, e) gradients when one kept tensor is gone;
    then one scan after the other, when five are gone and two gradients are alive. A fused mixer is one operation, whose
    incoming gradient takes the place of the kept tensor that the output projection has released.
    """
    wide = w.product * w.b * m * w.e
    if scans.fused:
        return scans.transient(w, m)
    return max((2 + average) * wide - wide, scans.transient(w, m) - 3 * wide)


def _select_flops(w: _Width, t: int) -> int:
    """in_proj, then convolution and x_proj of both directions."""
    return 2 * w.b * t * (2 * w.d * w.e + 2 * w.e * (_CONV + w.selected))


def _project_flops(w: _Width, t: int) -> int:
    """dt_proj of both directions."""
    return 2 * w.b * t * 2 * w.rank * w.e


def _kept(w: _Width, t: int, s: int, m: int, scans: _ScanMemory) -> dict[str, int]:
    """Bytes that one layer keeps for backward, by what keeps them."""
    wide, selected = w.product * w.b * m * w.e, w.product * w.b * m * w.selected
    padded = wide + w.product * w.b * (_CONV - 1) * w.e
    reversed_taps = w.copied(2 * _CONV * w.e) or _FLOAT * _CONV * w.e
    kept = {
        "norm": _FLOAT * w.b * t * (2 * w.d + 1),  # its input, the same over its length, and that length
        "in_proj": w.product * w.b * m * w.d
        + 2 * wide
        + w.copied(2 * w.d * w.e),  # input; output, whose half is the gate
        "convolution": 2 * (padded + wide) + reversed_taps,  # padded input, output
        # u, the step, B and C; and, since torch's convolution lays u out otherwise than x_proj reads it, a copy of u
        # (one image needs none)
        "selection": 2 * ((3 if w.b > 1 else 2) * wide + selected + w.copied(w.e * (w.selected + w.rank))),
        "scan": 2 * scans.kept(w, m),
        "gate": 2 * wide,  # the scans' sum and silu(gate)
        "out_proj": w.product * w.b * s * w.e + w.copied(w.d * w.e),
    }
    if scans.fused:
        kept["norm"] = _FLOAT * w.b * t * (w.d + 1)  # the sum, and its scale
        kept["convolution"] = 0  # its input is in_proj's output
        kept["selection"] = 2 * (wide + selected)  # dt, but not delta
        kept["gate"] = wide  # the scans' sum
    if s < t:
        kept["fusion"] = w.b * t * (_INDEX + _FLOAT)  # each token's destination and weight
    return kept


def _head(w: _Width, config: Mapping[str, Any], s: int, options: FusionOptions) -> Part:
    classes = config["num_classes"]
    weights = _FLOAT * w.b * s if options.weighting == "size" else 0
    pooling = 2 * _INDEX * w.b if config["pool"] == "cls" else weights
    return Part(
        tokens=s,
        flops=2 * w.b * w.d * classes,
        scan_flops=0,
        parameter_bytes=_FLOAT * (w.d + (w.d + 1) * classes),
        largest_weight_bytes=_FLOAT * w.d * classes,
        activation_bytes=_FLOAT * w.b * s * (2 * w.d + 1) + w.product * w.b * w.d + pooling + w.copied(w.d * classes),
        transient_bytes=_FLOAT * w.b * (2 * s * w.d + 4 * classes),  # logits, log-probabilities, two gradients
    )


def flops_counted(model: nn.Module, images: Tensor) -> int:
    """FLOPs of one forward pass as torch's own counter sees them, to compare with `Cost.product_flops`.

    It knows matrix products and convolutions; formulas of famba's operators are registered beside them
    (famba.kernels.ops, famba.fusion.merge). The selective scan is left out: it is one operator without a formula. The
    backend `reference` is made of torch's operators, and its products count.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops()

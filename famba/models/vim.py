"""Vision Mamba (Vim, arXiv:2401.09417) with token fusion inside its blocks (Famba-V, arXiv:2409.09808).

`b` batch, `t` tokens in scan order, `d` d_model, `e` d_inner. State-dict keys and shapes are those of the released
weights. A block is Add -> RMSNorm -> mixer, with the residual stream kept in fp32; fusion happens between the norm and
the mixer, on the normed tokens and on the residual with one matching, which serves both scan directions.
"""

import dataclasses
import math
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from famba.errors import InputError
from famba.fusion import matching, merge, strategies
from famba.fusion.matching import Matching
from famba.fusion.options import FusionOptions
from famba.kernels import dispatch, ops, scan
from famba.kernels.cpu import runtime as native
from famba.kernels.ops import add_rms_norm
from famba.models.mixer import BidirectionalMixer
from famba.models.presets import cls_index, grid, sizes, tokens

_NORM_EPS = 1e-5
_NO_WEIGHT_DECAY = ("A_log", "A_b_log", "D", "D_b", "cls_token", "pos_embed")


def create_model(name: str, *, num_classes: int = 1000, **options: Any) -> "VisionMamba":
    """A Vision Mamba by name.

    Args:
        name: a key of `PRESETS`; vim_tiny, vim_small and vim_base are the released sizes.
        options: arguments of `VisionMamba` in place of the name's own; None takes the name's own or the default.
    """
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    return VisionMamba(num_classes=num_classes, **{**sizes(name), **given})


def kernels(backend: str, device: torch.device, config: Mapping[str, Any], precision: str) -> dict[str, str]:
    """Which backend runs each function of a model, and `instruction_set`, what the native ones were compiled for.

    They are chosen by the tables that the functions themselves choose by, for tensors of one image; so are errors.

    Args:
        config: a model's, or the sizes and the cls_position of it.
        precision: `fp32`, or `bf16` for autocast.
    """

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((), dtype=dtype, device=device).expand(shape)

    d, n = config["d_model"], config["d_state"]
    e, k = 2 * d, 4  # as the mixer has them
    t = tokens(config)
    low = torch.bfloat16 if precision == "bf16" else torch.float32
    u, x, read, size = tensor(1, e, t, dtype=low), tensor(1, t, d), tensor(1, n, t, dtype=low), tensor(1, t)
    pairs = tensor(1, 1, dtype=torch.int64)
    tables = {
        "scan": (scan._BACKENDS, (u, u, tensor(e, n), read, read, tensor(e), None, tensor(e))),
        "convolution": (ops._CONV, (u, tensor(e, k), tensor(e))),
        "norm": (ops._NORM, (tensor(1, t, d, dtype=low), x, tensor(d))),
        "match": (matching._MATCH, (x,)),
        "plan": (merge._PLAN, (pairs, pairs, size)),
        "fuse": (merge._APPLY, (size, tensor(1, t, d, dtype=low), x)),
    }
    found = {function: dispatch.chosen(table, backend, *given) for function, (table, given) in tables.items()}
    if "native" in found.values():
        found["instruction_set"] = native.instruction_set()
    return found


@dataclasses.dataclass
class Trace:
    """What happened in one forward pass, for figures and tests; detached.

    Attributes:
        token_counts: tokens at the input and after each layer's fusion, depth + 1 numbers.
        matchings: each layer's matching, None where nothing was fused.
        features: what each layer's matching compared, None where nothing was fused.
        normed: each layer's normed tokens before its fusion, (b, t, d).
        hidden_states: each layer's mixer output, (b, s, d).
        residuals: the residual stream that each layer passes on, (b, s, d), before that output is added.
        groups: after each layer, the token that each input token has ended in, (b, tokens at the input).
        sizes: after each layer, the input tokens that each token stands for, (b, s).
        cls_index: where the class token stands at the end, (b,); None without one.
        pooled: what the head saw, (b, d).
    """

    token_counts: list[int]
    matchings: list[Matching | None] = dataclasses.field(default_factory=list)
    features: list[Tensor | None] = dataclasses.field(default_factory=list)
    normed: list[Tensor] = dataclasses.field(default_factory=list)
    hidden_states: list[Tensor] = dataclasses.field(default_factory=list)
    residuals: list[Tensor] = dataclasses.field(default_factory=list)
    groups: list[Tensor] = dataclasses.field(default_factory=list)
    sizes: list[Tensor] = dataclasses.field(default_factory=list)
    cls_index: Tensor | None = None
    pooled: Tensor | None = None


class _Tokens(NamedTuple):
    """The tokens on their way through the layers; a tuple, so that a block's backward hooks run."""

    hidden: Float[Tensor, "b t d"]
    residual: Float[Tensor, "b t d"] | None
    size: Float[Tensor, "b t"]
    cls_index: Int[Tensor, "b"] | None


class VisionMamba(nn.Module):
    """Vim with a fusion schedule.

    Args:
        img_size, patch_size, stride: pixels; a stride below the patch size overlaps the patches.
        cls_position: the class token is inserted before patch number patches // 2 (`middle`), at the `head`, or `none`.
        pool: the head sees the class token (`cls`), or the `mean` of all tokens, each weighted by the input tokens it
            stands for if fusion weighs by size.
        average_directions: average the two scan directions, as released; False sums them.
        drop_path_rate: in training each image skips the last layer's mixer with this probability, earlier layers' with
            proportionally less (stochastic depth, arXiv:1603.09382).
        schedule: tokens removed by each layer, layer 1 first; None fuses nothing.
        fusion: how tokens are fused; None is the default `FusionOptions`.
        backend: of the kernels, see `famba.backends`.

    Raises:
        InputError: patches that do not tile the image, a pool without its class token, a schedule of another length
            than the depth, or one that removes more tokens than there are (names layer, t and r).
    """

    def __init__(
        self,
        *,
        num_classes: int,
        img_size: int,
        patch_size: int,
        stride: int,
        depth: int,
        d_model: int,
        d_state: int,
        in_chans: int = 3,
        cls_position: str = "middle",
        pool: str = "cls",
        average_directions: bool = True,
        drop_path_rate: float = 0.0,
        schedule: Sequence[int] | None = None,
        fusion: FusionOptions | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        options = FusionOptions() if fusion is None else fusion
        schedule = [0] * depth if schedule is None else schedule
        self.config: dict[str, Any] = {
            "num_classes": num_classes,
            "img_size": img_size,
            "patch_size": patch_size,
            "stride": stride,
            "depth": depth,
            "d_model": d_model,
            "d_state": d_state,
            "in_chans": in_chans,
            "cls_position": cls_position,
            "pool": pool,
            "average_directions": average_directions,
            "drop_path_rate": drop_path_rate,
        }
        self.grid = grid(self.config)  # patches along one side
        if cls_position not in ("middle", "head", "none"):
            raise InputError(f"cls_position: {cls_position!r} is not one of middle, head, none")
        if pool not in (("mean",) if cls_position == "none" else ("cls", "mean")):
            raise InputError(
                f"pool: {pool!r} with cls_position {cls_position!r}; allowed: mean, or cls with a class token"
            )
        if not 0 <= drop_path_rate < 1:
            raise InputError(f"drop_path_rate: {drop_path_rate!r}; must be at least 0 and less than 1")

        self.img_size, self.depth, self.cls_position, self.pool = img_size, depth, cls_position, pool
        self.tokens, self.cls_index = tokens(self.config), cls_index(self.grid**2, cls_position)
        self.set_fusion(schedule, options)

        self.cls_token = nn.Parameter(torch.zeros(1, 1, d_model)) if cls_position != "none" else None
        self.pos_embed = nn.Parameter(torch.zeros(1, self.tokens, d_model))
        self.patch_embed = _PatchEmbed(in_chans, patch_size, stride, d_model)
        self.head = nn.Linear(d_model, num_classes)
        self.layers = nn.ModuleList(
            _Block(
                d_model,
                d_state,
                average_directions=average_directions,
                drop_path_rate=drop_path_rate * layer / max(1, depth - 1),
                backend=backend,
            )
            for layer in range(depth)
        )
        self.norm_f = _AddNorm(d_model, backend)
        self._init_weights()
        for name in self.no_weight_decay():
            self.get_parameter(name)._no_weight_decay = True  # type: ignore[attr-defined]  # as Mamba's code marks them

    def set_fusion(self, schedule: Sequence[int], options: FusionOptions) -> None:
        """Fuse by another schedule from now on; the weights are the same for all. Errors as at construction."""
        if not isinstance(options, FusionOptions):
            raise InputError(f"fusion: {options!r}; must be a FusionOptions, such as FusionOptions(order='append')")
        try:
            schedule = [int(operator.index(r)) for r in schedule]
        except TypeError:
            raise InputError(
                f"schedule: {schedule!r}; must be {self.depth} whole numbers, such as "
                f"famba.schedule('upper', depth={self.depth}, r=..) gives"
            ) from None
        if len(schedule) != self.depth:
            raise InputError(f"schedule: {len(schedule)} entries; must be one for each of {self.depth} layers")
        counts = strategies.token_counts(schedule, self.tokens, protected=int(self.cls_index is not None))
        self._schedule, self.options, self.token_counts = schedule, options, counts

    @property
    def schedule(self) -> list[int]:
        """Tokens removed by each layer; `famba.set_schedule` sets another one."""
        return list(self._schedule)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        """Logits."""
        return self.head(self._features(images, None))

    def forward_features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """What the head sees: pooled already, as in the released code."""
        return self._features(images, None)

    def forward_head(self, features: Float[Tensor, "b d"], pre_logits: bool = False) -> Float[Tensor, "b _"]:
        """Logits of what `forward_features` gives; with pre_logits, those features themselves."""
        return features if pre_logits else self.head(features)

    @property
    def num_features(self) -> int:
        """Numbers that the head sees of each image."""
        return self.config["d_model"]

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a new one, drawn by torch's generator."""
        config = self.config | {"num_classes": num_classes}
        grid(config)  # refuses what is no number of classes
        self.config = config
        self.head = nn.Linear(self.num_features, num_classes).to(self.pos_embed)
        self._init_head()

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that should not decay, besides norms and biases; timm's optimisers ask for them."""
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in _NO_WEIGHT_DECAY}

    def save_pretrained(self, folder: str | Path, **options: Any) -> str | None:
        """Write config.json (sizes, schedule, options of fusion), model.safetensors and a model card.

        This, `push_to_hub` and `from_pretrained` take the options of huggingface_hub's PyTorchModelHubMixin.
        """
        from famba.models import hub  # huggingface_hub is an extra, and takes half a second to import

        return hub.Published.of(self).save_pretrained(folder, **options)

    def push_to_hub(self, name: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes to the repository `owner/name` on the Hugging Face hub."""
        from famba.models import hub

        return hub.Published.of(self).push_to_hub(name, **options)

    @staticmethod
    def from_pretrained(source: str | Path, **options: Any) -> "VisionMamba":
        """The model that `save_pretrained` wrote to a folder or repository, in evaluation mode."""
        from famba.models import hub

        return hub.load(source, **options)

    def forward_with_trace(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b classes"], Trace]:
        """Logits, and what happened on the way."""
        trace = Trace(token_counts=[])
        pooled = self._features(images, trace)
        trace.pooled = pooled.detach()
        return self.head(pooled), trace

    def embed(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b t d"]:
        """Patch embedding, class token and position embedding: the tokens that enter layer 1."""
        if images.shape[-2:] != (self.img_size, self.img_size):
            raise InputError(
                f"images: {tuple(images.shape[-2:])} pixels; this model takes {self.img_size, self.img_size}"
            )
        if images.shape[1] != self.config["in_chans"]:
            raise InputError(f"images: {images.shape[1]} channels; this model takes {self.config['in_chans']}")
        x = self.patch_embed(images)
        if self.cls_token is not None:
            assert self.cls_index is not None
            token = self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype)
            x = torch.cat([x[:, : self.cls_index], token, x[:, self.cls_index :]], dim=1)
        return x + self.pos_embed

    def _features(self, images: Tensor, trace: Trace | None) -> Float[Tensor, "b d"]:
        hidden = self.embed(images)
        b, t, _ = hidden.shape
        cls_index = None if self.cls_index is None else torch.full((b,), self.cls_index, device=hidden.device)
        at = _Tokens(hidden, None, torch.ones(b, t, dtype=self.pos_embed.dtype, device=hidden.device), cls_index)
        if trace is not None:
            trace.token_counts.append(t)
        for block, r in zip(self.layers, self._schedule, strict=True):
            at = block(at, r, self.options, trace)
        if trace is not None:
            trace.cls_index = at.cls_index

        x, _ = self.norm_f(at.hidden, at.residual)
        if self.pool == "cls":
            assert at.cls_index is not None
            return x[torch.arange(b, device=x.device), at.cls_index]
        if self.options.weighting == "mean" or not any(self._schedule):  # unfused: independent of the options
            return x.mean(1)
        return (x * (at.size / t)[..., None]).sum(1)

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Vim's initialisation; the mixers have set what belongs to their scans."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        self._init_head()
        proj = self.patch_embed.proj
        nn.init.trunc_normal_(proj.weight, std=math.prod(proj.weight.shape[1:]) ** -0.5)
        assert proj.bias is not None
        proj.bias.zero_()
        for block in self.layers:
            assert isinstance(block, _Block)
            # one residual branch per layer: the sum's variance does not grow with the depth
            block.mixer.out_proj.weight.div_(math.sqrt(self.depth))

    def _init_head(self) -> None:
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)


class _PatchEmbed(nn.Module):
    def __init__(self, in_chans: int, patch_size: int, stride: int, d_model: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, d_model, patch_size, stride)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).mT


class _AddNorm(nn.Module):
    """The residual stream's next value in fp32, and its RMSNorm."""

    def __init__(self, d_model: int, backend: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self._backend = backend

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        normed, residual = add_rms_norm(hidden, residual, self.weight, eps=_NORM_EPS, backend=self._backend)
        return normed.to(self.weight.dtype), residual  # else a model in half precision would mix fp32


class _Block(nn.Module):
    """Add -> RMSNorm -> fuse -> mixer."""

    def __init__(
        self, d_model: int, d_state: int, *, average_directions: bool, drop_path_rate: float, backend: str
    ) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.mixer = BidirectionalMixer(d_model, d_state, average_directions=average_directions, backend=backend)
        self.norm = _AddNorm(d_model, backend)
        self._backend = backend

    def forward(self, at: _Tokens, r: int, options: FusionOptions, trace: Trace | None) -> _Tokens:
        normed, residual = self.norm(at.hidden, at.residual)
        size, cls_index = at.size, at.cls_index
        feature = pairs = plan = None
        if r:
            compared = options.feature if options.matching == "similarity" else "normed"
            feature = self._feature(compared, normed, residual)
            guard, backend = () if cls_index is None else cls_index, self._backend
            pairs = matching.match_tokens(feature, r, protected=guard, kind=options.matching, backend=backend)
            how = {"order": options.order, "weighting": options.weighting, "reduction": options.reduction}
            plan = merge.plan(pairs, size, **how, backend=backend)
            size = plan.size
            cls_index = None if cls_index is None else plan.destination.gather(1, cls_index[:, None])[:, 0]

        def fuse(x: Tensor) -> Tensor:
            nonlocal residual
            if plan is not None:
                x, residual = merge.apply_both(plan, x, residual, backend=self._backend)
            return x

        hidden = self.mixer(normed, fuse) if options.position == "after_scan" else self.mixer(fuse(normed))
        if self.training and self.drop_path_rate:
            hidden = hidden * functional.dropout(hidden.new_ones(hidden.shape[0], 1, 1), self.drop_path_rate)

        if trace is not None:
            b, before = normed.shape[:2]
            destination = torch.arange(before, device=normed.device).expand(b, -1) if plan is None else plan.destination
            trace.token_counts.append(hidden.shape[1])
            trace.matchings.append(pairs)
            trace.features.append(None if feature is None else feature.detach())
            trace.normed.append(normed.detach())
            trace.hidden_states.append(hidden.detach())
            trace.residuals.append(residual.detach())
            trace.groups.append(destination.gather(1, trace.groups[-1]) if trace.groups else destination)
            trace.sizes.append(size)
        return _Tokens(hidden, residual, size, cls_index)

    @torch.no_grad()
    def _feature(self, kind: str, normed: Tensor, residual: Tensor) -> Float[Tensor, "b t c"]:
        """What similarity compares, (b, t, c). The selection is that of the tokens before they are fused."""
        if kind == "normed":
            return normed
        return residual if kind == "residual" else self.mixer.feature(normed, kind)

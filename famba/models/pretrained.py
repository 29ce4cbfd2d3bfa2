"""Weights that were trained before: released Vim checkpoints and famba's own, fitted to a model, and fused as they are.

    model = load_vim("hustvl/Vim-tiny-midclstok")  # on the Hugging Face hub; or a file
    set_schedule(model, schedule("upper", depth=24, r=9))  # and set_schedule(model, None) takes it back

`t` tokens at the size that the weights were trained at, `s` at another, `d` d_model. The form of the checkpoints is
that of the public Vim code (Vim: arXiv:2401.09417): a torch file whose entries `model` and `model_ema` are state
dicts, or a state dict alone. Torch files are read with `weights_only`, so that reading one runs nothing.
"""

import argparse
import contextlib
import functools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from famba.errors import InputError
from famba.fusion.options import FusionOptions
from famba.models.presets import cls_index
from famba.models.saved import described_beside
from famba.models.vim import VisionMamba
from famba.params import IMAGENET_MEAN, IMAGENET_STD
from famba.storage import checkpoint

_STATES = ("model_ema", "model")  # the first is taken where there is a choice


class Origin(NamedTuple):
    """What the images were like that the weights of a file were trained on.

    Attributes:
        mean, std: per channel, what the images were normalised by.
        num_classes: those that the file's head tells apart.
        classes: their names; None where the file does not say.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    classes: tuple[str, ...] | None


def load_vim(
    source: str | Path | Mapping[str, Any],
    *,
    num_classes: int | None = None,
    img_size: int | None = None,
    stride: int | None = None,
    state: str | None = None,
    trained_at: int = 224,
    cls_position: str = "middle",
    average_directions: bool = True,
    schedule: Sequence[int] | None = None,
    fusion: FusionOptions | None = None,
    backend: str = "auto",
) -> VisionMamba:
    """A Vision Mamba with the weights of a checkpoint in the released form; its sizes are read off the shapes.

    Images are to be normalised by `IMAGENET_MEAN` and `IMAGENET_STD`, as the released models' were.

    Args:
        source: a .safetensors or torch file, but for those of `load_model`; a name on the Hugging Face hub, owner/name
            or owner/name/file; or what such a file holds. Names of tensors may begin with `module.`, as
            DistributedDataParallel leaves them.
        num_classes: None keeps the head; another number than the file's gives a new one, drawn by torch's generator.
        img_size, stride: pixels; None is what the weights were trained with. If they change the number of patches,
            position embeddings are interpolated (`resize_positions`).
        state: which of several state dicts; None takes the moving average, `model_ema`, where there is one.
        trained_at: pixels of the images that the weights were trained on. No shape tells it; 224 for all released.
        cls_position, average_directions: as trained. No shape tells them; the defaults are the released models'.
        schedule, fusion, backend: as in `create_model`.

    Raises:
        InputError: a file that cannot be read or holds more than tensors and plain values; the first tensor that is
            missing, foreign, of another shape, or not of finite floating-point numbers; weights that `load_model` or
            `VisionMamba.from_pretrained` reads.
    """
    path, tensors = _read_vim(source, state)
    sizes = _sizes(path, tensors, with_cls=cls_position != "none")
    build = functools.partial(
        VisionMamba,
        **{key: sizes[key] for key in ("patch_size", "depth", "d_model", "d_state", "in_chans")},
        num_classes=sizes["num_classes"] if num_classes is None else num_classes,
        img_size=trained_at if img_size is None else img_size,
        stride=_trained_stride(path, sizes, trained_at) if stride is None else stride,
        cls_position=cls_position,
        pool="mean" if cls_position == "none" else "cls",
        average_directions=average_directions,
        schedule=schedule,
        fusion=fusion,
        backend=backend,
    )
    with torch.device("meta"):
        _check_fit(path, tensors, build())  # before memory is taken for sizes that nothing else confirms
    model = build()
    _take(path, tensors, model)
    return model


def set_schedule(
    model: VisionMamba, schedule: Sequence[int] | None, options: FusionOptions | None = None
) -> VisionMamba:
    """Fuse by a schedule from now on, in a model as it is: no weight changes, and nothing is trained.

    Args:
        model: a VisionMamba, changed in place, and returned.
        schedule: tokens removed by each layer, as `famba.schedule` makes it; None fuses nothing, and the model gives
            what it gave before it was first fused, bit for bit.
        options: how tokens are fused; None leaves it as it is.

    Raises:
        InputError: another kind of model; a schedule that does not fit the model, which is as it was.
    """
    if not hasattr(model, "set_fusion"):  # what torch.compile makes of one has it
        raise InputError(f"model: {type(model).__name__}; must be a VisionMamba")
    schedule = [0] * model.depth if schedule is None else schedule
    model.set_fusion(schedule, model.options if options is None else options)
    return model


def take_weights(model: VisionMamba, path: Path) -> Origin:
    """Put the weights of a run's model.safetensors, or of a checkpoint in the released form, into a model.

    Position embeddings are interpolated if the model has another number of patches. A head for another number of
    classes is not taken: the model keeps its own. An InputError names the first difference of another architecture.
    """
    tensors, described = checkpoint.read(path) if path.suffix == ".safetensors" else ({}, None)
    if described is None and described_beside(path):
        raise InputError(f"{path}: of save_pretrained, which keeps no normalisation; must be a run's model.safetensors")
    if described is None:
        path, tensors = _read_vim(path, None)
        num_classes = _take(path, tensors, model)
        return Origin(IMAGENET_MEAN, IMAGENET_STD, num_classes, None)
    checkpoint.check_weights(path, tensors)
    try:
        config, classes = described["model"], tuple(described["classes"])
        mean, std = tuple(described["mean"]), tuple(described["std"])
        # What no shape tells.
        for key in ("cls_position", "pool", "average_directions"):
            if config[key] != model.config[key]:
                raise InputError(f"{path}: model.{key}: trained with {config[key]!r}; here it is {model.config[key]!r}")
    except (KeyError, TypeError):
        raise InputError(f"{path}: does not describe a run's model; expected the model.safetensors of a run") from None
    return Origin(mean, std, _take(path, tensors, model), classes)


def resize_positions(
    pos_embed: Float[Tensor, "1 t d"], grid: int, *, cls_position: str = "middle"
) -> Float[Tensor, "1 s d"]:
    """Position embeddings for `grid` x `grid` patches: bicubic over the image, but for the class token's row.

    As ViT's (arXiv:2010.11929, section 3.2) and DeiT's are, with the class token wherever it stands. As many patches as
    before give the same tensor.
    """
    before = _side(pos_embed.shape[1], with_cls=cls_position != "none")
    if before == grid:
        return pos_embed
    at, after = (cls_index(side**2, cls_position) for side in (before, grid))
    patches = pos_embed if at is None else torch.cat([pos_embed[:, :at], pos_embed[:, at + 1 :]], dim=1)
    image = patches.float().mT.unflatten(2, (before, before))
    patches = functional.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False).flatten(2).mT
    patches = patches.to(pos_embed.dtype)
    if at is None:
        return patches
    return torch.cat([patches[:, :after], pos_embed[:, at : at + 1], patches[:, after:]], dim=1)


def _take(path: Path, tensors: Mapping[str, Tensor], model: VisionMamba) -> int:
    """Check all tensors, fit those that may differ, and put them into the model; the classes of the file's head."""
    _check_fit(path, tensors, model)
    num_classes, own = len(tensors["head.bias"]), model.state_dict()
    fitted = dict(tensors)
    fitted["pos_embed"] = resize_positions(tensors["pos_embed"], model.grid, cls_position=model.cls_position)
    if num_classes != model.config["num_classes"]:
        fitted |= {key: own[key] for key in ("head.weight", "head.bias")}
    model.load_state_dict(fitted)
    return num_classes


def _check_fit(path: Path, tensors: Mapping[str, Tensor], model: VisionMamba) -> None:
    """Refuse tensors that are not those of this model, but for the number of its patches and classes."""
    sizes = _sizes(path, tensors, with_cls=model.cls_token is not None)
    d_model = model.config["d_model"]
    with torch.device("meta"):
        as_trained = {
            "pos_embed": torch.empty(1, sizes["tokens"], d_model),
            "head.weight": torch.empty(sizes["num_classes"], d_model),
            "head.bias": torch.empty(sizes["num_classes"]),
        }
    checkpoint.check_state(path, tensors, model.state_dict() | as_trained)


def _sizes(path: Path, tensors: Mapping[str, Tensor], *, with_cls: bool) -> dict[str, int]:
    """What the shapes say of a model: `tokens` and `grid` are those that it was trained with."""

    def shape(key: str, dims: int) -> torch.Size:
        if key not in tensors:
            raise InputError(f"{path}: lacks {key}; expected the tensors of a Vision Mamba")
        if tensors[key].dim() != dims:
            raise InputError(f"{path}: {key} has shape {tuple(tensors[key].shape)}; expected {dims} dimensions")
        return tensors[key].shape

    tokens = shape("pos_embed", 3)[1]
    try:
        grid = _side(tokens, with_cls=with_cls)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    d_model, in_chans, _, patch_size = shape("patch_embed.proj.weight", 4)
    return {
        "tokens": tokens,
        "grid": grid,
        "d_model": d_model,
        "in_chans": in_chans,
        "patch_size": patch_size,
        "d_state": shape("layers.0.mixer.A_log", 2)[1],
        "depth": len({match[1] for key in tensors if (match := re.match(r"layers\.(\d+)\.", key))}),
        "num_classes": shape("head.weight", 2)[0],
    }


def _side(rows: int, *, with_cls: bool) -> int:
    """Patches along one side."""
    side = math.isqrt(max(0, rows - with_cls))
    if side < 1 or side**2 != rows - with_cls:
        token = " and a class token" if with_cls else ""
        raise InputError(f"pos_embed: {rows} rows; must be a square number of patches{token}")
    return side


def _trained_stride(path: Path, sizes: Mapping[str, int], trained_at: int) -> int:
    """The stride at which patches of this size make this grid of the images that the weights were trained on."""
    patch_size, steps = sizes["patch_size"], sizes["grid"] - 1
    stride, rest = divmod(trained_at - patch_size, steps) if steps else (patch_size, trained_at - patch_size)
    if rest or not 1 <= stride <= patch_size:
        raise InputError(
            f"{path}: trained_at: {trained_at} pixels; no stride of patches of {patch_size} makes {sizes['grid']} of "
            "them along a side of that; give the size that the weights were trained at"
        )
    return stride


def _read_vim(source: str | Path | Mapping[str, Any], state: str | None) -> tuple[Path, dict[str, Tensor]]:
    """The state dict of a checkpoint in the released form, and what messages call it."""
    if state is not None and state not in _STATES:
        raise InputError(f"state: {state!r} is not one of {', '.join(_STATES)}")
    if isinstance(source, Mapping):
        path, content = Path("state dict"), source
    else:
        path = _file(source)
        content, described = checkpoint.read(path) if path.suffix == ".safetensors" else (_read_torch(path), None)
        if described is not None and described.get("kind") == "model":
            raise InputError(f"{path}: of a run, whose scan and fusion no shape tells; take famba.load_model")
        if described_beside(path):
            raise InputError(f"{path}: described by the config.json beside it; take VisionMamba.from_pretrained")
    held: Mapping[str, Any] = content if isinstance(content, Mapping) else {}
    keys = _STATES if state is None else (state,)
    found: list[tuple[str, Any]] = [(f"{key}.", held[key]) for key in keys if isinstance(held.get(key), Mapping)]
    if state is None and any(isinstance(value, Tensor) for value in held.values()):
        found.append(("", held))
    if not found:
        names = ", ".join(map(str, list(held)[:8])) or "nothing by name"
        raise InputError(f"{path}: holds {names}; expected a state dict under {' or '.join(keys)}")
    prefix, tensors = found[0]
    if wrong := [name for name, value in tensors.items() if not isinstance(value, Tensor)]:
        raise InputError(f"{path}: {prefix}{wrong[0]} is no tensor")
    tensors = {str(name).removeprefix("module."): t for name, t in tensors.items()}
    checkpoint.check_weights(path, tensors)
    return path, tensors


def _file(source: str | Path) -> Path:
    """The file of weights that a path or a name on the hub stands for."""
    path = Path(source)
    if path.is_dir():
        raise InputError(
            f"{path}: is a folder; must be a file; VisionMamba.from_pretrained reads the folders of save_pretrained"
        )
    if path.is_file() or isinstance(source, Path) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(/.+)?", source):
        return path
    from famba.models import hub  # an extra, as in `VisionMamba.save_pretrained`

    return hub.download(source)


def _read_torch(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with torch.serialization.safe_globals([argparse.Namespace]):  # where the Vim code keeps its command line
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a broken pickle raises whatever its bytes come to mean
            foreign: list[str] = []
            with contextlib.suppress(Exception):  # of a broken pickle again
                foreign = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
            if foreign:
                raise InputError(
                    f"{path}: holds {', '.join(foreign)}; only tensors and plain values are read"
                ) from None
            said = str(error).split(". ")[0] or type(error).__name__
            raise InputError(f"{path}: not a whole torch file ({' '.join(said.split())})") from None

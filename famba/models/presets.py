"""The sizes of models by name, without torch."""

from collections.abc import Mapping
from typing import Any

from famba.errors import InputError

# What a name stands for; every value can be overridden in `create_model`.
PRESETS: dict[str, dict[str, int]] = {
    "vim_tiny": {"img_size": 224, "patch_size": 16, "stride": 16, "depth": 24, "d_model": 192, "d_state": 16},
    "vim_small": {"img_size": 224, "patch_size": 16, "stride": 16, "depth": 24, "d_model": 384, "d_state": 16},
    "vim_base": {"img_size": 224, "patch_size": 16, "stride": 16, "depth": 24, "d_model": 768, "d_state": 16},
    "vim_micro": {"img_size": 32, "patch_size": 4, "stride": 4, "depth": 12, "d_model": 128, "d_state": 16},
    "vim_nano": {"img_size": 8, "patch_size": 3, "stride": 1, "depth": 10, "d_model": 32, "d_state": 8},
}


def sizes(name: str, **given: int | None) -> dict[str, int]:
    """The sizes of a model by name, in place of which come those that are given and not None."""
    if name not in PRESETS:
        raise InputError(f"model: {name!r} is not one of {', '.join(PRESETS)}")
    return PRESETS[name] | {key: value for key, value in given.items() if value is not None}


def grid(config: Mapping[str, Any]) -> int:
    """Patches along one side of an image; an InputError names what is no size, or patches that do not tile it."""
    for key in ("num_classes", "img_size", "patch_size", "stride", "depth", "d_model", "d_state", "in_chans"):
        value = config.get(key, 1)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{key}: {value!r}; must be a whole number of 1 or more")
    img_size, patch_size, stride = config["img_size"], config["patch_size"], config["stride"]
    if patch_size > img_size or (img_size - patch_size) % stride:
        raise InputError(
            f"img_size: {img_size} pixels; patches of {patch_size} at stride {stride} do not tile it; allowed: "
            f"{patch_size} plus a multiple of {stride}"
        )
    return (img_size - patch_size) // stride + 1


def tokens(config: Mapping[str, Any]) -> int:
    """Tokens of an image, the class token included."""
    return grid(config) ** 2 + (config["cls_position"] != "none")


def cls_index(patches: int, cls_position: str) -> int | None:
    """Where the class token stands among so many patches; None without one."""
    return {"middle": patches // 2, "head": 0, "none": None}[cls_position]

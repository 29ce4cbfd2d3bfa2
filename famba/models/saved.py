"""A model as a file: weights, sizes, schedule and options of fusion in one safetensors file."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from famba.errors import InputError
from famba.fusion.options import FusionOptions
from famba.models.vim import VisionMamba
from famba.storage.checkpoint import check_state, pack, unpack


def model_bytes(model: VisionMamba, weights: Mapping[str, Tensor], described: Mapping[str, Any]) -> bytes:
    """The content of a model file.

    Args:
        model: whose architecture and fusion are recorded.
        weights: a state dict of it.
        described: anything else that JSON can hold: strategy, seed, classes.
    """
    built = {
        "model": model.config,
        "schedule": model.schedule,
        "fusion": dataclasses.asdict(model.options),
    }
    return pack(weights, {"kind": "model", **built, **described})


def load_model(path: Path) -> tuple[VisionMamba, dict[str, Any]]:
    """A model as it was saved, fusion included, and what the file says of it.

    Raises:
        InputError: a file that is missing, spoilt, not famba's, or whose tensors are not those of its model.
    """
    tensors, described = unpack(path, "model")
    try:
        model = VisionMamba(
            **described["model"], schedule=described["schedule"], fusion=FusionOptions(**described["fusion"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: does not describe a model: {' '.join(str(error).split())}") from None
    check_state(path, tensors, model.state_dict())
    model.load_state_dict(tensors)
    return model, described

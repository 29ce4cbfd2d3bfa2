"""A model as a file: weights, sizes, schedule and options of fusion in one safetensors file."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from famba.errors import InputError
from famba.fusion.options import FusionOptions
from famba.models.vim import VisionMamba
from famba.storage.checkpoint import check_state, check_weights, pack, unpack


def model_bytes(model: VisionMamba, weights: Mapping[str, Tensor], described: Mapping[str, Any]) -> bytes:
    """The content of a model file: a model's architecture and fusion, its weights, and what else is described."""
    return pack(weights, {"kind": "model", **description(model), **described})


def load_model(path: str | Path) -> tuple[VisionMamba, dict[str, Any]]:
    """The model of a run as it was saved, fusion included, in evaluation mode; and what the file says of it.

    Args:
        path: a run's model.safetensors.

    Returns:
        Of what the file says, `classes` are the names of the logits, and images are normalised by `mean` and `std`.

    Raises:
        InputError: a file that is missing, spoilt, not famba's, or whose tensors are not those of its model.
    """
    path = Path(path)
    tensors, described = unpack(path, "model")
    return rebuilt(path, tensors, described).eval(), described


def description(model: VisionMamba) -> dict[str, Any]:
    """What JSON has to hold of a model besides its weights."""
    return {"model": model.config, "schedule": model.schedule, "fusion": dataclasses.asdict(model.options)}


def described_beside(path: Path) -> bool:
    """Whether a config.json beside a file of weights describes their model, as `VisionMamba.save_pretrained` leaves it.

    Such a file holds what a released checkpoint does; so only this tells that its scan may be another.
    """
    if path.name != "model.safetensors":
        return False
    try:
        described = json.loads((path.parent / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(described, dict) and {"model", "schedule", "fusion"} <= described.keys()


def rebuilt(path: Path, tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> VisionMamba:
    """A model of its description and weights, which are compared (InputError) before any memory is taken for it."""
    check_weights(path, tensors)

    def build() -> VisionMamba:
        options = FusionOptions(**described["fusion"])
        return VisionMamba(**described["model"], schedule=described["schedule"], fusion=options)

    try:
        if described["model"]["depth"] > len(tensors):
            raise ValueError(f"depth: {described['model']['depth']} of {len(tensors)} tensors")
        with torch.device("meta"):
            expected = build().state_dict()
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split()) + " is missing" * isinstance(error, KeyError)
        raise InputError(f"{path}: does not describe a model: {said}") from None
    check_state(path, tensors, expected)
    model = build()
    model.load_state_dict(tensors)
    return model

"""Weights and training states as safetensors: no pickle, so that reading a file can run nothing.

A file holds named tensors and one JSON object, which says what it is and how to rebuild what the tensors belong to.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from famba.errors import InputError
from famba.files import write_atomic
from famba.model import VisionMamba
from famba.params import FusionOptions

_FORMAT = "famba"  # the one metadata entry: safetensors keeps text only


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
        InputError: a file that is missing, truncated, not famba's, or whose tensors are not those of its model.
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


def pack(tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> bytes:
    """Tensors and one JSON object as the content of a file."""
    text = json.dumps(described, sort_keys=True, allow_nan=False)
    return save({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, metadata={_FORMAT: text})


def save_file(path: Path, tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> None:
    """Write what `pack` makes, whole or not at all."""
    write_atomic(path, pack(tensors, described))


def unpack(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, on the CPU, and its JSON object.

    Args:
        kind: what the object's `kind` must be.

    Raises:
        InputError: a file that is missing, truncated, or not of that kind.
    """
    tensors, described = read(path)
    if described is None or described.get("kind") != kind:
        found = None if described is None else described.get("kind")
        raise InputError(f"{path}: holds {found or 'tensors that famba did not write'}; expected a famba {kind}")
    return tensors, described


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of any safetensors file, on the CPU, and famba's JSON object; None if famba did not write it.

    Raises:
        InputError: a file that is missing or truncated.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_FORMAT)
            described = json.loads(text) if text is not None else None
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({' '.join(str(error).split())})") from None
    return tensors, described if isinstance(described, dict) else None


def check_state(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse tensors whose names or shapes are not the expected ones, naming the first that differs."""
    missing = [key for key in expected if key not in tensors]
    foreign = [key for key in tensors if key not in expected]
    for word, keys in (("lacks", missing), ("has the unknown", foreign)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise InputError(f"{path}: {word} {keys[0]}{more}; expected the {len(expected)} tensors of this model")
    for key, t in expected.items():
        if tensors[key].shape != t.shape:
            raise InputError(f"{path}: {key} has shape {tuple(tensors[key].shape)}; expected {tuple(t.shape)}")

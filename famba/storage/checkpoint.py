"""Weights and training states as safetensors: no pickle, so that reading a file can run nothing.

A file holds named tensors and one JSON object, which says what it is and how to rebuild what the tensors belong to,
and holds a CRC-32 of all of that: safetensors itself would not notice a byte that changed on the disk.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from famba.errors import InputError

_FORMAT = "famba"  # the one metadata entry: safetensors keeps text only, and several in no fixed order
_CHECKSUM = "crc32"


def pack(tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> bytes:
    """Tensors and one JSON object as the content of a file: the same bytes whenever they are the same."""
    kept = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    plain = json.loads(json.dumps(described, allow_nan=False))  # as it will be read
    text = json.dumps({**plain, _CHECKSUM: _crc32(kept, plain)}, sort_keys=True)
    return save(kept, metadata={_FORMAT: text})


def unpack(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, on the CPU, and its JSON object, whose `kind` must be this one. Errors as of `read`."""
    tensors, described = read(path)
    if described is None or described.get("kind") != kind:
        found = None if described is None else described.get("kind")
        raise InputError(f"{path}: holds {found or 'tensors that famba did not write'}; expected a famba {kind}")
    return tensors, described


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of any safetensors file, on the CPU, and famba's JSON object; None if famba did not write it.

    Raises:
        InputError: a file that is missing, truncated, or famba's and not what was written.
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
    if not isinstance(described, dict):
        return tensors, None
    written = described.pop(_CHECKSUM, None)
    if written != (found := _crc32(tensors, described)):
        raise InputError(f"{path}: spoilt: its CRC-32 is {found}; that of what was written is {written}")
    return tensors, described


def check_state(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse tensors whose names or shapes are not the expected ones, naming the first that differs."""
    for word, some, others in (("lacks", expected, tensors), ("has the unknown", tensors, expected)):
        if keys := [key for key in some if key not in others]:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise InputError(f"{path}: {word} {keys[0]}{more}; expected the {len(expected)} tensors of this model")
    for key, t in expected.items():
        if tensors[key].shape != t.shape:
            raise InputError(f"{path}: {key} has shape {tuple(tensors[key].shape)}; expected {tuple(t.shape)}")


def check_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are no weights, naming the first: each must hold floating-point numbers, all finite."""
    for key, t in tensors.items():
        if t.layout != torch.strided or t.is_meta or not t.is_floating_point():
            raise InputError(f"{path}: {key} is {t.dtype}, {t.layout}, on {t.device}; expected dense floating-point")
        if t.untyped_storage().nbytes() < t.numel() * t.element_size():  # a small file that would fill the memory
            raise InputError(f"{path}: {key} has shape {tuple(t.shape)}; the file holds fewer numbers")
        if not t.float().isfinite().all():
            raise InputError(f"{path}: {key} holds numbers that are not finite in float32")


def _crc32(tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> str:
    """Of names, types, shapes and values, in an order of their own; eight hexadecimal digits."""
    crc = zlib.crc32(json.dumps(described, sort_keys=True).encode())
    for key in sorted(tensors):
        t = tensors[key]
        crc = zlib.crc32(f"{key} {t.dtype} {tuple(t.shape)}".encode(), crc)
        crc = zlib.crc32(t.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"

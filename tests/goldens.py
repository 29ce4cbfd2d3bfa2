"""Inputs and outputs of independent implementations, in golden/."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).resolve().parent / "golden"


def golden_json(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def golden_tensors(name: str, prefix: str = "", device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a file whose keys begin so, by the rest of the key."""
    stored = load_file(GOLDEN / f"{name}.safetensors", device=device)
    return {key.removeprefix(prefix): x for key, x in stored.items() if key.startswith(prefix)}

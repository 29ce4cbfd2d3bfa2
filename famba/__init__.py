"""Vision Mamba with token fusion: the cross-layer strategies of Famba-V (arXiv:2409.09808) on Vim (arXiv:2401.09417).

The public names are looked up when they are first asked for, so that reading results needs no torch.
"""

import importlib
from typing import Any

_HOME = {
    "FambaError": "errors",
    "InputError": "errors",
    "FusionOptions": "params",
    "selective_scan": "scan",
    "selective_scan_ref": "scan",
    "backends": "scan",
    "Matching": "fusion",
    "match_tokens": "fusion",
    "fuse": "fusion",
    "STRATEGIES": "strategies",
    "schedule": "strategies",
    "token_counts": "strategies",
    "VisionMamba": "model",
    "create_model": "model",
    "load_vim": "pretrained",
    "apply": "pretrained",
    "fit": "train",
    "doctor": "diagnosis",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'famba' has no attribute {name!r}")
    return getattr(importlib.import_module(f"famba.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""Vision Mamba with token fusion: the cross-layer strategies of Famba-V (arXiv:2409.09808) on Vim (arXiv:2401.09417).

The public names are imported when they are first used, so that reading results needs no torch.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from famba.diagnostics import doctor
    from famba.errors import BackendError, FambaError, InputError, TrainingError
    from famba.fusion.matching import Matching, match_tokens
    from famba.fusion.merge import fuse
    from famba.fusion.options import FusionOptions
    from famba.fusion.strategies import STRATEGIES, schedule, token_counts
    from famba.kernels.scan import backends, selective_scan, selective_scan_ref
    from famba.models.pretrained import load_vim, set_schedule
    from famba.models.saved import load_model
    from famba.models.vim import VisionMamba, create_model
    from famba.training.fit import fit

# Idle threads of OpenMP, which torch runs on, would spin on cores that other processes could use. It is read when torch
# is loaded; where torch came first, `famba.kernels.precision.configure` warns.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
__all__ = [
    "STRATEGIES",
    "BackendError",
    "FambaError",
    "FusionOptions",
    "InputError",
    "Matching",
    "TrainingError",
    "VisionMamba",
    "backends",
    "create_model",
    "doctor",
    "fit",
    "fuse",
    "load_model",
    "load_vim",
    "match_tokens",
    "schedule",
    "selective_scan",
    "selective_scan_ref",
    "set_schedule",
    "token_counts",
]
_HOME = {
    "errors": ("BackendError", "FambaError", "InputError", "TrainingError"),
    "fusion.options": ("FusionOptions",),
    "fusion.matching": ("Matching", "match_tokens"),
    "fusion.merge": ("fuse",),
    "fusion.strategies": ("STRATEGIES", "schedule", "token_counts"),
    "kernels.scan": ("backends", "selective_scan", "selective_scan_ref"),
    "models.vim": ("VisionMamba", "create_model"),
    "models.pretrained": ("load_vim", "set_schedule"),
    "models.saved": ("load_model",),
    "training.fit": ("fit",),
    "diagnostics": ("doctor",),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'famba' has no attribute {name!r}")
    return getattr(importlib.import_module(f"famba.{_MODULE[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

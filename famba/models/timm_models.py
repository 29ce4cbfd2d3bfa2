"""The models by name in timm: after `import famba.models.timm_models`, `timm.create_model("vim_tiny")` makes one."""

from collections.abc import Callable
from typing import Any

from timm.models import register_model

from famba.errors import InputError
from famba.models.presets import PRESETS
from famba.models.vim import VisionMamba, create_model


def _entrypoint(name: str) -> Callable[..., VisionMamba]:
    def build(pretrained: bool = False, **options: Any) -> VisionMamba:
        if pretrained:
            raise InputError(f"pretrained: True; timm has no weights of {name}, famba.load_vim reads the released ones")
        for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):  # which timm gives to every model
            options.pop(key, None)
        return create_model(name, **options)

    build.__name__ = name
    return build


for _name in PRESETS:
    register_model(_entrypoint(_name))

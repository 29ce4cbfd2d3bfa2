"""torchvision beside a torch that its operators were not built for: once this is imported, it and timm can be.

Where torchvision imports by itself nothing is done. Otherwise its Python parts miss two operators that no transform
uses, and which are declared here, without a body.
"""

import sys

import torch

from famba.data.timm_transforms import TimmAugmentation

try:
    import torchvision
except RuntimeError:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    DECLARED = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        DECLARED.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401


class Bridged(TimmAugmentation):
    """An augmentation; a process that it is sent to imports this module first."""

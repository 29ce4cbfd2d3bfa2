"""Peak memory in the paper's Tables 2 and 3 beside the formula, by first fusing layer and by r.

Both are relative to the model without fusion, because the paper trains with other kernels. Its runs save less than the
formula predicts, and with r = 1 and 2 they need more memory than without fusion.
"""

import pandas as pd

from famba.analysis import ablation
from famba.fusion import strategies
from famba.fusion.options import FusionOptions
from famba.models.vim import create_model
from famba.profiling import flops

# As the public Famba-V code fuses. At this batch nearly all memory is activations, so the ratio hardly depends on it.
_OPTIONS = FusionOptions(order="append", weighting="mean")
_CLS, _CLASSES, _BATCH, _DEPTH = "head", 100, 128, 24


def beside_formula() -> pd.DataFrame:
    """Peak memory of a training step relative to no fusion, from the paper (vim_tiny) and by formula (vim_small too).

    Returns:
        Columns model, table (2: the first fusing layer varies, with r so that about as many tokens go; 3: r varies),
        first_layer, r, source (`paper` or `formula`) and memory_share.
    """
    sizes = {x: create_model(x, num_classes=_CLASSES, cls_position=_CLS).config for x in ("vim_tiny", "vim_small")}

    def peak(model: str, schedule: list[int]) -> int:
        return flops.analyse(sizes[model], schedule, batch=_BATCH, options=_OPTIONS).peak_bytes

    unfused = {model: peak(model, [0] * _DEPTH) for model in sizes}
    rows = []
    for table in (2, 3):
        for row in ablation.paper(table).to_dict("records"):
            at = {"table": table, "first_layer": row["first_layer"], "r": row["r"]}
            rows.append({"model": "vim_tiny", **at, "source": "paper", "memory_share": row["memory_ratio"]})
            removed = strategies.schedule("upper", depth=_DEPTH, r=row["r"], first_layer=row["first_layer"])
            for model in sizes:
                share = peak(model, removed) / unfused[model]
                rows.append({"model": model, **at, "source": "formula", "memory_share": share})
    return pd.DataFrame(rows)

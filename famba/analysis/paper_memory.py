"""Peak memory in the paper's Tables 2 and 3 beside the formula, by first fusing layer and by r.

Both are relative to the model without fusion, because the paper trains with other kernels. Its runs save less than the
formula predicts, and with r = 1 and 2 they need more memory than without fusion.
"""

import pandas as pd

from famba.analysis import summary
from famba.fusion import strategies
from famba.fusion.options import FusionOptions
from famba.models.vim import create_model
from famba.profiling import flops

# As the public Famba-V code fuses. At this batch nearly all memory is activations, so the ratio hardly depends on it.
_OPTIONS = FusionOptions(order="append", weighting="mean")
_CLS, _CLASSES, _BATCH = "head", 100, 128
_DEPTH = 24


def beside_formula() -> pd.DataFrame:
    """Peak memory of a training step relative to no fusion, from the paper (vim_tiny) and by formula (vim_small too).

    Returns:
        Columns model, table (2: the first fusing layer varies, with r so that about as many tokens go; 3: r varies),
        first_layer, r, source (`paper` or `formula`) and memory_share.
    """
    published = summary.paper_table()
    unfused = published.loc[(published["table"] == 1) & (published["strategy"] == "none")]
    base = dict(zip(unfused["model"], unfused["peak_memory_mib"], strict=True))
    sizes = {model: create_model(model, num_classes=_CLASSES, cls_position=_CLS).config for model in base}

    def peak(model: str, schedule: list[int]) -> int:
        return flops.analyse(sizes[model], schedule, batch=_BATCH, options=_OPTIONS).peak_bytes

    unfused_bytes = {model: peak(model, [0] * _DEPTH) for model in base}
    rows = []
    for row in published.loc[published["table"] > 1].to_dict("records"):
        first, last = map(int, row["fused_layers"].split("-"))
        r = row["tokens_fused_per_layer"]
        at = {"table": row["table"], "first_layer": first, "r": r}
        share = row["peak_memory_mib"] / base[row["model"]]
        rows.append({"model": row["model"], **at, "source": "paper", "memory_share": share})
        removed = strategies.schedule("upper", depth=_DEPTH, r=r, first_layer=first, last_layer=last)
        for model in base:
            share = peak(model, removed) / unfused_bytes[model]
            rows.append({"model": model, **at, "source": "formula", "memory_share": share})
    return pd.DataFrame(rows)

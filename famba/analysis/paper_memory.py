"""The memory of the paper's Tables 2 and 3 beside the formula: how it moves with the layer and with r.

Everything is in units of the same model without fusion, so that only the direction and the share that is saved compare:
the paper trains with other kernels. Its runs save less than the formula says that fewer tokens can save, and with r = 1
and 2 they take more memory than without fusion.
"""

import functools
from collections.abc import Sequence

import pandas as pd
import torch

from famba.analysis import summary
from famba.fusion import strategies
from famba.fusion.options import FusionOptions
from famba.models.vim import create_model
from famba.profiling import flops

# Fused as by the public Famba-V code. At this batch nearly all memory is activations, so that its size matters little.
_OPTIONS = FusionOptions(order="append", weighting="mean")
_CLS, _CLASSES, _BATCH = "head", 100, 128
_DEPTH = 24


def beside_formula() -> pd.DataFrame:
    """Peak memory of a training step as a share of the unfused model's.

    Returns:
        One row for each model, table, row of it and source: model, table (2: the first fusing layer varies, and r with
        it, so that about as many tokens go; 3: r varies), first_layer, r, source (`paper` or `formula`) and
        memory_share. The paper has these tables for vim_tiny alone; the formula is given for vim_small too.
    """
    published = summary.paper_table()
    unfused = published.loc[(published["table"] == 1) & (published["strategy"] == "none")]
    base = dict(zip(unfused["model"], unfused["peak_memory_mib"], strict=True))
    rows = []
    for row in published.loc[published["table"] > 1].to_dict("records"):
        first, last = map(int, row["fused_layers"].split("-"))
        r = row["tokens_fused_per_layer"]
        at = {"table": row["table"], "first_layer": first, "r": r}
        share = row["peak_memory_mib"] / base[row["model"]]
        rows.append({"model": row["model"], **at, "source": "paper", "memory_share": share})
        removed = strategies.schedule("upper", depth=_DEPTH, r=r, first_layer=first, last_layer=last)
        for model in base:
            share = _peak(model, tuple(removed)) / _peak(model, (0,) * _DEPTH)
            rows.append({"model": model, **at, "source": "formula", "memory_share": share})
    return pd.DataFrame(rows)


@functools.cache
def _peak(model: str, schedule: Sequence[int]) -> int:
    with torch.device("meta"):  # its sizes are asked for, not its weights
        config = create_model(model, num_classes=_CLASSES, cls_position=_CLS).config
    return flops.analyse(config, schedule, batch=_BATCH, options=_OPTIONS).peak_bytes

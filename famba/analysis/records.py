"""A run as one line: what it found, as tables and figures read it.

Frames are tidy: one row is one run, or one epoch of a run.
"""

import itertools
from pathlib import Path
from typing import Any

import pandas as pd

from famba import config
from famba.config import SweepParams
from famba.errors import InputError
from famba.storage import runs
from famba.storage.files import write_atomic

CURVES = ("strategy", "seed", "epoch", "train_loss", "val_loss", "train_top1_percent", "val_top1_percent")
_TEXT: Any = {"correct": "str", "made_of": "str", "disturbed": "str"}


def line(name: str, record: runs.RunRecord) -> dict[str, Any]:
    """What is kept of a variant's run. Correct is as in `runs.RunRecord`, of a set with a fixed test split without the
    images that are never tested."""
    data, answers = record.params["data"], record.correct
    return {
        "strategy": name,
        "seed": record.seed,
        "profile": record.profile,
        "dataset": data["dataset"],
        "img_size": data["img_size"],
        "model": record.params["model"]["name"],
        **{key: record.metrics[key] for key in ("top1_percent", "top5_percent", "loss")},
        "correct": answers if data["folds"] else answers.replace("-", ""),
        "chosen_weights": record.metrics["chosen"]["weights"],
        "chosen_epoch": record.metrics["chosen"]["epoch"],
        **{key: record.cost[key] for key in ("peak_memory_mib", "flops_per_image", "params_count")},
        "tokens_removed": sum(record.schedule),
        "tokens_left": record.token_counts[-1],
        "device": record.cost["device"],
        "threads": record.cost["threads"],
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(record.cost["versions"].items())),
        "command": record.cost["command"],
        "made_of": record.cost.get("made_of", ""),
    }


def epochs(name: str, record: runs.RunRecord) -> list[dict[str, Any]]:
    """A row for each epoch of a variant's run: `CURVES`."""
    rows = [{"strategy": name, "seed": record.seed, **row} for row in record.history]
    return [{key: row[key] for key in CURVES} for row in rows]


def gather(sweep: SweepParams, runs_dir: str | Path, folder: str | Path) -> None:
    """Write runs.csv and curves.csv of the runs that the sweep names; those of an earlier one are left out.

    Args:
        runs_dir, folder: if relative, from the repository root.

    Raises:
        InputError: a run that is missing or spoilt.
    """
    wanted = itertools.product(sweep.variants, sweep.seeds)
    found = [(name, runs.read(config.root() / runs_dir / runs.run_name(name, seed))) for name, seed in wanted]
    write(pd.DataFrame([line(*run) for run in found]), folder)
    rows = [row for run in found for row in epochs(*run)]
    write(pd.DataFrame(rows, columns=list(CURVES)), folder, "curves.csv")


def published(sweep: SweepParams, folder: str | Path) -> pd.DataFrame:
    """A row for each run that the sweep names, from their lines in a folder's runs.csv, which may hold others, too.

    The column strategy holds the variant's name; correct is without images that none of them tested.

    Raises:
        InputError: no such file, or a run without a line there.
    """
    lines = read(folder).set_index(["strategy", "seed"], drop=False)
    wanted = list(itertools.product(sweep.variants, sweep.seeds))
    if missing := [runs.run_name(*each) for each in wanted if each not in lines.index]:
        raise InputError(f"{folder}/runs.csv: {len(missing)} of {len(wanted)} runs are missing, the first {missing[0]}")
    return _of_tested_images(lines.loc[wanted].reset_index(drop=True))


def read(folder: str | Path) -> pd.DataFrame:
    """All lines of a folder's runs.csv; if relative, the folder is from the repository root."""
    return _of_tested_images(load(Path(folder) / "runs.csv"))


def load(path: str | Path) -> pd.DataFrame:
    """A table that `write` wrote, of runs, costs or a summary; if relative, the path is from the repository root.

    Raises:
        InputError: no such file.
    """
    path = config.root() / path
    try:
        table = pd.read_csv(path, dtype=_TEXT)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return table.fillna({"disturbed": ""})  # nothing disturbed it


def write(lines: pd.DataFrame, folder: str | Path, name: str = "runs.csv") -> None:
    """Write a table, such as lines of runs or of epochs, into a folder; if relative, it is from the repository root."""
    write_atomic(config.root() / folder / name, lines.to_csv(index=False, lineterminator="\n").encode())


def _of_tested_images(lines: pd.DataFrame) -> pd.DataFrame:
    images = itertools.zip_longest(*lines["correct"], fillvalue="-")
    tested = zip(*(answers for answers in images if {*answers} != {"-"}), strict=True)
    return lines.assign(correct=["".join(answers) for answers in tested])

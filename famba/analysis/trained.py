"""A trained model and what is known of it: that of a finished run, or one that was published without its run."""

import json
from pathlib import Path
from typing import Any

from famba import config
from famba.errors import InputError
from famba.models import saved
from famba.models.vim import VisionMamba
from famba.storage import checkpoint, runs
from famba.storage.files import json_bytes, write_atomic

_CONFIG = "config.json"


def load(folder: str | Path) -> tuple[VisionMamba, dict[str, Any]]:
    """The model, and a dict of strategy, seed, schedule, params (`Params.as_dict`), and classes, mean and std of the
    training images.

    Args:
        folder: of the run, or of what `publish` wrote; if relative, from the repository root.

    Raises:
        InputError: a folder or file that is missing, spoilt, or not such a model's.
    """
    folder = config.root() / folder
    if known := _known(folder):
        return saved.rebuilt(folder, checkpoint.read(folder / runs.MODEL_FILE)[0], known), known
    run = runs.read(folder)
    model, known = saved.load_model(folder / runs.MODEL_FILE)
    return model, known | {"schedule": list(run.schedule), "seed": run.seed, "params": run.params}


def publish(run_dir: str | Path, folder: str | Path, *, made_of: str) -> None:
    """Write the model of a run as `save_pretrained` does, in half precision, with what `load` needs."""
    model, known = load(run_dir)
    folder = config.root() / folder
    model.half().save_pretrained(folder)
    kept = {key: known[key] for key in ("strategy", "seed", "params", "classes", "mean", "std")}
    write_atomic(folder / _CONFIG, json_bytes(_known(folder) | kept | {"made_of": made_of}))


def made_of(folder: str | Path) -> str:
    """What the run of a published model was made of (`training.fit.made_of`); empty where none was published."""
    return _known(config.root() / folder).get("made_of", "")


def _known(folder: Path) -> dict[str, Any]:
    """What is known of a published model; empty where there is none."""
    path = folder / _CONFIG
    try:
        return json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from None

"""Models that are published without their runs."""

import pytest
import torch
from test_tokens import run  # noqa: F401 (a fixture)

from famba import VisionMamba
from famba.analysis import tokens, trained
from famba.errors import InputError
from famba.reports.models import PHOTOGRAPHS
from famba.storage import runs


def test_a_published_model_predicts_as_its_run_and_is_half_as_large(run, tmp_path):  # noqa: F811
    assert trained.made_of(tmp_path) == ""
    trained.publish(run, tmp_path, made_of="this")
    assert trained.made_of(tmp_path) == "this"
    published, finished = (tokens.trace(*trained.load(folder), PHOTOGRAPHS) for folder in (tmp_path, run))
    assert published.predicted == finished.predicted
    torch.testing.assert_close(published.trace.pooled, finished.trace.pooled, atol=0.01, rtol=0.01)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < 0.6 * (run / runs.MODEL_FILE).stat().st_size
    assert VisionMamba.from_pretrained(tmp_path).schedule == finished.model.schedule
    ours, theirs = (trained.load(folder)[1] for folder in (tmp_path, run))
    for key in ("strategy", "seed", "schedule", "params", "classes", "mean", "std"):
        assert ours[key] == theirs[key], key


def test_a_folder_that_holds_neither_a_run_nor_a_published_model_is_named(tmp_path):
    with pytest.raises(InputError, match=r"metrics\.json: missing, so the run is not complete"):
        trained.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: not readable as JSON"):
        trained.made_of(tmp_path)
    with pytest.raises(InputError, match=r"config\.json: not readable as JSON"):
        trained.load(tmp_path)

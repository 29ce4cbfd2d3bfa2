"""What `dvc plots` draws of the training curves, read as Vega-Lite; nothing here needs a network."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT
from test_runs import make_run

from famba.analysis import records
from famba.config import SweepParams
from famba.fusion.strategies import STRATEGIES
from famba.plots import STRATEGY_COLOURS
from famba.storage import runs


@pytest.fixture
def shown(tmp_path) -> dict[str, dict]:
    """Each plot of dvc.yaml by its name, for two strategies with two seeds."""
    for name in ("dvc.yaml", "params.yaml", ".dvc/config", ".dvc/plots/curves.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    sweep = SweepParams(strategies=("none", "upper"), seeds=(0, 1))
    for run in itertools.product(sweep.strategies, sweep.seeds):
        runs.write(make_run(*run), tmp_path / "runs" / runs.run_name(*run))
    records.gather(sweep, tmp_path / "runs", tmp_path / "results")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    dvc, environment = Path(sys.executable).with_name("dvc"), {"DVC_SITE_CACHE_DIR": str(tmp_path / "site")}
    command = [dvc, "plots", "show", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    assert "DVC_METRIC" not in done.stdout
    return {name: plot["content"] for name, (plot,) in json.loads(done.stdout)["data"].items()}


def test_each_curve_is_the_mean_over_seeds_of_the_epochs_of_every_run_in_the_colour_of_its_strategy(shown):
    columns = set()
    for name, plot in shown.items():
        rows = plot["data"]["values"]
        drawn = {(row["strategy"], row["seed"], row["epoch"]) for row in rows}
        assert drawn == set(itertools.product(("none", "upper"), "01", "12")), name
        epoch, value = plot["transform"]
        assert epoch == {"calculate": "toNumber(datum['epoch'])", "as": "x"}
        (column,) = (key for key in records.CURVES if value == {"calculate": f"toNumber(datum['{key}'])", "as": "y"})
        assert all(float(row[column]) > 0 for row in rows)
        columns.add(column)
        colour = plot["encoding"]["color"]
        assert colour["field"] == "strategy"
        assert colour["scale"]["domain"] == list(STRATEGIES)
        assert colour["scale"]["range"][: len(STRATEGIES)] == [STRATEGY_COLOURS[x] for x in STRATEGIES]
        seeds, mean = (layer["encoding"] for layer in plot["layer"])
        assert seeds["detail"] == {"field": "seed"}
        assert mean["y"]["aggregate"] == "mean"
        assert "detail" not in mean
    assert columns == set(records.CURVES) - {"strategy", "seed", "epoch"}

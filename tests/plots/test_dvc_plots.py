"""What `dvc plots` draws of the training curves, read as Vega-Lite; nothing here needs a network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_runs import make_run

from famba.analysis import records
from famba.config import SweepParams
from famba.fusion.strategies import STRATEGIES
from famba.plots import STRATEGY_COLOURS
from famba.storage import runs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> dict[str, dict]:
    """Each plot of dvc.yaml by its name, for two strategies with two seeds."""
    folder = tmp_path_factory.mktemp("plots")
    for name in ("dvc.yaml", "params.yaml", ".dvc/config", ".dvc/plots/curves.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    sweep = SweepParams(strategies=("none", "upper"), seeds=(0, 1))
    for strategy in sweep.strategies:
        for seed in sweep.seeds:
            runs.write(make_run(strategy, seed), folder / "runs" / runs.run_name(strategy, seed))
    records.gather(sweep, folder / "runs", folder / "results")
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    dvc, environment = Path(sys.executable).with_name("dvc"), {"DVC_SITE_CACHE_DIR": str(folder / "site")}
    command = [dvc, "plots", "show", "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    assert "DVC_METRIC" not in done.stdout
    return {name: plot["content"] for name, (plot,) in json.loads(done.stdout)["data"].items()}


def test_each_curve_is_drawn_from_the_epochs_of_every_run(shown):
    columns = set()
    for name, plot in shown.items():
        rows = plot["data"]["values"]
        assert {(row["strategy"], row["seed"], row["epoch"]) for row in rows} == {
            (strategy, seed, epoch) for strategy in ("none", "upper") for seed in "01" for epoch in "12"
        }, name
        epoch, value = plot["transform"]
        assert epoch == {"calculate": "toNumber(datum['epoch'])", "as": "x"}
        (column,) = (key for key in records.CURVES if value == {"calculate": f"toNumber(datum['{key}'])", "as": "y"})
        assert all(float(row[column]) > 0 for row in rows)
        columns.add(column)
    assert columns == set(records.CURVES) - {"strategy", "seed", "epoch"}


def test_a_curve_is_the_mean_over_seeds_in_the_colour_of_its_strategy(shown):
    assert len(shown) == 4
    for plot in shown.values():
        colour = plot["encoding"]["color"]
        assert colour["field"] == "strategy"
        assert colour["scale"]["domain"] == list(STRATEGIES)
        assert dict(zip(colour["scale"]["domain"], colour["scale"]["range"], strict=False)) == {
            x: STRATEGY_COLOURS[x] for x in STRATEGIES
        }
        seeds, mean = (layer["encoding"] for layer in plot["layer"])
        assert seeds["detail"] == {"field": "seed"}
        assert mean["y"]["aggregate"] == "mean"
        assert "detail" not in mean

"""The pipeline itself, in a copy of the repository: a reduced sweep of the smoke profile through `dvc repro`."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from checkout import copy_to
from dvc.utils.serialize import modify_yaml
from PIL import Image

from famba import VisionMamba

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The tracked files, committed anew, with `none` and `upper`, one seed, under `smoke`."""
    folder = copy_to(tmp_path_factory.mktemp("copy"), without=("tests/golden/", "figures/", "results/", "dvc.lock"))
    with modify_yaml(folder / "params.yaml") as document:
        document.update(profile="smoke")
        document["sweep"].update(strategies=["none", "upper"], seeds=[0])
    commit(folder)
    return folder


def run(folder: Path, *command: str) -> str:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DVC_SITE_CACHE_DIR": str(folder.parent / "dvc-site"),
        **{f"GIT_{who}_NAME": "test" for who in ("AUTHOR", "COMMITTER")},
        **{f"GIT_{who}_EMAIL": "test@localhost" for who in ("AUTHOR", "COMMITTER")},
    }
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def commit(folder: Path) -> None:
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-qm", "state")


def ran(output: str) -> set[str]:
    """The stages that were run, less those that always are."""
    found = set(re.findall(r"Running stage '([^']+)'", output))
    assert "resolve/dvc.yaml:resolve" in found
    return {name for name in found if not name.startswith("resolve/")}


def outputs(folder: Path) -> dict[str, bytes]:
    found = [*folder.glob("figures/*"), *folder.glob("results/*.*"), *folder.glob("results/runs/*/*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if path.is_file()}


@pytest.fixture(scope="module")
def first(copy: Path) -> dict[str, bytes]:
    """What the first `make repro` leaves, by its own script: two stages at a time."""
    done = ran(run(copy, ".ci/repro", "2"))
    assert {"train@none-0", "train@upper-0", "cost", "compare", "similarity", "tokens@none", "tokens@upper"} <= done
    assert not [stage for stage in done if "ablation" in stage]
    commit(copy)
    return outputs(copy)


def test_the_pipeline_writes_summary_and_real_figures(copy, first):
    assert {"results/summary.csv", "results/summary.md", "results/summary.json"} <= set(first)
    assert "\n| none " in first["results/summary.md"].decode()
    figures = sorted(copy.glob("figures/*.png"))
    assert len(figures) >= 8
    for path in figures:
        with Image.open(path) as image:
            image.load()
            assert min(image.size) > 200, path
            assert len(image.convert("RGB").getcolors(2**24) or []) > 10, f"{path} is blank"


def test_make_repro_waits_for_a_dvc_that_is_still_at_work_and_says_that_nothing_is_to_be_done(copy, first):
    hold = "import time, zc.lockfile as z; lock = z.LockFile('.dvc/tmp/lock'); print(flush=True); time.sleep(8)"
    with subprocess.Popen([sys.executable, "-c", hold], cwd=copy, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline()
        assert run(copy, ".ci/repro", "2").startswith("make repro: nothing to do")
    assert outputs(copy) == first


def test_what_changes_no_result_runs_nothing_again(copy, first):
    """A comment, a notebook that was run and saved, and a value that the profile replaces anyway."""
    module, notebook, params = (copy / x for x in ("famba/plots/results.py", "notebooks/train.ipynb", "params.yaml"))
    before = {path: path.read_text() for path in (module, notebook, params)}
    module.write_text(before[module] + "\n# touched\n")
    notebook.write_text(before[notebook].replace('"execution_count": null', '"execution_count": 7'))
    with modify_yaml(params) as document:
        document["fusion"]["upper"].update(r=1)
    assert all(path.read_text() != text for path, text in before.items())
    done = ran(run(copy, "dvc", "repro"))
    for path, text in before.items():
        path.write_text(text)
    assert done == set()
    assert outputs(copy) == first


def test_a_new_seed_runs_the_new_runs_only(copy, first):
    before = (copy / "params.yaml").read_text()
    with modify_yaml(copy / "params.yaml") as document:
        document["sweep"].update(seeds=[0, 1])
    planned = ran(run(copy, "dvc", "repro", "--dry"))
    (copy / "params.yaml").write_text(before)
    assert planned == {"train@none-1", "train@upper-1", "compare", "similarity"}


def test_an_experiment_trains_what_it_changes_in_a_copy_and_its_metrics_are_shown(copy, first):
    done = ran(run(copy, "dvc", "exp", "run", "--temp", "compare", "-S", "profiles.smoke.fusion.upper.r=6"))
    assert done == {"train@upper-0", "cost", "compare"}
    assert outputs(copy) == first
    assert run(copy, "git", "status", "--porcelain") == ""
    assert "top1_percent" in run(copy, "dvc", "metrics", "show", "--md")


def test_without_the_lock_file_finished_runs_are_taken_from_the_cache(copy, first):
    """As after `git checkout .`, which undoes what `dvc repro` has written into dvc.lock."""
    lock = copy / "dvc.lock"
    made = lock.read_bytes()
    lock.unlink()
    said = run(copy, "dvc", "repro", "-s", "train@none-0", "train@upper-0")
    lock.write_bytes(made)
    assert said.count("is cached - skipping run") == 2
    assert outputs(copy) == first


def test_claims_are_judged_by_the_sweep_and_the_ablations_that_were_run(copy, first):
    run(copy, "dvc", "repro", "--force", "--single-item", "claims")
    found = pd.read_csv(copy / "results" / "claims.csv")
    assert "not measured" not in set(found.loc[found["claim"] == "upper_keeps_accuracy", "verdict"])
    assert set(found.loc[found["claim"] == "later_start", "verdict"]) == {"not measured"}


def test_an_ablation_of_another_profile_brings_calibration_curves_similarity_and_models(copy, first):
    """The schedule that calibration finds is beside the one that was trained. When code that draws has changed, all of
    it is drawn without the runs."""
    stage, record = (f"experiments/dvc.yaml:{kind}@photographs" for kind in ("ablation", "record"))
    few = {"strategies": ["none", "by_logits"], "seeds": [3], "profile": "smoke"}
    with modify_yaml(copy / "params.yaml") as document:
        document["ablation"]["photographs"].update(few)
        document["profiles"]["smoke"]["fusion"].update(by_logits={"schedule": [0, 8, 8, 8]})
    runs = copy / "results" / "experiments" / "ablation" / "smoke"
    assert ran(run(copy, "dvc", "repro", record)) == {record}
    assert {path.name for path in runs.iterdir()} == {"none-3", "by_logits-3"}
    shutil.rmtree(runs)
    module = copy / "famba" / "analysis" / "ablation.py"
    module.write_text(module.read_text() + "\nTOUCHED = 1\n")
    done = ran(run(copy, "dvc", "repro", stage))
    run(copy, "git", "checkout", "--", "params.yaml", "famba")
    assert done == {stage}
    results, figures = (copy / kind / "ablation" / "photographs" for kind in ("results", "figures"))
    found = json.loads((results / "calibration.json").read_text())["logits"]
    assert (sum(found["schedule"]), found["runs"]) == (24, ["none-3"])
    text = (results / "calibration.md").read_text()
    assert "| by_logits | 0 8 8 8 |" in re.sub(" +", " ", text)
    assert ("which is `by_logits`" in text) == (found["schedule"] == [0, 8, 8, 8])
    assert {path.stem for path in figures.glob("*.png")} >= {"fusing_costs", "curves"}
    assert (results / "similarity.md").is_file()
    model = copy / "results" / "records" / "photographs" / "models" / "by_logits-3"
    assert VisionMamba.from_pretrained(model).schedule == [0, 8, 8, 8]

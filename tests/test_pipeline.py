"""The pipeline itself, in a copy of the repository: a reduced sweep of the smoke profile through `dvc repro`."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The tracked files, committed anew, with `none` and `upper`, one seed, under `smoke`."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files are tracked is not known")
    folder = tmp_path_factory.mktemp("copy")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = [name for name in names.split("\0") if name and not name.startswith("tests/golden/")]
    assert "dvc.yaml" in names
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "dvc.lock").unlink(missing_ok=True)
    for made in ("figures", "results"):
        shutil.rmtree(folder / made, ignore_errors=True)
    edit(folder, lambda document: document.update(profile="smoke"))
    edit(folder, lambda document: document["sweep"].update(strategies=["none", "upper"], seeds=[0]))
    less = {"strategies": ["lower"], "factors": ["order"], "seeds": [0, 1], "epochs": None}
    edit(folder, lambda document: document["ablation"].update(less))
    run(folder, "git", "init", "-q")
    commit(folder)
    return folder


def edit(folder: Path, change) -> None:
    yaml = YAML()
    document = yaml.load(folder / "params.yaml")
    change(document)
    yaml.dump(document, folder / "params.yaml")


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
    """The stages that were run, less the one that always is."""
    found = set(re.findall(r"Running stage '([^']+)'", output))
    assert "resolve" in found
    return found - {"resolve"}


def outputs(folder: Path) -> dict[str, bytes]:
    found = [*folder.glob("figures/*"), *folder.glob("results/*.*"), *folder.glob("results/runs/*/*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def first(copy: Path) -> dict[str, bytes]:
    """What the first `make repro` leaves, by its own recipe: several stages at a time."""
    recipe = subprocess.run(["make", "-n", "repro"], cwd=copy, capture_output=True, text=True, check=True).stdout
    commands = [line.partition(" && ")[2] for line in recipe.splitlines() if "activate && " in line]
    assert len(commands) == 4  # resolve, train, draw, and the rest
    done = ran("".join(run(copy, "bash", "-c", command) for command in commands))
    assert {"train@none-0", "train@upper-0", "cost", "compare", "similarity", "tokens@none", "tokens@upper"} <= done
    assert not [stage for stage in done if "ablation" in stage]
    commit(copy)
    return outputs(copy)


def test_the_pipeline_writes_summary_and_real_figures(copy, first):
    assert {"results/summary.csv", "results/summary.md", "results/summary.json"} <= set(first)
    assert "| none |" in first["results/summary.md"].decode()
    figures = sorted(copy.glob("figures/*.png"))
    assert len(figures) >= 8
    for path in figures:
        with Image.open(path) as image:
            image.load()
            assert min(image.size) > 200, path
            assert len(image.convert("RGB").getcolors(2**24) or []) > 10, f"{path} is blank"


def test_a_second_repro_does_nothing(copy, first):
    assert ran(run(copy, "dvc", "repro")) == set()
    assert outputs(copy) == first


def test_a_comment_runs_nothing_again_and_code_that_draws_never_retrains(copy, first):
    module = copy / "famba" / "plots" / "results.py"
    text = module.read_text()
    module.write_text(text + "\n# touched\n")
    assert ran(run(copy, "dvc", "repro")) == set()
    module.write_text(text + "\nTOUCHED = 1\n")
    run(copy, "dvc", "repro", "resolve")
    planned = ran(run(copy, "dvc", "repro", "--dry"))
    module.write_text(text)
    run(copy, "dvc", "repro", "resolve")
    assert "compare" in planned
    assert not [stage for stage in planned if stage.startswith("train")]


def test_code_that_trains_retrains_every_run(copy, first):
    module = copy / "famba" / "training" / "optim.py"
    text = module.read_text()
    module.write_text(text + "\nTOUCHED = 1\n")
    run(copy, "dvc", "repro", "resolve")
    planned = ran(run(copy, "dvc", "repro", "--dry"))
    module.write_text(text)
    run(copy, "dvc", "repro", "resolve")
    assert {"train@none-0", "train@upper-0"} <= planned


def test_saving_a_notebook_again_runs_nothing_again(copy, first):
    path = copy / "notebooks" / "train.ipynb"
    text = path.read_text()
    path.write_text(text.replace('"execution_count": null', '"execution_count": 7'))
    assert path.read_text() != text
    done = ran(run(copy, "dvc", "repro"))
    path.write_text(text)
    assert done == set()


def test_a_new_seed_runs_the_new_runs_only(copy, first):
    edit(copy, lambda document: document["sweep"].update(seeds=[0, 1]))
    planned = ran(run(copy, "dvc", "repro", "--dry"))
    edit(copy, lambda document: document["sweep"].update(seeds=[0]))
    assert planned == {"train@none-1", "train@upper-1", "compare", "similarity"}


def test_another_r_of_one_strategy_reruns_that_strategy_and_the_gathering(copy, first):
    done = ran(run(copy, "dvc", "exp", "run", "-S", "profiles.smoke.fusion.upper.r=6"))
    assert done == {"train@upper-0", "cost", "compare", "similarity", "tokens@upper"}
    after = outputs(copy)
    assert {name for name in first if name.startswith("results/runs/none-0/") and after[name] != first[name]} == set()
    assert after["results/runs/upper-0/schedule.json"] != first["results/runs/upper-0/schedule.json"]
    difference = run(copy, "dvc", "metrics", "diff", "--md")
    assert "summary.json" in difference
    assert "top1_percent" in run(copy, "dvc", "metrics", "show", "--md")


def test_a_value_that_the_profile_replaces_anyway_runs_nothing_again(copy, first):
    text = (copy / "params.yaml").read_text()
    edit(copy, lambda document: document["fusion"]["upper"].update(r=1))
    planned = ran(run(copy, "dvc", "repro"))
    (copy / "params.yaml").write_text(text)
    run(copy, "dvc", "repro")
    assert planned == set()


ABLATION, ADAPTIVE = "experiments/dvc.yaml:ablation", "experiments/dvc.yaml:adaptive"


def test_the_ablation_is_a_pipeline_of_its_own_that_keeps_its_runs(copy, first):
    done = ran(run(copy, "dvc", "repro", ABLATION))
    assert done == {ABLATION}
    results = {name: copy / name for name in ("results/ablation.csv", "results/ablation.md", "figures/ablation.png")}
    made = {name: path.read_bytes() for name, path in results.items()}
    assert b"Keeping scan order instead of" in made["results/ablation.md"]
    with Image.open(results["figures/ablation.png"]) as image:
        assert min(image.size) > 200
    assert (copy / "experiments" / "dvc.lock").is_file()
    commit(copy)
    assert ran(run(copy, "dvc", "repro", ABLATION)) == set()
    assert ran(run(copy, "dvc", "repro")) == set()

    runs = {path: path.stat().st_mtime_ns for path in copy.glob("results/experiments/ablation/*/metrics.json")}
    assert len(runs) == 2 * 2 * 2
    module = copy / "famba" / "analysis" / "ablation.py"
    text = module.read_text()
    module.write_text(text + "\nTOUCHED = 1\n")
    again = ran(run(copy, "dvc", "repro", ABLATION))
    module.write_text(text)
    assert again == {ABLATION}
    assert {path: path.stat().st_mtime_ns for path in runs} == runs
    assert {name: path.read_bytes() for name, path in results.items()} == made
    run(copy, "dvc", "repro", ABLATION)


def test_an_ablation_of_other_seeds_or_another_profile_is_asked_for_as_the_sweep_is(copy, first):
    run(copy, "dvc", "exp", "run", ABLATION, "-S", "ablation.seeds=[3]")
    lines = (copy / "results" / "ablation.csv").read_text().splitlines()
    assert [line.split(",")[6] for line in lines] == ["seed", "3", "3", "3", "3"]
    edit(copy, lambda document: document.update(profile="default"))
    planned = run(copy, "dvc", "repro", "--dry", ABLATION)
    edit(copy, lambda document: document.update(profile="smoke"))
    assert "-p profile default" in planned


def test_the_adaptive_pipeline_stands_on_the_sweeps_runs_and_leaves_them_alone(copy, first):
    before = outputs(copy)
    assert ran(run(copy, "dvc", "repro", ADAPTIVE)) == {ADAPTIVE}
    assert {name: content for name, content in outputs(copy).items() if name in before} == before
    text = (copy / "results" / "adaptive.md").read_text()
    assert "| adaptive-logits |" in text
    assert "| upper |" in text
    assert (copy / "figures" / "adaptive.png").is_file()
    assert ran(run(copy, "dvc", "repro", ADAPTIVE)) == set()
    (copy / "results" / "adaptive.md").unlink()
    assert ran(run(copy, "dvc", "repro", ADAPTIVE)) == {ADAPTIVE}
    assert (copy / "results" / "adaptive.md").read_text() == text  # from the runs that were kept, to the same bytes
    shutil.rmtree(copy / "results" / "experiments" / "adaptive")
    for name in set(outputs(copy)) - set(before):
        (copy / name).unlink()

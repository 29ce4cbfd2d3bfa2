"""A crate is written of a pipeline that was run, and read again by its library."""

import hashlib
import json
from typing import Any

import pytest
from rocrate.rocrate import ROCrate
from ruamel.yaml import YAML

from famba import config
from famba.analysis import crate
from famba.errors import InputError

COMMAND = "python -m famba notebook notebooks/compare.ipynb build/executed/compare.ipynb"
OUTS = [{"path": "results/summary.md"}, {"path": "results/runs/none-0"}, {"path": "figures/ablation"}]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A repository in which two stages were run."""
    for name in ("params.yaml", "CITATION.cff"):
        (tmp_path / name).write_bytes((config.root() / name).read_bytes())
    for name in ("dvc.yaml", "notebooks/compare.ipynb", "results/summary.md", "figures/ablation/a/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    stages = {"resolve": {"cmd": "x", "outs": [{"path": "build/resolved"}]}, "compare": {"cmd": COMMAND, "outs": OUTS}}
    YAML(typ="safe", pure=True).dump({"stages": stages}, tmp_path / "dvc.lock")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_its_reader_finds_the_workflow_each_stage_and_what_it_made(run):
    crate.write(run / "crate")
    read: Any = ROCrate(run / "crate")
    assert read.mainEntity.id == "dvc.yaml"
    actions = [action for action in read.get_by_type("CreateAction") if "result" in action]
    made = {action.id: [each.id for each in action["result"]] for action in actions}
    files = ["results/summary.md", "figures/ablation/a/b.png"]
    assert made == {"#compare": files, "#dvc-repro": files}
    compare = read.get("#compare")
    assert (compare["description"], compare["instrument"][0].id) == (COMMAND, "notebooks/compare.ipynb")
    assert {each.id for each in compare["object"]} == {"params.yaml"}
    for path in files:
        content = (run / "crate" / path).read_bytes()
        assert read.get(path)["sha256"] == hashlib.sha256(content).hexdigest()
        assert content == path.encode()
    claimed = {each.id for each in read.root_dataset["conformsTo"]}
    assert "https://w3id.org/ro/wfrun/workflow/0.5" in claimed


def test_what_cannot_be_a_crate_is_refused_and_nothing_is_overwritten(run):
    (run / "crate").mkdir()
    (run / "crate" / "mine").touch()
    with pytest.raises(InputError, match="crate: must be a folder that is new or empty; nothing is overwritten"):
        crate.write(run / "crate")
    with pytest.raises(InputError, match="mine: must be a folder"):
        crate.write(run / "crate" / "mine")
    (run / "results" / "summary.md").unlink()
    with pytest.raises(InputError, match=r"results/summary\.md: missing, but a stage"):
        crate.write(run / "new")
    (run / "CITATION.cff").unlink()
    with pytest.raises(InputError, match=r"CITATION\.cff: missing"):
        crate.write(run / "new")
    (run / "dvc.lock").unlink()
    with pytest.raises(InputError, match=r"dvc\.lock: no stage was run"):
        crate.write(run / "new")


def test_codemeta_says_what_the_citation_says():
    found = json.loads((config.root() / "codemeta.json").read_bytes())
    cited = YAML(typ="safe", pure=True).load((config.root() / "CITATION.cff").read_text())
    assert (found["name"], found["version"], found["keywords"]) == (cited["title"], cited["version"], cited["keywords"])
    assert found["license"] == f"https://spdx.org/licenses/{cited['license']}"
    assert [each["name"] for each in found["author"]] == [each["name"] for each in cited["authors"]]
    papers = [f"https://arxiv.org/abs/{each['identifiers'][0]['value'][6:]}" for each in cited["references"]]
    assert [each["@id"] for each in found["referencePublication"]] == papers

"""Results with their provenance, as others can read it: a Workflow Run RO-Crate of what DVC has run.

Source: the profile "Workflow Run Crate" 0.5 (S. Leo et al., "Recording provenance of workflow runs with RO-Crate",
PLOS ONE 19(9), 2024), on RO-Crate 1.1; written and read by the library `rocrate`.
"""

import hashlib
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from famba import config
from famba.errors import InputError

_PROFILES = {
    "https://w3id.org/ro/wfrun/process/0.5": "Process Run Crate",
    "https://w3id.org/ro/wfrun/workflow/0.5": "Workflow Run Crate",
    "https://w3id.org/workflowhub/workflow-ro-crate/1.0": "Workflow RO-Crate",
}
_LANGUAGE = "https://dvc.org"
_LOCKS = ("dvc.lock", "experiments/dvc.lock")


def write(folder: Path) -> None:
    """Write the crate: the workflow, its parameters and notebooks, and each stage that was run with what it made.

    Files are copied under their paths in the repository. The runs themselves are left out; DVC keeps them.

    Args:
        folder: of the crate, which must be empty or not exist.

    Raises:
        InputError: the folder is not empty; nothing was run; CITATION.cff or a stage's file is missing.
    """
    from rocrate.model.computerlanguage import ComputerLanguage
    from rocrate.rocrate import ROCrate

    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise InputError(f"{folder}: must be a folder that is new or empty; nothing is overwritten")
    if not (stages := {name: stage for lock in _LOCKS for name, stage in _yaml(lock).get("stages", {}).items()}):
        raise InputError("dvc.lock: no stage was run; `make repro` runs them")
    if not (cited := _yaml("CITATION.cff")):
        raise InputError("CITATION.cff: missing; it has the title and the licence")
    crate: Any = ROCrate(version="1.1")
    crate.name, crate.license = f"Results of {cited['title']}", f"https://spdx.org/licenses/{cited['license']}"
    crate.description = "Training runs of Vision Mamba with token fusion, compared, as `dvc repro` made them."
    entities = [{"@id": url, "@type": "CreativeWork", "name": name} for url, name in _PROFILES.items()]
    crate.root_dataset["conformsTo"] = [crate.add_jsonld(entity) for entity in entities]

    def file(path: str) -> Any:
        if known := crate.get(path):
            return known
        source = config.root() / path
        if not source.is_file():
            raise InputError(f"{path}: missing, but a stage that was run has made or read it")
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        return crate.add_file(source, path, properties={"name": path, "sha256": digest})

    properties = {"name": "DVC", "url": {"@id": _LANGUAGE}, "identifier": {"@id": _LANGUAGE}}
    language = crate.add(ComputerLanguage(crate, _LANGUAGE, properties=properties))
    workflow = crate.add_workflow(config.root() / "dvc.yaml", "dvc.yaml", main=True, lang=language)
    workflow["name"] = "Train every strategy and compare them"
    params, made = file("params.yaml"), []
    for name, stage in stages.items():
        notebooks = [file(word) for word in stage["cmd"].split() if word.startswith("notebooks/")]
        outs = [file(path) for out in stage.get("outs", []) for path in _kept(out["path"])]
        made += outs
        action = crate.add_action(notebooks or [workflow], f"#{name}", object=[params], result=outs)
        action["name"], action["description"] = name, stage["cmd"]
    crate.add_action([workflow], "#dvc-repro", object=[params], result=made)["name"] = "dvc repro"
    crate.write(folder)


def _kept(out: str) -> list[str]:
    """The files of an output that git keeps; runs are in DVC's cache, what is in build/ is for one machine."""
    path = config.root() / out
    if out.startswith(("results/runs", "build/")):
        return []
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    return [each.relative_to(config.root()).as_posix() for each in files]


def _yaml(name: str) -> dict[str, Any]:
    path = config.root() / name
    return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")) if path.is_file() else {}

"""The shape of the repository: who imports whom, what the pipeline depends on, how notebooks are written.

Each of these guards says how much it looked at, so that a file that moves cannot make it pass by seeing nothing.
"""

import ast
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import nbformat
import pytest
from checkout import tracked
from packaging.requirements import Requirement
from PIL import Image
from ruamel.yaml import YAML

import famba
from famba import backends, config
from famba.analysis import summary
from famba.cli import main
from famba.storage import provenance

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
STAGE_NOTEBOOKS = ("train", "cost", "compare", "tokens", "similarity", "ablation", "claims")
# A package imports only from itself and from those before it; two modules of fusion need nothing and come first.
PACKAGES = (
    *("errors", "validation", "fusion.options", "fusion.strategies", "params", "config", "storage", "supervision"),
    *("kernels", "fusion", "models", "data", "profiling", "training", "analysis", "experiments", "plots", "bench"),
    *("diagnostics", "reports", "gpu_check", "notebook", "cli", "__main__"),
)
FOR_ALL = ("plots", "notebooks", "paper", "dev")  # the extras that `make env` installs
# What reads parameters and results, and draws them.
NO_TORCH = (
    *("config", "storage.files", "storage.provenance", "storage.runs", "fusion.options", "fusion.strategies"),
    *("analysis.ablation", "analysis.cost", "analysis.records", "analysis.similarity", "analysis.summary"),
    *("experiments.launcher", "plots"),
)


def read_yaml(path: Path) -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(path.read_text())


def modules() -> list[str]:
    """The name of every module of famba but famba itself."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / "famba").rglob("*.py"))]
    return [".".join(path.parts).removesuffix(".__init__") for path in paths if path.parts != ("famba", "__init__")]


def package(module: str) -> int:
    """The place of a module's package."""
    name = module.removeprefix("famba.")
    return PACKAGES.index(name if name in PACKAGES else name.split(".")[0])


def notebooks() -> dict[str, nbformat.NotebookNode]:
    return {path.stem: nbformat.read(path, as_version=4) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}


def code(notebook: nbformat.NotebookNode) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def defaults(notebook: nbformat.NotebookNode) -> dict[str, object]:
    """Name and value of each parameter."""
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    body = ast.parse(tagged[0].source).body
    assert all(isinstance(line, ast.Assign) and len(line.targets) == 1 for line in body)
    return {line.targets[0].id: ast.literal_eval(line.value) for line in body}


def stages() -> dict[str, dict]:
    """Each stage of the root's pipeline and of those in folders, by its name; of a foreach, the body."""
    found: dict[str, dict] = {}
    for path in [ROOT / "dvc.yaml", *sorted(ROOT.glob("*/dvc.yaml"))]:
        bodies = {name: stage.get("do", stage) for name, stage in read_yaml(path)["stages"].items()}
        assert not set(found) & set(bodies)
        assert all((stage.get("wdir") == "..") == (path.parent != ROOT) for stage in bodies.values()), path
        found |= bodies
    return found


def command(stage: dict) -> str:
    return stage["cmd"] if isinstance(stage["cmd"], str) else " && ".join(stage["cmd"])


def notebook_stages() -> dict[str, dict]:
    return {name: stage for name, stage in stages().items() if "famba notebook" in command(stage)}


def test_packages_import_only_from_those_before_them():
    looked = 0
    for module in modules():
        for other in provenance._module(module)[0]:
            assert package(other) <= package(module), f"{module} imports {other}"
            looked += 1
    assert looked > 100


def test_timm_and_torchvision_are_imported_where_they_are_asked_for_alone():
    named = {module for module in modules() if {"timm", "torchvision"} & provenance._module(module)[1]}
    assert named == {"famba.data.preload", "famba.data.timm_transforms", "famba.models.timm_models"}


def test_what_reads_results_needs_no_torch_and_training_needs_nothing_that_reads_results():
    for name in NO_TORCH:
        for other in provenance._closure([f"famba.{name}"]):
            assert "torch" not in provenance._module(other)[1], f"{name}, by way of {other}"
    needed = provenance._closure(["famba.training.fit"])
    assert "famba.models.vim" in needed
    assert not [name for name in needed if package(name) > package("famba.training")]


def test_the_package_hands_out_its_public_names():
    assert len(famba.__all__) > 5
    assert all(getattr(famba, name) is not None for name in famba.__all__)


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import famba", "torch famba.config"),
        (
            "import famba; famba.create_model('vim_nano', num_classes=10, img_size=8)",
            "torch._dynamo pandas scipy sklearn pydantic matplotlib",  # the compiler takes as long as the rest of torch
        ),
        ("from famba.cli import main; main(['resolve', '--out', 'build/resolved'])", "torch pandas scipy"),
    ],
    ids=["package", "model", "dvc repro"],
)
def test_what_takes_long_to_import_is_imported_where_it_is_needed_alone(code, absent):
    command = [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    assert "famba" in found
    assert not set(absent.split()) & set(found)


def test_each_stage_depends_on_the_digest_of_the_notebook_that_it_runs():
    found = notebook_stages()
    assert set(found) == set(STAGE_NOTEBOOKS)
    for name, stage in found.items():
        assert f"notebook notebooks/{name}.ipynb build/executed/{name}" in command(stage)
        others = ("results/", "build/resolved/params", "build/ablations")
        code = [dep for dep in stage["deps"] if not dep.startswith(others)]
        assert code == [f"build/resolved/code/{name}.json"]
        assert provenance.of_notebook(ROOT / "notebooks" / f"{name}.ipynb")["digest"]
    assert stages()["resolve"]["always_changed"]


def test_what_judges_the_claims_is_code_of_their_stage_alone():
    """Stages that depended on it would measure all times again where only a verdict is worded anew."""
    sources = {name: "\n".join(code(notebooks()[name])).encode() for name in STAGE_NOTEBOOKS}
    needed = {name: provenance._closure(provenance._parsed(source)[0]) for name, source in sources.items()}
    assert [name for name, found in needed.items() if "famba.analysis.claims" in found] == ["claims"]
    assert "famba.training.optim" in needed["train"]
    assert "famba.plots.results" not in needed["train"]


def test_stages_depend_on_the_parameters_that_they_read():
    assert set(stages()["compare"]["params"]) == {"profile", "sweep"}
    assert set(stages()["claims"]["params"]) == {"ablation", "claims"}
    for name in ("record", "ablation"):
        assert "build/ablations/${key}.json" in stages()[name]["deps"]
        assert "profile ${profile}" in command(stages()[name])
    assert "results/records/${key}" in stages()["ablation"]["deps"]
    assert stages()["record"]["outs"] == [{"results/records/${key}": {"cache": False, "persist": True}}]


def test_each_stage_gives_its_notebook_parameters_that_it_has_and_has_it_make_the_results():
    found = notebook_stages()
    assert len(found) == len(STAGE_NOTEBOOKS)
    for name, stage in found.items():
        words = shlex.split(command(stage))
        given = [words[i + 1] for i, word in enumerate(words) if word == "-p"]
        unset = {"pipeline"} & set(defaults(notebooks()[name])) - set(given)
        assert not unset, f"{name} would show what is there instead of making it"
        assert {"profile"} <= set(given) <= set(defaults(notebooks()[name])), name


def test_training_outputs_are_cached_and_only_gathering_ones_are_not():
    """`cache: false` switches off DVC's run cache, so a finished run would be trained again."""
    for name, stage in notebook_stages().items():
        for out in [*stage.get("outs", []), *stage.get("metrics", []), *stage.get("plots", [])]:
            ((path, how),) = out.items() if isinstance(out, dict) else [(out, {})]
            assert how.get("cache", True) == path.startswith("results/runs/"), (name, out)


def test_stage_notebooks_hold_no_outputs_and_every_notebook_asks_for_the_same_kernel():
    found = notebooks()
    assert {"method", "data", *STAGE_NOTEBOOKS} <= set(found)
    for name, notebook in found.items():
        assert notebook.metadata.kernelspec.name == "python3", name
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert cells
        if name == "method":
            assert all(cell.execution_count for cell in cells), name
            shown = [cell for cell in cells if cell.outputs]
            assert len(shown) > 8  # widgets are not kept: without a kernel they are dead, and their names are random
            assert all("nbval-check-output" in cell.metadata.tags for cell in shown), "make test would not compare it"
        else:
            assert not any(cell.outputs or cell.execution_count for cell in cells), name


def test_notebooks_call_the_package_and_hold_no_logic_of_their_own():
    banned = (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.For, ast.While, ast.If, ast.Try, ast.With)
    for name, notebook in notebooks().items():
        assert notebook.cells[0].cell_type == "markdown"
        assert notebook.cells[0].source.startswith("# "), name
        for source in code(notebook):
            nodes = list(ast.walk(ast.parse(source)))
            assert not [node for node in nodes if isinstance(node, banned)], (name, source)
            texts = [node.value for node in nodes if isinstance(node, ast.Constant)]
            assert not [text for text in texts if isinstance(text, str) and re.match(r"\.{1,2}/", text)], (name, source)
        assert any("assert " in source for source in code(notebook)), f"{name} checks nothing"


def test_notebook_defaults_are_the_real_profile_and_write_nothing_that_is_published():
    for name, notebook in notebooks().items():
        given = defaults(notebook)
        assert given.get("profile") is None, name
        assert given.get("pipeline", False) is False, name
        assert all(str(path).startswith("build/") for key, path in given.items() if key.endswith("_dir")), name


def test_every_notebook_leads_to_another_and_the_first_lists_them_all():
    found = notebooks()
    texts = {name: "\n".join(x.source for x in book.cells if x.cell_type == "markdown") for name, book in found.items()}
    assert set(re.findall(r"\]\(([\w-]+)\.ipynb\)", texts["index"])) == set(found) - {"index"}
    for name, text in texts.items():
        for link in re.findall(r"\]\(([\w-]+)\.ipynb\)", text):
            assert link in found, f"{name}: {link}.ipynb"
        assert re.search(r"^(Next|Back to).*\]\([\w-]+\.ipynb\)\.$", text, re.MULTILINE), name


def required(*extras: str) -> list[Requirement]:
    """What famba needs with these extras."""
    lines = [*PROJECT["dependencies"], *(line for name in extras for line in EXTRAS[name])]
    return [Requirement(line) for line in lines if not line.startswith("famba")]


@pytest.mark.parametrize(("kind", "extras"), [("", FOR_ALL), ("-cuda", (*FOR_ALL, "cuda"))])
def test_the_conda_environments_ask_for_what_pyproject_asks_for(kind, extras):
    *by_conda, by_pip = read_yaml(ROOT / f"environment{kind}.yml")["dependencies"]
    conda = {"torch": "pytorch-gpu" if kind else "pytorch-cpu", "matplotlib": "matplotlib-base"}
    asked = [*required(*extras), Requirement(f"python{PROJECT['requires-python']}")]
    expected = {conda.get(req.name, req.name): (req.specifier, req.marker) for req in asked}
    if kind:
        expected["triton"] = (expected["triton"][0], None)  # it is for Linux only
    given = [Requirement(line) for line in [*by_conda, *by_pip["pip"][1:]]]
    assert len(expected) > 20
    assert {x.name: (x.specifier, x.marker) for x in given if x.name not in ("pip", "cxx-compiler")} == expected
    assert not any(";" in line for line in by_conda), "conda knows no markers"
    assert by_pip["pip"][0] == "-e ."


def test_everything_but_torch_is_pinned_and_torch_in_one_place():
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pinned = {re.sub(r"[-_.]+", "-", req.name).lower(): str(req.specifier) for req in pins}
    assert len(pinned) > 100
    assert all(specifier.startswith("==") for specifier in pinned.values())
    assert "torch" not in pinned
    for req in required(*FOR_ALL, "docs"):
        if req.name != "torch":
            version = pinned[re.sub(r"[-_.]+", "-", req.name).lower()].removeprefix("==")
            assert req.specifier.contains(version), req.name
    assert len(re.findall(r"^TORCH +:= torch==", (ROOT / "Makefile").read_text(), re.MULTILINE)) == 1


def test_security_gives_a_reason_for_every_dependency_of_the_core():
    _, section = (ROOT / "SECURITY.md").read_text().split("| package | reason |")
    assert re.findall(r"(?m)^\| (\S+) \| \S.+ \|$", section) == [req.name for req in required()]


def test_workflows_pin_actions_by_commit():
    workflows = "\n".join(path.read_text() for path in ROOT.glob(".github/workflows/*.yml"))
    used = re.findall(r"uses: (.+)", workflows)
    assert len(used) >= 2
    assert [line for line in used if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+(\.\d+)*", line)] == []


def test_no_tracked_file_is_large():
    assert not [x for x in tracked() if (ROOT / x).stat().st_size > 2**20 and not x.startswith("tests/golden/")]


@pytest.mark.slow
def test_a_wheel_made_of_the_sdist_trains_outside_the_checkout_with_the_core_packages_alone(tmp_path):
    uv = Path(sys.executable).with_name("uv")
    if not uv.exists():
        pytest.skip("uv is not here: make env installs it")
    done = subprocess.run([uv, "build", "--out-dir", tmp_path, ROOT], capture_output=True, text=True)
    if "Failed to resolve requirements from `build-system.requires`" in done.stderr:
        pytest.skip("the build backend is neither here nor to be had: no network")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("famba/")}
        archive.extractall(tmp_path / "installed")
    wanted = {name for name in tracked() if name.startswith("famba/")}
    table = "famba/analysis/paper/famba_v_results.csv"
    assert {"famba/kernels/cpu/scan.cpp", "famba/kernels/cpu/jobs.h", table, "famba/py.typed"} <= wanted
    assert packed == wanted | {"famba/params.yaml"}
    absent = [Requirement(line).name for line in EXTRAS["plots"]]  # None in sys.modules: not to be imported
    (tmp_path / "installed" / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({absent}))")
    for label, colour in {"blue": (20, 40, 200), "red": (200, 30, 20)}.items():
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (40, 32), tuple(c + i for c in colour)).save(tmp_path / "images" / label / f"{i}.png")
    code = "from famba.cli import main; from famba.kernels.cpu import build; print(build.SOURCES, build.unavailable())"
    train = ["-c", f"{code}; raise SystemExit(main())", "train", "--profile", "smoke", "--set", "train.epochs=1"]
    kernels = re.escape(f"{tmp_path}/installed/famba/kernels/cpu {backends()['native']}")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "XDG_CACHE_HOME": str(tmp_path)}
    environment["FAMBA_CXXFLAGS"] = "-O0"  # compiled here, and soon
    for arguments, said in (
        ([*train, "--out", "run"], rf"^{kernels}\n.*: top-1 [0-9.]+ %, training [0-9.]+ s, peak memory [0-9.]+ MiB"),
        ([ROOT / "examples" / "train_your_own.py", "images", "out", "12"], r"100 % .*, 65 tokens fused to 41"),
    ):
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert re.search(rf"{said}\n$", done.stdout), done.stdout
    assert (tmp_path / "out" / "config.json").is_file()


def test_committed_locks_are_of_this_code_and_these_parameters(tmp_path):
    """What is published was made by what is beside it: otherwise a lock holds another digest."""
    assert main(["resolve", "--out", str(tmp_path / "resolved")]) == 0
    for name in config.load_ablations():
        assert main(["resolve", "--ablation", name, "--out", str(tmp_path / "ablations" / f"{name}.json")]) == 0
    looked = 0
    for path in [ROOT / "dvc.lock", *ROOT.glob("*/dvc.lock")]:
        for name, stage in read_yaml(path)["stages"].items():
            for dep in stage.get("deps", []):
                if (file := tmp_path / dep["path"].removeprefix("build/")).is_file():
                    digest = hashlib.md5(file.read_bytes()).hexdigest()
                    assert dep["md5"] == digest, f"{path}: {name}: {dep['path']} was another: dvc repro"
                    looked += 1
    assert looked > 80


def documents() -> dict[str, str]:
    """README.md and docs/*.md by name."""
    found = {str(path.relative_to(ROOT)): path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
    assert len(found) >= 7
    return found


def anchors(text: str) -> set[str]:
    """What a link can point to within a Markdown text, named as GitHub names its headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_command_writes_both_files(tmp_path, monkeypatch):
    for name in ("params.yaml", "dvc.yaml", *summary.TABLES_IN):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        emptied = re.sub(r"(?s)(:begin -->).*?(<!-- \S+:end)", r"\1\2", (ROOT / name).read_text())
        (tmp_path / name).write_text(emptied)
    shutil.copytree(ROOT / "results", tmp_path / "results", ignore=shutil.ignore_patterns("runs", "experiments"))
    monkeypatch.chdir(tmp_path)
    assert main(["readme"]) == 0
    for name in summary.TABLES_IN:
        assert (tmp_path / name).read_text() == documents()[name]


def test_the_readme_is_short():
    assert len(documents()["README.md"].splitlines()) <= 150


def test_links_in_readme_and_docs_point_to_files_and_headings_that_exist():
    looked = 0
    for name, text in documents().items():
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if not link.startswith("https://"):
                path, _, anchor = link.partition("#")
                target = (ROOT / name).parent / path if path else ROOT / name
                assert target.exists(), f"{name}: {link}"
                assert not anchor or anchor in anchors(target.read_text()), f"{name}: {link}"
                looked += 1
    assert looked > 50


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_commands_and_profiles_that_readme_and_docs_name_exist(capsys):
    text = "\n".join(documents().values())
    blocks = "\n".join(re.findall(r"^```.*?^```|`[^`\n]+`", text, re.DOTALL | re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", blocks))
    assert {"repro", "test", "gpu-check"} <= named <= targets()
    with pytest.raises(SystemExit):
        main(["--help"])
    usage = capsys.readouterr().out
    words = set(re.findall(r"-m famba ([a-z-]+)", blocks))
    assert {"train", "bench"} <= words
    for word in words:
        assert re.search(rf"^ +{word}\s", usage, re.MULTILINE), word
    assert set(re.findall(r"-m (famba\.[a-z_.]+)", blocks)) <= set(modules())
    profiles = set(re.findall(r"profile[= ]([a-z_0-9]+)", blocks))
    assert {"smoke", "paper"} <= profiles
    assert profiles <= set(read_yaml(ROOT / "params.yaml")["profiles"])
    assert set(re.findall(r"dvc repro experiments/dvc.yaml:([a-z]+)", blocks)) <= set(stages())


def test_make_lists_every_target():
    done = subprocess.run(["make", "help"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert {"env", "repro", "test", "lab"} <= targets()
    assert set(re.findall(r"^  make ([a-z-]+)", done.stdout, re.MULTILINE)) == targets()
    assert subprocess.run(["make"], capture_output=True, text=True, check=True, cwd=ROOT).stdout == done.stdout


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]])
def test_style(arguments):
    done = subprocess.run([sys.executable, "-m", "ruff", *arguments, "."], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_types():
    pyright = shutil.which("pyright") or str(Path(sys.executable).with_name("pyright"))
    if subprocess.run([pyright, "--version"], capture_output=True, cwd=ROOT).returncode:
        pytest.skip("pyright does not start: it needs node, or a network to fetch it")
    done = subprocess.run([pyright, "--pythonpath", sys.executable], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 errors" in done.stdout


def test_another_build_of_torch_is_installed_once_over_the_one_that_is_there(tmp_path):
    """The uv of this environment is a stand-in that logs its arguments."""
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").write_text(f"{tmp_path}/.venv")
    for name, body in {"python": "exit 0", "uv": 'echo "$@" >> asked'}.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    for backend in ("", "auto", "auto", "cpu"):
        settings = {"TORCH": "torch==2.13.0", "UV": "uv", "PYTHON": "", "TORCH_BACKEND": backend}
        command = [tmp_path / ".ci" / "setup", ".venv", ".venv/ready-1"]
        subprocess.run(command, env=os.environ | settings, cwd=tmp_path, check=True, capture_output=True)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert ["--reinstall-package torch " in line for line in asked] == [False, True, False, True]

"""The shape of the repository: who imports whom, what the pipeline depends on, how notebooks are written.

Each of these guards says how much it looked at, so that a file that moves cannot make it pass by seeing nothing.
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from ruamel.yaml import YAML

import famba
from famba import backends, config
from famba.analysis import summary
from famba.training import fit

ROOT = Path(__file__).resolve().parent.parent
STAGE_NOTEBOOKS = ("train", "compare", "tokens", "evidence", "ablation", "adaptive", "photographs")
# A module imports only from those before it.
# fmt: off
ORDER = [
    "errors", "lifeline", "params", "files", "gpu_check", "sources", "recipe", "stream", "warm", "data", "augment",
    "dispatch", "native", "mamba", "gpu", "scan", "ops", "fusion", "strategies", "mixer", "model", "checkpoint",
    "pretrained", "cost", "records", "numerics", "optim", "parallel", "graph", "watch", "session", "train", "calibrate",
    "workers", "sweep", "ablation", "metrics", "effects", "paper_memory", "evidence", "tokens", "alike", "adaptive",
    "canvas", "pictures", "figures", "explore", "bench", "checks", "hours", "diagnosis", "__main__",
]
NO_TORCH = [
    "errors", "lifeline", "params", "files", "strategies", "records", "workers", "metrics", "effects", "evidence",
    "canvas", "pictures", "figures",
]
# fmt: on


def modules() -> dict[str, str]:
    """The source of each module by its name; a package inside the package counts as one."""
    paths = {path.stem: [path] for path in sorted((ROOT / "famba").glob("*.py")) if path.stem != "__init__"}
    paths |= {path.parent.name: sorted(path.parent.glob("*.py")) for path in (ROOT / "famba").glob("*/__init__.py")}
    return {name: "\n".join(path.read_text() for path in files) for name, files in paths.items()}


def imports(source: str) -> set[str]:
    """The modules of famba that a source names in its imports, anywhere in it."""
    known, found = modules(), set[str]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("famba.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "famba":
            found |= {alias.name if alias.name in known else famba._HOME[alias.name] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("famba."):
            found.add(str(node.module).split(".")[1])
    return found & set(known)


def closure(start: set[str]) -> set[str]:
    found, todo = set(), set(start)
    while todo:
        name = todo.pop()
        found.add(name)
        todo |= imports(modules()[name]) - found
    return found


def files_of(names: set[str]) -> set[str]:
    """What a stage must depend on: the modules, and the folders of the package that hold what they read."""
    files = {f"famba/{name}" if (ROOT / "famba" / name).is_dir() else f"famba/{name}.py" for name in names}
    return files | {"famba/paper" for name in names if ' / "paper" / ' in modules()[name]}


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
        document = YAML(typ="safe", pure=True).load(path.read_text())
        assert not set(found) & set(document["stages"])
        assert all((stage.get("wdir") == "..") == (path.parent != ROOT) for stage in document["stages"].values()), path
        found |= {name: stage.get("do", stage) for name, stage in document["stages"].items()}
    return found


def command(stage: dict) -> str:
    return stage["cmd"] if isinstance(stage["cmd"], str) else " && ".join(stage["cmd"])


def notebook_stages() -> dict[str, dict]:
    return {name: stage for name, stage in stages().items() if "famba notebook" in command(stage)}


def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files are tracked is not known")
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_every_module_has_its_place_and_imports_only_from_those_before_it():
    assert set(modules()) == set(ORDER)
    looked = 0
    for name, source in modules().items():
        for other in imports(source) - {name}:
            assert ORDER.index(other) < ORDER.index(name), f"{name} imports {other}"
            looked += 1
    assert looked > 20


def test_what_reads_results_needs_no_torch_and_training_needs_nothing_that_reads_results():
    for name in NO_TORCH:
        for other in closure({name}):
            for node in ast.walk(ast.parse(modules()[other])):
                named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                named += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not [n for n in named if n.split(".")[0] == "torch"], f"{name}, by way of {other}"
    assert "model" in closure({"train"})
    assert not closure({"train"}) & {"metrics", "figures", "sweep"}


def test_the_package_hands_out_its_public_names_and_imports_nothing_for_it():
    done = subprocess.run(
        [sys.executable, "-c", "import sys, famba; print('torch' in sys.modules, 'famba.config' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout == "False False\n"
    assert len(famba.__all__) > 5
    for name in famba.__all__:
        assert getattr(famba, name) is not None


def test_each_stage_depends_on_its_stripped_notebook_and_on_exactly_what_that_imports():
    found = notebook_stages()
    assert set(found) == set(STAGE_NOTEBOOKS)
    for name, stage in found.items():
        used = set().union(*(imports(source) for source in code(notebooks()[name])))
        assert used
        listed = {dep for dep in stage["deps"] if dep.startswith("famba/")}
        assert listed == files_of(closure(used)), name
        assert f"build/notebooks/{name}.ipynb" in stage["deps"]
        assert not [dep for dep in stage["deps"] if dep.startswith("notebooks/")]


def test_the_resolved_parameters_depend_on_what_makes_them():
    stage = stages()["resolve"]
    assert set(stage["deps"]) == files_of(closure({"params"}))
    sections = set(YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text()))
    assert set(stage["params"]) == sections - {"sweep", "ablation", "photographs"}
    assert set(stages()["ablation"]["params"]) == sections - {"sweep", "photographs"}
    assert set(stages()["adaptive"]["params"]) == sections - {"ablation", "photographs"}
    assert set(stages()["photographs"]["params"]) == sections - {"profile", "ablation"}


def test_each_stage_gives_its_notebook_every_parameter_and_no_other():
    found = notebook_stages()
    assert len(found) == len(STAGE_NOTEBOOKS)
    for name, stage in found.items():
        words = shlex.split(command(stage))
        given = [words[i + 1] for i, word in enumerate(words) if word == "-p"]
        assert sorted(given) == sorted(defaults(notebooks()[name])), name


def test_training_outputs_are_cached_and_only_gathering_ones_are_not():
    """`cache: false` switches off DVC's run cache, so a finished run would be trained again."""
    for name, stage in notebook_stages().items():
        for out in [*stage.get("outs", []), *stage.get("metrics", []), *stage.get("plots", [])]:
            cached = isinstance(out, str) or next(iter(out.values())).get("cache", True)
            assert cached == (name == "train"), (name, out)


def test_stage_notebooks_hold_no_outputs_and_every_notebook_asks_for_the_same_kernel():
    found = notebooks()
    assert {"method", "data", *STAGE_NOTEBOOKS} <= set(found)
    for name, notebook in found.items():
        assert notebook.metadata.kernelspec.name == "python3", name
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert cells
        if name == "method":
            assert all(cell.execution_count for cell in cells), name
            assert any(cell.outputs for cell in cells)
        else:
            assert not any(cell.outputs or cell.execution_count for cell in cells), name


def test_notebooks_call_the_package_and_hold_no_logic_of_their_own():
    banned = (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.For, ast.While, ast.If, ast.Try, ast.With)
    for name, notebook in notebooks().items():
        assert notebook.cells[0].cell_type == "markdown"
        assert notebook.cells[0].source.startswith("# "), name
        for source in code(notebook):
            assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, banned)], (name, source)
            texts = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
            assert not [text for text in texts if isinstance(text, str) and re.match(r"\.{1,2}/", text)], (name, source)
        assert any("assert " in source for source in code(notebook)), f"{name} checks nothing"


def test_notebook_defaults_are_the_smoke_run():
    for name, notebook in notebooks().items():
        assert defaults(notebook).get("profile", "smoke") == "smoke", name
        written = [value for key, value in defaults(notebook).items() if key.endswith("_dir")]
        assert all(str(path).startswith("build/") for path in written), name


def test_the_conda_environments_ask_for_what_pyproject_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["notebooks"], *extras["paper"], *extras["dev"]]
    conda = {"torch": "pytorch-cpu", "matplotlib": "matplotlib-base"}
    for file, torch, more in (
        ("environment.yml", "pytorch-cpu", []),
        ("environment-cuda.yml", "pytorch-gpu", extras["cuda"]),
    ):
        document = YAML(typ="safe", pure=True).load((ROOT / file).read_text())
        *by_conda, by_pip = document["dependencies"]
        given = [Requirement(line) for line in [*by_conda, *by_pip["pip"][1:]]]
        asked = [Requirement(line) for line in [*wanted, *more] if not line.startswith("famba")]
        expected = {(conda | {"torch": torch}).get(req.name, req.name): req.specifier for req in asked}
        expected |= {"python": Requirement(f"python{project['requires-python']}").specifier}
        got = {req.name: req.specifier for req in given if req.name not in ("pip", "cxx-compiler")}
        assert len(expected) > 20
        assert got == expected, file
        assert by_pip["pip"][0] == "-e ."


def test_everything_but_torch_is_pinned_and_torch_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pinned = {re.sub(r"[-_.]+", "-", req.name).lower(): str(req.specifier) for req in pins}
    assert len(pinned) > 100
    assert all(specifier.startswith("==") for specifier in pinned.values())
    asked = [
        *project["dependencies"],
        *(line for extra in ("notebooks", "paper", "dev") for line in project["optional-dependencies"][extra]),
    ]
    for req in map(Requirement, asked):
        name = re.sub(r"[-_.]+", "-", req.name).lower()
        if name not in ("torch", "famba"):
            assert req.specifier.contains(pinned[name].removeprefix("==")), name
    assert "torch" not in pinned
    assert len(re.findall(r"^TORCH +:= torch==", (ROOT / "Makefile").read_text(), re.MULTILINE)) == 1


def test_no_tracked_file_is_large():
    found = tracked()
    assert len(found) > 20
    large = [path for path in found if path.stat().st_size > 2**20 and ROOT / "tests" / "golden" not in path.parents]
    assert not large


@pytest.mark.slow
def test_a_wheel_made_of_the_sdist_carries_all_that_it_reads_and_its_kernels_run(tmp_path):
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
    wanted = {str(path.relative_to(ROOT)) for path in tracked() if (ROOT / "famba") in path.parents}
    assert {"famba/kernels/cpu/scan.cpp", "famba/kernels/cpu/scan.h", "famba/paper/famba_v_results.csv"} <= wanted
    assert packed == wanted
    code = "from famba import backends; from famba.native import build; print(build.SOURCES, backends()['native'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "XDG_CACHE_HOME": str(tmp_path)},
    )
    sources, reason = done.stdout.strip("\n").split(" ", 1)
    assert Path(sources) == tmp_path / "installed" / "famba" / "native"
    assert reason == backends()["native"]


def test_checkpoints_are_keyed_by_all_code_that_makes_a_result():
    beside_it = {
        "errors",
        "lifeline",
        "params",
        "files",
        "checkpoint",
        "cost",
        "records",
        "watch",
    }  # read, write and measure
    assert set(fit.CODE) | {"native", "gpu"} == closure({"train"}) - beside_it


def test_the_readmes_tables_are_those_of_the_results():
    text = (ROOT / "README.md").read_text()
    blocks = summary.readme_blocks(ROOT / "results")
    assert set(blocks) == {"results", "photographs", "beside"}
    assert summary.readme_text(text, blocks) == text


def test_commands_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    blocks = "\n".join(re.findall(r"^```.*?^```|`[^`\n]+`", text, re.DOTALL | re.MULTILINE))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", blocks))
    assert {"repro", "test"} <= named
    assert named <= targets
    usage = subprocess.run([sys.executable, "-m", "famba", "--help"], capture_output=True, text=True, cwd=ROOT).stdout
    for word in set(re.findall(r"python -m famba ([a-z]+)", blocks)):
        assert re.search(rf"^ +{word} ", usage, re.MULTILINE), word


def test_make_lists_every_target():
    done = subprocess.run(["make", "help"], capture_output=True, text=True, check=True, cwd=ROOT)
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert {"env", "repro", "test", "lab"} <= targets
    assert set(re.findall(r"^  make ([a-z-]+)", done.stdout, re.MULTILINE)) == targets
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


def test_no_test_asserts_how_long_something_took():
    """A busy machine would fail it; `processes.wait_until`, which gives up on what hangs, is the one exception."""
    clock = re.compile(r"\btime\.(time|monotonic|perf_counter|process_time|thread_time)(_ns)?\(")
    found, looked_at = [], 0
    for path in sorted((ROOT / "tests").glob("*.py")):
        statements = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
        found += [path.name for statement in statements if clock.search(ast.unparse(statement))]
        looked_at += len(statements)
    assert looked_at > 1000
    assert found == ["processes.py"]


def test_the_sweep_has_a_rule_for_every_strategy_in_every_profile():
    profiles = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text())["profiles"]
    assert {"default", "smoke"} <= set(profiles)
    for profile in profiles:
        for strategy in config.load_sweep().strategies:
            assert config.load(profile, strategy=strategy).strategy == strategy

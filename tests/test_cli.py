"""The command line: what it prints, what it leaves, and how it says no."""

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from checkout import ROOT
from refusals import refused

from famba import config, plots
from famba.cli import main


@pytest.fixture
def notebook(tmp_path: Path):
    """Writes a notebook of a parameters cell and one more, and says where."""

    def write(parameters: str, body: str) -> Path:
        cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
        cells.append(nbformat.v4.new_code_cell(body))
        kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
        path = tmp_path / "some.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
        return path

    return write


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--strategy", "uper"], "'uper' is not one of none, all, interleaved, lower, upper"),
        (["train", "--set", "fusion.a.r=1", "--set", "fusion.b.r=1"], "--strategy: missing; --set changes a, b, and"),
        (
            ["train", "--strategy", "upper", "--set", "fusion.upper.r=99"],
            "fusion.upper under profile default: layer 6: ",
        ),
        (
            ["train", "--strategy", "upper", "--set", "fusion.uper.r=1"],
            "fusion.uper.r=1: strategy 'upper' is trained; must be fusion.upper.r",
        ),
        (["train", "--seed", "-1"], "--seed: -1; must be 0 to 4294967295"),
        (["bench", "--device", "cuda", "scan"], "--device: 'cuda'; allowed with --gpu only"),
        (["notebook", "nowhere.ipynb", "out.ipynb"], "nowhere.ipynb: no such notebook"),
        (["notebook", str(ROOT / "params.yaml"), "out.ipynb"], "params.yaml: no such notebook"),
    ],
)
def test_bad_input_is_one_line_that_names_it_and_status_1(arguments, said, capsys):
    assert said in refused(capsys, *arguments)


def test_a_notebook_stays_as_it_is_and_its_copy_must_be_one_that_can_be_written(notebook, tmp_path, capsys):
    path = notebook("", "1")
    before = path.read_bytes()
    assert f"{path}: the notebook itself, which is not overwritten" in refused(capsys, "notebook", str(path), str(path))
    assert path.read_bytes() == before
    folder = tmp_path / "folder.ipynb"
    folder.mkdir()
    assert f"{folder}: cannot be written: " in refused(capsys, "notebook", str(path), str(folder))
    path.write_text("{")
    assert f"{path}: not a notebook" in refused(capsys, "notebook", str(path), "out.ipynb")


@pytest.mark.parametrize("also", [("--profile", "smoke"), ("--processes", "2"), ("--set", "train.epochs=3")])
def test_what_resolved_parameters_say_already_is_not_said_twice(also, capsys):
    said = refused(capsys, "train", "--resolved", "params.json", *also)
    assert re.match(rf"famba: {also[0]}: .+: not allowed with --resolved, which says it already$", said)


def test_train_says_what_the_run_reached_and_replaces_it_only_when_forced(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "history.csv").write_text("")  # of a run that was not finished
    train = ["train", "--profile", "smoke", "--set", "train.epochs=1", "--out", str(tmp_path / "run")]
    assert main(train) == 0
    line = rf"{tmp_path}/run: top-1 [0-9.]+ %, training [0-9.]+ s, peak memory [0-9.]+ MiB"
    assert re.fullmatch(line, capsys.readouterr().out.splitlines()[-1])
    assert len((tmp_path / "run" / "history.csv").read_text().splitlines()) == 2
    made = json.loads((tmp_path / "run" / "cost.json").read_text())["command"]
    assert made == "python -m famba train --profile smoke --strategy none --seed 0 --set train.epochs=1"
    before = (tmp_path / "run" / "cost.json").stat().st_mtime_ns
    assert f"--out: {tmp_path}/run exists; name another folder, or --force to " in refused(capsys, *train)
    assert (tmp_path / "run" / "cost.json").stat().st_mtime_ns == before
    assert main([*train, "--force"]) == 0
    assert (tmp_path / "run" / "cost.json").stat().st_mtime_ns > before


def test_train_leaves_other_folders_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("")
    train = ["train", "--profile", "smoke", "--set", "train.epochs=1", "--out", str(tmp_path)]
    assert "exists; name another folder, or --force" in refused(capsys, *train)
    assert f"{tmp_path} holds thesis.tex, which is no file of a run; name another folder" in refused(
        capsys, *train, "--force"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("command", "missing", "extra"), [("readme", "pandas", "plots"), ("notebook a b", "papermill", "notebooks")]
)
def test_a_command_that_lacks_a_package_names_the_extra_that_brings_it(command, missing, extra):
    code = f"import sys; sys.modules['{missing}'] = None; from famba import cli; exit(cli.main('{command}'.split()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"famba: {missing} is not installed: pip install 'famba[{extra}]'\n")


def test_a_notebook_gets_its_parameters_as_yaml_and_runs_in_the_root(notebook, tmp_path, monkeypatch, capsys):
    path = notebook("a = 1\nb = 'x'\nc = 0.5\nd = 1\nkept = 7", "import os\nprint((a, b, c, d, kept), os.getcwd())")
    root = config.root()
    monkeypatch.chdir(root / "tests")
    out = tmp_path / "deep" / "er" / "out.ipynb"
    given = ["-p", "a", "3", "-p", "b", "none", "-p", "c", "1e-3", "-p", "d", "null"]
    assert main(["notebook", str(path), str(out), *given]) == 0
    printed = nbformat.read(out, as_version=4).cells[-1].outputs[0].text
    assert printed == f"(3, 'none', 0.001, None, 7) {root}\n"
    assert capsys.readouterr().err == ""


def test_an_unknown_parameter_is_an_error_that_lists_the_known_ones(notebook, tmp_path, capsys):
    out = tmp_path / "out.ipynb"
    said = refused(capsys, "notebook", str(notebook("epochs = 2\nseed = 0", "seed")), str(out), "-p", "epoch", "300")
    assert "'epoch' is unknown; allowed: epochs, seed" in said
    assert not out.exists()


def test_an_error_that_a_user_can_mend_is_one_line_from_inside_a_notebook_too(notebook, tmp_path, capsys):
    path = notebook("strategy = 'uper'", "from famba import config\nconfig.load(strategy=strategy)")
    assert "'uper' is not one of none, all" in refused(capsys, "notebook", str(path), str(tmp_path / "out.ipynb"))


def test_a_defect_inside_a_notebook_keeps_its_traceback(notebook, tmp_path, capsys):
    assert main(["notebook", str(notebook("x = 0", "1 / x")), str(tmp_path / "out.ipynb")]) == 1
    printed = capsys.readouterr().err
    assert "ZeroDivisionError" in printed
    assert "1 / x" in printed


def test_an_executed_notebook_holds_what_its_cells_print_show_and_return(notebook, tmp_path):
    path = notebook(
        "x = 1",
        "import sys\nfrom IPython.display import display\nfrom matplotlib.figure import Figure\n"
        "print('a', end=''); print('b'); print('c', file=sys.stderr)\n"
        "shown = display('first', display_id=True); shown.update('second')\n"
        "from famba import plots\ndisplay(plots.Figure())\nFigure().subplots().figure",
    )
    assert main(["notebook", str(path), str(tmp_path / "out.ipynb")]) == 0
    executed = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    nbformat.validate(executed)
    printed, warned, shown, own, figure = executed.cells[-1].outputs
    assert (printed.name, printed.text, warned.name, warned.text) == ("stdout", "ab\n", "stderr", "c\n")
    assert shown.data == {"text/plain": "'second'"}
    assert figure.execution_count == executed.cells[-1].execution_count == 2
    assert base64.b64decode(own.data["image/png"]) == plots.Figure()._repr_png_()
    assert base64.b64decode(figure.data["image/png"]).startswith(b"\x89PNG")


def test_a_notebook_sees_nothing_of_the_one_before(notebook, tmp_path, capsys):
    assert main(["notebook", str(notebook("x = 1", "left = 1")), str(tmp_path / "out.ipynb")]) == 0
    assert main(["notebook", str(notebook("x = 1", "left")), str(tmp_path / "out.ipynb")]) == 1
    assert "name 'left' is not defined" in capsys.readouterr().err

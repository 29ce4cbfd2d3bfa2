"""The documentation's site."""

import importlib.util
import re
import subprocess
import sys
from fnmatch import fnmatch

import pytest
from checkout import ROOT

import famba

spec = importlib.util.spec_from_file_location("conf", ROOT / "docs" / "conf.py")
conf = importlib.util.module_from_spec(spec)
spec.loader.exec_module(conf)


def test_the_table_of_contents_names_every_page():
    named = " ".join(conf.CHAPTERS.values()).split()
    pages = [x.relative_to(ROOT).with_suffix("") for x in (*ROOT.glob("docs/*.md"), *ROOT.glob("notebooks/*.ipynb"))]
    assert len(pages) > 15
    assert not [page for page in map(str, pages) if not any(fnmatch(page, pattern) for pattern in named)]


def test_every_public_name_has_an_entry_in_the_api():
    entries = re.findall(r"^\.\. (?:auto\w+|data):: (\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(entries) == sorted(famba.__all__)


def test_the_site_shows_an_executed_copy_of_the_same_notebook_only(tmp_path, monkeypatch):
    monkeypatch.setattr(conf, "EXECUTED", tmp_path)
    new = conf.v4.new_code_cell
    committed = conf.v4.new_notebook(
        cells=[conf.v4.new_markdown_cell("# Title"), new('kind = "upper"'), new("print(r)")]
    )
    given = new('kind = "upper"', metadata={"tags": ["injected-parameters"]})
    printed = new("print(r)", outputs=[conf.v4.new_output("stream", text="2")])
    executed = conf.v4.new_notebook(cells=[*committed.cells[:2], given, printed])

    def shown():
        cells = conf.shown("tokens", conf.reads(conf.writes(committed), as_version=4)).cells
        return cells[1].source, cells[-1].outputs

    assert shown() == ("{download}`tokens.ipynb`, without outputs: it was not executed here.", [])
    (tmp_path / "tokens-lower.ipynb").write_text(conf.writes(executed))
    assert shown()[1] == [], "of another parameter"
    (tmp_path / "tokens-upper.ipynb").write_text(conf.writes(executed))
    assert shown() == ("{download}`tokens.ipynb`, with its outputs.", printed.outputs)
    committed.cells[2].source = "print(r + 1)"
    assert shown()[1] == []


@pytest.mark.slow
def test_the_site_has_no_broken_link_or_reference(tmp_path):
    if not importlib.util.find_spec("sphinx"):
        pytest.skip("sphinx is not here: make docs installs it")
    command = [sys.executable, "-m", "sphinx", "-qW", "-c", "docs", ".", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "README.html").read_text()
    assert not re.findall(r'<(?:script|link)[^>]*(?:src|href)="https?:', page)

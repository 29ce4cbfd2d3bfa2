"""The digest of code: what changes it and what does not, on a small package that stands in for famba."""

import importlib.metadata
import json

import pytest
from refusals import refusal

import famba
from famba import config
from famba.storage import provenance

MODULES = {
    "a/__init__.py": "",
    "a/first.py": '"""Docs."""\nimport numpy\nfrom famba.a import second\n'
    'def f(x):\n    """More docs."""\n    return x + 1\n',
    "a/second.py": "from famba import f\n\nVALUE = 1\n",
    "b.py": "def f():\n    from famba.c import VALUE\n    return VALUE\n",
    "c.py": "import torch\nVALUE = [1, 2]\n",
    "unused.py": "VALUE = 1\n",
    "k/__init__.py": "",
    "k/build.py": "FLAGS = ()\n",
    "k/scan.cpp": "// scan\nint x;\n",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Where that package lies; a change there is seen by the next digest."""
    monkeypatch.setattr(provenance, "_PACKAGE", tmp_path)
    monkeypatch.setattr(provenance, "_module", provenance._module.__wrapped__)
    monkeypatch.setattr(provenance, "_version", provenance._version.__wrapped__)
    monkeypatch.setattr(config, "root", lambda: tmp_path)
    monkeypatch.setattr(famba, "_MODULE", {"f": "b"})
    monkeypatch.setattr(importlib.metadata, "version", {"numpy": "2.4", "torch": "2.13.0+cpu"}.get)
    for name, text in MODULES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def notebook(path, *code, markdown="# Title", **more):
    cells = [{"cell_type": "markdown", "source": [markdown]}]
    cells += [{"cell_type": "code", "source": text.splitlines(keepends=True), **more} for text in code]
    path.write_text(json.dumps({"cells": cells}))
    return path


def test_imports_are_followed_by_module_name_by_public_name_and_inside_functions(package):
    assert provenance._closure(["famba.a.first"]) == [
        f"famba.{name}" for name in ("a", "a.first", "a.second", "b", "c")
    ]


@pytest.mark.parametrize(
    ("name", "old", "new", "changes"),
    [
        ("a/first.py", "ocs.", "ocs, and more.", False),
        ("a/first.py", "return x + 1", "# why\n    return (\n        x  +  1\n    )", False),
        ("a/first.py", "x + 1", "x + 2", True),
        ("c.py", "[1, 2]", "[2, 1]", True),
        ("c.py", "[1, 2]", "[1, 2, []]", True),
        ("unused.py", "1", "2", False),
    ],
)
def test_only_code_that_is_imported_changes_the_digest(package, name, old, new, changes):
    before = provenance.of_module("famba.a.first")
    text = (package / name).read_text()
    assert old in text
    (package / name).write_text(text.replace(old, new))
    assert (provenance.of_module("famba.a.first") != before) == changes


def test_the_sources_of_the_kernels_count_by_their_bytes(package):
    before = provenance.of_module("famba.k.build")
    (package / "k" / "scan.cpp").write_text("// another comment\nint x;\n")
    assert provenance.of_module("famba.k.build") != before


def test_a_notebook_counts_by_its_code_cells_and_the_versions_of_what_it_imports(package, tmp_path, monkeypatch):
    path = tmp_path / "some.ipynb"
    first = provenance.of_notebook(notebook(path, "from famba.a import first", "first.f(1)"))
    assert first["versions"] == {"numpy": "2.4", "torch": "2.13.0"}, "without the part that names a build"
    edited = notebook(path, "from famba.a import first", "first.f(1)  # why", markdown="# Other", execution_count=7)
    assert provenance.of_notebook(edited) == first
    assert provenance.of_notebook(notebook(path, "from famba.a import first", "first.f(2)")) != first
    monkeypatch.setattr(importlib.metadata, "version", {"numpy": "2.4", "torch": "2.14.0"}.get)
    assert provenance.of_notebook(edited)["digest"] != first["digest"]


def test_what_is_no_notebook_is_refused_in_one_line(tmp_path):
    for content in ("{", "[]", '{"cells": [{"cell_type": "code", "source": "1 +"}]}'):
        (tmp_path / "some.ipynb").write_text(content)
        assert "some.ipynb: not a readable notebook" in refusal(lambda: provenance.of_notebook(tmp_path / "some.ipynb"))

"""Which code and which library versions a result rests on, as one digest.

The digest covers every module that is imported, directly or not, by a notebook or by another module. Python counts by
its syntax tree without docstrings, so that comments, docstrings and formatting change nothing; the kernels' C++ counts
by its bytes. It names checkpoints, and a pipeline stage depends on it instead of on the files. No torch.
"""

import ast
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import famba
from famba.errors import InputError

_PACKAGE = Path(__file__).resolve().parents[1]
# Libraries that compute or draw what is published: another version may give other numbers. Others only carry them.
_LIBRARIES = ("matplotlib", "numpy", "pandas", "scipy", "seaborn", "timm", "torch", "triton")


def of_module(name: str) -> str:
    """The digest of a module of famba, such as `famba.training.fit`, and of all that it imports: 16 hex digits."""
    return _digest(_closure([name]), [])


def of_notebook(path: Path) -> dict[str, Any]:
    """What a notebook's results rest on.

    Returns:
        `digest` (16 hexadecimal digits; markdown cells, outputs and metadata do not count) and `versions`, the
        libraries' versions, which are part of the digest.

    Raises:
        InputError: the file is not a notebook.
    """
    try:
        cells = json.loads(path.read_bytes())["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        trees = [ast.parse(source) for source in sources]
    except (OSError, ValueError, KeyError, TypeError, SyntaxError) as error:
        raise InputError(f"{path}: not a readable notebook: {error}") from None
    modules = _closure(name for tree in trees for name in _imported(tree)[0])
    return {"digest": _digest(modules, trees), "versions": _versions(modules, trees)}


def _digest(modules: list[str], trees: list[ast.Module]) -> str:
    content = hashlib.sha256(json.dumps(_versions(modules, trees)).encode())
    for name in modules:
        content.update(f"\n{name} {_module(name)[2]}".encode())
        for source in sorted(_file(name).parent.glob("*.[ch]*")) if name.endswith(".build") else ():
            content.update(f"\n{source.name} ".encode() + source.read_bytes())
    for tree in trees:
        content.update(f"\n{_plain(tree)}".encode())
    return content.hexdigest()[:16]


def _versions(modules: Iterable[str], trees: Iterable[ast.Module]) -> dict[str, str]:
    """Installed versions of the libraries imported there, without the part that names a build (+cpu, +cu130)."""
    used = set[str]().union(*(_module(name)[1] for name in modules), *(_imported(tree)[1] for tree in trees))
    found = {}
    for name in sorted(used.intersection(_LIBRARIES)):
        try:
            found[name] = importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def _closure(names: Iterable[str]) -> list[str]:
    """The modules named and all modules of famba that they import, sorted; famba/__init__.py does no work."""
    found: set[str] = set()
    todo = set(names)
    while todo:
        name = todo.pop()
        found.add(name)
        packages = {".".join(name.split(".")[:end]) for end in range(2, name.count(".") + 1)}
        todo |= (_module(name)[0] | packages) - found
    return sorted(found)


def _imported(tree: ast.Module) -> tuple[set[str], set[str]]:
    """The modules of famba, and the top-level names of other packages, that are imported anywhere in a syntax tree."""
    own, others = set[str](), set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
            own |= {alias.name for alias in node.names if alias.name.startswith("famba.")}
        elif isinstance(node, ast.ImportFrom):
            others.add(str(node.module).split(".")[0])
            own |= {_home(str(node.module), alias.name) for alias in node.names}
    return own - {""}, others


def _home(module: str, name: str) -> str:
    """The module of famba that `from module import name` imports; empty if it is another package's."""
    if module.split(".")[0] != "famba":
        return ""
    if _file(f"{module}.{name}").exists():
        return f"{module}.{name}"
    return module if module != "famba" else f"famba.{famba._MODULE[name]}" if name in famba._MODULE else ""


def _file(name: str) -> Path:
    path = _PACKAGE.joinpath(*name.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def _module(name: str) -> tuple[set[str], set[str], str]:
    """What `_imported` finds in a module, and its code as text."""
    tree = ast.parse(_file(name).read_bytes())
    return *_imported(tree), _plain(tree)


def _plain(node: Any) -> str:
    """A syntax tree as text that is the same on every version of Python: no positions, docstrings or empty fields."""
    if isinstance(node, list):
        return f"[{','.join(map(_plain, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
        fields["body"] = node.body[1:]
    kept = (f"{key}={_plain(value)}" for key, value in fields.items() if value not in (None, []) and key != "kind")
    return f"{type(node).__name__}({','.join(kept)})"

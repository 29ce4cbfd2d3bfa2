"""Which code and which library versions a result rests on, as one digest.

The digest covers every module that is imported, directly or not, by a notebook or by another module. Python counts by
its syntax tree without docstrings, so that comments, docstrings and formatting change nothing; the kernels' C++ counts
by its bytes. It names checkpoints, and a pipeline stage depends on it instead of on the files. What was parsed once is
read again from build/cache. No torch.
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
from famba import config
from famba.errors import InputError
from famba.storage.files import json_bytes, write_atomic

SAME_RUNS = "results/records/same_runs.json"
_PACKAGE = Path(__file__).resolve().parents[1]
# Libraries that compute or draw what is published: another version may give other numbers. Others only carry them.
_LIBRARIES = ("matplotlib", "numpy", "pandas", "scipy", "seaborn", "timm", "torch", "triton")


def of_module(name: str) -> str:
    """The digest of a module of famba, such as `famba.training.fit`, and of all that it imports: 16 hex digits."""
    return _digest(_closure([name]))


def of_training() -> str:
    """The digest of the training code; or that of earlier code, if today's trains the same (`experiments.recheck`)."""
    digest, known = of_module("famba.training.fit"), same_runs()
    return known["same_as"] if known.get("code") == digest else digest


def same_runs() -> dict[str, Any]:
    """Which `code` was found to train the same `runs` as the code that it is the `same_as`; empty if none was."""
    path = config.root() / SAME_RUNS
    try:
        return json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from None


def of_notebook(path: Path) -> dict[str, Any]:
    """What a notebook's results rest on: `digest` (16 hexadecimal digits; only code cells count) and the libraries'
    `versions`, which are part of it."""
    try:
        cells = json.loads(path.read_bytes())["cells"]
        source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        own, others, code = _parsed(source.encode())
    except (OSError, ValueError, KeyError, TypeError, SyntaxError) as error:
        raise InputError(f"{path}: not a readable notebook: {error}") from None
    modules = _closure(own)
    return {"digest": _digest(modules, others, code), "versions": _versions(modules, others)}


def _digest(modules: list[str], others: Iterable[str] = (), code: str = "") -> str:
    content = hashlib.sha256(json.dumps([_versions(modules, others), code]).encode())
    for name in modules:
        content.update(f"\n{name} {_module(name)[2]}".encode())
        for source in sorted(_file(name).parent.glob("*.[ch]*")) if name.endswith(".build") else ():
            content.update(f"\n{source.name} ".encode() + source.read_bytes())
    return content.hexdigest()[:16]


def _versions(modules: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """Installed versions of the libraries imported there, without the part that names a build (+cpu, +cu130)."""
    used = set(others).union(*(_module(name)[1] for name in modules))
    return {name: _version(name) for name in sorted(used.intersection(_LIBRARIES))}


@functools.cache
def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "absent"


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
    """Of a module's file, what `_parsed` gives."""
    return _parsed(_file(name).read_bytes())


def _parsed(source: bytes) -> tuple[set[str], set[str], str]:
    """The modules of famba and the other packages that are imported anywhere in a source, and its code's digest."""
    key = hashlib.sha256(Path(__file__).read_bytes() + source).hexdigest()  # this module makes the rules
    cache = config.root() / "build" / "cache" / "code" / f"{key}.json"
    if not cache.exists():
        tree = ast.parse(source)
        imports = {("", x.name) for node in ast.walk(tree) if isinstance(node, ast.Import) for x in node.names}
        froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        imports |= {(str(node.module), x.name) for node in froms for x in node.names}
        write_atomic(cache, json_bytes([sorted(imports), hashlib.sha256(_plain(tree).encode()).hexdigest()]))
    imports, code = json.loads(cache.read_bytes())
    own = {_home(module, name) if module else name for module, name in imports}
    return (
        {x for x in own if x.startswith("famba.")},
        {(module or name).split(".")[0] for module, name in imports},
        code,
    )


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

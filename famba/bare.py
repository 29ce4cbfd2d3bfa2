"""The benchmark of a GPU on a machine that has torch, triton and NumPy and no more: `python -m famba.bare`.

A borrowed GPU often comes so, without a network. What else the package imports is stood in for while it is imported:
annotations mean nothing, the dataclasses of parameters check nothing, and any other package that is not there raises
when it is called. What is there is never stood in for, so that elsewhere this is `python -m famba bench --gpu`.
"""

import argparse
import contextlib
import dataclasses
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_PACKAGES = ("jaxtyping", "pydantic", "ruamel", "pandas", "PIL", "safetensors", "tqdm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status. Options are those of `python -m famba bench --gpu`."""
    parser = argparse.ArgumentParser(prog="python -m famba.bare", description="Measure a GPU.")
    parser.add_argument("parts", nargs="*", metavar="part", help="scan, steps, fusion, graphs; all if none is given")
    parser.add_argument("--quick", action="store_true", help="small sizes: seconds, to see that it works")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N; cpu with --quick")
    parser.add_argument("--json", type=Path, help="write the result there; results/benchmark_gpu.json if it is whole")
    options = parser.parse_args(arguments)
    import torch  # noqa: F401 (before anything is stood in for: it tries some of these packages itself)

    with stand_ins():
        from famba.bench import gpu
    from famba.errors import FambaError

    try:
        gpu.main(options.parts, quick=options.quick, device=options.device, json=options.json)
    except FambaError as error:
        print(f"famba: {error}", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """What is imported meanwhile finds something under the names of the packages that are missing."""
    finder = _Finder()
    sys.meta_path.append(finder)  # the last to be asked, so only for what is not there
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in finder.found:
            sys.modules.pop(name, None)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self) -> None:
        self.found: list[str] = []

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] not in _PACKAGES:
            return None
        self.found.append(fullname)
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == "pydantic":
            vars(module).update(ConfigDict=dict, Field=lambda **_: None)
        if module.__name__ == "pydantic.dataclasses":
            vars(module).update(dataclass=_unchecked)


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.endswith("Error"):
            return type(name, (Exception,), {})  # named where it would be caught; nothing raises it
        return _Absent(f"{self.__name__}.{name}")


class _Absent:
    """Stands in annotations for something of a package that is not here."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> "_Absent":
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self._name}.{name}")

    def __getitem__(self, of: Any) -> Any:
        return Any

    def __or__(self, other: Any) -> Any:
        return Any

    __ror__ = __or__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        package = self._name.split(".")[0]
        raise ImportError(f"{self._name} was called, and {package} is not installed")


def _unchecked(*, config: Any = None, **options: Any) -> Any:
    """pydantic's dataclass without its checks."""
    return dataclasses.dataclass(**options)


if __name__ == "__main__":
    sys.exit(main())

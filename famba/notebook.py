"""Executes a notebook with papermill in this process: no kernel has to start, and signals reach the notebook's code."""

import base64
import io
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from famba import config
from famba.errors import FambaError, InputError

# Imported by jsonschema for a check of addresses that no notebook needs, it compiles a grammar for more than a second.
sys.modules.setdefault("rfc3987_syntax", None)  # pyright: ignore[reportArgumentType]

import nbformat  # noqa: E402
import papermill  # noqa: E402
from IPython.core.displayhook import DisplayHook  # noqa: E402
from IPython.core.displaypub import DisplayPublisher  # noqa: E402
from IPython.core.interactiveshell import InteractiveShell  # noqa: E402
from IPython.core.pylabtools import print_figure  # noqa: E402
from papermill.engines import Engine, papermill_engines  # noqa: E402
from papermill.exceptions import PapermillExecutionError  # noqa: E402
from traitlets.config import Config  # noqa: E402


def execute(notebook: Path, output: Path, given: dict[str, str]) -> None:
    """Execute a notebook with parameters, in the repository root, and write the executed copy, also where it fails.

    Args:
        given: parameter name -> value, read as a YAML scalar: `0` is a number, `none` a string, `null` is None.

    Raises:
        InputError: no such notebook, or a parameter that its `parameters` cell does not have. Papermill itself would
            only warn, and run the default instead.
        FambaError: raised inside the notebook, with the same message; or any other error there, with its traceback.
    """
    if notebook.suffix != ".ipynb" or not notebook.is_file():
        raise InputError(f"{notebook}: no such notebook")
    if output.resolve() == notebook.resolve():
        raise InputError(f"{output}: the notebook itself, which is not overwritten; name another file")
    try:
        allowed = papermill.inspect_notebook(str(notebook))
    except nbformat.reader.NotJSONError:
        raise InputError(f"{notebook}: not a notebook") from None
    for name in given:
        if name not in allowed:
            raise InputError(f"{notebook}: parameter {name!r} is unknown; allowed: {', '.join(allowed) or 'none'}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        papermill.execute_notebook(
            str(notebook),
            str(output),
            parameters={name: config.parse_value(name, value) for name, value in given.items()},
            engine_name=_InProcess.__name__,
            kernel_name="python3",
            progress_bar=False,
            cwd=str(config.root()),
        )
    except FambaError as error:
        raise FambaError(f"{notebook}: {error}") from None
    except OSError as error:  # one of a cell is the next
        raise InputError(f"{output}: cannot be written: {error}") from None
    except PapermillExecutionError as error:
        raise FambaError(f"{notebook}: cell {error.exec_count} failed\n{error}") from None


class _InProcess(Engine):
    """An engine of papermill that runs the cells in an IPython shell of this process."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **_: Any) -> None:
        _Shell.clear_instance()
        shell = _Shell.instance(config=Config(HistoryManager={"enabled": False}))
        try:
            for index, cell in enumerate(nb_man.nb.cells):
                if cell.cell_type != "code":
                    continue
                nb_man.cell_start(cell, index)
                cell.execution_count, shell.outputs = shell.execution_count, cell.outputs
                with redirect_stdout(_Stream("stdout", cell.outputs)), redirect_stderr(_Stream("stderr", cell.outputs)):
                    result = shell.run_cell(cell.source, store_history=True)
                if error := result.error_before_exec or result.error_in_exec:
                    own = error.__traceback__ and error.__traceback__.tb_next  # the first frame is IPython's
                    frames = traceback.format_exception(type(error), error, own)
                    made = {"ename": type(error).__name__, "evalue": str(error), "traceback": frames}
                    cell.outputs.append(nbformat.v4.new_output("error", **made))
                    nb_man.cell_exception(cell, index, exception=error)
                    if isinstance(error, FambaError | SystemExit | KeyboardInterrupt):
                        raise error
                    return
                nb_man.cell_complete(cell, index)
        finally:
            shell.restore_sys_module_state()
            _Shell.clear_instance()
        if "ipywidgets" in sys.modules:  # so that the executed copy shows them without a kernel
            state = sys.modules["ipywidgets"].Widget.get_manager_state()
            nb_man.nb.metadata.widgets = {"application/vnd.jupyter.widget-state+json": state}


papermill_engines.register(_InProcess.__name__, _InProcess)


class _Stream(io.TextIOBase):
    """What a cell prints, as one output."""

    def __init__(self, name: str, outputs: list[Any]) -> None:
        self._name, self._outputs = name, outputs

    def write(self, text: str) -> int:
        if not self._outputs or self._outputs[-1].get("name") != self._name:
            self._outputs.append(nbformat.v4.new_output("stream", name=self._name, text=""))
        self._outputs[-1].text += text
        return len(text)


class _Publisher(DisplayPublisher):
    """What a cell displays; with a `display_id` it can be displayed anew in the same place."""

    shell: Any

    def publish(self, data: dict, metadata: dict | None = None, *_: Any, **given: Any) -> None:
        made = nbformat.v4.new_output("display_data", _encoded(data), metadata=metadata or {})
        place = (given.get("transient") or {}).get("display_id")
        if given.get("update") and place in self.shell.places:
            self.shell.places[place].update(made)
            return
        self.shell.outputs.append(made)
        self.shell.places[place] = made

    def clear_output(self, wait: bool = False) -> None:
        self.shell.outputs.clear()


class _Hook(DisplayHook):
    """The value of a cell's last line."""

    shell: Any

    def write_output_prompt(self) -> None: ...

    def finish_displayhook(self) -> None: ...

    def write_format_data(self, format_dict: dict, md_dict: dict | None = None) -> None:
        made = {"metadata": md_dict or {}, "execution_count": self.prompt_count}
        self.shell.outputs.append(nbformat.v4.new_output("execute_result", _encoded(format_dict), **made))


class _Shell(InteractiveShell):
    """IPython whose outputs are those of the current cell."""

    def __init__(self, **traits: Any) -> None:
        super().__init__(display_pub_class=_Publisher, displayhook_class=_Hook, **traits)
        self.outputs: list[Any] = []
        self.places: dict[str, Any] = {}
        png: Any = self.display_formatter.formatters["image/png"]  # pyright: ignore
        png.for_type_by_name("matplotlib.figure", "Figure", _drawn)  # matplotlib is imported by those who draw

    def _showtraceback(self, etype: type, evalue: BaseException, stb: list[str]) -> None:
        """The engine keeps the error."""


def _drawn(figure: Any) -> Any:
    return figure._repr_png_() if hasattr(figure, "_repr_png_") else print_figure(figure)


def _encoded(data: dict[str, Any]) -> dict[str, Any]:
    return {kind: base64.b64encode(x).decode() if isinstance(x, bytes) else x for kind, x in data.items()}

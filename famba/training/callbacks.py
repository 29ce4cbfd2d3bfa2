"""Callbacks of a run: curves in its notebook, and events for TensorBoard.

Each is called after every epoch with the run's history, a list of dicts of `runs.HISTORY_COLUMNS`, and with what
the epoch cost. None has any effect on the run's numbers.
"""

import io
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from famba.errors import InputError
from famba.storage import runs

# By the prefix of their columns: label, grey, line style.
_LINES = {
    "train": ("training", "0.6", "-"),
    "val": ("validation", "0.1", "-"),
    "ema_val": ("validation, averaged weights", "0.1", ":"),
}
_SHARE = 0.05  # of the time that may go into drawing


class Curves:
    """Loss and accuracy by epoch as one figure of a notebook's cell, renewed in place; elsewhere nothing.

    Drawn after the last epoch; where somebody may watch, also after the first, and in between as often as that takes a
    twentieth of the time.
    """

    def __init__(self, epochs: int | None = None) -> None:  # of the run; None draws every epoch
        self._epochs = epochs
        self._handle: Any = None
        self._next = 0.0

    def __call__(self, history: Sequence[Mapping[str, Any]], cost: Mapping[str, float] | None = None) -> None:
        """Show the history so far."""
        start = time.monotonic()
        last = self._epochs is None or len(history) >= self._epochs
        shell = _notebook_shell()
        watched = hasattr(shell, "kernel")  # that of famba.notebook has none
        if not history or shell is None or not (last or (watched and start >= self._next)):
            return
        from IPython.display import Image, display

        image = Image(data=_png(history, self._epochs), format="png")
        if self._handle is None:
            self._handle = display(image, display_id=True)
        else:
            self._handle.update(image)
        now = time.monotonic()
        self._next = now + (now - start) * (1 / _SHARE - 1)


class Events:
    """Events for TensorBoard: every column of the history and everything of the cost as a scalar; a step is an epoch.

    A run that goes on after `start_epoch` takes back the events after it, and so has each epoch once.

    Args:
        folder: of this run alone.

    Raises:
        InputError: TensorBoard is not installed, or the folder cannot be written to.
    """

    def __init__(self, folder: Path, *, start_epoch: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(
                f"train.tensorboard: true: TensorBoard cannot be imported ({error}); pip install 'famba[paper]'"
            ) from None
        try:
            self._writer = SummaryWriter(str(folder), purge_step=start_epoch + 1)
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror})") from None

    def __call__(self, history: Sequence[Mapping[str, Any]], cost: Mapping[str, float] | None = None) -> None:
        """Write the newest epoch."""
        row = history[-1]
        scalars = {key: row[key] for key in runs.HISTORY_COLUMNS if key != "epoch" and row.get(key) is not None}
        for key, value in {**scalars, **(cost or {})}.items():
            self._writer.add_scalar(key, value, row["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Write what is left, and end the thread that does it."""
        self._writer.close()


def _notebook_shell() -> Any:
    """The IPython that runs this, if it shows more than text."""
    if "IPython" not in sys.modules:
        return None
    from IPython.core.getipython import get_ipython

    shell: Any = get_ipython()
    return shell if shell is not None and "image/png" in shell.display_formatter.active_types else None


def _png(history: Sequence[Mapping[str, Any]], epochs: int | None) -> bytes:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, 2.8), layout="constrained")
    panels = {"loss": "loss", "top1_percent": "top-1 accuracy (%)"}
    for axes, (column, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for prefix, (name, grey, style) in _LINES.items():
            points = [(row["epoch"], y) for row in history if (y := row.get(f"{prefix}_{column}")) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=name, color=grey, linestyle=style)
        axes.set(xlabel="epoch", ylabel=label, xlim=(0.5, (epochs or len(history)) + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=90)
    return content.getvalue()

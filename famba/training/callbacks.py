"""Callbacks of a run: curves in its notebook, events for TensorBoard, and its history so far as a table.

Each is called after every epoch with the run's history, a list of dicts of `runs.HISTORY_COLUMNS`, and with what
the epoch cost. None has any effect on the run's numbers.
"""

import io
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from famba import config
from famba.errors import InputError
from famba.storage import runs
from famba.storage.files import write_atomic

# Heading, and by the label of each line its column and style. Validation is black, its moving average dotted.
_PANELS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "loss": {
        "training": ("train_loss", {"color": "0.6"}),
        "validation": ("val_loss", {"color": "0.1"}),
        "validation, averaged weights": ("ema_val_loss", {"color": "0.1", "linestyle": ":"}),
    },
    "top-1 accuracy (%)": {
        "training": ("train_top1_percent", {"color": "0.6"}),
        "validation": ("val_top1_percent", {"color": "0.1"}),
        "validation, averaged weights": ("ema_val_top1_percent", {"color": "0.1", "linestyle": ":"}),
    },
}
_SHARE = 0.05  # of the time that may go into drawing


class Curves:
    """Loss and accuracy by epoch as one figure of a notebook's cell, renewed in place; elsewhere nothing.

    Drawn after the first epoch, after the last, and in between as often as that takes a twentieth of the time.
    """

    def __init__(self, epochs: int | None = None) -> None:
        """Args:
        epochs: those that the run will have; None is not known, and every epoch is drawn.
        """
        self._epochs = epochs
        self._handle: Any = None
        self._next = 0.0

    def __call__(self, history: Sequence[Mapping[str, Any]], cost: Mapping[str, float] | None = None) -> None:
        """Show the history so far."""
        del cost
        start = time.monotonic()
        last = self._epochs is None or len(history) >= self._epochs
        if not history or not _in_notebook() or (start < self._next and not last):
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

    What comes after an epoch should come before that epoch's checkpoint is written: then a run that was killed has
    each epoch once, since those after the one it goes on from are taken back.
    """

    def __init__(self, folder: str | Path, *, start_epoch: int) -> None:
        """Args:
            folder: of this run alone; if relative, from the repository root.
            start_epoch: epochs that the run has behind it: 0, or those of the checkpoint that it goes on from.

        Raises:
            InputError: TensorBoard is not installed, or the folder cannot be written to.
        """
        folder = config.root() / folder
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


class Rows:
    """The history so far as the file that the finished run will have, byte for byte; whole at any moment."""

    def __init__(self, path: str | Path) -> None:
        """Args:
        path: if relative, from the repository root.
        """
        self._path = config.root() / path

    def __call__(self, history: Sequence[Mapping[str, Any]], cost: Mapping[str, float] | None = None) -> None:
        """Write all epochs again; InputError where that cannot be."""
        del cost
        write_atomic(self._path, runs.history_bytes(history))


def _in_notebook() -> bool:
    """Whether an IPython that shows more than text runs this."""
    if "IPython" not in sys.modules:
        return False
    from IPython.core.getipython import get_ipython

    shell: Any = get_ipython()
    return shell is not None and "image/png" in shell.display_formatter.active_types


def _png(history: Sequence[Mapping[str, Any]], epochs: int | None) -> bytes:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, 2.8), layout="constrained")
    for axes, (label, lines) in zip(figure.subplots(1, len(_PANELS)), _PANELS.items(), strict=True):
        for name, (column, style) in lines.items():
            points = [(row["epoch"], row[column]) for row in history if row.get(column) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=name, **style)
        axes.set(xlabel="epoch", ylabel=label, xlim=(0.5, (epochs or len(history)) + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=90)
    return content.getvalue()

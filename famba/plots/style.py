"""What every figure and animation has in common: one style, one way to be shown, one way to be saved.

Nothing here goes through pyplot, so nothing of the session's state is read or left behind. The same picture is the
same bytes whenever it is drawn or saved.
"""

import base64
import functools
import io
import itertools
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import matplotlib.style
import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure as _MatplotlibFigure
from PIL import Image

from famba import config
from famba.errors import InputError
from famba.fusion import strategies
from famba.storage.files import write_atomic

# The same on every machine: independent of the user's style, in the font that ships with matplotlib.
_STYLE: list[Any] = [
    "default",
    seaborn.axes_style("whitegrid", {"axes.spines.top": False, "axes.spines.right": False, "grid.color": "0.9"}),
    seaborn.plotting_context("paper", rc={"lines.linewidth": 1.8}),
    {"font.sans-serif": ["DejaVu Sans"], "legend.frameon": False, "svg.hashsalt": "famba"},
]
GREY = "0.4"  # of captions
PALETTE: list[str] = seaborn.color_palette("colorblind").as_hex()
# A strategy has one colour and one marker everywhere, and always the same place in the order.
STRATEGY_COLOURS = {
    "none": PALETTE[7],
    "all": PALETTE[0],
    "interleaved": PALETTE[1],
    "lower": PALETTE[4],
    "upper": PALETTE[2],
}
_MARKERS = {"none": "o", "all": "s", "interleaved": "D", "lower": "v", "upper": "^"}
_OWN_COLOURS = [PALETTE[3], PALETTE[5], PALETTE[6]]  # of a user's own strategies
_MORE_MARKERS = "<>pdX*h8PH"  # of changes from the first on, of a user's own strategies from the last
MODELS = {"vim_tiny": "Vim-Ti", "vim_small": "Vim-S"}
_GIF_COLOURS = 128
_FRAME_MS = 700

P = ParamSpec("P")


class Figure(_MatplotlibFigure):
    """A figure that a notebook shows without pyplot, with the same bytes each time."""

    def _repr_png_(self) -> bytes:
        return _rendered(self, "png", dpi=100)


@dataclass(frozen=True)
class Animation:
    """Figures of one size in an endless loop, the last shown three times as long; a notebook plays it."""

    frames: tuple[Figure, ...]

    def _repr_html_(self) -> str:  # nbconvert shows no image/gif
        return f'<img alt="{self!r}" src="data:image/gif;base64,{base64.b64encode(_gif(self)).decode()}">'

    def __repr__(self) -> str:
        return f"Animation of {len(self.frames)} frames"


def save(picture: _MatplotlibFigure | Animation, path: str | Path) -> Path:
    """Write a figure as PNG or SVG, an animation as GIF: the same bytes for the same picture, no date, no version.

    Args:
        path: if relative, from the repository root; its folder is created.

    Raises:
        InputError: a suffix that is not for this kind of picture, or a folder that cannot be written to.
    """
    path = config.root() / path
    kind, allowed = ("animations", [".gif"]) if isinstance(picture, Animation) else ("figures", [".png", ".svg"])
    if path.suffix not in allowed:
        raise InputError(f"{path}: {kind} are saved as {' or '.join(allowed)}")
    write_atomic(path, _gif(picture) if isinstance(picture, Animation) else _rendered(picture, path.suffix[1:]))
    return path


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw in the package's own style, whatever the user has set, and lay out once.

    A new layout at every save differs by rounding errors, which change the names inside an SVG.
    """

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.style.context(_STYLE):
            figure = draw(*args, **kwargs)
            if figure.get_layout_engine() is not None:
                figure.draw_without_rendering()
                figure.set_layout_engine("none")
            return figure

    return drawn


def grid_of_panels(
    count: int, across: int, size: tuple[float, float], margin: tuple[float, float] = (0.0, 0.0)
) -> tuple[Figure, np.ndarray]:
    """Panels of a size (inches), at most `across` beside each other; places that are left over stay blank."""
    across = min(across, count)
    down = math.ceil(count / across)
    figure = Figure(figsize=(size[0] * across + margin[0], size[1] * down + margin[1]), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    for axes in panels.flat[count:]:
        axes.set_axis_off()
    return figure, panels


def error_bar(middle: Any, low: Any, high: Any) -> np.ndarray | None:
    """The interval of a value, or those of several, as `errorbar` takes them; None where there is none."""
    return None if np.isnan(low).all() else np.reshape([middle - low, high - middle], (2, -1))


def label_rows(axes: Axes, labels: Sequence[str]) -> None:
    """Rows 0, 1, .. of an axis as labels, from the top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(False, axis="y")


def caption(figure: Figure, text: str) -> Figure:
    """The figure with a caption below it, in lines of its width; `± 1 sd` is not broken."""
    lines = textwrap.wrap(text.replace("± 1 sd", "±\u00a01\u00a0sd"), round(14 * figure.get_figwidth()))
    figure.supxlabel("\n".join(lines).replace("\u00a0", " "), x=0.01, ha="left", fontsize=8.5, color=GREY)
    return figure


def _rendered(figure: _MatplotlibFigure, kind: str, dpi: int = 150) -> bytes:
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[kind]
    target = io.BytesIO()
    with matplotlib.style.context(_STYLE):
        figure.savefig(target, format=kind, metadata=metadata, dpi=dpi, facecolor="white")
    return target.getvalue()


def _gif(animation: Animation) -> bytes:
    """One palette for all frames, so that unchanged parts do not flicker."""
    drawn = [Image.open(io.BytesIO(_rendered(figure, "png", dpi=80))).convert("RGB") for figure in animation.frames]
    everything = Image.fromarray(np.concatenate([np.asarray(frame) for frame in drawn]))
    palette = everything.quantize(_GIF_COLOURS, dither=Image.Dither.NONE)
    first, *rest = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in drawn]
    shown_ms = [_FRAME_MS] * len(rest) + [3 * _FRAME_MS]
    target = io.BytesIO()
    first.save(target, "GIF", save_all=True, append_images=rest, duration=shown_ms, loop=0)
    return target.getvalue()


def looks_in(frame: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Colour and marker of each strategy present, in `strategies.ordered`.

    A variant has its strategy's colour and its change's marker; a user's own strategies have colours and markers by
    their place among themselves.

    Raises:
        InputError: no rows.
    """
    names = {name: variant(name) for name in strategies.ordered(list(frame["strategy"]))}
    if not names:
        raise InputError("strategy: none at all; the table has no rows")
    own = [name for name in names if names[name][0] not in STRATEGY_COLOURS]
    colours = STRATEGY_COLOURS | dict(zip(own, itertools.cycle(_OWN_COLOURS), strict=False))
    markers = _MARKERS | dict(zip(own, itertools.cycle(reversed(_MORE_MARKERS)), strict=False))
    changes = dict.fromkeys(change for _, change in names.values() if change)
    of_changes = dict(zip(changes, itertools.cycle(_MORE_MARKERS), strict=False))
    return {name: (colours[x], of_changes.get(change, markers[x])) for name, (x, change) in names.items()}


def variant(name: str) -> tuple[str, str]:
    """`<strategy>_<change>` of one of the paper's strategies in its two parts; of any other name no change."""
    strategy, _, change = name.partition("_")
    return (strategy, change) if strategy in STRATEGY_COLOURS else (name, "")


def rows_of(frame: pd.DataFrame, strategy: str) -> pd.DataFrame:
    return frame.loc[frame["strategy"] == strategy]

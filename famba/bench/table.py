"""Tables as lists of rows, to be read in a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Columns by name, in the order in which rows bring them; the least times, which doubled their number, left out."""
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if not name.endswith("_least_ms")]
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(x.rjust(width) for x, width in zip(row, widths, strict=True)) for row in cells)


def _cell(x: Any) -> str:
    if x is None:
        return ""
    if isinstance(x, float):
        return f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}"
    return str(x)

"""Rows of a run drawn: as a curve of matplotlib, and as text and HTML of a few lines, for notebooks."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .errors import check, unknown_name

if TYPE_CHECKING:
    import matplotlib.axes

_WIDTH, _HEIGHT, _MARGIN = 180, 36, 3  # of a sparkline, in pixels
_COUNTS = ("iteration", "rounds", "bytes_down", "bytes_up", "seconds")
_LIKED = ("accuracy", "loss", "distance", "stationarity", "gap", "hypergradient_norm", "lower_gradient_norm")

Rows = Sequence[Mapping[str, float | str]]


def curve(rows: Rows, columns: Sequence[str], by: str, axes: matplotlib.axes.Axes | None) -> matplotlib.axes.Axes:
    """Columns against another one.

    Raises:
        InputError: there are no rows, or no such column.
    """
    from matplotlib import pyplot

    check(len(rows) > 0, "the history has no rows to draw.")
    known = numeric(rows)
    for name in (by, *columns):
        if name not in known:
            raise unknown_name("column of the history", name, known)
    drawn = list(columns) or telling(rows)[:1]
    check(drawn, "the history has no metric to draw: name a column, or run with metrics=.")
    axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")[1] if axes is None else axes
    for name in drawn:
        points = [(float(row[by]), float(row[name])) for row in rows]
        there = [point for point in points if all(map(math.isfinite, point))]
        axes.plot(*zip(*there, strict=True) if there else ([], []), label=name)
    axes.set_xlabel(by.replace("_", " "))
    axes.set_ylabel(drawn[0].replace("_", " ") if len(drawn) == 1 else "")
    axes.grid(alpha=0.3)
    if len(drawn) > 1:
        axes.legend(frameon=False)
    return axes


def numeric(rows: Rows) -> list[str]:
    """The columns that hold numbers."""
    return [name for name in dict.fromkeys(key for row in rows for key in row) if not _is_text(rows, name)]


def _is_text(rows: Rows, name: str) -> bool:
    return any(isinstance(row.get(name), str) for row in rows)


def telling(rows: Rows) -> list[str]:
    """The metrics, and then the diagnostics, that tell most of how a run went."""
    names = [name for name in numeric(rows) if name not in _COUNTS]
    rank = lambda name: next((k for k, word in enumerate(_LIKED) if word in name), len(_LIKED))
    return sorted((name for name in names if _points(rows, name)), key=rank)


def _points(rows: Rows, name: str) -> list[tuple[float, float]]:
    values = [(k, float(row.get(name, math.nan))) for k, row in enumerate(rows)]
    return [(k, value) for k, value in values if math.isfinite(value)]


def number(value: float | str) -> str:
    """A value of a row, short."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) or (math.isfinite(value) and float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:.4g}"


def line(rows: Rows) -> str:
    """The last row in a line: rounds, bytes, and what tells most."""
    if not rows:
        return "no rows"
    last = rows[-1]
    told = [f"{number(last['rounds'])} rounds", f"{number(_bytes(last))} bytes"] if "rounds" in last else []
    return ", ".join([*told, *(f"{name} {number(last[name])}" for name in telling(rows)[:2])])


def _bytes(row: Mapping[str, float | str]) -> float:
    return float(row.get("bytes_down", 0)) + float(row.get("bytes_up", 0))


def page(title: str, rows: Rows) -> str:
    """A table of what tells most, first and last, with a sparkline each; every name is escaped."""
    if not rows:
        return f"<div><b>{html.escape(title)}</b>: no rows</div>"
    first, last = rows[0], rows[-1]
    names = [name for name in (*telling(rows)[:6], *_COUNTS) if name in last]
    cells = [
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(number(first.get(name, math.nan)))}</td>"
        f"<td>{html.escape(number(last[name]))}</td><td>{spark(rows, name)}</td></tr>"
        for name in names
    ]
    head = "<tr><th>column</th><th>first</th><th>last</th><th></th></tr>"
    return f"<div><b>{html.escape(title)}</b><table>{head}{''.join(cells)}</table></div>"


def spark(rows: Rows, name: str) -> str:
    """A column as a line of SVG; nothing where it has fewer than two numbers."""
    points = _points(rows, name)
    if len(points) < 2:
        return ""
    across = max(points[-1][0] - points[0][0], 1)
    low, high = (pick(value for _, value in points) for pick in (min, max))
    scale = (high - low) or 1.0
    spot = lambda k, value: (
        f"{_MARGIN + (k - points[0][0]) / across * (_WIDTH - 2 * _MARGIN):.1f},"
        f"{_HEIGHT - _MARGIN - (value - low) / scale * (_HEIGHT - 2 * _MARGIN):.1f}"
    )
    path = " ".join(spot(k, value) for k, value in points)
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{html.escape(name, quote=True)}">'
        f'<polyline points="{path}" fill="none" stroke="currentColor" stroke-width="1.5"/></svg>'
    )

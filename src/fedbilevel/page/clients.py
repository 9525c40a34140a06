"""How clients fare, and what each one holds: its rows, and their labels, where that is known."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..results.folder import CLIENTS
from .found import Found
from .markup import dim, folded, number, table, text

_MOST_RUNS, _MOST_ROWS, _MOST_DOTS, _FEW = 6, 40, 500, 12
_WIDTH, _STRIP = 640, 34  # of a strip of dots, in pixels
_CELL, _NAMES, _MOST_LABELS = 22, 150, 20
_LONGEST = 22  # letters of a client's name in the map


class Table(NamedTuple):
    """clients.csv: names, and numbers by column; NaN where there is none."""

    names: list[str]
    columns: dict[str, np.ndarray]


class Held(NamedTuple):
    """What each client holds.

    Attributes:
        names: of the clients.
        rows: by level, (clients,) how many rows.
        labels: (clients, labels) how many rows of each label in both levels; None where rows have none.
    """

    names: list[str]
    rows: dict[str, np.ndarray]
    labels: np.ndarray | None


def clients(found: Found, held: Held | str) -> str:
    """The part of the page.

    Args:
        held: what clients hold; or why that is not told.
    """
    tables = [(run, read(file)) for run in found.runs if (file := run.file(CLIENTS)) is not None]
    several = len(found.runs) > 1
    parts = []
    for run, told in tables[:_MOST_RUNS]:
        title = f"<h3>{text(run.algorithm)}, seed {run.seed}</h3>" if several else ""
        parts.append(title + (_fares(told) if told is not None else dim(f"{CLIENTS} cannot be read.")))
    if not tables:
        parts.append(dim(f"How each fares: not told (no {CLIENTS})."))
    if len(tables) > _MOST_RUNS:
        parts.append(dim(f"{len(tables) - _MOST_RUNS} more runs have a {CLIENTS}."))
    counted = any(told is not None and "rows" in told.columns for _, told in tables)
    lost = f"{'Labels' if counted else 'Rows and labels'}: not told"
    parts.append(dim(f"{lost} ({held}).") if isinstance(held, str) else _map(held))
    return "".join(parts)


def read(file: Path) -> Table | None:
    """clients.csv; None where it cannot be read."""
    try:
        with file.open(newline="", errors="replace") as lines:
            rows = list(csv.reader(lines))
        head = rows[0]
        assert head[0] == "client" and len(head) > 1
        rows = [row for row in rows[1:] if len(row) == len(head)]
        value = lambda cell: float(cell) if cell else float("nan")
        columns = {name: np.array([value(row[k]) for row in rows]) for k, name in enumerate(head) if k}
        return Table([row[0] for row in rows], columns)
    except (OSError, ValueError, IndexError, AssertionError, csv.Error):
        return None


def _fares(told: Table) -> str:
    """A strip of dots for each metric, and the numbers."""
    metrics = {name: values for name, values in told.columns.items() if name != "rows"}
    strips = [[text(name), _strip(values, told.names)] for name, values in metrics.items()]
    order = np.arange(len(told.names))
    if len(order) > _MOST_ROWS and metrics:
        order = np.argsort(next(iter(metrics.values())), kind="stable")
        order = np.concatenate([order[: _MOST_ROWS // 2], order[-_MOST_ROWS // 2 :]])
    rows = [[text(told.names[k]), *(number(float(values[k])) for values in told.columns.values())] for k in order]
    some = f"{len(order)} of {len(told.names):,} clients: lowest and highest {next(iter(metrics), '')}"
    listed = table(["client", *map(text, told.columns)], rows, 1)
    title = some if len(order) < len(told.names) else "by client"
    return table([], strips) + folded(title, listed, unfolded=len(order) <= _FEW)


def _strip(values: np.ndarray, names: list[str]) -> str:
    """Each client a dot, from the lowest to the highest value."""
    there = np.flatnonzero(np.isfinite(values))
    if not len(there):
        return '<span class="dim">no numbers</span>'
    there = there[np.argsort(values[there], kind="stable")]
    low, high = float(values[there[0]]), float(values[there[-1]])
    if len(there) > _MOST_DOTS:
        there = there[np.unique(np.linspace(0, len(there) - 1, _MOST_DOTS).round().astype(int))]
    at = lambda value: 8 + (_WIDTH - 16) * ((value - low) / (high - low) if high > low else 0.5)
    dots = [
        f'<circle class="f0" opacity=".55" cx="{at(values[k]):.1f}" cy="9" r="4">'
        f"<title>{text(names[k])}: {number(float(values[k]))}</title></circle>"
        for k in there
    ]
    middle = float(np.median(values[np.isfinite(values)]))
    drawn = [f'<path class="axis" d="M{at(middle):.1f} 1v16"/>', *dots]
    ends = ("start", 4, low), ("middle", _WIDTH / 2, middle), ("end", _WIDTH - 4, high)
    words = ("lowest", "median", "highest")
    drawn += [
        f'<text class="dim" x="{x:.0f}" y="30" text-anchor="{anchor}">{word} {number(value)}</text>'
        for word, (anchor, x, value) in zip(words, ends, strict=True)
        if high > low or word == "median"
    ]
    return f'<svg viewBox="0 0 {_WIDTH} {_STRIP}" style="width:{_WIDTH}px" role="img">{"".join(drawn)}</svg>'


def _map(held: Held) -> str:
    """Rows of each client, and how its labels are shared out."""
    shown = range(min(len(held.names), _MOST_ROWS))
    title = "Rows" if held.labels is None else "Rows and labels"
    more = dim(f"{len(held.names) - len(shown):,} more clients.") if len(shown) < len(held.names) else ""
    labels = held.labels[:, :_MOST_LABELS] if held.labels is not None else np.zeros((len(held.names), 0))
    bars, scale = (
        _NAMES + 8 + labels.shape[1] * (_CELL + 2),
        max(1.0, float(np.max(np.sum([*held.rows.values()], axis=0)))),
    )
    drawn = [
        f'<text class="dim" x="{_NAMES + 8 + k * (_CELL + 2) + _CELL / 2:.0f}" y="12" text-anchor="middle">{k}</text>'
        for k in range(labels.shape[1])
    ]
    for line, k in enumerate(shown):
        y = 18 + line * 20
        name = held.names[k] if len(held.names[k]) <= _LONGEST else held.names[k][: _LONGEST - 1] + "\u2026"
        drawn.append(f'<text x="{_NAMES}" y="{y + 12}" text-anchor="end">{text(name)}</text>')
        total = max(1.0, float(labels[k].sum()))
        for label, count in enumerate(labels[k]):
            drawn.append(
                f'<rect class="f0" opacity="{0.06 + 0.94 * float(count) / total:.2f}" y="{y}" width="{_CELL}" height="16" '
                f'x="{_NAMES + 8 + label * (_CELL + 2)}"><title>{text(name)}, label {label}: {int(count):,}</title></rect>'
            )
        x = bars + 12.0
        for colour, counts in zip((1, 2), held.rows.values(), strict=False):
            width = float(counts[k]) / scale * 200
            drawn.append(f'<rect class="f{colour}" x="{x:.1f}" y="{y + 3}" width="{width:.1f}" height="10"/>')
            x += width
        counts = " + ".join(f"{int(counts[k]):,}" for counts in held.rows.values())
        drawn.append(f'<text class="dim" x="{x + 6:.0f}" y="{y + 12}">{counts}</text>')
    width, height = bars + 330, 22 + len(shown) * 20
    key = " + ".join(
        f'<span style="color:var(--c{colour})">{text(level)}</span>'
        for colour, level in zip((1, 2), held.rows, strict=False)
    )
    view = f'viewBox="0 0 {width} {height}" style="max-width:{width}px"'
    return f'<h3>{title}, {key}</h3><svg {view} role="img" aria-label="{title}">{"".join(drawn)}</svg>{more}'

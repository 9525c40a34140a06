"""What the studies share: tables that are kept, points held against their formula, figures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedbilevel import RunError
from fedbilevel.results import pipe_table

from ..kinds import JSON, Cell, Look

EXACT = 1e-9  # how far, relatively, a deterministic point may be from its formula
ROUNDING = 1e-13  # and how far besides, of the size of the vectors that were subtracted
ERRORS = 5.0  # how many standard errors a random one may be
Progress = Callable[[str], None]
Row = Mapping[str, Cell]
Number = float | np.number


def table(folder: Path, name: str, settings: Mapping[str, JSON], rows: Callable[[], Sequence[Row]]) -> pandas.DataFrame:
    """NAME.csv as a DataFrame, if NAME.json says that it was made with these settings; else of `rows()`, written there."""
    folder.mkdir(parents=True, exist_ok=True)
    file, beside = folder / f"{name}.csv", folder / f"{name}.json"
    wanted = json.dumps({"study": name, "version": version("fedbilevel"), **settings}, indent=2) + "\n"
    if not (file.is_file() and beside.is_file() and beside.read_text() == wanted):
        beside.unlink(missing_ok=True)  # so that an interrupted run leaves nothing that looks finished
        pandas.DataFrame(rows()).to_csv(file, index=False)
        beside.write_text(wanted)
    return pandas.read_csv(file)


def agree(frame: pandas.DataFrame, study: str) -> None:
    """Refuse a table in which a point's `measured` is off its `formula` by more than its `tolerance`.

    Raises:
        RunError: with the worst point.
    """
    off = (frame["measured"] - frame["formula"]).abs()
    worse = (off / frame["tolerance"]).fillna(math.inf).to_numpy()
    at = int(np.argmax(worse))
    if worse[at] > 1:
        point = {name: value for name, value in frame.iloc[at].items() if name != "tolerance"}
        where = ", ".join(f"{name} {value}" for name, value in point.items())
        raise RunError(f"{study}: a measured point is off its formula, {worse[at]:.3g} times the tolerance: {where}.")


def point(measured: Number, formula: Number, size: Number) -> dict[str, float]:
    """The columns of a deterministic point, which came out of vectors of that size."""
    tolerance = float(EXACT * abs(formula) + ROUNDING * size)
    return {"measured": float(measured), "formula": float(formula), "tolerance": tolerance}


def distance(measured: np.ndarray, formula: np.ndarray, true: np.ndarray, size: Number) -> dict[str, float]:
    """The point that is the distance of a vector from the true one."""
    return point(np.linalg.norm(measured - true), np.linalg.norm(formula - true), size)


def markdown(path: Path, title: str, head: list[str], rows: list[list[str]], *notes: str) -> Path:
    """A table with a line above it and notes below."""
    path.write_text("\n\n".join([f"{title}\n\n{pipe_table(head, rows).strip()}", *notes]) + "\n")
    return path


def number(value: Number, digits: int = 3) -> str:
    """A number in a table's cell; "never" where it is none."""
    return f"{float(value):.{digits}g}" if np.isfinite(float(value)) else "never"


def count(value: Number) -> str:
    """A whole number in a table's cell."""
    return f"{int(value):,}" if np.isfinite(float(value)) else "never"


# Okabe and Ito's colours, told apart by everyone; each goes with a marker and a line of its own
STYLES = [
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    {"color": "#009E73", "marker": "^", "linestyle": "-."},
    {"color": "#CC79A7", "marker": "D", "linestyle": (0, (3, 1, 1, 1))},
    {"color": "#E69F00", "marker": "v", "linestyle": (0, (5, 1))},
    {"color": "#56B4E9", "marker": "P", "linestyle": ":"},
    {"color": "#000000", "marker": "X", "linestyle": (0, (1, 1))},
]
FORMULA = {"color": "black", "marker": "x", "linestyle": "none", "markersize": 9, "zorder": 5}


def style(place: int) -> Look:
    """The look of the curve at that place of the legend."""
    hollow = {"markerfacecolor": "white"} if place >= len(STYLES) else {}  # told apart from the first of that colour
    return {**STYLES[place % len(STYLES)], **hollow, "linewidth": 1.6, "markersize": 5}


def panels(
    rows: int, columns: int, size: tuple[float, float], sharex: bool = False, sharey: bool | Literal["row"] = False
) -> tuple[Figure, np.ndarray]:
    """(figure, array of axes with a light grid)."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def ticks(axis: Axes, values: Iterable[Number]) -> None:
    """A logarithmic x axis with these whole numbers as its marks."""
    axis.set_xscale("log")
    axis.set_xticks(np.asarray(list(values)), [f"{value:g}" for value in values])
    axis.minorticks_off()


def legend(figure: Figure, columns: int) -> None:
    """One legend for all panels, below them, every label once."""
    found = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def save(figure: Figure, path: Path) -> Path:
    """Write the figure."""
    figure.savefig(path, dpi=130)
    return path

"""Curves of every metric against rounds, bytes and seconds: the median over seeds, and their range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas

from ..results.report import UNMEASURED, drops, metrics_of
from ..settings import told_apart
from .axes import Axis, vertical
from .found import Found
from .markup import LIGHT, dim, folded, number, size, table, text

_WIDTH, _PANEL, _HEIGHT = 960, 250, 210  # of a figure, of one of its panels, in pixels
_LEFT, _TOP, _BOTTOM, _GAP = 52, 10, 40, 66
_MOST_FIGURES, _MOST_CURVES = 24, 24
_POINTS = 60_000  # of all curves together, which keeps the page small
_FEWEST, _MOST = 12, 160  # points of one curve
_HUGE = 1e100  # beyond it a value is not drawn
_TOLD = ("recovered", "halvings")  # counts that are told in words
_DIAGNOSTICS = (UNMEASURED, "lower_gradient_norm", "vector_residual", "vector_growth", "turn")


# From how much on a unit is taken, how much of it is one, and its name.
_SIZES = ((1e9, 1e9, "GB"), (1e6, 1e6, "MB"), (1e3, 1e3, "kB"), (0.0, 1.0, "bytes"))
_TIMES = ((7200.0, 3600.0, "h"), (120.0, 60.0, "min"), (1.0, 1.0, "s"), (0.0, 1e-3, "ms"))


class Scale(NamedTuple):
    """What stands across a panel: its column, in which unit, and how that is called."""

    column: str
    unit: float
    title: str


class Curve(NamedTuple):
    """One algorithm's: across, and up the median, the lowest and the highest of the seeds."""

    across: np.ndarray
    middle: np.ndarray
    low: np.ndarray
    high: np.ndarray


def curves(found: Found) -> str:
    """The part of the page."""
    frame = found.frame.assign(bytes=lambda rows: rows["bytes_down"] + rows["bytes_up"])
    if not len(frame):
        return dim("No rows yet.")
    plain, steps, diagnostics = columns(found)
    names = [*found.algorithms]
    shown, left = plain[:_MOST_FIGURES], plain[_MOST_FIGURES:]
    drawn = min(len(names), _MOST_CURVES)
    many = (len(shown) + len(steps) + len(diagnostics)) * drawn * 3
    points = int(np.clip(_POINTS / max(1, many) / 3, _FEWEST, _MOST))
    draw = lambda listed: "".join(figure(found, frame, name, points) for name in listed)
    notes = ["more than one seed: median, and range"] if frame["seed"].nunique() > 1 else []
    notes += [f"{len(names) - drawn} more algorithms are in history.csv"] if len(names) > drawn else []
    notes += [f"{len(left)} more columns are in history.csv"] if left else []
    parts = [legend(found), dim("; ".join(notes) + ".") if notes else "", ends(found, plain), draw(shown)]
    parts += [folded("Steps", draw(steps))] if steps else []
    parts += [folded("Diagnostics", draw(diagnostics))] if diagnostics else []
    return "".join(parts)


def columns(found: Found) -> tuple[list[str], list[str], list[str]]:
    """The columns that hold a number: metrics, step sizes that were found, diagnostics."""
    frame = found.frame
    there = [
        name for name in frame.columns if pandas.api.types.is_numeric_dtype(frame[name]) and frame[name].notna().any()
    ]
    metrics = [name for name in metrics_of(frame) if name in there and name not in _TOLD]
    steps = [name for name in metrics if name.endswith("_lr")]
    return [name for name in metrics if name not in steps], steps, [name for name in _DIAGNOSTICS if name in there]


def legend(found: Found) -> str:
    """Which line is whose."""
    told = told_apart(found.steps) if set(found.steps) >= set(found.algorithms) else {}
    line = '<svg class="small" width="26" height="10" aria-hidden="true"><path class="{}" d="M0 5H26"/></svg>'
    several = [
        f"<span>{line.format(look(k))} {text(told.get(name, name))}</span>" for k, name in enumerate(found.algorithms)
    ]
    return f'<p class="legend">{"".join(several[:_MOST_CURVES])}</p>' if len(several) > 1 else ""


def look(k: int) -> str:
    """The classes of the k-th algorithm's line."""
    return f"line s{k % len(LIGHT)} d{k // len(LIGHT)}"


def ends(found: Found, metrics: Sequence[str]) -> str:
    """Where each algorithm ended, and what it took."""
    rows = []
    for name, runs in found.algorithms.items():
        middle = lambda column, runs=runs: _middle([run.last(column) for run in runs])
        paid = [run.last("bytes_down") + run.last("bytes_up") for run in runs]
        spent = [number(_median([run.last(column) for run in runs])) for column in ("iteration", "rounds")]
        taken = [*spent, size(_median(paid)), f"{_median([run.last('seconds') for run in runs]):.3g} s"]
        rows.append([text(name), f"{len(runs)}", *taken, *map(middle, metrics[:_MOST_FIGURES])])
    head = ["", "seeds", "iterations", "rounds", "payload", "computation", *map(_words, metrics[:_MOST_FIGURES])]
    return table(head, rows, 1)


def _median(values: Sequence[float]) -> float:
    there = [value for value in values if np.isfinite(value)]
    return float(np.median(there)) if there else float("nan")


def _middle(values: Sequence[float]) -> str:
    """The median of some numbers, and from where to where they go."""
    there = [value for value in values if np.isfinite(value)]
    if not there:
        return "-"
    several = len(there) > 1 and min(there) < max(there)
    told = f' <span class="dim">[{number(min(there))}, {number(max(there))}]</span>' if several else ""
    return number(float(np.median(there))) + told


def _words(name: str) -> str:
    return text(name.replace("_", " "))


def scales(frame: pandas.DataFrame) -> list[Scale]:
    """What the three panels stand on."""
    per, called = _unit(float(frame["bytes"].max()), _SIZES)
    span, spelt = _unit(float(frame["seconds"].max()), _TIMES)
    return [
        Scale("rounds", 1.0, "rounds"),
        Scale("bytes", per, f"payload, {called} (down and up)"),
        Scale("seconds", span, f"computation, {spelt}"),
    ]


def _unit(most: float, units: Sequence[tuple[float, float, str]]) -> tuple[float, str]:
    return next(((of, name) for least, of, name in units if most >= least), (1.0, units[-1][2]))


def figure(found: Found, frame: pandas.DataFrame, metric: str, points: int) -> str:
    """One metric: a panel for rounds, one for bytes, one for seconds."""
    across = scales(frame)
    runs = {name: frame[frame["algorithm"] == name] for name in list(found.algorithms)[:_MOST_CURVES]}
    lines = [{name: curve(own, scale, metric, points) for name, own in runs.items()} for scale in across]
    every = [part for panel in lines for each in panel.values() if each is not None for part in (each.low, each.high)]
    up = vertical(np.concatenate(every) if every else np.zeros(0), _HEIGHT - _BOTTOM, _TOP)
    marks = drops(found.folder) if found.tuned else []
    panels = []
    for k, (scale, panel) in enumerate(zip(across, lines, strict=True)):
        start = _LEFT + k * (_PANEL + _GAP)
        furthest = max((each.across[-1] for each in panel.values() if each is not None), default=1.0)
        along = Axis(0.0, float(furthest) or 1.0, start, start + _PANEL)
        dropped = np.interp(marks, frame["rounds"], frame[scale.column]) / scale.unit if marks else np.zeros(0)
        panels += [_frame(along, up, scale.title), *_marks(along, up, dropped)]
        panels += [_drawn(j, name, each, along, up) for j, (name, each) in enumerate(panel.items()) if each is not None]
    title = _words(metric) + (' <span class="dim">(log)</span>' if up.logarithmic else "")
    told = f"{metric.replace('_', ' ')} against rounds, bytes and seconds"
    view = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{text(told)}"'
    return f'<h3>{title}</h3><div class="wide"><svg class="figure" {view}>{"".join(panels)}</svg></div>'


def curve(rows: pandas.DataFrame, scale: Scale, metric: str, points: int) -> Curve | None:
    """One algorithm's curve, as far as all seeds go, but for those that ended early; None where it has no number."""
    seeds = []
    for _, run in rows.groupby("seed"):
        along, value = (run[name].to_numpy(float) for name in (scale.column, metric))
        there = np.isfinite(along) & (np.abs(value) < _HUGE)
        if there.any():
            order = np.argsort(along[there], kind="stable")
            seeds.append((along[there][order] / scale.unit, value[there][order]))
    if not seeds:
        return None
    lengths = sorted(along[-1] for along, _ in seeds)
    end = min(length for length in lengths if length >= lengths[len(lengths) // 2] / 2)
    grid = np.unique(np.concatenate([along for along, _ in seeds]))
    grid = grid[grid <= end]
    if len(grid) > points:
        grid = grid[np.unique(np.linspace(0, len(grid) - 1, points).round().astype(int))]
    nowhere = {"left": np.nan, "right": np.nan}
    values = np.stack([np.interp(grid, along, value, **nowhere) for along, value in seeds])
    known = ~np.isnan(values).all(axis=0)
    grid, values = grid[known], values[:, known]
    return Curve(grid, *(pick(values, axis=0) for pick in (np.nanmedian, np.nanmin, np.nanmax)))


def _frame(along: Axis, up: Axis, title: str) -> str:
    """Grid, ticks and the name below a panel."""
    drawn, foot = [], up.start
    for value, label in up.ticks():
        at = up.spot(value)
        drawn.append(f'<path class="grid" d="M{along.start:.0f} {at:.1f}H{along.end:.0f}"/>')
        drawn.append(f'<text class="dim" x="{along.start - 5:.0f}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
    for value, label in along.ticks():
        at = along.spot(value)
        drawn.append(f'<path class="axis" d="M{at:.1f} {foot:.0f}v4"/>')
        drawn.append(f'<text class="dim" x="{at:.1f}" y="{foot + 15:.0f}" text-anchor="middle">{label}</text>')
    drawn.append(f'<path class="axis" d="M{along.start:.0f} {foot:.0f}H{along.end:.0f}"/>')
    middle = (along.start + along.end) / 2
    drawn.append(f'<text x="{middle:.0f}" y="{foot + 32:.0f}" text-anchor="middle">{text(title)}</text>')
    return "".join(drawn)


def _marks(along: Axis, up: Axis, dropped: np.ndarray) -> list[str]:
    """Where candidates of a race were dropped."""
    return [
        f'<path class="mark" d="M{at:.1f} {up.start:.0f}V{up.end:.0f}"><title>candidates dropped</title></path>'
        for at in along.at(dropped)
    ]


def _drawn(k: int, name: str, curve: Curve, along: Axis, up: Axis) -> str:
    """The range over seeds and their median."""
    across = along.at(curve.across)
    path = lambda values, across: " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, up.at(values), strict=True))
    title, band = f"<title>{text(name)}</title>", ""
    if (curve.high > curve.low).any():
        edge = f"{path(curve.high, across)} {path(curve.low[::-1], across[::-1])}"
        band = f'<polygon class="band f{k % len(LIGHT)}" points="{edge}"/>'
    if len(across) == 1:
        spot = f'cx="{across[0]:.1f}" cy="{up.spot(float(curve.middle[0])):.1f}"'
        return f'<circle class="f{k % len(LIGHT)}" {spot} r="3">{title}</circle>'
    return f'{band}<polyline class="{look(k)}" points="{path(curve.middle, across)}">{title}</polyline>'

"""Curves of one task beside each other: the best point of the grid, the fastest one, and no step given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from knobs.contender import Outcome
from knobs.grids import Curve, Grid


def draw(found: Mapping[tuple[str, str], tuple[Grid, Sequence[Outcome]]], file: Path) -> Path:
    """Phi less the best end, in G, against rounds: each seed thin, the median thick."""
    import matplotlib.pyplot as plt

    panels = len(found)
    figure, axes = plt.subplots(-(-panels // 4), min(panels, 4), figsize=(4 * min(panels, 4), 3 * -(-panels // 4)),
                                squeeze=False, layout="constrained")  # fmt: skip
    for axis in axes.flat[panels:]:
        axis.set_axis_off()
    for axis, ((task, name), (grid, runs)) in zip(axes.flat, found.items(), strict=False):
        points = {"best point": grid.best(), "fastest point": grid.fastest()}
        lines = {label: [grid.curves(seed, [p])[p] for seed in grid.seeds] for label, p in points.items()}
        lines["no step given"] = [run.curve for run in runs]
        for colour, (label, curves) in enumerate(lines.items()):
            _several(
                axis, [_left(grid, seed, c) for seed, c in zip(grid.seeds, curves, strict=True)], f"C{colour}", label
            )
        axis.axhline(0.1, color="grey", linewidth=0.5)
        axis.set(title=f"{task}, {name}", xlabel="rounds", ylim=(-0.2, 1.3), xlim=(0, grid.contestant.budget))
    axes.flat[0].legend(fontsize="small")
    axes.flat[0].set_ylabel("(Phi - best end) / G")
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return file


def _left(grid: Grid, seed: int, curve: Curve) -> Curve:
    """What is left to gain, in G."""
    return Curve(curve.rounds, (curve.values - grid.goal(seed)) / grid.gain(seed))


def _several(axis, curves: Sequence[Curve], colour: str, label: str) -> None:
    for curve in curves:
        axis.plot(curve.rounds, curve.values, color=colour, linewidth=0.5, alpha=0.4)
    longest = max(curves, key=lambda curve: len(curve.rounds)).rounds
    wide = [np.interp(longest, c.rounds, np.minimum(c.values, 1e3), right=np.nan) for c in curves]
    axis.plot(longest, np.nanmedian(wide, axis=0), color=colour, label=label)

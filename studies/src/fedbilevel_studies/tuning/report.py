"""Tables and a figure of what the contenders reached, against rounds and against bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas
from matplotlib.axes import Axes

from fedbilevel.results import pipe_table

from ..kinds import Look
from ..theory import common
from .contenders import BY_HAND, OURS, RIVALS, TUNE, UNTUNED

MB = 1e6


def best_lengths(frame: pandas.DataFrame) -> pandas.DataFrame:
    """The rows of the length with the lowest median of Phi at the end, by task and contender."""
    keys = ["task", "contender", "length"]
    ends = frame.groupby([*keys, "seed"], sort=False)["phi"].last()
    medians = ends.groupby(keys, sort=False).median().reset_index()
    chosen = medians.loc[medians.groupby(["task", "contender"], sort=False)["phi"].idxmin(), keys]
    return frame.merge(chosen, on=keys, how="inner")


def at(curve: pandas.DataFrame, column: str, level: float, value: str = "phi") -> float:
    """What the x of one run was worth when so many rounds or bytes were spent."""
    spent = curve[curve[column] <= level]
    return float(spent[value].iloc[-1])


def held_from(curve: pandas.DataFrame, goal: float) -> float:
    """The rounds from which on Phi is at or below the goal to the end; infinite for never."""
    above = np.flatnonzero(~(curve["phi"].to_numpy() <= goal))
    first = 0 if not above.size else above[-1] + 1
    return float(curve["rounds"].iloc[first]) if first < len(curve) else np.inf


def spread(values: list[float], digits: int = 4) -> str:
    """The median, and the range in brackets where there are several."""
    known = np.asarray(values)
    middle = common.number(np.median(known), digits)
    if len(known) == 1:
        return middle
    return f"{middle} ({common.number(known.min(), digits)}-{common.number(known.max(), digits)})"


def write(frame: pandas.DataFrame, folder: Path, notes: tuple[str, ...] = ()) -> list[Path]:
    """tuning.csv, tuning.md, tuning-race.md and tuning.png."""
    frame.to_csv(folder / "tuning.csv", index=False)
    best = best_lengths(frame)
    table, race = folder / "tuning.md", folder / "tuning-race.md"
    table.write_text("\n\n".join([pipe_table(*reached(best)).strip(), *notes]) + "\n")
    race.write_text(pipe_table(*raced(best)))
    return [folder / "tuning.csv", table, race, figure(best, folder / "tuning.png")]


def _curves(best: pandas.DataFrame, task: str) -> dict[str, list[pandas.DataFrame]]:
    """Each contender's curves on a task, a seed each, in the order of seeds."""
    mine = best[best["task"] == task]
    split = lambda own: [curve for _, curve in own.groupby("seed", sort=True)]
    return {str(label): split(own) for label, own in mine.groupby("contender", sort=False)}


def reached(best: pandas.DataFrame) -> tuple[list[str], list[list[str]]]:
    """What each contender returns and spends; and Phi at the bytes of the cheapest of all."""
    head = ["task", "contender", "rounds", "MB", "Phi", "test loss", "Phi at equal bytes"]
    lines = []
    for task in best["task"].unique():
        curves = _curves(best, task)
        paid = [c for label, own in curves.items() if label not in (UNTUNED, BY_HAND) for c in own]
        least = min(float(curve["bytes"].iloc[-1]) for curve in paid)
        for label, own in curves.items():
            length = int(own[0]["length"].iloc[0])
            last = lambda column, own=own: [float(curve[column].iloc[-1]) for curve in own]
            lines.append(
                [
                    task,
                    f"{label}, runs of {length}" if length else label,
                    common.count(np.median(last("rounds"))),
                    common.number(np.median(last("bytes")) / MB),
                    spread(last("phi")),
                    spread(last("test")),
                    spread([at(curve, "bytes", least) for curve in own]),
                ]
            )
    return head, lines


def raced(best: pandas.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Ours, and `fb.tune`, against the best rival of each task, seed by seed."""
    head = ["task", "best rival", "its Phi", "whose", "Phi", "that - rival, % of Phi"]
    head += ["rounds from which it is there", "rival's gain over by hand, %"]
    lines = []
    for task in best["task"].unique():
        curves = _curves(best, task)
        end = lambda own: np.array([float(curve["phi"].iloc[-1]) for curve in own])
        rivals = {label: end(own) for label, own in curves.items() if label in RIVALS}
        if not rivals:
            continue
        label = min(rivals, key=lambda name: float(np.median(rivals[name])))
        theirs = rivals[label]
        hand = rivals.get(BY_HAND, rivals.get(UNTUNED, theirs))
        gain = float(np.median(100 * (hand - theirs) / np.abs(hand)))
        for own in (OURS, TUNE):
            if own not in curves:
                continue
            there = [held_from(c, goal) for c, goal in zip(curves[own], theirs, strict=True)]
            more = float(np.median(100 * (end(curves[own]) - theirs) / np.abs(theirs)))
            ends = spread(list(theirs)), own, spread(list(end(curves[own])))
            lines.append([task, label, *ends, f"{more:+.1f}", common.count(np.median(there)), f"{gain:.1f}"])
    return head, lines


def figure(best: pandas.DataFrame, path: Path) -> Path:
    """Phi of the x that each contender would return: above against rounds, below against MB."""
    tasks = list(best["task"].unique())
    shape = (max(4.2 * len(tasks), 5.6), 7.2)
    picture, axes = common.panels(2, len(tasks), shape)
    looks = _looks(list(best["contender"].unique()))
    for column, task in enumerate(tasks):
        for label, own in _curves(best, task).items():
            look = {**looks[label], "marker": "", "label": label}
            for row, spent, unit in ((0, "rounds", 1.0), (1, "bytes", MB)):
                _draw(axes[row, column], own, spent, unit, look)
        for axis in axes[:, column]:
            axis.set_ylim(_window(best[best["task"] == task]))
        axes[0, column].set(title=task, xlabel="rounds")
        axes[1, column].set(xlabel="MB, all clients, both ways")
    for row in (0, 1):
        axes[row, 0].set_ylabel("$\\Phi$ at the returned x")
    common.legend(picture, 4)
    return common.save(picture, path)


def _looks(labels: list[str]) -> dict[str, Look]:
    """Of each contender; what nobody tunes is grey, so that the others have a colour each."""
    known = [label for label in labels if label != UNTUNED]
    grey: Look = {**common.style(0), "color": "0.6", "linestyle": "-"}
    looks = {label: grey if label == UNTUNED else common.style(known.index(label)) for label in labels}
    if TUNE in looks:
        looks[TUNE] = {**looks[TUNE], "linestyle": "-", "linewidth": 2.0}
    return looks


def _window(own: pandas.DataFrame) -> tuple[float, float]:
    """From below the lowest Phi to above that of the start; what is worse than that is cut off."""
    start = float(own.groupby("seed")["phi"].first().max())
    lowest = float(own["phi"].min())
    span = max(start - lowest, 0.05 * abs(start))
    return lowest - 0.05 * span, start + 0.1 * span


def _draw(axis: Axes, own: list[pandas.DataFrame], spent: str, unit: float, look: Look) -> None:
    """The median of a contender's curves, flat where nobody searches; for both of ours their range too."""
    most = max(float(curve[spent].iloc[-1]) for curve in own)
    if look["label"] in (UNTUNED, BY_HAND):
        axis.axhline(float(np.median([curve["phi"].iloc[-1] for curve in own])), **look)
        return
    grid = np.unique(np.concatenate([curve[spent].to_numpy(float) for curve in own] + [[most]]))
    values = np.array([[at(curve, spent, level) for level in grid] for curve in own])
    axis.step(grid / unit, np.median(values, axis=0), where="post", **look)
    if len(own) > 1 and look["label"] in (OURS, TUNE):
        lowest, highest = values.min(axis=0), values.max(axis=0)
        band = {"step": "post", "alpha": 0.15, "color": look["color"], "linewidth": 0}
        axis.fill_between(grid / unit, lowest, highest, **band)

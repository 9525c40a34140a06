"""The first stage of a study: each contender's best step sizes and variant, from one equal grid.

A point of the grid is judged by the first round at which the median of five consecutive evaluations is at the goal; one
that never gets there, or is not there at the end, by how far it is from it at the end. The end is the grid's budget, or
twice the round at which the first point was at the goal. A contender is judged by the mean over the grid's seeds.

The soonest points are often on the edge of stability. A study may therefore run its best few once more, on a seed of its
own and for the whole budget of the final runs, and take the best of those.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..callbacks.progress import Meter
from .memory import release
from .report import direction, first_reached, running_median
from .study import Contender, Study
from .sweep import sweep

Telling = Callable[[str], None]


def search(study: Study, folder: Path, data_dir: Any, say: Telling) -> dict[str, dict[str, Any]]:
    """Each contender's best step sizes and variant; every finished (contender, seed) is kept in grid.csv."""
    import pandas

    file = folder / "grid.csv"
    rows: list[dict[str, Any]] = pandas.read_csv(file).to_dict("records") if file.is_file() else []
    finished = {(row["label"], int(row["seed"])) for row in rows}
    best = {}
    for contender in study.contenders:
        ranked = study.candidates(contender)
        for seeds, rounds, whole in (
            (study.grid_seeds, study.grid_rounds, False),
            (study.shortlist_seeds, contender.rounds or study.rounds, True),
        ):
            for seed in seeds:
                if (contender.label, seed) not in finished:
                    rows += _try(study, contender, ranked, seed, rounds, whole, data_dir, say)
                    pandas.DataFrame(rows).to_csv(file, index=False)
            mine = [row for row in rows if row["label"] == contender.label and row["seed"] in seeds]
            of = lambda point, mine=mine: [row["score"] for row in mine if all(row[n] == v for n, v in point.items())]
            ranked = sorted(ranked, key=lambda point, of=of: float(np.mean(of(point) or 0.0)))[: study.shortlist]
        best[contender.label] = ranked[0]
        release()
        say(f"{contender.label}: best {best[contender.label]}")
    return best


def _try(
    study: Study, contender: Contender, candidates: list[dict[str, Any]], seed: int, rounds: int, whole: bool,
    data_dir: Any, say: Telling,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each of the candidates; `whole`: they all run to the end of the budget."""
    task, engine = study.build(contender, seed, data_dir)
    rows = []
    for variant in contender.variants:
        steps = [{n: v for n, v in c.items() if n not in variant} for c in candidates if variant.items() <= c.items()]
        if not steps:
            continue
        named = "".join(f", {name} {value}" for name, value in variant.items())
        with Meter(f"{study.name}: grid, {contender.label}{named}, seed {seed}", 1.0) as meter:
            curves = sweep(
                task.problem, task.data, contender.build(variant), steps, task.x, task.y,
                rounds=rounds, key=task.key, engine=engine, evaluate_every=study.every,
                metrics={study.metric: task.metrics[study.metric]}, progress=meter.update,
                arrived=lambda c: math.inf if whole else judge(study, c.rounds, c.metrics[study.metric], rounds)[0],
            )  # fmt: skip
        for curve in curves:
            values = curve.metrics[study.metric]
            reached, score = judge(study, curve.rounds, values, rounds)
            rows.append({
                "label": contender.label, "seed": seed, **variant, **curve.settings,
                "rounds_to_goal": reached, "end": float(running_median(values)[-1]), "score": score,
            })  # fmt: skip
    say(f"{contender.label}, grid of {len(rows)} on seed {seed}: best score {min(row['score'] for row in rows):.0f}")
    return rows


def judge(study: Study, rounds: np.ndarray, values: np.ndarray, budget: int) -> tuple[float, float]:
    """(the round at which the goal is reached, infinite for never; the score of the run, lower is better).

    A run that is at the goal early and falls back is no good: its score is that of one that never got there.
    """
    sign = direction(study.metric)
    at = first_reached(sign * values, sign * study.goal)
    reached = float("inf") if at is None else float(rounds[at])
    short = sign * (study.goal - running_median(values)[-1])
    if short <= 0:
        return reached, reached
    missed = short / max(abs(study.goal), 1e-12) if np.isfinite(short) else 10.0
    return reached, budget * (1 + float(missed))


def write_settings(file: Path, best: Mapping[str, Mapping[str, Any]]) -> None:
    """What the grid chose, as TOML, a section a contender."""
    text = "".join(  # numbers, words and truth values are written alike in JSON and TOML
        f"[{json.dumps(label)}]\n" + "".join(f"{name} = {json.dumps(v)}\n" for name, v in chosen.items()) + "\n"
        for label, chosen in best.items()
    )
    file.write_text(text)

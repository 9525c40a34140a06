"""AggITD, part by part: turns, local steps, cohort and truncation; and what one cohort for all exchanges would do.

The first half: |grad Phi|^2 after a fixed number of rounds, each point with the best steps of the one grid.

The second half is about cohorts C of n out of m clients. With fresh ones every factor is averaged by itself: on a quadratic
E h is what all clients together would give, whose bias falls with N. With ONE cohort for all exchanges of an estimate

    E h = mean over all C of h(the problem that has the clients of C alone)

which falls with N to the mean of those problems' own hypergradients, not to grad Phi.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pandas
from jaxtyping import Array, Bool, Float, Int, PyTree

from fedbilevel import AggITD, Algorithm, Federation, State, protocol

from . import common, problems, runner
from .family import PROBLEM, Family, family
from .runner import Count
from .spread import STEPS, formula

TRUNCATIONS = {
    "uniform": {"truncation": "uniform"},
    "full": {"truncation": "full"},
    "full, warm v": {"truncation": "full", "warm_start_v": True},
}
CLIENTS, BUDGET, BLOCKS, SEEDS = 20, 2_000, 20, 3
SPREAD, ASKED = 1.0, 2
COHORTS = ("fresh cohorts", "one cohort")


def ablation(folder: Path, quick: bool = False, progress: common.Progress = lambda text: None) -> list[Path]:
    """The study; leaves ablation.csv, .md and .png, and the same as ablation-cohort."""
    return [*_parts(folder, quick, progress), *_one_cohort(folder, quick, progress)]


# Turns, local steps, cohort, truncation ---------------------------------------------------------------------------------


def _parts(folder: Path, quick: bool, progress: common.Progress) -> list[Path]:
    numbers, steps, cohorts, truncations, budget = (1, 3, 10, 30), (1, 5), (CLIENTS, 4), tuple(TRUNCATIONS), BUDGET
    if quick:
        numbers, steps, cohorts, truncations, budget = (2,), (1,), (4,), ("uniform", "full"), 300
    settings = {"N": numbers, "local_steps": steps, "cohorts": cohorts, "truncations": truncations, "budget": budget}
    settings |= {"clients": CLIENTS, "seeds": SEEDS, "inner": problems.INNER, "outer": problems.OUTER}

    def rows():
        found = []
        with jax.enable_x64(True):
            for place in itertools.product(cohorts, truncations, steps, numbers):
                cohort, truncation, local_steps, N = place
                progress(f"ablation: {cohort} of {CLIENTS} clients, {truncation}, {local_steps} local steps, N = {N}")
                at = {"cohort": cohort, "truncation": truncation, "local_steps": local_steps, "N": N}
                found.append({**at, "stationarity": _after(*place, budget)})
        return found

    frame = common.table(folder, "ablation", settings, rows)
    lines = []
    for (cohort, truncation, local_steps), at in frame.groupby(["cohort", "truncation", "local_steps"], sort=False):
        values = map(common.number, at.sort_values("N")["stationarity"])
        lines.append([f"{cohort} of {CLIENTS}", str(truncation), str(local_steps), *values])
    head = ["clients asked", "truncation", "local steps", *(f"N = {N}" for N in numbers)]
    text = (
        f"|grad Phi|^2 after {budget:,} rounds of AggITD (mean of the last tenth, middle one of {SEEDS} runs), with the "
        "best steps of one grid."
    )
    table = common.markdown(folder / "ablation.md", text, head, lines)
    return [folder / "ablation.csv", table, _parts_figure(folder, frame, budget)]


def _after(cohort: int, truncation: str, local_steps: int, N: int, budget: int) -> float:
    """|grad Phi|^2 at the end of the budget, with the best of the steps."""
    setup = problems.quadratic(CLIENTS, SPREAD, None if cohort == CLIENTS else cohort)
    algorithm = AggITD(inner_rounds=N, local_steps=local_steps, skip_idle_rounds=True, **TRUNCATIONS[truncation])
    iterations = int(budget / protocol(algorithm, setup.problem, setup.data, setup.x, setup.y).rounds)
    random = cohort < CLIENTS or truncation == "uniform"
    ends = []
    for seed in range(SEEDS if random else 1):
        seeded = dataclasses.replace(setup, key=jax.random.key(seed))
        _, values = runner.curves(seeded, algorithm, iterations, BLOCKS, None, **problems.grid(setup, local_steps))
        ends.append(values[:, -2:].mean(-1))
    middle = np.median(np.where(np.isfinite(ends), ends, np.inf), axis=0)
    return float(middle.min())


def _parts_figure(folder: Path, frame: pandas.DataFrame, budget: int) -> Path:
    cohorts, truncations = frame["cohort"].unique(), frame["truncation"].unique()
    figure, axes = common.panels(
        len(cohorts), len(truncations), (3.6 * len(truncations) + 0.6, 3 * len(cohorts) + 0.6), sharey="row"
    )
    for (row, cohort), (column, truncation) in itertools.product(enumerate(cohorts), enumerate(truncations)):
        axis, at = axes[row, column], frame[(frame["cohort"] == cohort) & (frame["truncation"] == truncation)]
        for place, (local_steps, curve) in enumerate(at.groupby("local_steps")):
            label = "one local step" if local_steps == 1 else f"{local_steps} local steps"
            axis.plot(curve["N"], curve["stationarity"], **common.style(place), label=label)
        axis.set_yscale("log")
        common.ticks(axis, sorted(frame["N"].unique()))
        asked = "all clients" if cohort == CLIENTS else f"{cohort} of {CLIENTS} clients"
        axis.set_title(f"{truncation}; {asked}", fontsize=10)
        if row == len(cohorts) - 1:
            axis.set_xlabel("N, turns of the lower loop")
        if column == 0:
            axis.set_ylabel(f"$|\\nabla\\Phi|^2$ after {budget:,} rounds")
    common.legend(figure, 2)
    return common.save(figure, folder / "ablation.png")


# One cohort for all exchanges -------------------------------------------------------------------------------------------


class _OneCohort(Federation):
    """`fed`, but every exchange of the iteration asks the same clients."""

    def __init__(self, fed: Federation):
        self._fed, self._cohort = fed, fed.draw_cohort()
        self.clients, self.cohort_size, self.weighted = fed.clients, fed.cohort_size, fed.weighted

    @property
    def share(self) -> float | Float[Array, ""]:
        return self._fed.share

    def ask(
        self,
        method: Callable[..., PyTree],
        message: tuple[PyTree, ...],
        combine: Literal["mean", "maximum"] | tuple[Literal["mean", "maximum"], ...],
        replies: PyTree,
        cohort: Int[Array, " cohort"] | None,
        beside: bool,
    ) -> PyTree:
        return self._fed.ask(method, message, combine, replies, self._cohort, beside)

    def repeat(
        self,
        times: int | Count,
        body: Callable[[Count, PyTree], PyTree],
        carry: PyTree,
        most: int | None = None,
    ) -> PyTree:
        return self._fed.repeat(times, body, carry, most)

    def until(
        self,
        condition: Callable[[PyTree], bool | Bool[Array, ""]],
        body: Callable[[Count, PyTree], PyTree],
        carry: PyTree,
        most: int,
    ) -> PyTree:
        return self._fed.until(condition, body, carry, most)

    def randint(self, low: int, high: int) -> Count:
        return self._fed.randint(low, high)

    def draw_cohort(self, size: int | None = None) -> Int[Array, " cohort"]:
        return self._fed.draw_cohort(size)


def same(algorithm: Algorithm, fed: Federation, state: PyTree) -> tuple[State, dict[str, Array]]:
    """A program: the estimate that one cohort alone makes, in place of x."""
    h, y = algorithm.estimate(_OneCohort(fed), state.x, state.y)
    return State(h, y), {}


def _one_cohort(folder: Path, quick: bool, progress: common.Progress) -> list[Path]:
    numbers, draws = ((4,), 2_000) if quick else ((1, 2, 4, 8, 16, 32, 64), 20_000)
    settings = {"N": numbers, "draws": draws, "spread": SPREAD, "asked": ASKED, **STEPS}

    def rows():
        found, f = [], family(SPREAD)
        with jax.enable_x64(True):
            setup = runner.Setup(PROBLEM, f.data(), jnp.asarray(f.x), jnp.asarray(f.y), cohort=ASKED)
            for N, name in itertools.product(numbers, COHORTS):
                progress(f"ablation: {name}, N = {N}")
                program = same if name == "one cohort" else runner.hypergradient
                h = runner.draws(setup, AggITD(inner_rounds=N, truncation="full", **STEPS), program, draws)
                error = common.ERRORS * np.sqrt(h.var(axis=0, ddof=1).sum() / draws)
                norms = [np.linalg.norm(mean - f.hypergradient(f.x)) for mean in (h.mean(0), expected(f, name, N))]
                found.append({"cohorts": name, "N": N, "measured": norms[0], "formula": norms[1], "tolerance": error})
        return found

    frame = common.table(folder, "ablation-cohort", settings, rows)
    common.agree(frame, "ablation-cohort")
    lines = [
        [
            str(name),
            *(
                f"{mean:.3g} ± {far / common.ERRORS:.1g} ({exact:.3g})"
                for mean, far, exact in zip(at["measured"], at["tolerance"], at["formula"], strict=True)
            ),
        ]
        for name, at in frame.groupby("cohorts", sort=False)
    ]
    head = [f"{ASKED} of {len(family(SPREAD).H)} clients", *(f"N = {N}" for N in numbers)]
    text = f"|E h - grad Phi| over {draws:,} estimates, its standard error and in brackets the formula."
    table = common.markdown(folder / "ablation-cohort.md", text, head, lines)
    return [folder / "ablation-cohort.csv", table, _cohort_figure(folder, frame)]


def expected(f: Family, name: str, N: int) -> np.ndarray:
    """E h over the cohorts."""
    if name == "fresh cohorts":
        return formula(f, "AggITD", N)[0]
    return np.mean(
        [formula(alone(f, C), "AggITD", N)[0] for C in itertools.combinations(range(len(f.H)), ASKED)], axis=0
    )


def alone(f: Family, C: tuple[int, ...]) -> Family:
    """The problem that has these clients only."""
    at = list(C)
    return dataclasses.replace(f, **{name: getattr(f, name)[at] for name in "HBbAt"})


def _cohort_figure(folder: Path, frame: pandas.DataFrame) -> Path:
    figure, axes = common.panels(1, 1, (6.4, 4.6))
    axis = axes[0, 0]
    for place, (name, at) in enumerate(frame.groupby("cohorts", sort=False)):
        look = common.style(place)
        axis.errorbar(at["N"], at["measured"], yerr=at["tolerance"] / common.ERRORS, capsize=3, **look, label=name)
        axis.plot(at["N"], at["formula"], **common.FORMULA, label="formula" if place == 0 else None)
    axis.set(
        xlabel="N, turns of the lower loop", ylabel="error of the mean estimate $|E\\,h - \\nabla\\Phi|$", yscale="log"
    )
    common.ticks(axis, frame["N"].unique())
    axis.legend(frameon=False)
    return common.save(figure, folder / "ablation-cohort.png")

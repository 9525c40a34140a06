"""Random bilevel problems whose Phi is known exactly: what step sizes that set themselves are judged on.

A draw is well scaled at first, x', y' and the mean of H at the start of order one or below:

    quadratic   g = mean of (a'y' - c'x' - t)^2 / 2          f = mean of (b'y' - t)^2 / 2 + |x'|^2 / 200
    logistic    g = mean cross-entropy of logits a'y'        f = mean cross-entropy of logits b'y'
                + base sum_k exp(x'_k) |y'_k|^2 / 2          (y'_k: the k-th group of y')

Means are over clients of the means over a client's rows. Clients differ in where their columns lie, in
how wide they spread, and in what makes a target. A client with fewer rows than columns has a singular
H_i; the mean of H over clients has a condition of at most `CONDITION` at the start.

Then three factors s_x, s_y, s_rows, each log-uniform in 1e-3..1e3, change units and nothing else: x = s_x x';
quadratic: y = s_y y', and all rows, targets too, times s_rows, so that f and g are s_rows^2 times as large;
logistic: labels are no numbers, so columns alone are times s_rows, and y = (s_y / s_rows) y'. Start and
solution move along.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .data import FederatedData
from .engines import Simulation
from .problem import Problem
from .random_models import Logistic, Model, Quadratic, Rows

CONDITION = 1e3
KINDS = ("quadratic", "logistic")
MODES = ("everyone", "cohort", "minibatches", "cohort and minibatches")
CLIENTS, COLUMNS, UPPER, ROWS = (2, 50), (2, 10), (1, 6), (4, 16)  # the least and the most
FACTORS = (1e-3, 1e3)


@dataclasses.dataclass(frozen=True)
class RandomProblem:
    """One draw: run it with `fb.solve(p.problem, p.data, algorithm, p.x, p.y, engine=p.engine, ...)`.

    Attributes:
        problem, data: the problem and its clients.
        x, y: the start, (dx,) and (dy,).
        engine: a simulation, with a cohort in some draws.
        batch_size: for the algorithm: rows of a minibatch, or None for all rows.
        kind: "quadratic" or "logistic".
        mode: "everyone" (and all rows), "cohort", "minibatches", "cohort and minibatches".
        factors: s_x, s_y, s_rows.
        model: the draw before it is scaled, in numpy.
    """

    problem: Problem
    data: FederatedData
    x: Float[Array, " dx"]
    y: Float[Array, " dy"]
    engine: Simulation
    batch_size: int | None
    kind: str
    mode: str
    factors: tuple[float, float, float]
    model: Model

    @property
    def loss_factor(self) -> float:
        """How many times larger f and g are than before scaling."""
        return self.factors[2] ** 2 if self.kind == "quadratic" else 1.0

    def value(self, x: Float[Array, " dx"] | np.ndarray) -> float:
        """Phi(x) exactly, in float64; infinite where x is not finite."""
        return self.loss_factor * self.model.value(np.asarray(x, float) / self.factors[0])

    def hypergradient(self, x: Float[Array, " dx"] | np.ndarray) -> np.ndarray:
        """grad Phi(x) exactly, (dx,) float64."""
        return self.loss_factor / self.factors[0] * self.model.hypergradient(np.asarray(x, float) / self.factors[0])

    def outer_value(self, x: Float[Array, " dx"] | np.ndarray, y: Float[Array, " dy"] | np.ndarray) -> float:
        """f(x, y), float64."""
        unit = self.factors[1] / (1.0 if self.kind == "quadratic" else self.factors[2])
        own = np.asarray(x, float) / self.factors[0], np.asarray(y, float) / unit
        return self.loss_factor * self.model.outer_value(*own)


def random_problem(seed: int) -> RandomProblem:
    """Draw a problem: of either kind, 2 to 50 ragged clients, with a cohort or minibatches or neither.

    Call it in float64: factors span six powers of ten each, and those of H twelve.

    Args:
        seed: the same seed gives the same problem. Even seeds are quadratic, odd ones logistic.
    """
    draw, kind = np.random.default_rng(seed), KINDS[seed % 2]
    mode = MODES[draw.integers(len(MODES))]
    clients, draw_from = _whole(draw, CLIENTS), lambda ends: int(draw.integers(ends[0], ends[1] + 1))
    model = (Quadratic if kind == "quadratic" else Logistic).draw(
        draw, clients, draw_from(UPPER), draw_from(COLUMNS), ROWS, CONDITION
    )
    sx, sy, rows = (float(s) for s in np.exp(draw.uniform(*np.log(FACTORS), size=3)))
    cohort = int(draw.integers(max(1, clients // 5), clients)) if "cohort" in mode else None
    batch = int(draw.integers(2, 9)) if "minibatches" in mode else None
    return _scaled(model, kind, mode, (sx, sy, rows), Simulation(cohort=cohort), batch)


def _scaled(
    model: Model, kind: str, mode: str, factors: tuple[float, float, float], engine: Simulation, batch: int | None
) -> RandomProblem:
    """A draw in other units."""
    sx, sy, rows = factors
    unit = sy if kind == "quadratic" else sy / rows
    held = lambda array: jnp.asarray(array, jnp.result_type(float))
    data = FederatedData.stack([_times(own, rows) for own in model.inner], [_times(own, rows) for own in model.outer])
    inner, outer = model.losses(sx, sy, rows)
    x, y = held(sx * model.x), held(unit * model.y)
    return RandomProblem(Problem(inner, outer), data, x, y, engine, batch, kind, mode, factors, model)


def _times(rows: Rows, factor: float) -> Rows:
    """A client's rows in other units; labels, which are whole numbers, stay."""
    return {k: part if part.dtype.kind == "i" else factor * part for k, part in rows.items()}


def _whole(draw: np.random.Generator, ends: tuple[int, int]) -> int:
    """A whole number, log-uniform between two, both included."""
    low, high = np.log(ends[0]), np.log(ends[1] + 1)
    return min(ends[1], int(np.exp(draw.uniform(low, high))))

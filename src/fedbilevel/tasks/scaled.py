"""Ridge tuning on columns scaled from 0.1 to 20: badly scaled, and everything has a closed form.

    g(x, y) = mean (a'y - t)^2 / 2 + sum_j exp(x_j) y_j^2 / 2
    f(y)    = mean (a'y - t)^2 / 2 on validation rows

x: a log penalty for each column; y: its weight. Column j has the deviation s_j, in equal ratios from
0.1 to 20, so curvatures of g differ by a factor of 400 under the first penalties, which are one, and
by 40,000 without. Every other column has an effect of `EFFECT` on t per deviation, whatever its
scale, and clients' own effects differ a little from that. The rest have none, and their penalties
should be large. The rows are synthetic.

Metrics: test_error, the mean squared error on test rows; value Phi(x); stationarity;
distance |y - y*(x)|^2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..arrays import held
from ..data import FederatedData
from ..keys import generator
from ..problem import Problem
from .base import Kind, Options, Row, Task, mean_loss
from .closed_form import Columns, check_own_clients

SCALES = tuple(float(s) for s in np.geomspace(0.1, 20, 12))
CLIENTS, INNER, OUTER, TEST = 5, (8, 12, 16), 40, 200  # rows of each client
EFFECT, OWN, NOISE = 0.5, 0.1, 1.0
FAR = 300.0  # log penalties beyond it are taken for it: exp would overflow in the end


def outer_loss(x: Float[Array, " columns"], y: Float[Array, " columns"], row: Row) -> Float[Array, ""]:
    """Half the squared error of one row."""
    return 0.5 * (row["a"] @ y - row["target"]) ** 2


def inner_loss(x: Float[Array, " columns"], y: Float[Array, " columns"], row: Row) -> Float[Array, ""]:
    """Half the squared error of one row plus the penalties."""
    return outer_loss(x, y, row) + 0.5 * jnp.sum(jnp.exp(x) * y**2)


def build(options: Options) -> Task:
    check_own_clients("scaled", options)
    place, _, _, run = options.keys()
    draw = generator(place)
    clients = [_client(draw, INNER[i % len(INNER)]) for i in range(options.clients or CLIENTS)]
    data = FederatedData.stack([inner for inner, _, _ in clients], [outer for _, outer, _ in clients])
    problem = Problem(inner_loss, outer_loss)
    rows = {name: held(np.concatenate([test[name] for *_, test in clients])) for name in ("a", "target")}
    half = mean_loss(outer_loss, rows)
    known = ClosedForm(moments([inner for inner, _, _ in clients]), moments([outer for _, outer, _ in clients]))
    metrics = {
        "test_error": lambda x, y: 2 * half(x, y),
        "value": lambda x, y: known.value(np.asarray(x, float)),
        "stationarity": lambda x, y: float(np.sum(known.hypergradient(np.asarray(x, float)) ** 2)),
        "distance": lambda x, y: float(np.sum((np.asarray(y, float) - known.solution(np.asarray(x, float))) ** 2)),
    }
    start = np.zeros(len(SCALES))
    return Task("scaled", "synthetic", problem, data, held(start), held(start), metrics, run)


Moments = tuple[np.ndarray, np.ndarray, float]


def moments(clients: Sequence[Columns]) -> Moments:
    """Means over clients of the means over a client's rows: of a a' (columns, columns), of a t (columns,), of t^2."""
    products = [(own["a"].T @ own["a"], own["a"].T @ own["target"], own["target"] @ own["target"]) for own in clients]
    squares, crossed, targets = zip(*products, strict=True)
    mean = lambda parts: np.mean([part / len(own["a"]) for part, own in zip(parts, clients, strict=True)], axis=0)
    return mean(squares), mean(crossed), float(mean(targets))


@dataclasses.dataclass(frozen=True)
class ClosedForm:
    """y*(x), Phi(x) and its gradient, x (columns,) float64, in 64 bits whatever the run is in.

    In 32 bits the reference would refuse what a long step makes of the condition number, and the run
    would end with it.
    """

    inner: Moments
    outer: Moments

    def solution(self, x: np.ndarray) -> np.ndarray:
        """y*(x) = (A + diag exp(x))^-1 b, (columns,)."""
        return self._solve(x, self.inner[1])

    def value(self, x: np.ndarray) -> float:
        """Phi(x)."""
        y, (square, crossed, target) = self.solution(x), self.outer
        return float(0.5 * (y @ square @ y - 2 * y @ crossed + target))

    def hypergradient(self, x: np.ndarray) -> np.ndarray:
        """grad Phi(x) = -exp(x) y* v*, (columns,)."""
        y, (square, crossed, _) = self.solution(x), self.outer
        return -np.exp(np.clip(x, -FAR, FAR)) * y * self._solve(x, square @ y - crossed)

    def _solve(self, x: np.ndarray, right: np.ndarray) -> np.ndarray:
        """By H = D (D^-1 A D^-1 + 1) D, D = exp(x / 2), which large penalties do not harm."""
        root = np.exp(-np.clip(x, -FAR, FAR) / 2)
        inside = root[:, None] * self.inner[0] * root + np.eye(len(x))
        return root * np.linalg.solve(inside, root * right)


def _client(draw: np.random.Generator, inner: int) -> tuple[Columns, Columns, Columns]:
    """A client's rows for training, validation and the test."""
    telling = np.arange(len(SCALES)) % 2 == 0
    effects = np.where(telling, EFFECT, 0) + OWN * draw.normal(size=len(SCALES)) * telling
    units = draw.normal(size=(inner + OUTER + TEST, len(SCALES)))
    rows = {"a": units * np.array(SCALES), "target": units @ effects + NOISE * draw.normal(size=len(units))}
    first, second = inner, inner + OUTER
    cut = lambda start, stop: {name: part[start:stop] for name, part in rows.items()}
    return cut(0, first), cut(first, second), cut(second, None)


scaled = Kind(
    "scaled",
    "x: log penalties of least squares on columns from 0.1 to 20, y: its weights; everything has a closed form",
    ("synthetic",),
    build,
)

"""The two kinds of random problem before they are scaled, in numpy: rows, losses, and Phi exactly."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeAlias, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .problem import Loss

Rows: TypeAlias = dict[str, np.ndarray]  # of one client at one level, its columns by name
Ends: TypeAlias = tuple[int, int]
NOISE, OWN, SIGNAL = 0.3, 0.3, 3.0  # of targets; how far clients' own truths lie from the common one; of logits
CURVE = 0.25  # of cross-entropy, at most


@dataclasses.dataclass(frozen=True)
class Model(abc.ABC):
    """A problem of order one.

    Attributes:
        inner, outer: rows of each client.
        x, y: the start, (dx,) and (dy,).
    """

    inner: Sequence[Rows]
    outer: Sequence[Rows]
    x: np.ndarray
    y: np.ndarray

    @functools.cached_property
    def lower(self) -> Rows:
        """All inner rows, with what each counts in the mean over clients."""
        return pooled(self.inner)

    @functools.cached_property
    def upper(self) -> Rows:
        """The same of the outer rows."""
        return pooled(self.outer)

    @abc.abstractmethod
    def losses(self, sx: float, sy: float, rows: float) -> tuple[Loss, Loss]:
        """The losses of one row, inner and outer, in other units."""

    @abc.abstractmethod
    def solution(self, x: np.ndarray) -> np.ndarray:
        """y*(x), (dy,)."""

    @abc.abstractmethod
    def outer_value(self, x: np.ndarray, y: np.ndarray) -> float:
        """f(x, y)."""

    @abc.abstractmethod
    def hypergradient(self, x: np.ndarray) -> np.ndarray:
        """grad Phi(x), (dx,)."""

    @abc.abstractmethod
    def hessian(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The mean of H over clients, (dy, dy)."""

    def value(self, x: np.ndarray) -> float:
        """Phi(x); infinite where x is not finite."""
        if not np.isfinite(x).all():
            return float("inf")
        with np.errstate(over="ignore", invalid="ignore"):
            found = self.outer_value(x, self.solution(x))
        return found if np.isfinite(found) else float("inf")


@dataclasses.dataclass(frozen=True)
class SquaredError:
    """Half the squared error of one row, in other units; `penalty` on |x|^2 / 2."""

    sx: float
    sy: float
    penalty: float

    def __call__(self, x: Float[Array, " dx"], y: Float[Array, " dy"], row: Mapping[str, Array]) -> Float[Array, ""]:
        x, error = x / self.sx, row["a"] @ (y / self.sy) - row["t"]
        error = error - row["c"] @ x if "c" in row else error
        return 0.5 * error**2 + 0.5 * self.penalty * jnp.sum(x**2)


@final
@dataclasses.dataclass(frozen=True)
class Quadratic(Model):
    """Least squares whose targets x moves."""

    SLACK: ClassVar[float] = 0.01

    @classmethod
    def draw(cls, draw: np.random.Generator, clients: int, dx: int, dy: int, rows: Ends, condition: float) -> Quadratic:
        """Targets are right at the outer level, and at the inner one off by what x can mend in part."""
        inner, outer = features(draw, clients, dy, rows, condition)
        mix, truth, wrong = draw.normal(size=(dy, dx)) / np.sqrt(dx), draw.normal(size=dy), draw.normal(size=dy)
        own = lambda size: OWN * draw.normal(size=size)
        noisy = lambda middle: middle + NOISE * draw.normal(size=len(middle))
        lower = [
            {"a": a, "c": a @ (mix + own(mix.shape) / np.sqrt(dx)), "t": noisy(a @ (wrong + own(dy)))} for a in inner
        ]
        upper = [{"a": a, "t": noisy(a @ (truth + own(dy)))} for a in outer]
        return cls(lower, upper, draw.normal(size=dx), 0.1 * draw.normal(size=dy))

    def losses(self, sx: float, sy: float, rows: float) -> tuple[Loss, Loss]:
        return SquaredError(sx, sy, 0.0), SquaredError(sx, sy, self.SLACK * rows**2)

    def solution(self, x: np.ndarray) -> np.ndarray:
        rows = self.lower
        right = rows["a"].T @ (rows["weight"] * (rows["c"] @ x + rows["t"]))
        return np.linalg.solve(self.hessian(x, self.y), right)

    def outer_value(self, x: np.ndarray, y: np.ndarray) -> float:
        rows = self.upper
        return float(0.5 * rows["weight"] @ (rows["a"] @ y - rows["t"]) ** 2 + 0.5 * self.SLACK * np.sum(x**2))

    def hypergradient(self, x: np.ndarray) -> np.ndarray:
        y, (lower, upper) = self.solution(x), (self.lower, self.upper)
        v = np.linalg.solve(self.hessian(x, y), upper["a"].T @ (upper["weight"] * (upper["a"] @ y - upper["t"])))
        return self.SLACK * x + lower["c"].T @ (lower["weight"] * (lower["a"] @ v))

    def hessian(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (self.lower["a"].T * self.lower["weight"]) @ self.lower["a"]


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """-log of the probability of one row's label, in other units; `groups` have penalties exp(x), or None."""

    sx: float
    sy: float
    rows: float
    base: float
    groups: tuple[int, ...] | None

    def __call__(self, x: Float[Array, " dx"], y: Float[Array, " dy"], row: Mapping[str, Array]) -> Float[Array, ""]:
        logit = row["a"] @ (y / self.sy)
        loss = jax.nn.softplus(jnp.where(row["label"] == 1, -logit, logit))
        if self.groups is None:
            return loss
        penalty = jnp.exp(x / self.sx)[np.array(self.groups)]
        return loss + 0.5 * self.base * jnp.sum(penalty * (y * (self.rows / self.sy)) ** 2)


@final
@dataclasses.dataclass(frozen=True)
class Logistic(Model):
    """Logistic regression with a log penalty for each group of columns.

    Attributes:
        base: the penalties at x = 0.
    """

    BASE: ClassVar[float] = 0.05 * CURVE

    base: float

    @classmethod
    def draw(cls, draw: np.random.Generator, clients: int, dx: int, dy: int, rows: Ends, condition: float) -> Logistic:
        """Some groups tell much and the others nothing; the start holds the former and lets the latter loose."""
        dx = min(dx, dy)
        inner, outer = features(draw, clients, dy, rows, condition)
        telling = draw.random(dx) < 0.5
        telling[0] = True
        truth = draw.normal(size=dy) * telling[np.arange(dy) % dx]
        truth *= SIGNAL / np.std(np.concatenate(inner) @ truth)
        own = [truth * (1 + OWN * draw.normal(size=dy)) for _ in range(clients)]
        labelled = lambda a, w: {"a": a, "label": (a @ w + draw.logistic(size=len(a)) > 0).astype(np.int32)}
        lower, upper = ([labelled(*pair) for pair in zip(level, own, strict=True)] for level in (inner, outer))
        start = np.where(telling, draw.uniform(2, 3, size=dx), draw.uniform(-2, -1, size=dx))
        return cls(lower, upper, start, np.zeros(dy), cls.BASE)

    @property
    def groups(self) -> np.ndarray:
        """(dy,) the group of each column."""
        return np.arange(len(self.y)) % len(self.x)

    def losses(self, sx: float, sy: float, rows: float) -> tuple[Loss, Loss]:
        groups = tuple(int(k) for k in self.groups)
        return CrossEntropy(sx, sy, rows, self.base, groups), CrossEntropy(sx, sy, rows, self.base, None)

    def solution(self, x: np.ndarray) -> np.ndarray:
        """By Newton's method with halved steps, from zero."""
        y = np.zeros(len(self.y))
        for _ in range(100):
            gradient = _gradient(self.lower, y) + self._penalty(x) * y
            step = np.linalg.solve(self.hessian(x, y), gradient)
            size, now = 1.0, self._inner_value(x, y)
            if not gradient @ step > 1e-14 * now:  # twice what is left: the next step is exact to rounding
                return y - step
            while self._inner_value(x, y - size * step) > now and size > 1e-6:
                size /= 2
            y = y - size * step
            if size <= 1e-6:  # rounding errors are all that is left
                break
        return y

    def outer_value(self, x: np.ndarray, y: np.ndarray) -> float:
        return _loss(self.upper, y)

    def hypergradient(self, x: np.ndarray) -> np.ndarray:
        y = self.solution(x)
        v = np.linalg.solve(self.hessian(x, y), _gradient(self.upper, y))
        return -np.bincount(self.groups, self._penalty(x) * y * v, minlength=len(x))

    def hessian(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        rows = self.lower
        p = _positive(rows["a"] @ y)
        return (rows["a"].T * (rows["weight"] * p * (1 - p))) @ rows["a"] + np.diag(self._penalty(x))

    def _inner_value(self, x: np.ndarray, y: np.ndarray) -> float:
        return float(_loss(self.lower, y) + 0.5 * np.sum(self._penalty(x) * y**2))

    def _penalty(self, x: np.ndarray) -> np.ndarray:
        return self.base * np.exp(x)[self.groups]


def features(
    draw: np.random.Generator, clients: int, columns: int, rows: Ends, condition: float
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Columns (rows, columns) of each client, for the inner and the outer level.

    At the inner level the mean over clients of a client's mean of a a' has the eigenvalues 1 .. 1/c,
    c log-uniform up to `condition`.
    """
    least = max(rows[0], -(-2 * columns // clients))
    shifts = 0.5 * draw.normal(size=(clients, columns))
    spreads = draw.uniform(0.5, 1.5, size=clients)
    own = lambda i, count: spreads[i] * draw.normal(size=(count, columns)) + shifts[i]
    counts = lambda: draw.integers(least, max(least, rows[1]) + 1, size=clients)
    inner = [own(i, n) for i, n in enumerate(counts())]
    outer = [own(i, n) for i, n in enumerate(counts())]
    seen = np.mean([a.T @ a / len(a) for a in inner], axis=0)
    basis, _ = np.linalg.qr(draw.normal(size=(columns, columns)))
    curvatures = np.geomspace(1, 1 / np.exp(draw.uniform(0, np.log(condition))), columns)
    change = np.linalg.inv(np.linalg.cholesky(seen)).T @ (np.sqrt(curvatures)[:, None] * basis.T)
    return [a @ change for a in inner], [a @ change for a in outer]


def pooled(clients: Sequence[Rows]) -> Rows:
    """All rows, and what each counts in the mean over clients of the mean over a client's: `weight`."""
    rows = {name: np.concatenate([own[name] for own in clients]) for name in clients[0]}
    weights = [np.full(len(own["a"]), 1 / (len(clients) * len(own["a"]))) for own in clients]
    return rows | {"weight": np.concatenate(weights)}


def _loss(rows: Rows, y: np.ndarray) -> float:
    """The mean cross-entropy."""
    logit = rows["a"] @ y
    return float(rows["weight"] @ np.logaddexp(0, np.where(rows["label"] == 1, -logit, logit)))


def _gradient(rows: Rows, y: np.ndarray) -> np.ndarray:
    """Its gradient in y."""
    return rows["a"].T @ (rows["weight"] * (_positive(rows["a"] @ y) - rows["label"]))


def _positive(logit: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * logit))

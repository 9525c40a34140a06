"""The two kinds of random problem before they are scaled, in numpy: rows, losses, and Phi exactly."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
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
        right = mean(self.inner, lambda own: own["a"].T @ (own["c"] @ x + own["t"]))
        return np.linalg.solve(self.hessian(x, self.y), right)

    def outer_value(self, x: np.ndarray, y: np.ndarray) -> float:
        fit = mean(self.outer, lambda own: 0.5 * np.sum((own["a"] @ y - own["t"]) ** 2))
        return float(fit + 0.5 * self.SLACK * np.sum(x**2))

    def hypergradient(self, x: np.ndarray) -> np.ndarray:
        y = self.solution(x)
        v = np.linalg.solve(self.hessian(x, y), mean(self.outer, lambda own: own["a"].T @ (own["a"] @ y - own["t"])))
        return self.SLACK * x + mean(self.inner, lambda own: own["c"].T @ (own["a"] @ v))

    def hessian(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return mean(self.inner, lambda own: own["a"].T @ own["a"])


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
        for _ in range(200):
            step = np.linalg.solve(self.hessian(x, y), self._gradient(x, y))
            size, now = 1.0, self._inner_value(x, y)
            while self._inner_value(x, y - size * step) > now + 1e-12 * abs(now) and size > 1e-8:
                size /= 2
            y = y - size * step
            if np.linalg.norm(step) <= 1e-12 * (1 + np.linalg.norm(y)):
                break
        return y

    def outer_value(self, x: np.ndarray, y: np.ndarray) -> float:
        return float(mean(self.outer, lambda own: np.sum(_losses(own, y))))

    def hypergradient(self, x: np.ndarray) -> np.ndarray:
        y = self.solution(x)
        v = np.linalg.solve(self.hessian(x, y), mean(self.outer, lambda own: own["a"].T @ _slopes(own, y)))
        return -np.bincount(self.groups, self._penalty(x) * y * v, minlength=len(x))

    def hessian(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        def own(rows: Rows) -> np.ndarray:
            p = _positive(rows["a"] @ y)
            return (rows["a"].T * (p * (1 - p))) @ rows["a"]

        return mean(self.inner, own) + np.diag(self._penalty(x))

    def _inner_value(self, x: np.ndarray, y: np.ndarray) -> float:
        return float(mean(self.inner, lambda own: np.sum(_losses(own, y))) + 0.5 * np.sum(self._penalty(x) * y**2))

    def _gradient(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return mean(self.inner, lambda own: own["a"].T @ _slopes(own, y)) + self._penalty(x) * y

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


def mean(clients: Sequence[Rows], total: Callable[[Rows], np.ndarray | float]) -> np.ndarray:
    """The mean over clients of the mean over a client's rows, from a client's total."""
    return np.asarray(np.stack([np.asarray(total(own)) / len(own["a"]) for own in clients]).mean(axis=0))


def _losses(own: Rows, y: np.ndarray) -> np.ndarray:
    logit = own["a"] @ y
    return np.logaddexp(0, np.where(own["label"] == 1, -logit, logit))


def _slopes(own: Rows, y: np.ndarray) -> np.ndarray:
    """d loss / d logit of each row."""
    return _positive(own["a"] @ y) - own["label"]


def _positive(logit: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * logit))

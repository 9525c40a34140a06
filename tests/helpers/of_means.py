"""An outer loss of means on ragged, weighted clients, and in numpy its value from all rows at once."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

import fedbilevel as fb

SHARES = (1.0, 3.0, 2.0, 0.5)
SIZES = ((5, 4), (9, 7), (3, 6), (6, 5))  # inner and outer rows of each client


def inner(x, y, row):
    """Ridge regression, weighted by group: its solution is a linear system."""
    weight = jnp.exp(x["group"] @ row["member"])
    fit = 0.5 * weight * (row["a"] @ y["w"] + y["b"] - row["t"]) ** 2
    return fit + 0.25 * (1 + x["k"] ** 2) * (jnp.sum(y["w"] ** 2) + y["b"] ** 2)


def outer_means(x, y, row):
    """Numerators and denominators of two groups' losses, and the loss of all."""
    loss = jnp.tanh(row["a"] @ y["w"] + y["b"] - row["t"]) ** 2
    return {"above": row["member"] * loss, "below": row["member"], "loss": loss + 0.05 * jnp.sum(x["group"] ** 2)}


def outer_of(means):
    rates = means["above"] / means["below"]
    return 3 * (rates[0] - rates[1]) ** 2 + means["loss"]


@dataclasses.dataclass(frozen=True)
class OfMeans:
    """The problem, its clients' weights p at either level, and a start."""

    problem: fb.Problem
    data: fb.FederatedData
    x: Any
    y: Any
    inner: list[dict[str, np.ndarray]]
    outer: list[dict[str, np.ndarray]]
    p: np.ndarray

    def solution(self, x) -> np.ndarray:
        """y*(x) = (w, b), (4,), from all rows at once."""
        matrix = 0.5 * (1 + float(x["k"]) ** 2) * np.eye(4)
        right = np.zeros(4)
        for p, rows in zip(self.p, self.inner, strict=True):
            a = np.concatenate([rows["a"], np.ones((len(rows["t"]), 1))], axis=1)
            weight = p / len(a) * np.exp(rows["member"] @ np.asarray(x["group"]))
            matrix += a.T @ (weight[:, None] * a)
            right += a.T @ (weight * rows["t"])
        return np.linalg.solve(matrix, right)

    def means(self, x, z) -> dict[str, np.ndarray]:
        """M at x and y = (w, b), from all rows at once."""
        above, below, loss = np.zeros(2), np.zeros(2), 0.0
        for p, rows in zip(self.p, self.outer, strict=True):
            own = np.tanh(rows["a"] @ z[:3] + z[3] - rows["t"]) ** 2
            above += p * np.mean(rows["member"] * own[:, None], 0)
            below += p * np.mean(rows["member"], 0)
            loss += p * np.mean(own)
        return {"above": above, "below": below, "loss": loss + 0.05 * np.sum(np.asarray(x["group"]) ** 2)}

    def value(self, x) -> float:
        """Phi(x)."""
        means = self.means(x, self.solution(x))
        rates = means["above"] / means["below"]
        return float(3 * (rates[0] - rates[1]) ** 2 + means["loss"])

    def hypergradient(self, x, step=1e-5) -> dict[str, np.ndarray]:
        """grad Phi(x), by central differences of fourth order."""
        flat, unravel = jax.flatten_util.ravel_pytree(x)
        flat, found = np.asarray(flat), []
        for each in np.eye(len(flat)):
            at = lambda s, each=each: self.value(unravel(jnp.asarray(flat + s * step * each)))
            found.append((8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step))
        return unravel(jnp.asarray(found))


def of_means(weighted: bool = True, seed: int = 0, sizes=SIZES, shift: float = 1.0) -> OfMeans:
    """Clients that differ: one of them has rows of one group alone."""
    draw = np.random.default_rng(seed)

    def rows(client: int, count: int) -> dict[str, np.ndarray]:
        group = draw.integers(0, 2, size=count) if client else np.zeros(count, int)
        a = draw.normal(size=(count, 3)) + 0.5 * shift * draw.normal(size=3)
        t = a @ np.array([0.6, -0.4, 0.2]) + (0.8 + 0.3 * shift * client) * group - 0.2 * draw.normal(size=count)
        return {"a": a, "t": t, "member": np.eye(2)[group]}

    inner_rows = [rows(i, n) for i, (n, _) in enumerate(sizes)]
    outer_rows = [rows(i, n) for i, (_, n) in enumerate(sizes)]
    weights = list(SHARES[: len(sizes)]) if weighted else None
    data = fb.FederatedData.stack(inner_rows, outer_rows, weights=weights)
    p = np.asarray(weights or np.ones(len(sizes)))
    problem = fb.Problem(inner, outer_means=outer_means, outer_of=outer_of)
    x = {"group": jnp.asarray([0.1, -0.2]), "k": jnp.asarray(0.3)}
    y = {"w": jnp.zeros(3) + 0.1, "b": jnp.asarray(0.0)}
    return OfMeans(problem, data, x, y, inner_rows, outer_rows, p / p.sum())

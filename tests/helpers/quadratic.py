"""A heterogeneous quadratic problem, and in numpy everything that the algorithms do to it.

    g_i = mean over rows of (a'y)^2 / 2 + ridge (1 + 0.3 x_0^2) |y|^2 / 2 + x'B y - c'y
    f_i = mean over rows of (a'y - b)^2 / 2 + x'C y + |x|^2 / 10

x and y are nested pytrees for the library and flat vectors here, clients differ in rows and curvature, and the cross
term depends on x and y.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import fedbilevel as fb

RIDGE = 0.3
DX, DY = 5, 4
power = np.linalg.matrix_power


def flat(tree: Any) -> np.ndarray:
    """The numbers of a pytree in one vector."""
    return np.asarray(ravel_pytree(tree)[0])


def inner(x, y, e):
    t, z = ravel_pytree(x)[0], ravel_pytree(y)[0]
    curved = RIDGE * (1 + 0.3 * x["k"] ** 2)
    return 0.5 * (e["a"] @ z) ** 2 + 0.5 * curved * (z @ z) + t @ e["B"] @ z - e["c"] @ z


def outer(x, y, e):
    t, z = ravel_pytree(x)[0], ravel_pytree(y)[0]
    return 0.5 * (e["a"] @ z - e["b"]) ** 2 + t @ e["C"] @ z + 0.1 * (t @ t)


@dataclasses.dataclass(frozen=True)
class Quadratic:
    """The problem for the library, and one dict of row arrays per client and level; `p`, `p_outer`: the clients' weights."""

    problem: fb.Problem
    data: fb.FederatedData
    x: Any
    y: Any
    inner: list[dict[str, np.ndarray]]
    outer: list[dict[str, np.ndarray]]

    @property
    def t(self) -> np.ndarray:
        return flat(self.x)

    @property
    def z(self) -> np.ndarray:
        return flat(self.y)

    # One array per client, at x = t and y = z: the first axis is the client's

    def hessians(self, t):
        ridge = RIDGE * (1 + 0.3 * t[0] ** 2)
        return np.stack([e["a"].T @ e["a"] / len(e["a"]) + ridge * np.eye(DY) for e in self.inner])

    def targets(self, t):
        """k_i in d_y g_i = H_i z - k_i."""
        return np.stack([e["c"].mean(0) - e["B"].mean(0).T @ t for e in self.inner])

    def crosses(self, t, z):
        curved = np.outer(np.eye(DX)[0], 0.6 * RIDGE * t[0] * z)
        return np.stack([e["B"].mean(0) + curved for e in self.inner])

    def outer_hessians(self):
        return np.stack([e["a"].T @ e["a"] / len(e["a"]) for e in self.outer])

    def outer_y(self, t, z):
        """d_y f_i."""
        return np.stack([(e["a"].T @ (e["a"] @ z - e["b"])) / len(e["a"]) + e["C"].mean(0).T @ t for e in self.outer])

    def outer_x(self, t, z):
        """d_x f_i."""
        return np.stack([e["C"].mean(0) @ z + 0.2 * t for e in self.outer])

    # The lower level

    def solution(self, t):
        """y*(x)."""
        return np.linalg.solve(self.hessians(t).mean(0), self.targets(t).mean(0))

    def corrected_map(self, t, lr, steps):
        """P of the corrected lower loop: y^{t+1} - y* = P (y^t - y*)."""
        local = [lr * sum(power(np.eye(DY) - lr * H, s) for s in range(steps)) for H in self.hessians(t)]
        return np.eye(DY) - np.mean(local, axis=0) @ self.hessians(t).mean(0)

    def corrected_path(self, t, z, lr, steps, rounds):
        """[y^0, ..., y^rounds] of the corrected lower loop."""
        best, P = self.solution(t), self.corrected_map(t, lr, steps)
        return [best + power(P, q) @ (z - best) for q in range(rounds + 1)]

    def local_map(self, t, lr, steps):
        """(K, k) of plain local steps: y^{t+1} = K y^t + k."""
        K = np.mean([power(np.eye(DY) - lr * H, steps) for H in self.hessians(t)], axis=0)
        sums = [lr * sum(power(np.eye(DY) - lr * H, s) for s in range(steps)) for H in self.hessians(t)]
        return K, np.mean([S @ k for S, k in zip(sums, self.targets(t), strict=True)], axis=0)

    # The hypergradient

    def compose(self, t, z, v):
        """d_x f - J v, each averaged over clients."""
        return self.outer_x(t, z).mean(0) - self.crosses(t, z).mean(0) @ v

    def hypergradient(self, t):
        """grad Phi(x)."""
        best = self.solution(t)
        return self.compose(t, best, np.linalg.solve(self.hessians(t).mean(0), self.outer_y(t, best).mean(0)))


def quadratic(seed: int = 0, clients: int = 5, sizes=((2, 3), (3, 5), (4, 7), (5, 4), (6, 6))) -> Quadratic:
    """A random instance; (inner, outer) rows of the clients as in `sizes`, over and over."""
    draw = np.random.default_rng(seed)
    inside, outside = [], []
    for i in range(clients):
        (n, k), spread = sizes[i % len(sizes)], 0.5 + i / clients
        normal = lambda *shape: draw.normal(size=shape)
        inside.append({"a": spread * normal(n, DY), "B": normal(n, DX, DY), "c": i + normal(n, DY)})
        outside.append({"a": normal(k, DY), "b": i + normal(k), "C": normal(k, DX, DY)})
    x = {"u": jnp.asarray(draw.normal(size=DX - 1)), "k": jnp.asarray(0.7)}
    y = {"w": jnp.asarray(draw.normal(size=DY - 1)), "deep": {"s": jnp.asarray(draw.normal())}}
    return Quadratic(fb.Problem(inner, outer), fb.FederatedData.stack(inside, outside), x, y, inside, outside)


def orthogonal(q: Quadratic, curvature: float = 10.0) -> Quadratic:
    """The same with the worst heterogeneity, every client curved along one coordinate only; equal in all shapes."""
    axes = np.sqrt(curvature) * np.eye(DY)
    inside = [{**e, "a": np.tile(axes[i % DY], (len(e["a"]), 1))} for i, e in enumerate(q.inner)]
    return dataclasses.replace(q, data=fb.FederatedData.stack(inside, q.outer), inner=inside)


def estimate(q: Quadratic, algorithm: fb.Algorithm, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(hypergradient estimate, last y), flat; all clients, in simulation."""
    h, y = fb.estimate_hypergradient(q.problem, q.data, algorithm, q.x, q.y, key=jax.random.key(seed))
    return flat(h), flat(y)

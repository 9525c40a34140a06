"""Logistic regression with a tuned penalty (algorithms.md, task 2), its oracles and the lower steps in numpy.

    g_i = mean over rows of softplus(-b a'y) + s exp(x)'y^2 / 2
    f_i = mean over rows of softplus(-b a'y) + s |x|^2 / 2

Not quadratic in y; s differs between clients, so that their cross terms do. Numpy's functions take `who`, the clients
whose mean is meant: all of them, or the one that an exchange asked.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import fedbilevel as fb


def inner(x, y, e):
    return jax.nn.softplus(-e["b"] * (e["a"] @ y)) + 0.5 * e["s"] * jnp.sum(jnp.exp(x) * y**2)


def outer(x, y, e):
    return jax.nn.softplus(-e["b"] * (e["a"] @ y)) + 0.5 * e["s"] * jnp.sum(x**2)


PROBLEM = fb.Problem(inner, outer)
X, Y = np.array([-0.7, -0.2]), np.array([0.9, -0.6])


def rows(seed, n, spread):
    draw = np.random.default_rng(seed)
    a = spread * (1.5 * draw.normal(size=(n, 2)) + draw.normal(size=2))
    return {"a": a, "b": np.where(draw.random(n) < 0.7, 1.0, -1.0), "s": np.full(n, 0.4 + spread / 2)}


@dataclasses.dataclass(frozen=True)
class Logistic:
    """Three clients: their rows at both levels, and the oracles in numpy."""

    inner: list[dict[str, np.ndarray]]
    outer: list[dict[str, np.ndarray]]

    @property
    def data(self):
        return fb.FederatedData.stack(self.inner, self.outer)

    @property
    def pooled(self):
        """One client with all the rows."""
        together = lambda level: {k: np.concatenate([e[k] for e in level]) for k in level[0]}
        return fb.FederatedData.stack([together(self.inner)], [together(self.outer)])

    @staticmethod
    def slopes(e, y):
        p = 1 / (1 + np.exp(e["b"] * (e["a"] @ y)))
        return p, (-(e["b"] * p)[:, None] * e["a"]).mean(0)

    def gradient(self, x, y, who):
        """d_y g."""
        one = lambda e: self.slopes(e, y)[1] + e["s"].mean() * np.exp(x) * y
        return np.mean([one(self.inner[i]) for i in who], axis=0)

    def hessian(self, x, y, who):
        """d2_yy g."""

        def one(e):
            p, _ = self.slopes(e, y)
            return (e["a"].T * (p * (1 - p))) @ e["a"] / len(p) + e["s"].mean() * np.diag(np.exp(x))

        return np.mean([one(self.inner[i]) for i in who], axis=0)

    def outer_y(self, y, who):
        """d_y f."""
        return np.mean([self.slopes(self.outer[i], y)[1] for i in who], axis=0)

    def compose(self, x, y, v, who, who_inner=None):
        """d_x f - d2_xy g v, the second from other clients or rows if asked."""
        direct = np.mean([self.outer[i]["s"].mean() for i in who]) * x
        return direct - np.mean([self.inner[i]["s"].mean() for i in who_inner or who]) * np.exp(x) * y * v

    def corrected_steps(self, x, y, q, lr, steps, who):
        """FedSVRG steps of each of `who` around the gradient q, averaged."""

        def one(i):
            z = y
            for _ in range(steps):
                z = z - lr * (self.gradient(x, z, [i]) - self.gradient(x, y, [i]) + q)
            return z

        return np.mean([one(i) for i in who], axis=0)


ALL = [0, 1, 2]
CLIENTS = Logistic([rows(10 + i, 2 + i, 1 + i) for i in ALL], [rows(20 + i, 4 - i, 3 - i) for i in ALL])
ROWS = Logistic([rows(10 + i, 1, 1 + i) for i in ALL], [rows(20 + i, 1, 3 - i) for i in ALL])

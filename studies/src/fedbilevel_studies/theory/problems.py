"""The two problems on which rounds are counted, with |grad Phi(x)|^2 in closed form, compiled; and the one grid of steps.

quadratic  `family`: H of condition 13, the Hessian of Phi of condition 56, every largest eigenvalue 1
ridge      x = log penalties of six features; clients differ in the scales of their features and in their true weights.
           With eight of them H has condition 12 at the solution, and the Hessian of Phi 27
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fedbilevel import FederatedData, Problem, reference

from ..kinds import Row
from . import family as quadratics
from .runner import Setup

FEATURES = 6
BIAS_PENALTY = 0.01
SHRUNK = 0.6  # validation rows follow weights this much smaller, so that every best penalty is finite
NEAR = 3.0
INNER = (0.5, 1.0, 1.5, 1.9)  # inner_lr * local_steps, in units of 1 / L of g; and hessian_lr
OUTER = (*(2.0**-k for k in range(7, -1, -1)), 1.9)  # outer_lr, in units of 1 / L of Phi

Weights = Mapping[str, Array]  # weight (features, 1), bias (1,)
Penalties = Float[Array, " features"]
Moments = tuple[Float[Array, "lower lower"], Float[Array, " lower"]]  # of the rows, and with their targets


def grid(setup: Setup, local_steps: int) -> dict[str, np.ndarray]:
    """Every combination of the three steps: the same multiples for every method."""
    inner, hessian, outer = np.array(list(itertools.product(INNER, INNER, OUTER))).T
    lower, upper = setup.curvatures
    return {"inner_lr": inner / (local_steps * lower), "hessian_lr": hessian / lower, "outer_lr": outer / upper}


class Affine(eqx.Module):
    """|G x + g|^2, with grad Phi(x) = G x + g."""

    G: Float[Array, "upper upper"]
    g: Float[Array, " upper"]

    def __call__(self, x: Float[Array, " upper"]) -> Float[Array, ""]:
        return jnp.sum((self.G @ x + self.g) ** 2)


def quadratic(clients: int = 8, spread: float = 1.0, cohort: int | None = None) -> Setup:
    """The quadratic family at one heterogeneity."""
    f = quadratics.family(spread, clients)
    stationarity = Affine(*map(jnp.asarray, f.upper()))
    start = jnp.asarray(f.x), jnp.asarray(f.y)
    return Setup(quadratics.PROBLEM, f.data(), *start, stationarity, (1.0, 1.0), cohort)


def outer_loss(x: Penalties, y: Weights, row: Row) -> Float[Array, ""]:
    """Half the squared error of one row, as in the task `ridge`."""
    return 0.5 * jnp.sum((row["a"] @ y["weight"] + y["bias"] - row["target"]) ** 2)


def inner_loss(x: Penalties, y: Weights, row: Row) -> Float[Array, ""]:
    """And the penalties."""
    penalty = jnp.sum(jnp.exp(x)[:, None] * y["weight"] ** 2) + BIAS_PENALTY * jnp.sum(y["bias"] ** 2)
    return outer_loss(x, y, row) + 0.5 * penalty


class Ridge(eqx.Module):
    """|grad Phi(x)|^2 of ridge tuning, from second moments of the rows; a column of ones stands for the bias.

    Infinite where a log penalty is more than `NEAR` off the best: Phi is flat too where penalties are infinite or zero, and
    a run that ends there has found nothing.
    """

    inner: Moments
    outer: Moments
    best: Penalties

    def gradient(self, x: Penalties) -> Penalties:
        """grad Phi(x): v = H^-1 d_y f, d2_xy g = diag(exp(x) w)."""
        pull, (outside, wish) = self.inner[1], self.outer
        penalty = jnp.exp(x)
        H = self.hessian(x)
        y = jnp.linalg.solve(H, pull)
        v = jnp.linalg.solve(H, outside @ y - wish)
        return -penalty * y[:-1] * v[:-1]

    def hessian(self, x: Penalties) -> Float[Array, "lower lower"]:
        """d2_yy g."""
        return self.inner[0] + jnp.diag(jnp.concatenate([jnp.exp(x), jnp.full((1,), BIAS_PENALTY, x.dtype)]))

    def __call__(self, x: Penalties) -> Float[Array, ""]:
        near = jnp.max(jnp.abs(x - self.best)) <= NEAR
        return jnp.where(near, jnp.sum(self.gradient(x) ** 2), jnp.inf)


def ridge(clients: int = 8, cohort: int | None = None) -> Setup:
    """Synthetic ridge tuning; the curvatures are those at the start and at the solution, the larger of each."""
    draw = np.random.default_rng(0)
    weights, size_of = np.linspace(0.7, 1.4, FEATURES), np.geomspace(0.7, 2.5, FEATURES)
    inside, outside = [], []
    for i in range(clients):
        scales, own = size_of * np.exp(0.3 * draw.normal(size=FEATURES)), weights + 0.4 * draw.normal(size=FEATURES)
        for rows, size, level in ((6 + 2 * (i % 3), 1.0, inside), (10, SHRUNK, outside)):
            a = scales * draw.normal(size=(rows, FEATURES))
            noise = 0.3 * draw.normal(size=rows)
            level.append({"a": a, "target": (a @ (size * own) + 0.3 + noise)[:, None]})
    x = jnp.zeros((FEATURES,))
    y = {"weight": jnp.zeros((FEATURES, 1)), "bias": jnp.zeros((1,))}
    stationarity = Ridge(_mean_moments(inside), _mean_moments(outside), jnp.zeros((FEATURES,)))
    best = _minimum(stationarity, stationarity.best)
    stationarity = eqx.tree_at(lambda found: found.best, stationarity, best)
    largest = lambda matrix: float(jnp.abs(jnp.linalg.eigvalsh(matrix)).max())
    upper = jax.jacfwd(stationarity.gradient)
    curvatures = [max(largest(of(x)), largest(of(best))) for of in (stationarity.hessian, upper)]
    data = FederatedData.stack(inside, outside)
    return Setup(Problem(inner_loss, outer_loss), data, x, y, stationarity, (curvatures[0], curvatures[1]), cohort)


def _mean_moments(clients: list[dict[str, np.ndarray]]) -> Moments:
    """The clients' moments, averaged."""
    own, pull = zip(*map(_moments, clients), strict=True)
    return jnp.asarray(np.mean(own, axis=0)), jnp.asarray(np.mean(pull, axis=0))


def _moments(rows: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    a = np.concatenate([rows["a"], np.ones((len(rows["a"]), 1))], axis=1)
    return a.T @ a / len(a), a.T @ rows["target"][:, 0] / len(a)


def _minimum(stationarity: Ridge, x: Penalties) -> Penalties:
    """Gradient steps, then Newton's."""
    step = 0.5 / jnp.abs(jnp.linalg.eigvalsh(jax.jacfwd(stationarity.gradient)(x))).max()
    x = jax.lax.fori_loop(0, 5_000, lambda _, x: x - step * stationarity.gradient(x), x)
    newton = lambda _, x: x - jnp.linalg.solve(jax.jacfwd(stationarity.gradient)(x), stationarity.gradient(x))
    return jax.lax.fori_loop(0, 5, newton, x)


def check(setup: Setup) -> float:
    """The closed form over `reference.stationarity`, at the start: 1."""
    assert setup.stationarity is not None
    return float(setup.stationarity(setup.x) / reference.stationarity(setup.problem, setup.data, setup.x, setup.y))

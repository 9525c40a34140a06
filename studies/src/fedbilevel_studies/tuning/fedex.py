"""FedEx, written from the box of Khodak, Tu, Li, Li, Balcan, Smith and Talwalkar (NeurIPS 2021).

k values of x, a distribution theta over them at the server, and ONE model that all of them train:

    client   draws j from theta, trains y at x_j on its own rows, and judges what it got on its own
             validation rows:  L_i
    server   y <- mean of the clients' y
             gradient_j = mean_i (L_i - baseline) [j_i = j] / theta_j
             theta <- theta exp(-eta gradient), normalised;   eta = sqrt(2 log k) / |gradient|_inf
    baseline the mean of earlier L, discounted by a factor drawn from [0, 1]

eta is the paper's aggressive schedule; it and the drawn discount are the defaults of the authors'
public scripts. As there FedEx is wrapped in random search: runs of a given length, each with k
values of its own, of which the one with the lowest L at its end counts; one run of the whole budget
is among the lengths. It returns the likeliest x.

What is adapted: x is whatever the task tunes, where the paper has the settings of local training,
so that the k = 27 values are drawn from the whole ranges (and not around one of them); a local step
is 1 / (1.2 L_i), of the client's own curvature at its x_j, measured by ten power steps on the
spot, so that nobody chooses it; f_i is the task's outer loss. Losses count as the library's means
weigh clients. The values are sent once, to all, and their bytes are counted.
"""

from __future__ import annotations

import contextlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax.tree
from jaxtyping import Array, Float, PyTree

import fedbilevel as fb

from .purse import Purse, Spent, Told
from .search import candidates

VALUES = 27  # k
POWERS = 10  # products with the Hessian that measure a curvature
MARGIN = 1.2  # of a step below the inverse of the curvature


class State(fb.State):
    """y, and x, the likeliest value.

    Attributes:
        log_theta: (k,) of the distribution.
        losses, weight: sums of earlier L and of their weights, discounted.
    """

    log_theta: Float[Array, " k"]
    losses: Float[Array, ""]
    weight: Float[Array, ""]


class FedEx(fb.Algorithm):
    """Exponentiated gradient over k values of x, which share one model.

    Args:
        values: the k values of x, each leaf with a leading axis of k.
        discount: of earlier losses in the baseline, in [0, 1].
        local_steps, batch_size: of a client's training.
    """

    values: PyTree = eqx.field(default=None)
    discount: float = fb.option(0.5)
    local_steps: int = fb.count(5)
    batch_size: int | None = fb.count(None)

    def init(self, x: PyTree, y: PyTree) -> State:
        zero = jnp.zeros((), optax.tree.norm(y).dtype)
        k = jax.tree.leaves(self.values)[0].shape[0]
        return State(self._at(0), y, jnp.full((k,), -np.log(k), zero.dtype), zero, zero)

    def _at(self, j: int | Array) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[j], self.values)

    def step(self, fed: fb.Federation, state: State) -> tuple[State, Told]:
        moved, losses, drawn = fed.average(self.train, state.log_theta, state.y)
        loss = jnp.sum(losses)
        baseline = jnp.where(state.weight > 0, state.losses / state.weight, 0)
        theta = jnp.where(drawn > 0, jnp.exp(state.log_theta), 1)  # what is not drawn may be zero
        gradient = (losses - baseline * drawn) / theta
        size = jnp.max(jnp.abs(gradient))
        eta = np.sqrt(2 * np.log(len(gradient))) / jnp.where(size > 0, size, 1)
        log_theta = jax.nn.log_softmax(state.log_theta - eta * gradient)
        after = State(
            self._at(jnp.argmax(log_theta)),
            optax.tree.add(state.y, moved),
            log_theta,
            self.discount * state.losses + loss,
            self.discount * state.weight + 1,
        )
        return after, {"loss": loss}

    def train(self, client: fb.Client, log_theta: Array, y: PyTree) -> tuple[PyTree, Array, Array]:
        """(How far y moved, L_i at the place of j among zeros, one there)."""
        j = jax.random.categorical(client.key, log_theta)
        x = self._at(j)
        step = 1 / (MARGIN * self.curvature(client, x, y))
        rows = client.batches("inner", self.batch_size, self.local_steps, at=x)

        def turn(s: Array, z: PyTree) -> PyTree:
            gradient = client.problem.inner_gradient(x, z, rows(s))
            return optax.tree.add_scale(z, -step, gradient)

        after = jax.lax.fori_loop(0, self.local_steps, turn, y)
        drawn = jax.nn.one_hot(j, len(log_theta), dtype=log_theta.dtype)
        loss = client.problem.outer_value(x, after, client.outer)
        return optax.tree.sub(after, y), loss * drawn, drawn

    def curvature(self, client: fb.Client, x: PyTree, y: PyTree) -> Float[Array, ""]:
        """The largest curvature of g_i at (x, y), by the power method on one batch."""
        rows = client.batches("inner", self.batch_size, 1, at=x)(0)
        draw = lambda leaf: jax.random.normal(client.key, leaf.shape, leaf.dtype)

        def turn(_: Array, found: tuple[PyTree, Array]) -> tuple[PyTree, Array]:
            v, size = found
            v = optax.tree.scale(1 / jnp.maximum(size, float(jnp.finfo(size.dtype).tiny)), v)
            v = client.problem.hessian_vector(x, y, v, rows)
            return v, optax.tree.norm(v)

        v = jax.tree.map(draw, y)
        return jax.lax.fori_loop(0, POWERS, turn, (v, optax.tree.norm(v)))[1]


def fedex(purse: Purse, length: int, seed: int) -> None:
    """Runs of so many rounds until the budget is spent; the x of the best finished one is returned.

    While the first is under way, its likeliest x.
    """
    xs, rng = candidates(purse.ground, purse.task.x, seed), np.random.default_rng((seed, 1))
    batch = purse.ground.batch_size
    with contextlib.suppress(Spent):
        while True:
            first = len(purse.trail) == 1
            values = [next(xs) for _ in range(VALUES)]
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *values)
            algorithm = FedEx(values=stacked, discount=float(rng.uniform()), batch_size=batch)
            rounds = min(length, purse.budget)
            purse.afford(rounds)
            purse.send(stacked)
            points, result = purse.solve(algorithm, rounds)
            if first:
                purse.trail += points[1:]
            if result is not None:
                purse.saw(result.x, float(result.history[-1]["loss"]))

"""A problem with features, phi(x, example), and the same problem without."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax.tree

import fedbilevel as fb

KEY = jax.random.key(0)
SIZES = [(5, 3), (2, 4)]  # (inner, outer) rows of the clients, over and over
CLIENTS = 8
MOST = max(inner for inner, _ in SIZES)


@jax.jit
def body(a, weight):
    """The step that features save; its name is what the tests look for."""
    return a @ weight


def phi(x, e):
    return {"hidden": jnp.tanh(body(e["a"], x["W"])), "shift": x["k"] * e["c"]}


def inner(x, y, e, features):
    residual = features["hidden"] @ y["w"] + y["s"] - e["b"]
    return (
        jax.nn.softplus(residual)
        + 0.25 * residual**2
        + features["shift"] * y["s"]
        + 0.2 * optax.tree.norm(y, squared=True)
    )


def outer(x, y, e):
    return 0.5 * (jnp.tanh(e["a"] @ x["W"]) @ y["w"] + y["s"] - e["b"]) ** 2 + 0.05 * optax.tree.norm(x, squared=True)


def whole(x, y, e):
    """The inner loss with the features inside."""
    return inner(x, y, e, phi(x, e))


def batched(loss):
    def mean(x, y, examples, weights, *features):
        return weights @ jax.vmap(lambda e, *f: loss(x, y, e, *f))(examples, *features)

    return mean


WITH, WITHOUT = fb.Problem(inner, outer, features=phi), fb.Problem(whole, outer)
BATCHED = fb.Problem(batched(inner), batched(outer), batched=True, features=jax.vmap(phi, in_axes=(None, 0)))
STOPPED = fb.Problem(inner, outer, features=lambda x, e: phi(jax.lax.stop_gradient(x), e))  # wrong on purpose


def setup():
    draw = np.random.default_rng(4)

    def rows(i, n):
        return {
            "a": draw.normal(size=(n, 3)) * (0.5 + i / CLIENTS),
            "b": i / 4 + draw.normal(size=n),
            "c": draw.normal(size=n),
        }

    sizes = [SIZES[i % len(SIZES)] for i in range(CLIENTS)]
    data = fb.FederatedData.stack(
        [rows(i, n) for i, (n, _) in enumerate(sizes)], [rows(i, n) for i, (_, n) in enumerate(sizes)]
    )
    x = {"W": jnp.asarray(draw.normal(size=(3, 3))), "k": jnp.asarray(0.4)}
    return data, x, {"w": jnp.asarray(draw.normal(size=3)), "s": jnp.asarray(0.3)}


DATA, X, Y = setup()
STEPS: dict[str, Any] = {"inner_rounds": 2, "inner_lr": 0.1, "local_steps": 3, "hessian_lr": 0.1, "outer_lr": 0.1}


class SameClients(fb.Algorithm):
    """A user's own: a cohort drawn for the iteration, asked in every round, in the loop and after it."""

    batch_size: int | None = fb.count(None)
    again: bool = fb.option(True)

    def step(self, fed, state):
        x, clients = state.x, fed.draw_cohort() if self.again else None
        turn = lambda t, y: fed.average(self.descend, x, y, cohort=clients)
        y = fed.repeat(3, turn, state.y)
        h = fed.average(self.cross, x, y, cohort=clients)
        return fb.State(optax.tree.add_scale(x, -0.1, h), fed.average(self.descend, x, y, cohort=clients)), {}

    def descend(self, client, x, y):
        rows = client.batches("inner", self.batch_size, 3, at=x)
        step = lambda s, y: optax.tree.add_scale(y, -0.1, client.problem.inner_gradient(x, y, rows(s)))
        return jax.lax.fori_loop(0, 3, step, y)

    def cross(self, client, x, y):
        return client.problem.cross_vector(x, y, y, client.batch("inner", self.batch_size))


def client(index=0, problem=WITH):
    return fb.Client(problem, (DATA.inner.alone(index), DATA.outer.alone(index)), None, KEY, (True, True))

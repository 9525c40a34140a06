"""The quality of x: Phi(x) by Newton's method, or f after training y at x for hundred rounds where there is none.

Of hyper-representation y is a head, trained from its start. Of loss tuning y is all of a network, of which hundred rounds
from its start leave f far from where it ends (.12 against .07 after 3,000, seed 10), and rank x by how fast y is trained:
there y starts from the end of 1,000 rounds at the start's x.

`fb.reference.value` is the yardstick, and `check` holds what is here to it: it takes seconds a point where y has hundreds
of entries, and a grid has thousands of points.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import fedbilevel as fb

TRAINED = ("loss-tuning", "hyper-representation")
SOFTMAX = ("regularisation", "cleaning")
STEPS, TRAINING, BEFOREHAND = 60, 100, 1000  # Newton's at most; rounds


def quality(task: fb.tasks.Task) -> Callable[[object], np.ndarray]:
    """xs, a pytree of leaves (n, ...), -> (n,) float64; infinite where x is not finite or nothing is found."""
    if task.name in TRAINED:
        y = _train(task, task.x, task.y, BEFOREHAND) if task.name == "loss-tuning" else task.y
        return functools.partial(_each, functools.partial(_trained, task, y))
    found = _softmax(task) if task.name in SOFTMAX else _dense(task)
    return lambda xs: np.where(np.isfinite(out := np.asarray(found(xs))) & _finite(xs), out, np.inf)


def check(task: fb.tasks.Task, x: object) -> float:
    """The relative difference to `fb.reference.value` at x."""
    ours = quality(task)(jax.tree.map(lambda leaf: leaf[None], x))[0]
    theirs = float(fb.reference.value(task.problem, task.data, x, task.y))
    return abs(ours - theirs) / abs(theirs)


def _finite(xs: object) -> np.ndarray:
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(xs)]
    return np.all([np.isfinite(leaf).reshape(len(leaf), -1).all(axis=1) for leaf in leaves], axis=0)


def _each(one: Callable[[object], float], xs: object) -> np.ndarray:
    lane = lambda k: jax.tree.map(lambda leaf: jnp.asarray(leaf[k]), xs)
    return np.array([one(lane(k)) if fine else np.inf for k, fine in enumerate(_finite(xs))])


def _trained(task: fb.tasks.Task, y: object, x: object) -> float:
    """f after 100 rounds of training from y, with everyone and all rows."""
    try:
        return float(_outer(task)(x, _train(task, x, y, TRAINING)))
    except fb.RunError:
        return np.inf


def _train(task: fb.tasks.Task, x: object, y: object, rounds: int) -> object:
    return fb.train(task.problem, task.data, x, y, rounds=rounds, key=task.key, evaluate_every=rounds, check=False).y


def _outer(task: fb.tasks.Task) -> Callable[[object, object], jax.Array]:
    rows, weights = task.data.outer.rows, _weights(task, "outer")
    return jax.jit(lambda x, y: _mean(task.problem.outer, x, y, rows, weights))


def _weights(task: fb.tasks.Task, level: str) -> np.ndarray:
    """What each row counts in the mean over clients."""
    data, counts = task.data, task.data.count(level)
    p = np.full(data.clients, 1 / data.clients) if data.weights is None else np.asarray(data.weights)
    return np.repeat(p * np.asarray(getattr(data, level).scale) / counts, counts)


def _mean(loss, x, y, rows, weights) -> jax.Array:
    return jnp.sum(weights * jax.vmap(lambda row: loss(x, y, row))(rows))


def _newton(value, derivatives, y):
    """The end of damped Newton steps; derivatives: y -> (gradient, Hessian)."""

    def step(state):
        k, y, _ = state
        gradient, hessian = derivatives(y)
        move = jnp.linalg.solve(hessian, gradient)
        sizes = 0.5 ** jnp.arange(8.0)
        values = jax.vmap(lambda s: value(y - s * move))(sizes)
        best = jnp.argmin(jnp.where(jnp.isfinite(values), values, jnp.inf))
        size = jnp.where(values[0] <= value(y), 1.0, sizes[best])
        return k + 1, y - size * move, jnp.linalg.norm(move) <= 1e-9 * (1 + jnp.linalg.norm(y))

    going = lambda state: (state[0] < STEPS) & ~state[2]
    return jax.lax.while_loop(going, step, (0, y, jnp.asarray(False)))[1]


def _dense(task: fb.tasks.Task):
    """For few variables: derivatives by JAX, many x side by side."""
    flat, back = ravel_pytree(task.y)
    inner, outer = ((getattr(task.data, level).rows, _weights(task, level)) for level in ("inner", "outer"))

    def one(x):
        value = lambda y: _mean(task.problem.inner, x, back(y), *inner)
        y = _newton(value, lambda y: (jax.grad(value)(y), jax.hessian(value)(y)), flat)
        return _mean(task.problem.outer, x, back(y), *outer)

    return jax.jit(lambda xs: jax.lax.map(one, xs, batch_size=64))


def _softmax(task: fb.tasks.Task):
    """For softmax regression: the Hessian from products of columns, one x after another, each from the last y*."""
    rows, labels = task.data.inner.rows, 10
    a = jnp.concatenate([jnp.ones((len(rows["a"]), 1)), rows["a"].astype(float)], axis=1)
    base, outer = jnp.asarray(_weights(task, "inner")), (task.data.outer.rows, _weights(task, "outer"))
    _, back = ravel_pytree(task.y)  # bias before weight, as in columns: a one before the features

    def parts(x):
        """(The rows' weights, the penalty of each row of y (65,))."""
        if task.name == "cleaning":
            share = jax.nn.sigmoid(x)
            return base * share[rows["number"]] / jnp.mean(share), jnp.full(a.shape[1], 0.01)
        return base, jnp.concatenate([jnp.full(1, 0.01), jnp.exp(x)])

    def one(y, x):
        weights, penalty = parts(x)
        full = jnp.repeat(penalty, labels)

        def value(y):
            logits = a @ y.reshape(-1, labels)
            own = jnp.take_along_axis(logits, rows["label"][:, None], axis=1)[:, 0]
            return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=1) - own)) + 0.5 * jnp.sum(full * y**2)

        def derivatives(y):
            p = jax.nn.softmax(a @ y.reshape(-1, labels), axis=1)
            error = weights[:, None] * (p - jax.nn.one_hot(rows["label"], labels))
            spread = (a[:, :, None] * (jnp.sqrt(weights)[:, None] * p)[:, None]).reshape(len(a), -1)
            same = jnp.einsum("nj,nc,nk->cjk", a, weights[:, None] * p, a, optimize=True)
            whole = -(spread.T @ spread)
            block = whole.reshape(a.shape[1], labels, a.shape[1], labels)
            place = jnp.arange(labels)
            block = block.at[:, place, :, place].add(same)
            return (a.T @ error).ravel() + full * y, block.reshape(whole.shape) + jnp.diag(full)

        y = _newton(value, derivatives, y)
        y = jnp.where(jnp.all(jnp.isfinite(y)), y, 0.0)
        return y, _mean(task.problem.outer, x, back(y), *outer)

    zero = jnp.zeros(a.shape[1] * labels)
    return jax.jit(lambda xs: jax.lax.scan(one, zero, xs)[1])

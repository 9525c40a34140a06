"""Whether the derivatives that an algorithm is made of are finite at a point, client by client."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax.tree
from jaxtyping import PyTree

from .data import FederatedData
from .problem import Problem
from .program import run


def not_finite(problem: Problem, data: FederatedData, x: PyTree, y: PyTree) -> str | None:
    """The first derivative that is not finite there, in words; None if all are."""
    numbers, slopes, curvatures = jax.tree.map(np.asarray, run(_found, problem, None, data, x, y))
    for (what, loss), finite in zip(_WORDS, (*numbers, *slopes, *curvatures), strict=True):
        places = jax.tree_util.tree_flatten_with_path(finite)[0]
        for path, good in places:
            if not good.all():
                leaf = jax.tree_util.keystr(path)
                who = name(data, int(np.flatnonzero(~good)[0]))
                return f"{what} of the {loss} loss{f' at its entry {leaf}' if leaf else ''} ({who})"
    return None


_WORDS = [
    ("the value", "inner"), ("the value", "outer"),
    ("the derivative in y", "inner"), ("the derivative in x", "outer"), ("the derivative in y", "outer"),
    ("the second derivative in y", "inner"), ("the mixed derivative in x and y", "inner"),
]  # fmt: skip


def name(data: FederatedData, index: int) -> str:
    """What a client is called."""
    names = getattr(data, "names", None)
    return str(names[index]) if names else f"client {index}"


def _found(problem, _, data, x, y):
    """For each derivative and leaf, (clients,) whether it is finite."""

    def one(i):
        inner, outer = data.inner.client(i).all(), data.outer.client(i).all()
        numbers = problem.inner_value(x, y, inner), problem.outer_value(x, y, outer)
        slopes = problem.inner_gradient(x, y, inner), *problem.outer_gradients(x, y, outer)
        ones = optax.tree.ones_like(y)
        products = problem.hessian_vector(x, y, ones, inner), problem.cross_vector(x, y, ones, inner)
        return jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), (numbers, slopes, products))

    return jax.vmap(one)(jnp.arange(data.clients, dtype=jnp.int32))

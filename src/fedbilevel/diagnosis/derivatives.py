"""Whether the derivatives that an algorithm is made of are finite at a point, client by client."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax.tree
from jaxtyping import PyTree

from ..compiled import run
from ..data import FederatedData
from ..oracles import around_all
from ..owned import own
from ..problem import Problem, Rows


def not_finite(problem: Problem, data: FederatedData, x: PyTree, y: PyTree) -> str | None:
    """The first derivative that is not finite there, in words; None if all are."""
    try:
        found = run(_found, problem, None, data, x, y)
    except Exception:  # a problem may have no second derivatives: methods of first order do not ask for them
        found = run(_found_first, problem, None, data, x, y)
    for (what, loss), finite in zip(_WORDS, jax.tree.map(np.asarray, found), strict=False):
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


def _found(problem: Problem, _: None, data: FederatedData, x: PyTree, y: PyTree) -> tuple[PyTree, ...]:
    """For each derivative and leaf, (clients,) whether it is finite."""
    ones = optax.tree.ones_like(y)

    def products(at: tuple[PyTree, PyTree, PyTree], inner: Rows, _: Rows) -> tuple[PyTree, PyTree]:
        return problem.hessian_vector(*at, inner), problem.cross_vector(*at, inner)

    return (*_found_first(problem, _, data, x, y), *_by_client(data, (x, y, ones), products))


def _found_first(problem: Problem, _: None, data: FederatedData, x: PyTree, y: PyTree) -> tuple[PyTree, ...]:
    """The same of the losses and their first derivatives."""
    problem = around_all(problem, data, x, y)

    def one(at: tuple[PyTree, PyTree], inner: Rows, outer: Rows) -> tuple[PyTree, ...]:
        x, y = at
        numbers = problem.inner_value(x, y, inner), problem.outer_value(x, y, outer)
        return *numbers, problem.inner_gradient(x, y, inner), *problem.outer_gradients(x, y, outer)

    return _by_client(data, (x, y), one)


def _by_client(data: FederatedData, at: PyTree, of: Callable[..., tuple[PyTree, ...]]) -> tuple[PyTree, ...]:
    finite = lambda tree: jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), tree)
    rows = lambda i: [level.client(i, level.cut(data.clients)).all() for level in (data.inner, data.outer)]
    return jax.vmap(lambda i: finite(of(own(at, i), *rows(i))))(jnp.arange(data.clients, dtype=jnp.int32))

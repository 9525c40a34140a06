"""The Neumann series of H^{-1}: where it is cut, and its products within one client."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax.tree
from jaxtyping import PyTree

from ..federation import Client
from .components.directions import hessian_factor, hypergradient
from .curvature import AutoStep


class NeumannSeries(AutoStep):
    """lam sum_{n=0}^{N} (I - lam H)^n, or one term drawn at random that stands for the sum ("uniform")."""

    neumann_terms: eqx.AbstractVar[int]
    truncation: eqx.AbstractVar[Any]

    def __check_init__(self):
        self.truncation.check_range(type(self).__name__, self.neumann_terms - 1)

    def cut(self, series: PyTree, last: PyTree, lam: Any) -> PyTree:
        """v from the sum of the terms ("full") or from the last one, scaled so that its mean is the sum."""
        full = self.truncation.full
        return optax.tree.scale(lam if full else lam * self.neumann_terms, series if full else last)


class LocalNeumann(NeumannSeries):
    """Every client forms a hypergradient of its own, with its own Hessian. NOT an estimator of the hypergradient:

    the mean of J_i H_i^{-1} d_y f_i is not J H^{-1} d_y f when clients differ, and no number of terms removes the bias.
    """

    @property
    def local_factors(self):
        return True

    def local_hypergradient(self, client: Client, x: PyTree, y: PyTree, lam: Any, draw: Any = 0) -> PyTree:
        """h_i with the client's own Hessian; `draw` numbers the local step, so that all its rows are fresh."""
        return self.local_hypergradients(client, lam, draw)(x, y)

    def local_hypergradients(self, client: Client, lam: Any, draw: Any) -> Any:
        """(x, y) -> h_i(x, y), on the rows and the number of terms of one draw."""
        first = draw * (self.neumann_terms + 1)
        outer = client.batch("outer", self.batch_size, first)
        terms = self._factors(client, draw)

        def at(x, y):
            rows = client.batches("inner", self.batch_size, self.neumann_terms, at=x)
            start = client.problem.outer_gradients(x, y, outer)[1]

            def turn(n, loop):
                p, total = loop
                p = hessian_factor(client.problem, x, y, p, self.lam(lam), rows(first + n + 1))
                return p, optax.tree.add(total, p) if self.truncation.full else total

            p, total = jax.lax.fori_loop(0, terms, turn, (start, start))
            inner = client.batch("inner", self.batch_size, first)
            return hypergradient(client.problem, x, y, self.cut(total, p, self.lam(lam)), inner, outer)

        return at

    def _factors(self, client, draw):
        if self.truncation.full:
            return self.neumann_terms
        if self.truncation.mode == "fixed":
            return jnp.asarray(self.truncation.value, jnp.int32)
        key = jax.random.split(jax.random.fold_in(client.key, draw))[1]  # apart from the keys that draw rows
        return jax.random.randint(key, (), 0, self.neumann_terms, dtype=jnp.int32)

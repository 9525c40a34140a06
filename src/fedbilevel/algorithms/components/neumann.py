"""The Neumann series of H^-1 d_y f: its products in rounds of the federation, or within one client.

With lam the step of the factors, N = `neumann_terms` and p_n = (I - lam H)^n d_y f, H^-1 d_y f is nearly

    lam sum_{n=0}^{N} p_n      truncation="full"
    N lam p_N'                 else, N' drawn from 0..N-1 (or fixed): its mean is lam sum_{n=0}^{N-1} p_n
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import jax
import jax.numpy as jnp
import optax.tree
from jaxtyping import Array, Float, Int, PyTree

from ...algorithm import Component, Truncation, count
from ...federation import Client, Federation
from ...pace.curvature import AutoStep as AutoStep
from ...pace.curvature import Rate
from .directions import hessian_factor, hypergradient
from .steps import growth, norm

Scalar = Float[Array, ""]
Number = int | Int[Array, ""]


@final
class NeumannSeries(Component):
    """The series in rounds: every product is a mean over clients, N' + 1 (or N + 1) rounds.

    Args:
        hessian: the step of the factors.
        truncation: where the series is cut.
        neumann_terms: N, its terms.
        batch_size: rows of a minibatch, fresh for every factor; None for all rows.
    """

    hessian: AutoStep
    truncation: Truncation
    neumann_terms: int = count(5)
    batch_size: int | None = count(None)

    def draw(self, fed: Federation) -> Number:
        """N', the number of factors; all N where all terms are summed."""
        return self.neumann_terms if self.truncation.full else self.truncation.draw(fed, self.neumann_terms - 1)

    def rounds(
        self, fed: Federation, x: PyTree, y: PyTree, factors: Number, lam: Scalar | None, cohort: jax.Array | None
    ) -> tuple[PyTree, Scalar, Scalar | None]:
        """(v, `vector_growth`, `vector_residual`) of so many factors."""
        full = self.truncation.full
        start = fed.average(self.start, x, y, cohort=cohort)

        def turn(n: Number, loop: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            p, total = loop
            p = fed.renewed(fed.average(self.factor, x, y, p, lam, cohort=cohort), p)
            return p, optax.tree.add(total, p) if full else total

        p, total = fed.repeat(factors, turn, (start, start), most=self.neumann_terms)
        v = cut(self.truncation, self.neumann_terms, self.hessian.lam(lam), total, p)
        stretched = growth(norm(p), norm(start))
        # H lam sum_{n<N} p_n = p_0 - p_N: the residual but for the last term; a random term has none
        return v, stretched, stretched if full else None

    # The clients' side ----------------------------------------------------------------------------------------------

    def start(self, client: Client, x: PyTree, y: PyTree) -> PyTree:
        """p_0 = d_y f_i."""
        return client.problem.outer_gradients(x, y, client.batch("outer", self.batch_size))[1]

    def factor(self, client: Client, x: PyTree, y: PyTree, p: PyTree, lam: Scalar | None) -> PyTree:
        """(I - lam d2_yy g_i) p."""
        rows = client.batch("inner", self.batch_size)
        return hessian_factor(client.problem, x, y, p, self.hessian.lam(lam), rows)


@final
class LocalNeumann(Component):
    """The series within one client, with its own Hessian, for a hypergradient of its own. No estimator of the hypergradient:

    the mean of J_i H_i^-1 d_y f_i is not J H^-1 d_y f where clients differ, and no number of terms removes the bias.

    Args:
        hessian: the step of the factors, of which several of one client's own act: with `local_factors`.
        truncation: where the series is cut; every client draws its own N'.
        neumann_terms: N, its terms.
        batch_size: rows of a minibatch, fresh for every factor; None for all rows.
    """

    hessian: AutoStep
    truncation: Truncation
    neumann_terms: int = count(5)
    batch_size: int | None = count(None)

    def local_hypergradient(self, client: Client, x: PyTree, y: PyTree, lam: Scalar | None, draw: Number = 0) -> PyTree:
        """h_i with the client's own Hessian; `draw` numbers the local step, so that all its rows are fresh."""
        return self.along(client, lam, draw)(x, y)

    def along(self, client: Client, lam: Scalar | None, draw: Number) -> Callable[[PyTree, PyTree], PyTree]:
        """(x, y) -> h_i(x, y), on the rows and with the number of factors of one draw."""
        first = draw * (self.neumann_terms + 1)
        outer = client.batch("outer", self.batch_size, first)
        factors, step, full = self._factors(client, draw), self.hessian.lam(lam), self.truncation.full

        def at(x: PyTree, y: PyTree) -> PyTree:
            rows = client.batches("inner", self.batch_size, self.neumann_terms, at=x)
            start = client.problem.outer_gradients(x, y, outer)[1]

            def turn(n: Number, loop: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
                p, total = loop
                p = hessian_factor(client.problem, x, y, p, step, rows(first + n + 1))
                return p, optax.tree.add(total, p) if full else total

            p, total = jax.lax.fori_loop(0, factors, turn, (start, start))
            v = cut(self.truncation, self.neumann_terms, step, total, p)
            return hypergradient(client.problem, x, y, v, client.batch("inner", self.batch_size, first), outer)

        return at

    def _factors(self, client: Client, draw: Number) -> Number:
        if self.truncation.full:
            return self.neumann_terms
        if self.truncation.mode == "fixed":
            return jnp.asarray(self.truncation.value, jnp.int32)
        key = jax.random.split(jax.random.fold_in(client.key, draw))[1]  # apart from the keys that draw rows
        return jax.random.randint(key, (), 0, self.neumann_terms, dtype=jnp.int32)


def cut(truncation: Truncation, terms: int, lam: Rate, total: PyTree, last: PyTree) -> PyTree:
    """v from the sum of the terms ("full"), or from the last one, scaled so that its mean is the sum."""
    full = truncation.full
    return optax.tree.scale(lam if full else lam * terms, total if full else last)

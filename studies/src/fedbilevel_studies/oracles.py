"""How many oracle calls an iteration makes: counted by running it line by line on a toy problem.

The number depends on an algorithm's loops and options and on how many clients it asks, not on the problem. A call is one
gradient, Hessian-vector or cross-vector product of one client on one batch; both gradients of the outer loss are one call.
"""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from fedbilevel import Algorithm, FederatedData, Loopback, Problem, Rows, Truncation, solve
from fedbilevel.callbacks import Callback, Running

ORACLES = ("inner_gradient", "inner_gradient_x", "hessian_vector", "cross_vector", "outer_gradients")


class _Counting(Problem):
    """A problem that notes each call of an oracle, and answers with numbers that cost nothing."""

    calls: list[str] = eqx.field(static=True, default_factory=list)

    def inner_gradient(self, x: PyTree, y: PyTree, rows: Rows) -> PyTree:
        self.calls.append("inner_gradient")
        return y

    def inner_gradient_x(self, x: PyTree, y: PyTree, rows: Rows) -> PyTree:
        self.calls.append("inner_gradient_x")
        return x

    def hessian_vector(self, x: PyTree, y: PyTree, v: PyTree, rows: Rows) -> PyTree:
        self.calls.append("hessian_vector")
        return v

    def cross_vector(self, x: PyTree, y: PyTree, v: PyTree, rows: Rows) -> PyTree:
        self.calls.append("cross_vector")
        return x

    def outer_gradients(self, x: PyTree, y: PyTree, rows: Rows) -> tuple[PyTree, PyTree]:
        self.calls.append("outer_gradients")
        return x, y


def oracle_calls(algorithm: Algorithm, clients: int = 2, cohort: int = 1) -> dict[str, float]:
    """Calls of each oracle in one iteration, for one place in the cohort; the mean over a truncation that is drawn.

    All calls of all clients, over the size of the cohort: also those of exchanges that ask one client, or everybody.

    Returns:
        name of the oracle -> calls, and "all" -> their sum.
    """
    truncation = getattr(algorithm, "truncation", None)
    variants: list[Algorithm] = [algorithm]
    if isinstance(truncation, Truncation) and truncation.mode == "uniform":
        most = getattr(algorithm, "neumann_terms", None)
        cuts = range(algorithm.inner_rounds + 1) if most is None else range(most)  # pyright: ignore[reportAttributeAccessIssue]
        variants = [dataclasses.replace(algorithm, truncation=cut) for cut in cuts]
    totals: dict[str, float] = dict.fromkeys(ORACLES, 0.0)
    for variant in variants:
        for name, calls in _count(variant, clients, cohort).items():
            totals[name] += calls / cohort / len(variants)
    return {**totals, "all": sum(totals.values())}


def _count(algorithm: Algorithm, clients: int, cohort: int) -> dict[str, int]:
    loss = lambda x, y, row: jnp.sum(x) * jnp.sum(y) * jnp.sum(row)
    problem = _Counting(loss, loss)
    rows = [jnp.ones((2, 1))] * clients
    given = problem, FederatedData.stack(rows, rows), algorithm, jnp.ones((1,)), jnp.ones((1,)), 1
    tally = _Tally(problem.calls)
    with jax.disable_jit():
        solve(*given, key=jax.random.key(0), engine=Loopback(cohort=cohort), callbacks=[tally], check=False)
    return {name: tally.found.count(name) for name in ORACLES}


class _Tally(Callback):
    """What was called from the first iteration's begin to its end: none of the calls that derive the protocol."""

    def __init__(self, calls: list[str]):
        self.calls, self.found = calls, []

    def start(self, run: Running) -> None:
        self.calls.clear()

    def advance(self, run: Running) -> None:
        self.found = list(self.calls)

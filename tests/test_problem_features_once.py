"""How often `Problem(features=phi)` computes phi: once for each row that is used, in an exchange and across exchanges."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import fedbilevel as fb
from fedbilevel.jaxprs import dce_jaxpr
from fedbilevel.protocol.calls import named_method
from helpers.featured import (
    CLIENTS,
    DATA,
    KEY,
    MOST,
    SIZES,
    STEPS,
    WITH,
    WITHOUT,
    SameClients,
    X,
    Y,
    client,
    inner,
    outer,
    phi,
)


def rows_computed(jaxpr) -> int:
    """The rows that `body` is computed for: over the turns of a loop, the dearest branch of a choice."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.params.get("name") == "body":
            total += eqn.invars[0].aval.shape[0]
            continue
        assert eqn.primitive.name != "while", "a loop of unknown length"
        times = eqn.params.get("length", 1)
        inside = [rows_computed(sub) for value in eqn.params.values() for sub in jaxprs_in(value)]
        total += times * (max(inside, default=0) if eqn.primitive.name == "cond" else sum(inside))
    return total


def jaxprs_in(value):
    for each in value if isinstance(value, tuple | list) else (value,):
        each = getattr(each, "jaxpr", each)
        if hasattr(each, "eqns"):
            yield each


def computed_by(method, *message, problem=WITH, index=0) -> int:
    """The same for one client method, without what its reply does not need."""
    asked = client(index, problem)
    made = jax.make_jaxpr(lambda *message: jax.tree.leaves(method(asked, *message)))(*message)
    return rows_computed(dce_jaxpr(made.jaxpr, [True] * len(made.jaxpr.outvars))[0])


BUSY = {**STEPS, "local_steps": 7}
ROW_COUNTS = [  # (algorithm, method, what is sent after x and y, draws on y at one x)
    (fb.AggITD, "turns.lower", (Y,), 6),  # the first step needs no rows
    (fb.LFedNest, "lower.steps", (), 7),
    (fb.LFedNest, "series.local_hypergradient", (None,), 4),
    (fb.AggITD, "turns.anchor", (fb.When(jnp.asarray(True), Y), None), 2),
    (fb.AggITD, "turns.vector_apart", (), 1),
    (fb.AggITD, "hessian.largest_curvature", (), 1),
    (fb.FedNest, "series.factor", (Y, None), 1),
]


@pytest.mark.parametrize("batch_size", [1, 2, None])
@pytest.mark.parametrize(("kind", "name", "rest", "draws"), ROW_COUNTS, ids=[name for _, name, *_ in ROW_COUNTS])
def test_an_exchange_computes_no_row_twice(kind, name, rest, draws, batch_size):
    series = {} if kind is fb.AggITD else {"neumann_terms": 4}
    series |= {"independent_cohorts": True} if name == "turns.vector_apart" else {}
    algorithm = kind(**BUSY, **series, truncation="full", batch_size=batch_size)
    method, message = named_method(algorithm, name), (X, Y, *rest)
    if name == "turns.vector_apart":
        present = jnp.asarray(True)
        method = lambda client, x, y: algorithm.turns.vector_apart(
            client, fb.When(present, (x, y)), fb.When(present, Y), None
        )
    count = SIZES[0][0]
    steps = draws * (batch_size or count)
    # the derivative in x goes through phi, forwards and backwards, on one draw's rows
    through = 2 * (batch_size or count) if name == "series.local_hypergradient" else 0
    assert computed_by(method, *message) <= min(count, steps) + through
    without = computed_by(method, *message, problem=WITHOUT)
    assert without >= steps + through
    if draws > 2 and (batch_size is None or steps > count):
        assert without > min(count, steps) + through


def test_the_one_round_turn_computes_each_row_once():
    algorithm = fb.AggITD(**BUSY, one_round=True)
    own = dataclasses.replace(client(), state=Y)
    sent = (Y, fb.When(jnp.asarray(True), Y), None)
    made = jax.make_jaxpr(lambda x, y: jax.tree.leaves(algorithm.turns.corrected_anchor(own, x, y, *sent)))(X, Y)
    assert rows_computed(dce_jaxpr(made.jaxpr, [True] * len(made.jaxpr.outvars))[0]) == SIZES[0][0]


def counting(problem, algorithm, engine) -> int:
    """How often phi is computed for a row in one iteration, while it runs."""
    seen = []

    def counted(x, e):
        jax.debug.callback(lambda _: seen.append(1), e["b"])
        return phi(x, e)

    if problem is WITH:
        other = fb.Problem(inner, outer, features=counted)
    else:
        other = fb.Problem(lambda x, y, e: inner(x, y, e, counted(x, e)), outer)
    fb.solve(other, DATA, algorithm, X, Y, 1, key=KEY, engine=engine, check=False)
    jax.effects_barrier()
    return len(seen)


def test_everyone_computes_each_row_once_an_iteration():
    algorithm = fb.AggITD(**STEPS)
    padded = CLIENTS * MOST
    # once for every gradient and Hessian product in y; once more to differentiate it in x
    assert counting(WITH, algorithm, fb.Simulation()) == 2 * padded
    assert counting(WITHOUT, algorithm, fb.Simulation()) > 2 * 2 * padded


def test_a_cohort_asked_again_computes_each_row_once():
    padded = 4 * MOST
    assert counting(WITH, SameClients(), fb.Simulation(4)) == 2 * padded
    assert counting(WITH, SameClients(again=False), fb.Simulation(4)) == (3 + 1 + 1) * padded

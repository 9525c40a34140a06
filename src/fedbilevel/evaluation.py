"""What holds at x and y for any clients' rows: their metrics, or their losses, by one exchange of a simulation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .algorithm import State
from .by_client import BAD, ClientMetrics, Found, Measure, checked, measures
from .client_table import ClientTable, named, table
from .data import FederatedData
from .engines.simulation import Simulation
from .errors import InputError, check
from .given import Whole
from .problem import Problem, bind
from .threefry import new_key
from .validation import Own, Validation
from .variables import trainable

LOSSES = (Measure("inner_loss", "max", "inner"), Measure("outer_loss", "max", "outer"))


def evaluate(
    problem: Problem,
    data: FederatedData,
    x: PyTree,
    y: PyTree,
    metrics: ClientMetrics | None = None,
    clients_y: PyTree = None,
    client_batch: Whole | None = None,
) -> ClientTable:
    """How each client fares at x and y.

    Args:
        metrics: as `solve(client_metrics=)`; None: the inner and the outer loss.
        clients_y: each client's own y, each array with a leading axis of clients; None: y is everybody's.
        client_batch: how many clients at a time.

    Raises:
        InputError: something cannot be used, or a metric is not finite.
    """
    check(isinstance(problem, Problem), f"problem is a fedbilevel.Problem; got {type(problem).__name__}.")
    check(isinstance(data, FederatedData), f"data is a FederatedData (stack or split); got {type(data).__name__}.")
    given = checked(metrics)
    own = clients_y is not None
    if own:
        clients_y, _ = trainable(clients_y, "clients_y")
        many = len(jax.tree.leaves(clients_y)[0])
        check(
            many == data.clients,
            f"each client has a y of its own, {many} in all, and the data has {data.clients} clients: pass those of the "
            "run, in their order.",
        )
        y = jax.tree.map(lambda leaf: leaf[0], clients_y) if y is None else y
    (x, x_rest), (y, y_rest) = trainable(x, "x"), trainable(y, "y")
    problem, key = bind(problem, x_rest, y_rest), new_key(0)
    found = measures(given, problem, (x, y), (x_rest, y_rest), data) or LOSSES
    program, state = Validation(False, found, False, data.clients, own), State(x, y)
    engine = Simulation(client_batch=client_batch, compile="quick")
    execution = engine.bind(problem, data, program, state, key)
    start = execution.start(program, state)
    if own:
        start = dataclasses.replace(
            start, client_state=Own(start.client_state.kept, jax.tree.map(jnp.asarray, clients_y))
        )
    carry, _ = execution.advance(program, start, 1, np.inf)
    each = execution.of_clients(lambda own: own.kept, carry)
    counts = data.count("outer").tolist()
    weights = None if data.weights is None else np.asarray(data.weights)
    made = table(found, Found.of(None, each, weights), data.names, counts)
    bad = np.asarray(each.status) == BAD
    for k in np.flatnonzero(bad.any(axis=0)) if given else ():
        those = np.flatnonzero(bad[:, k])
        raise InputError(
            f"the client metric {found[k].name!r} is not a finite number at {named(data.names, those)}: a row's number must "
            "be finite; return a pair (numerator, denominator) where some rows do not count."
        )
    return made

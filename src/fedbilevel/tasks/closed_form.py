"""Tasks whose solution can be computed: how they are made, and how good x is, how stationary, how far y is from y*(x)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import optax.tree
from jaxtyping import Array, Float, Key

from .. import reference
from ..data import FederatedData
from ..errors import check
from ..keys import generator
from ..problem import Loss, Problem
from .base import Metric, Options, Task

Vector = Float[Array, " size"]
Columns = dict[str, np.ndarray]  # a client's rows of one level, its parts by name
Clients = Callable[[np.random.Generator, list[int]], Iterable[tuple[Columns, Columns]]]
CLIENTS, ROWS = 8, (5, 8, 11)  # unless the options say how many clients; rows of each in turn


def synthetic(
    name: str,
    options: Options,
    inner_loss: Loss,
    outer_loss: Loss,
    clients: Clients,
    start: Callable[[Key[Array, ""]], tuple[Vector, Vector]],
) -> Task:
    """A task that makes its own clients.

    Args:
        clients: (numpy generator, rows of each client) -> (inner rows, outer rows) of each client.
        start: key -> (x, y).

    Raises:
        InputError: the options ask for a partition or a data set.
    """
    check_own_clients(name, options)
    place, _, begin, run = options.keys()
    counts = [ROWS[i % len(ROWS)] for i in range(options.clients or CLIENTS)]
    rows = list(clients(generator(place), counts))
    data = FederatedData.stack([inner for inner, _ in rows], [outer for _, outer in rows])
    problem = Problem(inner_loss, outer_loss)
    x, y = start(begin)
    return Task(name, "synthetic", problem, data, x, y, closed_form_metrics(problem, data), run)


def check_own_clients(name: str, options: Options) -> None:
    """Raises InputError where the options of a task that makes its own clients ask for a partition or a data set."""
    check(
        options.partition == "iid" and options.data_dir is None,
        f"the {name} task makes its own clients: leave --partition and --data-dir out.",
    )


def closed_form_metrics(problem: Problem, data: FederatedData) -> dict[str, Metric]:
    """value Phi(x), stationarity |grad Phi(x)|^2, distance |y - y*(x)|^2."""
    return {
        "value": lambda x, y: reference.value(problem, data, x, y),
        "stationarity": lambda x, y: reference.stationarity(problem, data, x, y),
        "distance": lambda x, y: optax.tree.norm(
            optax.tree.sub(y, reference.solution(problem, data, x, y)), squared=True
        ),
    }

"""Metrics for tasks whose solution can be computed: how good x is, how stationary, and how far y is from y*(x)."""

from __future__ import annotations

from collections.abc import Callable

import optax.tree

from .. import reference
from ..data import FederatedData
from ..problem import Problem


def closed_form_metrics(problem: Problem, data: FederatedData) -> dict[str, Callable]:
    """value Phi(x), stationarity |grad Phi(x)|^2, distance |y - y*(x)|^2."""
    return {
        "value": lambda x, y: reference.value(problem, data, x, y),
        "stationarity": lambda x, y: reference.stationarity(problem, data, x, y),
        "distance": lambda x, y: optax.tree.norm(
            optax.tree.sub(y, reference.solution(problem, data, x, y)), squared=True
        ),
    }

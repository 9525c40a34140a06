"""What server and sites derive alike: the protocol, from the app and what rows look like, without any rows."""

from __future__ import annotations

import hashlib
import json

import jax
import numpy as np

from ...app import App, placeholder
from ...data import FederatedData
from ...exchanges import Protocol
from ...problem import Problem, bind, strong, trainable
from ...protocol import trace


def placeholder_data(schemas: list[str], sites: int, weights: list[float] | None) -> FederatedData:
    """A federation of one row of zeros a site, weighted if weights are given."""
    inner, outer = (placeholder(text) for text in schemas)
    return FederatedData.stack([inner] * sites, [outer] * sites, weights)


def begin(app: App) -> tuple[Problem, tuple, object]:
    """(The problem over the trainable parts alone, those parts (x, y), the algorithm's first state)."""
    x, y = app.begin()
    x, x_rest = trainable(x, "x")
    y, y_rest = trainable(y, "y")
    return bind(app.problem, x_rest, y_rest), strong((x, y)), app.algorithm.init(x, y)


def derive(app: App, data: FederatedData, cohort: int) -> Protocol:
    """The protocol of the app's algorithm."""
    problem, _, state = begin(app)
    return trace(app.algorithm, problem, data, state, cohort)


def fingerprint(protocol: Protocol) -> str:
    """What tells one protocol from another: every exchange's method, and the shapes and dtypes of what travels."""
    leaves = lambda tree: [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(tree)]
    sites = [
        [list(path), site.name, leaves(site.message), leaves(site.reply)]
        for path, site in sorted(protocol.sites.items())
    ]
    text = json.dumps([protocol.algorithm, protocol.clients, protocol.cohort, sites])
    return hashlib.sha256(text.encode()).hexdigest()


def shares(counts: list[list[int]]) -> tuple[list[float], list[float]]:
    """(The sites' weights p_i, and what their outer rows' weights sum to), from their numbers of rows at both levels."""
    inner, outer = np.asarray(counts, float).T
    p = inner / inner.sum()
    return p.tolist(), (outer / outer.sum() / p).tolist()

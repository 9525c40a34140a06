"""The hypergradient against central differences of Phi."""

from __future__ import annotations

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from fedbilevel import reference
from fedbilevel.data import FederatedData
from fedbilevel.problem import Problem


def moved(tree: PyTree, seed: int = 0, size: float = 0.5) -> PyTree:
    """The tree, a random step away."""
    flat, unravel = ravel_pytree(tree)
    return unravel(flat + size * jax.random.normal(jax.random.key(seed), flat.shape))


def check_hypergradient(problem: Problem, data: FederatedData, x: PyTree, y: PyTree, least: float) -> None:
    """Assert that the reference is what differences of Phi are, each of which is at least `least` in size.

    Variables are float64.
    """
    y = reference.solution(problem, data, x, y)
    flat, unravel = ravel_pytree(x)
    phi = lambda flat: float(reference.value(problem, data, unravel(flat), y))
    step = 1e-4
    differences = [(phi(flat + e) - phi(flat - e)) / (2 * step) for e in step * np.eye(len(flat))]
    assert np.abs(differences).min() > least
    h = ravel_pytree(reference.hypergradient(problem, data, x, y))[0]
    np.testing.assert_allclose(h, differences, rtol=1e-5, atol=1e-9)

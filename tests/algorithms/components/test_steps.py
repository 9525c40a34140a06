"""What the steps that methods share promise, for numbers that hypothesis chooses: fixed points, and estimates' limits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedbilevel.algorithms.components.steps import fedsvrg, local_descent, momentum, storm

DIM, CLIENTS = 3, 4
seeds = st.integers(0, 2**31 - 1)
rates = st.floats(1e-3, 0.3)
vectors = arrays.arrays(float, DIM, elements=st.floats(-10, 10, allow_subnormal=False))
parts = st.tuples(vectors, vectors).map(lambda pair: {"a": jnp.asarray(pair[0]), "b": (jnp.asarray(pair[1]),)})


def clients(seed) -> tuple[Any, Any, Any]:
    """Quadratics g_i with Hessians A_i and minima of their own: (A, b, where the mean gradient is zero)."""
    draw = np.random.default_rng(seed)
    roots = draw.normal(size=(CLIENTS, DIM, DIM))
    A, b = roots @ roots.swapaxes(1, 2) / DIM + np.eye(DIM), draw.normal(size=(CLIENTS, DIM)) * 3
    return A, b, np.linalg.solve(A.mean(0), b.mean(0))


@given(seeds, rates, st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_corrected_local_steps_stay_where_the_mean_gradient_is_zero(seed, lr, steps):
    """For any number of steps, at every client, though each has a minimum of its own, to which plain steps go."""
    A, b, y = clients(seed)
    with jax.disable_jit():
        for i in range(CLIENTS):
            gradient = lambda s, i=i: lambda z: A[i] @ z - b[i]
            mean = jnp.asarray(A.mean(0) @ y - b.mean(0))
            np.testing.assert_allclose(fedsvrg(gradient, jnp.asarray(y), mean, lr, steps), y, rtol=0, atol=1e-11)
        plain = local_descent(gradient, jnp.asarray(y), lr, steps)
    assert np.abs(plain - y).max() > 1e-4 * lr


@given(seeds, rates, vectors)
@settings(max_examples=20, deadline=None)
def test_one_corrected_step_is_a_step_along_the_mean_gradient(seed, lr, y):
    A, b, _ = clients(seed)
    mean = A.mean(0) @ y - b.mean(0)
    never = lambda s: pytest.fail("the first step needs no gradient of the client's own")
    with jax.disable_jit():
        moved = fedsvrg(never, jnp.asarray(y), jnp.asarray(mean), lr, 1)
    np.testing.assert_allclose(moved, y - lr * mean, rtol=0, atol=1e-12)


def bowl(tree):
    """The gradient of a function that is no quadratic."""
    return jax.tree.map(lambda a: a + jnp.sin(a), tree)


def close(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), one, other)


@given(parts, parts, parts)
@settings(max_examples=30, deadline=None)
def test_storm_that_forgets_all_is_the_gradient_and_that_forgets_nothing_sarah(before, after, estimate):
    close(storm(bowl, before, after, estimate, 1.0), bowl(after))
    sarah = jax.tree.map(lambda e, new, old: e + (new - old), estimate, bowl(after), bowl(before))
    close(storm(bowl, before, after, estimate, 0.0), sarah)
    close(storm(bowl, before, after, bowl(before), 0.3), bowl(after))  # an estimate without error has none later


@given(parts, parts, parts, st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_momentum_lies_between_the_estimate_and_the_gradient(before, after, estimate, forget):
    mixed = jax.tree.map(lambda e, g: (1 - forget) * e + forget * g, estimate, bowl(after))
    close(momentum(bowl, before, after, estimate, forget), mixed)
    close(momentum(bowl, after, before, estimate, 0.0), estimate)

"""Many clients with as many rows each: what is known of them without a look gives the numbers that looking gives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel import data
from helpers.plain import plain

ROWS = np.random.default_rng(4).normal(size=(30, 5, 3))


def stacked(monkeypatch, far, rows=ROWS, **options):
    monkeypatch.setattr(data, "_FAR", far)
    return fb.FederatedData.stack(rows, rows[::-1], **options)


def test_windows_and_draws_are_the_same(monkeypatch):
    far, near = stacked(monkeypatch, 30), stacked(monkeypatch, 31)
    assert far.inner.even and far.outer.even and not near.inner.even
    index, key = jnp.array([0, 17, 29], jnp.int32), jax.random.key(2)

    def taken(own, level):
        rows = getattr(own, level).client
        every = lambda i: (rows(i).all(), rows(i).draw(key, 1, 4), rows(i).draw(key, 1, None))
        return [leaf for leaf in jax.tree.leaves(jax.vmap(every)(index)) if leaf.dtype != key.dtype]

    for level in ("inner", "outer"):
        for leaf, like in zip(taken(far, level), taken(near, level), strict=True):
            assert leaf.dtype == like.dtype
            np.testing.assert_array_equal(leaf, like)


@pytest.mark.parametrize("options", [{}, {"weights": np.arange(1, 31.0)}])
def test_a_run_goes_the_same_way(monkeypatch, options):
    loss = lambda x, y, e: 0.5 * jnp.sum((e @ x - y) ** 2)
    runs = []
    for far in (30, 31):
        own = stacked(monkeypatch, far, **options)
        result = fb.solve(
            fb.Problem(loss, loss), own, plain(fb.SimFBO, batch_size=2), jnp.ones(3), jnp.ones(()), 5, key=jax.random.key(1),
            engine=fb.Simulation(cohort=None if options else 6),
        )  # fmt: skip
        runs.append(np.append(result.x, result.y))
    np.testing.assert_allclose(*runs, rtol=1e-14)


def test_others_are_looked_at(monkeypatch):
    uneven = [*ROWS[:29], ROWS[29][:4]]
    assert not stacked(monkeypatch, 1, np.array(uneven, dtype=object)).inner.even
    weighted = stacked(monkeypatch, 1, weights=np.arange(1, 31.0))
    assert weighted.inner.even and weighted.outer.even  # p_outer / p_inner is one
    assert not fb.FederatedData.stack(
        ROWS, [rows[: 1 + (i > 3)] for i, rows in enumerate(ROWS)], weights="rows"
    ).outer.even

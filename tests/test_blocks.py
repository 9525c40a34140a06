"""Full batches taken block by block: the same numbers as those of clients that hold their rows alone."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel import blocks
from fedbilevel.blocks import Cut, Sizes
from helpers.featured import BATCHED, KEY, WITH, WITHOUT, SameClients, X, Y

SIZES = [(1, 2), (18, 21), (1, 2), (1, 2), (1, 2)]  # (inner, outer) rows; blocks are of four
STEPS = {"inner_lr": 0.1, "local_steps": 2, "hessian_lr": 0.1, "outer_lr": 0.1, "outer_steps": 2}
AGGITD = fb.AggITD(inner_rounds=1, **STEPS)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Blocks of four rows, three in a turn, however few rows there are."""
    monkeypatch.setattr(blocks, "SPARE", 0)
    monkeypatch.setattr(blocks, "TURN", 12)
    monkeypatch.setattr(blocks, "_SIZES", (4,))


def rows(draw, n):
    return {"a": draw.normal(size=(n, 3)), "b": draw.normal(size=n), "c": draw.normal(size=n)}


def uneven(weights=None):
    draw = np.random.default_rng(0)
    inner, outer = ([rows(draw, n) for n in level] for level in zip(*SIZES, strict=True))
    data = fb.FederatedData.stack(inner, outer, weights)
    assert data.inner.sizes is not None
    assert data.outer.sizes is not None
    return data


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("problem", "algorithm", "weights", "simulation"),
    [
        (WITH, SameClients(again=False), None, {"cohort": 3, "dropout": 0.3}),
        slow(WITH, AGGITD, None, {"cohort": 3, "dropout": 0.3}),
        (BATCHED, fb.Lockstep(**STEPS), "rows", {}),
        slow(WITH, dataclasses.replace(AGGITD, same_cohort=True), "rows", {"cohort": 4}),
        slow(WITHOUT, fb.Lockstep(**STEPS), None, {"client_batch": 2}),
        slow(WITH, fb.SimFBO(**{k: v for k, v in STEPS.items() if k != "outer_steps"}), None, {}),
    ],
    ids=[
        "features, cohorts, dropout",
        "AggITD",
        "a batched loss",
        "one cohort of weighted clients",
        "two at a time",
        "SimFBO",
    ],
)
def test_a_run_equals_that_of_clients_alone(problem, algorithm, weights, simulation):
    data = uneven(weights)
    asked = {name: value for name, value in simulation.items() if name != "client_batch"}
    engines = fb.Simulation(**simulation), fb.Loopback(**asked)
    runs = [fb.solve(problem, data, algorithm, X, Y, iterations=2, engine=engine, key=KEY) for engine in engines]
    for ours, theirs in zip(*(jax.tree.leaves((run.x, run.y)) for run in runs), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def inner(y, v, rows):
    return (
        WITH.inner_value(X, y, rows),
        WITH.inner_gradient(X, y, rows),
        WITH.inner_gradient_x(X, y, rows),
        jax.vmap(lambda v: WITH.hessian_vector(X, y, v, rows))(v),
        WITH.cross_vector(X, y, y, rows=rows),
    )


def outer(y, v, rows):
    return WITH.outer_value(X, y, rows), WITH.outer_gradients(X, y, rows)


def plain(rows):
    """The same full batch, padded."""
    return dataclasses.replace(rows)


@pytest.mark.parametrize(("level", "oracles"), [("inner", inner), ("outer", outer)], ids=["inner", "outer"])
def test_every_oracle_of_many_clients_is_that_on_padded_rows(level, oracles):
    own = getattr(uneven("rows"), level)
    vectors = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf + 1]), Y)

    def of(form, i):
        rows = own.client(i, own.cut(5)).all()
        return oracles(jax.tree.map(lambda leaf: leaf * (1.0 + i.astype(float)), Y), vectors, form(rows))

    agree(of)


def agree(of):
    """Of all clients, for their rows in blocks and padded."""
    found, expected = (
        jax.jit(jax.vmap(lambda i, f=form: of(f, i)))(jnp.arange(5)) for form in (lambda rows: rows, plain)
    )
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def test_an_algorithm_may_differentiate_oracles_and_read_the_rows():
    own = uneven().inner

    def of(form, i):
        batch = form(own.client(i, own.cut(5)).all())
        value, slope = jax.value_and_grad(lambda y: WITH.inner_value(X, y, batch))(Y)
        product = jax.jvp(lambda y: WITH.inner_gradient(X, y, batch), (Y,), (Y,))[1]
        return value, slope, product, batch.weights @ batch.examples["b"], batch.weights.shape[0]

    agree(of)


def test_nothing_of_the_largest_clients_size_is_made_for_the_others():
    own = uneven().inner

    def gradients(cut):
        one = lambda i: WITH.inner_gradient(X, Y, own.client(i, cut).all())
        return jax.jit(jax.vmap(one)).lower(jnp.arange(5)).compile().as_text()

    assert "[5,18" in gradients(None)
    assert "[5,18" not in gradients(own.cut(5))


class Own(fb.Problem):
    """A problem with an oracle of its own, which sees all rows of a client at once."""

    def inner_gradient(self, x, y, rows):
        gradient = super().inner_gradient(x, y, rows)
        return jax.tree.map(lambda leaf: jnp.clip(leaf, -0.1, 0.1), gradient)


def test_oracles_of_ones_own_are_given_padded_rows():
    own, problem = uneven().inner, Own(WITH.inner, WITH.outer, features=WITH.features)
    gradient = lambda form: jax.vmap(lambda i: problem.inner_gradient(X, Y, form(own.client(i, own.cut(5)).all())))
    found, expected = (jax.jit(gradient(form))(jnp.arange(5)) for form in (lambda rows: rows, plain))
    assert all(bool(jnp.all(a == b)) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))


def test_padding_stays_where_it_is_cheap(monkeypatch):
    monkeypatch.setattr(blocks, "SPARE", 2**14)
    assert Sizes.of(np.full(100, 1000)) is None
    assert Sizes.of(np.array([100, 5, 5, 5])) is None  # three times the rows, but few
    found = Sizes.of(np.array([5] * 99 + [100_000]))
    assert found is not None
    assert found.cut(100) == Cut(4, 25_000 + 99 * 2)
    assert found.cut(40) == Cut(4, 25_000 + 63 * 2)  # the largest 64
    assert found.cut(2) == Cut(4, 0)  # hundreds of times the rows that are expected
    assert found.cut(100, keeps=False) == Cut(4, 0)


def test_blocks_fit_most_clients(monkeypatch):
    monkeypatch.undo()
    of = lambda *counts: Sizes.of(np.array(counts))
    assert of(*[5] * 99, 100_000).size == 128
    assert of(*[5] * 100_000, 100_000).size == 8
    assert of(100_000, 300_000, 7, 7, 7).size == 128

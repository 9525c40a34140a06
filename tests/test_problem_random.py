"""`Problem(random=True)`: one draw, one mask, the same on every engine; none where a loss is judged."""

from __future__ import annotations

import dataclasses
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel import blocks
from fedbilevel.algorithms import ALGORITHMS
from fedbilevel.federation import Client
from fedbilevel.pace.curvature import AutoStep
from fedbilevel.problem import Rows
from helpers.quadratic import flat

KEY = jax.random.key(3)
SIZES = [(5, 3), (9, 2), (2, 4), (6, 6), (3, 5)]
NUMBERS = {"inner_lr": 0.05, "hessian_lr": 0.05, "outer_lr": 0.05}


def model(y, row, key):
    hidden = jnp.tanh(row["a"])
    if key is not None:
        hidden = jnp.where(jax.random.bernoulli(key, 0.5, hidden.shape), 2 * hidden, 0.0)
    return hidden @ y["w"] + y["v"]


def inner(x, y, row, key):
    return (model(y, row, key) - row["b"]) ** 2 + jnp.exp(x["decay"]) * jnp.sum(y["w"] ** 2) + 0.1 * y["v"] ** 2


def outer(x, y, row):
    return (model(y, row, None) - row["b"]) ** 2


def batch(x, y, rows, weights, keys):
    axis = None if keys is None else 0
    return weights @ jax.vmap(inner, in_axes=(None, None, 0, axis))(x, y, rows, keys)


RANDOM, STILL = fb.Problem(inner, outer, random=True), fb.Problem(lambda *given: inner(*given, None), outer)
BATCHED = fb.Problem(batch, lambda x, y, rows, w: w @ jax.vmap(lambda r: outer(x, y, r))(rows), True, random=True)


def rows(draw, n):
    return {"a": draw.normal(size=(n, 4)), "b": draw.normal(size=n)}


def data(sizes=SIZES, weights=None):
    draw = np.random.default_rng(1)
    return fb.FederatedData.stack(*([rows(draw, n) for n in level] for level in zip(*sizes, strict=True)), weights)


DATA = data()
X = {"decay": jnp.array(-1.0)}
Y = {"w": jnp.arange(4.0), "v": jnp.array(1.0)}
LEVEL = DATA.inner.client(1)


def ends(problem, algorithm, engine, data=DATA, iterations=2):
    result = fb.solve(problem, data, algorithm, X, Y, iterations, key=KEY, engine=engine)
    return flat((result.x, result.y))


# The keys of rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 4])
def test_the_key_of_a_row_is_that_of_its_place_in_the_draw(size):
    drawn = LEVEL.draw(KEY, 0, size)
    secret, rows = (
        jax.random.fold_in(KEY, 0),
        [jax.tree.map(lambda leaf, s=s: leaf[s], drawn.examples) for s in range(4)],
    )
    weights = np.asarray(drawn.weights)[:4]
    by_hand = sum(
        w * inner(X, Y, row, jax.random.fold_in(secret, s))
        for s, (w, row) in enumerate(zip(weights, rows, strict=True))
    )
    if size is None:
        rest = [jax.tree.map(lambda leaf, s=s: leaf[s], drawn.examples) for s in range(4, 9)]
        by_hand += sum(inner(X, Y, row, jax.random.fold_in(secret, s)) for s, row in enumerate(rest, 4)) / 9
    for problem in (RANDOM, BATCHED):
        np.testing.assert_allclose(problem.inner_value(X, Y, drawn), by_hand, rtol=1e-12)
        assert abs(float(problem.inner_value(X, Y, LEVEL.draw(KEY, 2, size)) - by_hand)) > 1e-3  # another draw


def test_all_derivatives_of_a_draw_share_its_masks():
    drawn = LEVEL.draw(KEY, 0, None)
    fixed = fb.Problem(lambda x, y, row: inner(x, y, row, row["key"]), outer)
    same = dataclasses.replace(drawn, examples={**drawn.examples, "key": drawn.keys()}, key=None)
    v = jax.tree.map(jnp.ones_like, Y)
    for name, args in {
        "inner_gradient": (),
        "inner_gradient_x": (),
        "hessian_vector": (v,),
        "cross_vector": (v,),
    }.items():
        ours, theirs = (getattr(p, name)(X, Y, *args, r) for p, r in ((RANDOM, drawn), (fixed, same)))
        np.testing.assert_allclose(flat(ours), flat(theirs), rtol=1e-12)


def test_rows_that_no_exchange_drew_have_no_masks():
    whole = LEVEL.all()
    assert whole.key is None and whole.keys() is None
    np.testing.assert_array_equal(RANDOM.inner_value(X, Y, whole), STILL.inner_value(X, Y, whole))


# The same on every engine ---------------------------------------------------------------------------------------------

WHOLE = ("simfbo", "aggitd", "fednest")  # that take all rows too, with weights: how rows are drawn is common to all
EVERY = [pytest.param(name, marks=() if name == "simfbo" else pytest.mark.slow) for name in ALGORITHMS]


@pytest.mark.parametrize("name", EVERY)
def test_masks_are_the_same_on_every_engine(name):
    fields = {field.name for field in dataclasses.fields(ALGORITHMS[name])}
    given = {"batch_size": 3, "local_steps": 2, "inner_rounds": 2, **NUMBERS}
    algorithm = ALGORITHMS[name](**{word: value for word, value in given.items() if word in fields})
    whole = [(dataclasses.replace(algorithm, batch_size=None), "rows")] if name in WHOLE else []
    for each, weights in ((algorithm, None), *whole):
        try:
            asked = {"cohort": 3 if weights is None else None, "dropout": 0.2}
            found = ends(RANDOM, each, fb.Simulation(**asked), data(weights=weights))
        except fb.InputError as error:  # an algorithm for everyone
            assert "cohort" in str(error)
            asked = {"dropout": 0.2}
            found = ends(RANDOM, each, fb.Simulation(**asked), data(weights=weights))
        np.testing.assert_allclose(ends(RANDOM, each, fb.Loopback(**asked), data(weights=weights)), found, atol=1e-12)
    still = ends(STILL, each, fb.Simulation(**asked), data(weights=weights))
    assert np.abs(still - found).max() > 1e-5  # there are masks


def test_batches_and_pieces_change_no_mask():
    algorithm = fb.Lockstep(**NUMBERS, local_steps=2)
    expected = ends(RANDOM, algorithm, fb.Simulation())
    for problem, engine in (
        (BATCHED, fb.Simulation()),
        (RANDOM, fb.Simulation(client_batch=2)),
        (BATCHED, fb.Loopback()),
    ):
        np.testing.assert_allclose(ends(problem, algorithm, engine), expected, atol=1e-12)


@pytest.mark.parametrize("engine", [fb.Simulation(), fb.Simulation(client_batch=2), fb.Simulation(cohort=3)])
def test_blocks_of_uneven_clients_change_no_mask(monkeypatch, engine):
    for name, value in {"SPARE": 0, "TURN": 12, "_SIZES": (4,)}.items():  # blocks of four rows
        monkeypatch.setattr(blocks, name, value)
    uneven = data([(1, 2), (18, 21), (1, 2), (2, 2), (1, 2)])
    assert uneven.inner.sizes is not None
    algorithm = fb.Lockstep(**NUMBERS, local_steps=2)
    alone = ends(RANDOM, algorithm, fb.Loopback(cohort=engine.cohort), uneven)
    np.testing.assert_allclose(ends(RANDOM, algorithm, engine, uneven), alone, atol=1e-12)


def test_rounds_have_masks_of_their_own_and_a_key_decides_them_all():
    algorithm = fb.Lockstep(inner_lr=1e-9, hessian_lr=1e-9, outer_lr=1e-9)  # all stays: what is seen is the masks
    run = lambda key: fb.solve(RANDOM, DATA, algorithm, X, Y, 4, key=key, engine=fb.Simulation(), metrics={})
    seen = lambda result: [row["lower_gradient_norm"] for row in result.history[1:]]
    one, again, other = seen(run(KEY)), seen(run(KEY)), seen(run(jax.random.key(4)))
    assert one == again
    assert len({round(value, 6) for value in one}) > 2 and one != other


def test_a_run_is_gone_on_with(tmp_path):
    run = lambda n, **more: fb.solve(RANDOM, DATA, fb.AggITD(**NUMBERS, batch_size=3), X, Y, n, key=KEY, **more)
    whole = run(6)
    run(3, callbacks=[fb.callbacks.Checkpoint(tmp_path, every=1)])
    resumed = run(6, resume=tmp_path)
    np.testing.assert_array_equal(flat((resumed.x, resumed.y)), flat((whole.x, whole.y)))


# Steps that are found while it runs -----------------------------------------------------------------------------------


def test_all_products_of_a_measured_curvature_have_one_mask():
    """Each row is worth much or little in one coordinate: products with several masks would mix them."""
    scale, sites = jnp.arange(1.0, 4.0), [{"at": np.arange(3)}, {"at": np.arange(3)}]
    kept = lambda key: jnp.where(jax.random.bernoulli(key, 0.5), 4.0, 0.25)
    lower = lambda x, y, row, key: 0.5 * kept(key) * scale[row["at"]] * y[row["at"]] ** 2
    problem, data = fb.Problem(lower, outer, random=True), fb.FederatedData.stack(sites, sites)
    for key in jax.random.split(KEY, 4):
        client = Client(problem, (data.inner.client(1), data.outer.client(1)), None, key, (True,))
        secrets = client.batch("inner").keys()
        by_hand = max(float(kept(secrets[at]) * scale[at]) / 3 for at in range(3))
        found = AutoStep("auto").largest_curvature(client, None, jnp.ones(3))
        assert float(found) == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.slow
def test_auto_runs_are_the_same_on_every_engine():
    run = lambda engine: fb.solve(RANDOM, DATA, fb.Lockstep(), X, Y, 12, key=KEY, engine=engine)
    one, other = run(fb.Simulation()), run(fb.Loopback())
    np.testing.assert_allclose(flat((one.x, one.y)), flat((other.x, other.y)), atol=1e-10)


# Judged without -------------------------------------------------------------------------------------------------------


def test_what_judges_draws_nothing():
    with_, without = (fb.reference.hypergradient(p, DATA, X, Y) for p in (RANDOM, STILL))
    np.testing.assert_array_equal(flat(with_), flat(without))
    assert fb.reference.value(RANDOM, DATA, X, Y) == fb.reference.value(STILL, DATA, X, Y)


@pytest.mark.slow
def test_a_search_and_training_take_it():
    tuned = fb.tune(RANDOM, DATA, X, Y, rounds=60, key=KEY)
    assert fb.reference.value(STILL, DATA, tuned.x, Y) < fb.reference.value(STILL, DATA, X, Y)
    trained, exact = fb.train(RANDOM, DATA, X, Y, rounds=100, key=KEY), fb.reference.solution(STILL, DATA, X, Y)
    masked = fb.train(RANDOM, DATA, X, Y, rounds=100, key=jax.random.key(9))
    assert 1e-6 < np.abs(flat(trained.y) - flat(masked.y)).max() < 1  # noise, about the same place
    assert np.abs(flat(trained.y) - flat(exact)).max() < 1


@pytest.mark.slow
def test_check_problem_takes_masks_for_what_they_are():
    report = fb.testing.check_problem(RANDOM, DATA, X, Y)
    assert report.passed


# Refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (fb.Problem(inner, outer), "declare it, Problem(..., random=True)"),
        (fb.Problem(lambda x, y, row: y["v"], outer, random=True), "takes no key"),
        (fb.Problem(inner, inner, random=True), "no key goes to the outer loss"),
        (fb.Problem(batch, outer, True), "declare it"),
        (
            fb.Problem(lambda x, y, row, key: jax.random.normal(key) * y["v"], outer, random=True),
            "has to run without a key",
        ),
        (fb.Problem(lambda x, y, row, key: jnp.ones(3) if key is not None else 0.0, outer, random=True), "scalar"),
    ],
    ids=["not declared", "not taken", "outer", "batched", "only with a key", "no scalar"],
)
def test_keys_that_are_not_declared_or_not_taken_are_refused(problem, words):
    with pytest.raises(fb.InputError) as error:
        fb.solve(problem, DATA, fb.Lockstep(), X, Y, 4, key=KEY)
    assert words in str(error.value)


def test_a_key_that_is_not_declared_is_told_of_where_y_has_settings_too():
    """The loss is then one that is completed by them, and its own signature is the user's all the same."""
    with pytest.raises(fb.InputError, match=re.escape("declare it, Problem(..., random=True)")):
        fb.solve(fb.Problem(inner, outer), DATA, fb.Lockstep(), X, {**Y, "layers": 3}, 4, key=KEY)


def test_losses_that_differ_in_what_they_draw_are_two_programs():
    other = fb.Problem(
        lambda x, y, row, key: inner(x, y, row, None if key is None else jax.random.fold_in(key, 1)), outer, random=True
    )
    one, two = (ends(p, fb.Lockstep(**NUMBERS), fb.Simulation()) for p in (RANDOM, other))
    assert np.abs(one - two).max() > 1e-5


def test_oracles_take_rows_with_a_key_and_a_place():
    drawn = LEVEL.draw(KEY, 0, None)
    third = Rows(
        jax.tree.map(lambda leaf: leaf[2:3], drawn.examples),
        jnp.ones(1),
        jnp.ones((), jnp.int32),
        drawn.key,
        place=jnp.array([2]),
    )
    row = jax.tree.map(lambda leaf: leaf[2], drawn.examples)
    np.testing.assert_allclose(RANDOM.inner_value(X, Y, third), inner(X, Y, row, drawn.keys()[2]), rtol=1e-12)
    assert eqx.is_array(drawn.keys())


def test_a_class_of_before_is_not_random():
    class Own(fb.Problem):
        def __init__(self):
            self.inner, self.outer, self.batched, self.features = STILL.inner, outer, False, None

    assert Own().random is False
    np.testing.assert_array_equal(Own().inner_value(X, Y, LEVEL.all()), STILL.inner_value(X, Y, LEVEL.all()))

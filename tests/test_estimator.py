"""The estimator bound once: the same numbers everywhere, compiled once, nothing kept, and a sentence for bad input."""

from __future__ import annotations

import gc

import equinox as eqx
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.algorithm import State
from fedbilevel.algorithms import ALGORITHMS, checked
from fedbilevel.estimator import estimate
from helpers.plain import plain
from helpers.quadratic import flat, quadratic

Q = quadratic(clients=3, sizes=((3, 3),))
DATA = fb.FederatedData.stack(Q.inner, Q.outer, weights=[1.0, 2.0, 3.0])
GIVEN = Q.problem, DATA
NEST = plain(fb.FedNest, inner_rounds=1, neumann_terms=1, local_steps=1)
KEY = jax.random.key(3)
FORMS = [name for name, kind in ALGORITHMS.items() if kind.estimate is not fb.Algorithm.estimate]
QUICK = ("aggitd",)
ALL = ("fedf2sa",)  # with weights they ask everybody
COMPILED = []


@jax.monitoring.register_event_duration_secs_listener
def _listen(event, seconds, **_):
    if event.endswith("backend_compile_duration"):
        COMPILED.append(event)


def moved(tree, by):
    return jax.tree.map(lambda leaf: leaf + by, tree)


def by_one_iteration(engine, algorithm, x, y, key):
    """What the engine's own iterations give, where the estimate takes the place of x."""
    execution = engine.bind(*GIVEN, algorithm, State(x, y), key, estimate)
    return execution.advance(algorithm, execution.start(algorithm, State(x, y)), 1, np.inf)[0].state


# The same numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FORMS]
)
def test_it_gives_what_an_iteration_of_the_engine_gives_also_inside_jit_and_scan(name):
    algorithm, engine = checked(name)[0], fb.Simulation(cohort=None if name in ALL else 2)
    estimator = fb.estimator(*GIVEN, algorithm, moved(Q.x, 1.0), moved(Q.y, 1.0), engine=engine)
    expected = by_one_iteration(engine, algorithm, Q.x, Q.y, KEY)
    h, y = estimator(Q.x, Q.y, KEY)
    np.testing.assert_allclose(flat((h, y)), flat((expected.x, expected.y)), rtol=1e-12, atol=1e-12)
    again = fb.estimate_hypergradient(*GIVEN, algorithm, Q.x, Q.y, key=KEY, engine=engine)
    np.testing.assert_array_equal(flat(again), flat((h, y)))
    other = estimator(Q.x, Q.y, jax.random.key(4))
    assert np.abs(flat(other) - flat((h, y))).max() > 1e-6  # other rows, and most often another cohort
    turn = lambda carry, key: (carry, estimator(*carry, key))
    _, (hs, ys) = jax.jit(lambda x, y: jax.lax.scan(turn, (x, y), jnp.stack([KEY, jax.random.key(4)])))(Q.x, Q.y)
    for k, one in enumerate([(h, y), other]):
        scanned = jax.tree.map(lambda leaf, k=k: leaf[k], (hs, ys))
        np.testing.assert_allclose(flat(scanned), flat(one), rtol=1e-12, atol=1e-12)


def test_there_are_some():
    assert {"aggitd", "fednest", "lfednest"} <= set(FORMS)
    with pytest.raises(fb.InputError, match="Lockstep never forms a hypergradient, so there is none to estimate"):
        fb.estimator(*GIVEN, fb.Lockstep(), Q.x, Q.y)


def test_an_outer_loop_of_ones_own_follows_the_estimates():
    estimator = fb.estimator(*GIVEN, NEST, Q.x, Q.y)

    def step(carry, key):
        x, y = carry
        h, y = estimator(x, y, key)
        return (jax.tree.map(lambda a, b: a - 0.1 * b, x, h), y), None

    keys = jax.random.split(KEY, 3)
    (x, y), _ = jax.lax.scan(step, (Q.x, Q.y), keys)
    by_hand = (Q.x, Q.y)
    for key in keys:
        by_hand, _ = step(by_hand, key)
    np.testing.assert_allclose(flat((x, y)), flat(by_hand), rtol=1e-12)
    assert np.abs(flat(x) - flat(Q.x)).max() > 1e-3


def test_many_x_at_once():
    estimator = fb.estimator(*GIVEN, NEST, Q.x, Q.y)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1]), Q.x)
    hs, _ = jax.vmap(lambda x: estimator(x, Q.y, KEY))(many)
    for k, x in enumerate([Q.x, moved(Q.x, 1)]):
        one = jax.tree.map(lambda leaf, k=k: leaf[k], hs)
        np.testing.assert_allclose(flat(one), flat(estimator(x, Q.y, KEY)[0]), rtol=1e-12)


@pytest.fixture(scope="module")
def looped():
    engine = fb.Loopback(cohort=2)
    return fb.estimator(*GIVEN, NEST, Q.x, Q.y, engine=engine), engine


def test_loopback_gives_the_same(looped):
    simulated = fb.estimator(*GIVEN, NEST, Q.x, Q.y, engine=fb.Simulation(cohort=2))
    assert looped[0].protocol.rounds == simulated.protocol.rounds > 0
    for seed in (0, 1, 0):
        both = [flat(each(Q.x, Q.y, jax.random.key(seed))) for each in (looped[0], simulated)]
        np.testing.assert_allclose(*both, rtol=1e-12)


@pytest.mark.parametrize("what", ["x", "key", "nothing"])
def test_loopback_says_that_it_cannot_be_traced(looped, what):
    call = {
        "x": lambda x, key: looped[0](x, Q.y, KEY),
        "key": lambda x, key: looped[0](Q.x, Q.y, key),
        "nothing": lambda x, key: looped[0](Q.x, Q.y, KEY),
    }[what]
    with pytest.raises(fb.InputError, match=r"Loopback sends messages.*within jax\.jit.*engine=fedbilevel\.Simulation"):
        jax.jit(call)(Q.x, KEY)


# Bound once -----------------------------------------------------------------------------------------------------------


def test_a_thousand_calls_compile_nothing_and_keep_nothing():
    estimator = fb.estimator(*GIVEN, NEST, Q.x, Q.y)
    keys = list(jax.random.split(KEY, 1000))
    x, y = jax.tree.map(lambda leaf: leaf + 0.0, (Q.x, Q.y))

    def call(k, x):
        h, _ = estimator(x, y, keys[k])
        return jax.tree.map(lambda a, b: a - 1e-3 * b, x, h)

    x = call(1, call(0, x))  # twice: what is subtracted from is another kind of array at first
    gc.collect()
    arrays, compiled = len(jax.live_arrays()), len(COMPILED)
    for k in range(1000):
        x = call(k, x)
    assert len(COMPILED) == compiled
    gc.collect()
    assert len(jax.live_arrays()) <= arrays
    fb.estimator(*GIVEN, plain(fb.FedNest, neumann_terms=2, inner_rounds=1), x, y)
    assert len(COMPILED) > compiled  # the count sees a compilation


def test_what_a_loss_reads_counts_as_it_was_when_bound():
    read = {"scale": 1.0}
    problem = fb.Problem(Q.problem.inner, lambda x, y, e: read["scale"] * Q.problem.outer(x, y, e))
    estimator = fb.estimator(problem, DATA, NEST, Q.x, Q.y)
    read["scale"] = 2.0
    for call in (estimator, jax.jit(estimator)):
        np.testing.assert_allclose(flat(call(Q.x, Q.y, KEY)), flat(fb.estimator(*GIVEN, NEST, Q.x, Q.y)(Q.x, Q.y, KEY)))
    h, _ = fb.estimate_hypergradient(problem, DATA, NEST, Q.x, Q.y, key=KEY)
    assert np.abs(flat(h) - flat(estimator(Q.x, Q.y, KEY)[0])).max() > 1e-6


# What is taken --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def estimator():
    return fb.estimator(*GIVEN, NEST, Q.x, Q.y)


def test_keys_of_both_kinds_traced_or_not(estimator):
    expected = flat(estimator(Q.x, Q.y, KEY))
    raw = jax.random.PRNGKey(3)
    np.testing.assert_array_equal(flat(estimator(Q.x, Q.y, raw)), expected)
    for key in (KEY, raw):
        np.testing.assert_array_equal(flat(jax.jit(estimator)(Q.x, Q.y, key)), expected)


def test_numbers_as_solve_takes_them_compile_nothing_more(estimator):
    expected, compiled = flat(estimator(Q.x, Q.y, KEY)), len(COMPILED)
    for x in (
        jax.tree.map(np.asarray, Q.x),
        {**Q.x, "k": float(Q.x["k"])},
        {**Q.x, "k": jnp.asarray(float(Q.x["k"]))},
    ):
        np.testing.assert_array_equal(flat(estimator(x, Q.y, KEY)), expected)
    assert len(COMPILED) == compiled
    as_lists = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), tree)
    listed = fb.estimator(*GIVEN, NEST, Q.x, Q.y)
    with pytest.raises(fb.InputError, match="x has another structure"):
        listed(as_lists(Q.x), Q.y, KEY)


def changed(name, leaf):
    """The start, but for one leaf of x or y."""
    return ({**Q.x, "u": leaf}, Q.y) if name == "x" else (Q.x, {**Q.y, "w": leaf})


BAD = {
    "structure": (lambda: ({"u": Q.x["u"]}, Q.y), r"x has another structure than the estimator was bound to: .*'u'"),
    "shape": (lambda: changed("x", jnp.ones(7)), r"x\['u'\] is f64\[7\], and the estimator was bound to f64\[\d\]"),
    "dtype": (lambda: changed("y", Q.y["w"].astype("f4")), r"y\['w'\] is f32.*bound to f64.*\.astype"),
    "whole": (lambda: changed("y", jnp.ones(3, int)), r"y\['w'\] is i64\[3\]"),
    "word": (lambda: changed("y", "a"), r"y\['w'\] holds no floating-point array"),
    "NaN": (lambda: changed("x", Q.x["u"].at[0].set(jnp.nan)), r"the start point x\['u'\] holds NaN or infinite"),
    "infinite": (lambda: changed("y", Q.y["w"].at[0].set(jnp.inf)), r"the start point y\['w'\] holds NaN or infinite"),
    "NaN of numpy": (lambda: changed("x", np.full(Q.x["u"].shape, np.nan)), r"the start point x\['u'\] holds NaN"),
}


@pytest.mark.parametrize("loopback", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_sentence(case, loopback, estimator, looped):
    make, sentence = BAD[case]
    with pytest.raises(fb.InputError, match=sentence):
        (looped[0] if loopback else estimator)(*make(), KEY)
    (looped[0] if loopback else estimator)(Q.x, Q.y, KEY)  # and it still works


@pytest.mark.parametrize("key", [0, None, jax.random.split(KEY, 2), jnp.zeros(2), "a"], ids=repr)
def test_a_bad_key_is_a_sentence(key, estimator):
    with pytest.raises(fb.InputError, match=r"key= is a jax\.random\.key\(seed\), one key; got"):
        estimator(Q.x, Q.y, key)


def test_so_is_one_of_another_kind_and_a_traced_one(estimator):
    with pytest.raises(fb.InputError, match=r"threefry.*rbg"):
        estimator(Q.x, Q.y, jax.random.key(0, impl="rbg"))
    with pytest.raises(fb.InputError, match=r"key= is a jax\.random\.key\(seed\), one key"):
        jax.jit(lambda key: estimator(Q.x, Q.y, key))(jnp.zeros(2))
    with pytest.raises(fb.InputError, match=r"x\['u'\] is f32.*bound to f64"):
        jax.jit(lambda x: estimator(x, Q.y, KEY))({**Q.x, "u": Q.x["u"].astype("f4")})
    with pytest.raises(fb.InputError, match=r"engine is Simulation\(\.\.\.\) or Loopback"):
        fb.estimator(*GIVEN, NEST, Q.x, Q.y, engine=fb.Simulation)


def test_a_wide_x_is_refused_where_32_bits_are_bound():
    narrow = lambda tree: jax.tree.map(lambda leaf: leaf.astype("f4"), tree)
    q = quadratic(clients=2, sizes=((2, 2),))
    data = fb.FederatedData.stack(*[[jax.tree.map(np.float32, rows) for rows in of] for of in (q.inner, q.outer)])
    estimator = fb.estimator(q.problem, data, NEST, narrow(q.x), narrow(q.y))
    for wide in (Q.x["u"], np.asarray(Q.x["u"])):
        with pytest.raises(fb.InputError, match=r"x\['u'\] is f64\[\d\], and the estimator was bound to f32"):
            estimator({**narrow(q.x), "u": wide}, narrow(q.y), KEY)


def test_an_estimate_that_blows_up_says_so():
    wild = plain(fb.AggITD, inner_rounds=2000, inner_lr=30.0, local_steps=1, truncation="full")
    estimator = fb.estimator(*GIVEN, wild, Q.x, Q.y)
    with pytest.raises(fb.Diverged, match=r"the hypergradient estimate of AggITD is not finite.*lower inner_lr"):
        estimator(Q.x, Q.y, KEY)
    assert not np.isfinite(flat(jax.jit(estimator)(Q.x, Q.y, KEY))).all()  # where values cannot be looked at


# What is no floating-point array --------------------------------------------------------------------------------------


class Layer(eqx.Module):
    """A lower variable with a whole number and a function in it."""

    w: jax.Array
    turns: jax.Array
    activation: object


@pytest.fixture(scope="module")
def layered():
    def inner(x, y, e):
        return 0.5 * jnp.sum((y.w - y.turns.astype(float) * y.activation(e)) ** 2) + jnp.sum(x * y.w)

    rows = [np.arange(4.0).reshape(2, 2), np.ones((2, 2))]
    problem = fb.Problem(inner, lambda x, y, e: 0.5 * jnp.sum((y.w - e) ** 2))
    x, y = jnp.ones(2), Layer(jnp.zeros(2), jnp.asarray(2), jnp.tanh)
    data = fb.FederatedData.stack(rows, rows)
    return fb.estimator(problem, data, NEST, x, y), x, y, (problem, data)


def test_the_rest_stays_and_the_arrays_alone_will_do(layered):
    estimator, x, y, given = layered
    h, after = estimator(x, y, KEY)
    assert after.activation is jnp.tanh and int(after.turns) == 2
    expected = fb.estimate_hypergradient(*given, NEST, x, y, key=KEY)
    np.testing.assert_array_equal(h, expected[0])
    arrays = eqx.filter(y, eqx.is_inexact_array)
    h_alone, alone = estimator(x, arrays, KEY)
    np.testing.assert_array_equal(h_alone, h)
    assert jax.tree.structure(alone) == jax.tree.structure(arrays)
    turn = lambda y, key: (estimator(x, y, key)[1], None)
    scanned, _ = jax.lax.scan(turn, arrays, jnp.stack([KEY]))
    np.testing.assert_allclose(scanned.w, after.w, rtol=1e-12)


def test_another_rest_is_refused(layered):
    estimator, x, y, _ = layered
    for other, sentence in (
        (Layer(y.w, jnp.asarray(3), jnp.tanh), r"y\.turns is .*3.*bound to .*2.*bind the estimator"),
        (Layer(y.w, y.turns, jnp.sin), r"y\.activation is .*sin.*bound to .*tanh"),
    ):
        with pytest.raises(fb.InputError, match=sentence):
            estimator(x, other, KEY)
    estimator(x, Layer(y.w, np.asarray(2), jnp.tanh), KEY)

"""The pace of x: gates, running means free of noise, the first distance, and how far x is put."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedbilevel.pace import outer
from fedbilevel.pace.outer import Mean

X, Y = jnp.asarray([1.0, -2.0]), jnp.asarray([0.5, 0.0, 1.0])
FULL, SERIES, SAMPLED = outer.rule(True, False, False), outer.rule(False, False, True), outer.rule(True, True, False)
number = jnp.asarray


def begun(loss=2.0, steepest=0.5, pull=3.0, rule=FULL):
    """At the start, as it is measured."""
    pace = outer.begin(X, Y, Y if rule is not SERIES else None)
    pace = outer.measured(pace, pull * jnp.asarray([1.0, 0.0, 0.0]), number(loss))
    return outer.probed(pace, number(loss), number(steepest), X)


def moved(pace, h, k, rule=FULL, t=1.0, v=Y, at=X, curvature=4.0):
    """(Where x is put, what is remembered): the algorithm has moved x by its probe along h."""
    after = at - jnp.exp(pace.log_probe) * h
    return outer.move(pace, at, after, v, number(t), number(k), number(curvature), number(0), rule, 1.0)


def test_the_rules():
    assert (FULL.first, SAMPLED.first, SERIES.first, outer.rule(False, False, False).first) == (3, 10, 10, 0)
    assert (FULL.shut_v, FULL.shut_y, SERIES.shut_y, SAMPLED.growth) == (0.2, 0.2, 0.5, 1.3)
    assert SERIES.random and not FULL.random


@pytest.mark.parametrize(("size", "t"), [(0.0, 1.0), (0.3, 0.5), (0.6, 0.0), (5.0, 0.0)])
def test_the_gate_of_v_shuts_at_a_fifth(size, t):
    found, _ = outer.gate(begun(), Y, number(size), number(4), FULL)
    assert float(found) == pytest.approx(t)


def test_the_longer_x_waited_for_v_the_more_of_e_is_let_pass():
    pace, waited = begun(), 0.0
    for k in range(250):
        found, pace = outer.gate(pace, Y, number(1.05), number(k), FULL)  # e never falls: .35 of |d_y f|
        t = max(0.0, 1 - 0.35 / (0.2 * (1 + waited / 100)))
        waited += 1 - t
        assert float(found) == pytest.approx(t, abs=1e-6)
    assert t > 0.25


def test_the_gate_of_y_knows_the_longest_gradient():
    pace = begun()
    for k, (length, t) in enumerate([(2.0, 0.0), (0.2, 0.5), (4.0, 0.0), (0.4, 0.5), (0.0, 1.0)]):
        found, pace = outer.gate_of_y(pace, number([0.1 * length, 0, 0]), number(0.1), number(0.0), number(k), FULL)
        assert float(found) == pytest.approx(t)
    trained, _ = outer.gate_of_y(begun(), number([1e-3, 0, 0]), number(0.1), number(10.0), number(0), FULL)
    assert float(trained) == pytest.approx(0.5)  # .01 against .01 L |y| = .1: a start that is trained


def test_the_longest_gradient_is_looked_for_until_x_has_moved_ten_times():
    pace = dataclasses.replace(begun(), moves=number(10), log_slope=number(0.0))
    _, pace = outer.gate_of_y(pace, number([1e3, 0, 0]), number(1.0), number(0.0), number(30), FULL)
    assert float(pace.log_slope) == 0


def test_a_running_mean_leaves_the_noise_out():
    draw, lengths, raw = np.random.default_rng(0), [], []
    mean = Mean.none(jnp.zeros(200))
    for k in range(400):
        vector = jnp.asarray(draw.normal(size=200))
        mean, length = mean.renewed(vector, jnp.log(jnp.linalg.norm(vector)), number(k))
        lengths.append(np.exp(float(length))), raw.append(float(jnp.linalg.norm(vector)))
    assert np.mean(lengths[20:]) < 0.25 * np.mean(raw)
    steady = Mean.none(jnp.zeros(3))
    for k in range(30):
        steady, length = steady.renewed(-Y, number(np.log(7.0)), number(k))
        assert float(length) == pytest.approx(np.log(7.0))  # from the first one on


def test_x_stays_until_it_may_move():
    pace, h = begun(), jnp.asarray([0.3, 0.4])
    for k in range(3):
        at, pace = moved(pace, h, k)
        np.testing.assert_array_equal(at.x, X)
        assert float(at.step) == 0 and float(at.length) == pytest.approx(0.5)
    at, pace = moved(pace, h, 3, t=0.0)
    np.testing.assert_array_equal(at.x, X)
    at, pace = moved(pace, h, 4)
    # .01 |f| = .02, between .0003 |v| |d_y f| and .03 of it, over |h|; eta = r / |h|
    np.testing.assert_allclose(at.x, X - 0.02 / 0.5 * h / 0.5, rtol=1e-9)
    assert float(at.step) == pytest.approx(0.02 / 0.5 / 0.5)


@pytest.mark.parametrize(
    ("loss", "distance"), [(2.0, 0.02), (1e9, 0.03 * 3 * 1.25**0.5), (1e-9, 0.0003 * 3 * 1.25**0.5)]
)
def test_the_first_distance_has_bounds(loss, distance):
    at, _ = moved(begun(loss), jnp.asarray([0.3, 0.4]), 3)
    assert np.linalg.norm(at.x - X) == pytest.approx(distance / 0.5)


def test_the_step_is_that_of_dog_and_grows_by_degrees():
    h, pace, at, squares, far, last = jnp.asarray([0.3, 0.4]), begun(), X, 0.0, 0.04, 0.04
    for k in range(3, 30):
        known = max(far, float(jnp.linalg.norm(at - X)))
        squares += 0.25
        expected = min(known / squares**0.5, last * (1.5 if k > 3 else 1) / 0.5)
        found, pace = moved(pace, h, k, at=at)
        assert float(found.step) == pytest.approx(expected)
        at, last = found.x, expected * 0.5


def test_x_goes_slower_where_it_went_too_far_and_where_g_is_steeper():
    h, pace = jnp.asarray([0.3, 0.4]), begun()
    one, pace = moved(pace, h, 3)
    back, _ = moved(pace, -h, 4, at=one.x)
    on, _ = moved(pace, h, 4, at=one.x)
    assert float(back.step) == pytest.approx(0.5 * float(on.step))
    steep, _ = moved(pace, h, 4, at=one.x, curvature=12.0)
    assert float(steep.step) == pytest.approx(float(on.step) / 9)


def test_where_a_series_is_cut_at_random_the_first_distance_knows_all_draws():
    """One draw in four is of any length: the one that x moves along first says little."""
    pace, lengths = begun(rule=SERIES), [4.0 if k % 4 == 1 else 1e-3 for k in range(SERIES.first + 1)]
    for k, length in enumerate(lengths):
        at, pace = moved(pace, number([0.0, length]), k, SERIES, v=None)
        assert (k < SERIES.first) == bool(jnp.all(at.x == X))
    typical = np.sqrt(np.mean(np.square(lengths)))
    assert float(pace.log_distance) == pytest.approx(np.log(0.1 * 2.0 / typical), abs=1e-5)
    assert np.linalg.norm(at.x - X) == pytest.approx(0.1 * 2.0 / typical, rel=1e-5)


def test_zeros_leave_everything_finite():
    for rule in (FULL, SERIES, SAMPLED):
        pace = begun(0.0, 0.0, 0.0, rule)
        for k in range(14):
            t, pace = outer.gate_of_y(pace, jnp.zeros(3), number(0.1), number(0.0), number(k), rule)
            at, pace = moved(pace, jnp.zeros(2), k, rule, t=float(t), v=None if rule is SERIES else jnp.zeros(3))
            np.testing.assert_array_equal(at.x, X)
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((at, pace)))

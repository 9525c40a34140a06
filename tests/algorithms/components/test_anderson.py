"""Anderson mixing against numpy's least squares, where all is linear and where a mixed point is worse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedbilevel.algorithms.components.anderson import WORSE, Anderson
from helpers.quadratic import flat

STEPS = (0.3, 0.02, 0.5)
DRAW = np.random.default_rng(0)
SPECTRUM = np.geomspace(1, 30, 7)
TURN, _ = np.linalg.qr(DRAW.normal(size=(7, 7)))
MATRIX, TARGET = TURN @ np.diag(SPECTRUM) @ TURN.T, DRAW.normal(size=7)
PARTS = np.split(np.arange(7), (2, 4))
ROOM = 5


def parts(numbers, dtype=None):
    """A point as pytrees: a dict of two leaves, a vector, a leaf of two axes."""
    x, y, v = (np.asarray(numbers)[part] for part in PARTS)
    tree = {"a": x[:1], "b": x[1]}, y, (v.reshape(1, 3),)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype or numbers.dtype), tree)


def joined(tree):
    return np.concatenate([flat(part) for part in tree])


MIXING = Anderson(ROOM)
step = jax.jit(lambda past, z, move, whole: MIXING.step(past, z, move, STEPS, whole))


def by_hand(slope, z, rounds):
    """The points of so many rounds, mixed by numpy's least squares; `slope` is d, and nothing gets worse."""
    steps = np.concatenate([np.full(len(part), s) for part, s in zip(PARTS, STEPS, strict=True)])
    points, slopes, found = [], [], []
    for _ in range(rounds):
        points, slopes = [*points, z][-ROOM - 1 :], [*slopes, slope(z)][-ROOM - 1 :]
        sizes = np.array([[np.linalg.norm(each[part]) for part in PARTS] for each in slopes])
        unit = np.concatenate([np.full(len(part), u) for part, u in zip(PARTS, sizes.max(0), strict=True)])
        Z, E = np.diff(points, axis=0).T, np.diff(slopes, axis=0).T
        z = z + steps * slopes[-1]
        if len(points) > 1:
            gamma, *_ = np.linalg.lstsq(E / unit[:, None], slopes[-1] / unit, rcond=None)
            z = z - (Z + steps[:, None] * E) @ gamma
        found.append(z)
    return found


def mixed(slope, z, rounds, dtype=None):
    """The points that the component finds, and whether they were mixed."""
    z = parts(z, dtype)
    past, found, used = MIXING.begin(z), [], []
    for _ in range(rounds):
        move = parts(slope(joined(z)), dtype)
        move = tuple(jax.tree.map(lambda leaf, s=s: s * leaf, part) for part, s in zip(move, STEPS, strict=True))
        z, past, flag = step(past, z, move, jnp.asarray(True))
        found.append(joined(z))
        used.append(float(flag))
    return found, used, past


def linear(z):
    return TARGET - MATRIX @ z


def test_points_are_those_of_least_squares_by_hand_while_the_ring_fills_and_when_it_is_full():
    found, used, _ = mixed(linear, np.zeros(7), ROOM + 3)
    for one, other in zip(found, by_hand(linear, np.zeros(7), ROOM + 3), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    assert used == [0.0] + [1.0] * (ROOM + 2)


@pytest.mark.parametrize(("dtype", "close"), [(np.float64, 1e-9), (np.float32, 1e-4)])
def test_where_all_is_linear_it_ends_at_the_solution_and_stays_there(dtype, close):
    """In as many rounds as there are numbers and a few restarts, where plain moves blow up: 30 times .5 is beyond 2."""
    right = np.linalg.solve(MATRIX, TARGET)
    for start in (np.zeros(7), 1e-3 * TARGET, -1e-3 * TARGET):  # another rounding each: what is lost in it is not mixed
        found, _, past = mixed(linear, start, 120, dtype)
        assert max(np.linalg.norm(z - right) for z in found[45:]) < close * np.linalg.norm(right)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(past))
    assert all(leaf.dtype in (dtype, np.int32) for leaf in jax.tree.leaves(past))


@pytest.mark.parametrize(("times", "given_up"), [(0.9 * WORSE, False), (1.1 * WORSE, True)])
def test_a_mixed_point_that_is_worse_is_given_up_for_the_best_one_and_its_plain_move(times, given_up):
    """Each part of the move is so many times what it was at the best point."""
    found, _, past = mixed(linear, np.zeros(7), 3)
    longer = parts(times * np.concatenate([np.full(len(p), n) for p, n in zip(PARTS, past.least, strict=True)]))
    unit = lambda part, s: jax.tree.map(lambda leaf: s * leaf / np.sqrt(flat(part).size), part)
    move = tuple(unit(part, s) for part, s in zip(longer, STEPS, strict=True))
    after, left, flag = step(past, parts(found[-1]), move, jnp.asarray(True))
    assert np.array_equal(joined(after), joined(past.best)) == given_up
    assert (float(flag) == 0) == given_up == (float(left.filled) == -1)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(left.points)) != given_up


def test_a_round_in_which_somebody_is_missing_is_plain_and_empties_the_memory():
    found, _, past = mixed(linear, np.zeros(7), 3)
    z, move = parts(found[-1]), parts(np.full(7, 0.25))
    after, emptied, flag = step(past, z, move, jnp.asarray(False))
    np.testing.assert_array_equal(joined(after), joined(z) + 0.25)
    assert float(flag) == 0 and float(emptied.filled) == -1


def test_units_of_the_parts_change_nothing():
    """x, y and v in other units, and so their derivatives: the same points."""
    scale = np.concatenate([np.full(len(part), u) for part, u in zip(PARTS, (1e-3, 1.0, 50.0), strict=True)])
    known, _, _ = mixed(linear, np.zeros(7), 6)
    own = mixed(lambda z: scale * linear(z / scale), np.zeros(7), 6)[0]
    np.testing.assert_allclose(own[-1] / scale, known[-1], rtol=1e-5)

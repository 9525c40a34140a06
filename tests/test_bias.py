"""Which draws bias the estimate, on a lower level that is not quadratic (algorithms.md 6.4).

The estimators are written out in numpy, with the clients (or the rows) that every factor is taken from as an argument,
and averaged over all the choices there are: exactly what a long run of the library must give on average.
"""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
from logistic import ALL, CLIENTS, PROBLEM, ROWS, X, Y

import fedbilevel as fb

N, LR, TAU, LAM = 2, 0.2, 2, 0.25
STEPS = {"inner_lr": LR, "local_steps": TAU, "hessian_lr": LAM}
ALONE = [[i] for i in ALL]


def average(estimate, draws):
    """The mean of estimate(*choice) over all choices of one out of three for each of `draws` draws."""
    return np.mean([estimate(*choice) for choice in itertools.product(ALONE, repeat=draws)], axis=0)


def lower(task, pairs):
    """[y^0, y^1, ...]; each pair says who answers the anchor and who takes the local steps."""
    path = [Y]
    for anchor, local in pairs:
        q = task.gradient(X, path[-1], anchor)
        path.append(task.corrected_steps(X, path[-1], q, LR, TAU, local))
    return path


def aggitd(task, Q, pairs, factors, last):
    """AggITD's estimate: factors[t] answers r^t for t >= Q, `last` the hypergradient round."""
    path = lower(task, pairs)
    r = task.outer_y(path[Q], factors[Q])
    for t in range(Q + 1, N + 1):
        r = r - LAM * task.hessian(X, path[t], factors[t]) @ r
    return task.compose(X, path[N], LAM * (N + 1) * r, last)


def fednest(task, n, pairs, factors, last):
    """FedNest's estimate: factors[0] starts the series, n more follow."""
    y = lower(task, pairs)[-1]
    p = task.outer_y(y, factors[0])
    for who in factors[1 : n + 1]:
        p = p - LAM * task.hessian(X, y, who) @ p
    return task.compose(X, y, N * LAM * p, last)


# name: (class, settings, estimate, numbers drawn, turns of the lower loop)
KINDS = {
    "aggitd": (fb.AggITD, {"inner_rounds": N}, aggitd, N + 1, N),
    "fednest": (fb.FedNest, {"inner_rounds": 1, "neumann_terms": N}, fednest, N, 1),
}


def paired(flat, turns):
    return [(flat[2 * t], flat[2 * t + 1]) for t in range(turns)]


def over_numbers(name, one):
    """The mean of one(estimate, number, turns) over the numbers that the server draws."""
    _, _, estimate, numbers, turns = KINDS[name]
    return np.mean([one(estimate, number, turns) for number in range(numbers)], axis=0)


def exact(task, name):
    """All factors exact, along every path of y there is."""

    def one(estimate, number, turns):
        return average(lambda *flat: estimate(task, number, paired(flat, turns), [ALL] * (N + 1), ALL), 2 * turns)

    return over_numbers(name, one)


def fixed(task, name):
    """The same client, or row, for everything."""

    def one(estimate, number, turns):
        return average(lambda i: estimate(task, number, [(i, i)] * turns, [i] * (N + 1), i), 1)

    return over_numbers(name, one)


def fresh_clients(name):
    """A client for every exchange; AggITD's anchor round answers r^t too."""

    def one(estimate, number, turns):
        def choose(*flat):
            pairs, rest = paired(flat, turns), flat[2 * turns :]
            factors = [*(anchor for anchor, _ in pairs), rest[0]] if name == "aggitd" else rest[:-1]
            return estimate(CLIENTS, number, pairs, factors, rest[-1])

        return average(choose, 2 * turns + 2 + (number if name == "fednest" else 0))

    return over_numbers(name, one)


class OneCohort:
    """`fed`, but every exchange asks the same clients."""

    def __init__(self, fed):
        self._fed, self._cohort = fed, fed.draw_cohort()

    def average(self, *args, cohort=None, **kwargs):
        return self._fed.average(*args, **kwargs, cohort=self._cohort)

    def __getattr__(self, name):
        return getattr(self._fed, name)


def sampled(kind, data, wrap=lambda fed: fed, cohort=None, draws=20_000, **settings):
    """(draws, 2) estimates at the same place, by the library."""

    class Probe(kind):
        def step(self, fed, state):
            h, _ = self.estimate(wrap(fed), state.x, state.y)
            return state, {"h0": h[0], "h1": h[1]}

    algorithm, engine = Probe(**{**STEPS, **settings}), fb.Simulation(cohort=cohort)
    history = fb.solve(PROBLEM, data, algorithm, X, Y, draws, key=jax.random.key(0), engine=engine).history
    return np.stack([history.column("h0"), history.column("h1")], axis=1)[1:]


def assert_mean(h, expected, other):
    """The mean of h is the expected one, as far as can be told, and is told apart from the other."""
    error = h.std(0) / np.sqrt(len(h))
    assert (np.abs(h.mean(0) - expected) < 5 * error).all()
    assert (np.abs(h.mean(0) - other) > 5 * error).any()


@pytest.mark.parametrize("name", KINDS)
def test_fresh_cohorts_are_unbiased_and_a_fixed_one_is_not(name):
    fresh, same, true = fresh_clients(name), fixed(CLIENTS, name), exact(CLIENTS, name)
    size = np.abs(true).max()
    if name == "fednest":  # every factor, and y, has clients of its own
        np.testing.assert_allclose(fresh, true, rtol=0, atol=1e-12)
    else:  # the clients that answer r also move y: a bias of order inner_lr * hessian_lr, a few per cent
        assert 1e-3 * size < np.abs(fresh - true).max() < 0.03 * size
    assert np.abs(same - true).max() > max(0.03 * size, 2 * np.abs(fresh - true).max())
    kind, settings = KINDS[name][:2]
    assert_mean(sampled(kind, CLIENTS.data, cohort=1, **settings), fresh, same)
    assert_mean(sampled(kind, CLIENTS.data, OneCohort, cohort=1, **settings), same, fresh)


@pytest.mark.parametrize("name", KINDS)
def test_minibatches_are_fresh_for_every_factor(name):
    """One client, one row a batch: with rows of its own for each factor the estimate is unbiased, AggITD's too."""
    kind, settings = KINDS[name][:2]
    true, same = exact(ROWS, name), fixed(ROWS, name)
    assert np.abs(same - true).max() > 0.03 * np.abs(true).max()
    assert_mean(sampled(kind, ROWS.pooled, batch_size=1, **settings), true, same)


def test_lfednests_local_minibatches_are_fresh_too():
    terms = 3

    def estimate(moved, outer, last, *factors):
        """After one local step on the row `moved`; the outer row gives d_y f and d_x f."""
        y = Y - LR * ROWS.gradient(X, Y, moved)
        p = ROWS.outer_y(y, outer)
        for row in factors:
            p = p - LAM * ROWS.hessian(X, y, row) @ p
        return ROWS.compose(X, y, terms * LAM * p, outer, last)

    numbers = range(terms)
    fresh = np.mean([average(estimate, 3 + n) for n in numbers], axis=0)
    same = np.mean([average(lambda *rows, n=n: estimate(*rows[:3], *rows[3:] * n), 4) for n in numbers], axis=0)
    settings = {"inner_rounds": 1, "local_steps": 1, "neumann_terms": terms, "batch_size": 1}
    assert_mean(sampled(fb.LFedNest, ROWS.pooled, **settings), fresh, same)

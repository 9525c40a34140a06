"""Which draws bias the estimate, on a lower level that is not quadratic (algorithms.md 6.4).

The estimators are written out in numpy, with the clients (or the rows) that every factor is taken from as an argument,
and averaged over all the choices there are: exactly what a long run of the library must give on average.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

import fedbilevel as fb
from helpers.draws import KINDS, LAM, LR, STEPS, average, exact, fixed, fresh_clients
from helpers.logistic import CLIENTS, PROBLEM, ROWS, X, Y
from helpers.plain import plain


@fb.federation.Federation.register
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

    algorithm, engine = plain(Probe, **{**STEPS, **settings}), fb.Simulation(cohort=cohort)
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

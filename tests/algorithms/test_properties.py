"""A lower level that is not quadratic: centralised limit, upper steps, slope of Phi (algorithms.md 6.6 and 6.7).

Every run is followed by the same algorithm in numpy, and by one with a fault that must be seen.
"""

from __future__ import annotations

import jax
import numpy as np

import fedbilevel as fb
from helpers.logistic import ALL, CLIENTS, PROBLEM, Logistic, X, Y
from helpers.plain import plain

KEY = jax.random.key(0)


def apart(one, other, least=1e-6):
    assert np.abs(np.asarray(one) - other).max() > least


def close(one, other, tolerance=1e-12):
    np.testing.assert_allclose(one, other, rtol=0, atol=tolerance)


def test_one_client_and_one_local_step_is_gradient_descent_on_y_and_v_in_lock_step():
    alone = Logistic([CLIENTS.inner[2]], [CLIENTS.outer[2]])
    rounds, lr, lam, outer_lr, me = 4, 0.2, 0.15, 0.5, [0]

    def descend(x, y, ahead=0):
        """One iteration: v descends on v'Hv/2 - v'd_y f while y descends on g; `ahead` of y's own steps, to be wrong."""
        v, path = np.zeros(2), [y]
        for _ in range(rounds + 1):
            path.append(path[-1] - lr * alone.gradient(x, path[-1], me))
        for t in range(rounds + 1):
            at = path[t + ahead]
            v = v - lam * (alone.hessian(x, at, me) @ v - alone.outer_y(at, me))
        return x - outer_lr * alone.compose(x, path[rounds], v, me), path[rounds]

    steps = {"inner_lr": lr, "hessian_lr": lam, "outer_lr": outer_lr}
    algorithm = fb.AggITD(inner_rounds=rounds, local_steps=1, truncation="full", **steps)
    for iterations in (1, 10):
        run = fb.solve(PROBLEM, alone.data, algorithm, X, Y, iterations, key=KEY)
        x, y = X, Y
        for _ in range(iterations):
            x, y = descend(x, y)
        close(run.x, x)
        close(run.y, y)
        if iterations == 1:
            apart(run.x, descend(X, Y, ahead=1)[0])


# Upper steps ----------------------------------------------------------------------------------------------------------


def test_the_upper_steps_are_corrected_around_the_mean_hypergradient():
    lr, lam, outer_lr, steps = 0.1, 0.1, 0.4, 3
    q = CLIENTS.gradient(X, Y, ALL)
    y = CLIENTS.corrected_steps(X, Y, q, lr, 2, ALL)
    v = lam * CLIENTS.outer_y(Y, ALL)
    v = v - lam * (CLIENTS.hessian(X, y, ALL) @ v - CLIENTS.outer_y(y, ALL))
    h = CLIENTS.compose(X, y, v, ALL)

    def moved(corrected):
        ends = []
        for i in ALL:
            x = X
            for _ in range(steps):
                drift = CLIENTS.compose(x, y, v, [i]) - CLIENTS.compose(X, y, v, [i])
                x = x - outer_lr * (drift + h if corrected else CLIENTS.compose(x, y, v, [i]))
            ends.append(x)
        return np.mean(ends, axis=0)

    rates = {"inner_lr": lr, "hessian_lr": lam, "outer_lr": outer_lr}
    algorithm = fb.AggITD(inner_rounds=1, local_steps=2, outer_steps=steps, truncation="full", **rates)
    run = fb.solve(PROBLEM, CLIENTS.data, algorithm, X, Y, 1, key=KEY)
    close(run.y, y)
    close(run.x, moved(corrected=True))
    close(run.history[-1]["hypergradient_norm"], np.linalg.norm(h))
    apart(run.x, moved(corrected=False))
    apart(run.x, X - outer_lr * steps * h)


def test_lfednest_steps_along_each_clients_own_hypergradient():
    lr, lam, outer_lr, terms = 0.1, 0.1, 0.4, 2
    y = np.mean([Y - lr * CLIENTS.gradient(X, Y, [i]) for i in ALL], axis=0)

    def local(i, x, terms):
        b, M = CLIENTS.outer_y(y, [i]), np.eye(2) - lam * CLIENTS.hessian(x, y, [i])
        return CLIENTS.compose(x, y, lam * sum(np.linalg.matrix_power(M, n) @ b for n in range(terms + 1)), [i])

    def moved(terms):
        return np.mean([x - outer_lr * local(i, x, terms) for i in ALL for x in [X - outer_lr * local(i, X, terms)]], 0)

    rates = {"inner_lr": lr, "hessian_lr": lam, "outer_lr": outer_lr, "neumann_terms": terms}
    algorithm = fb.LFedNest(inner_rounds=1, local_steps=1, outer_steps=2, truncation="full", **rates)
    run = fb.solve(PROBLEM, CLIENTS.data, algorithm, X, Y, 1, key=KEY)
    close(run.y, y)
    close(run.x, moved(terms))
    apart(run.x, moved(terms - 1))


# Finite differences ---------------------------------------------------------------------------------------------------


def solution(x):
    y = np.zeros(2)
    for _ in range(50):
        y = y - np.linalg.solve(CLIENTS.hessian(x, y, ALL), CLIENTS.gradient(x, y, ALL))
    return y


def phi(x):
    y = solution(x)
    value = lambda e: np.log1p(np.exp(-e["b"] * (e["a"] @ y))).mean() + e["s"].mean() / 2 * (x @ x)
    return np.mean([value(e) for e in CLIENTS.outer])


def test_the_hypergradient_is_the_slope_of_phi():
    differences = np.array([(phi(X + d) - phi(X - d)) / 2e-4 for d in 1e-4 * np.eye(2)])
    apart(differences, CLIENTS.compose(X, solution(X), np.zeros(2), ALL), 1e-2)  # more than d_x f
    estimates = {}
    for rounds in (5, 800):
        algorithm = plain(
            fb.AggITD, inner_rounds=rounds, inner_lr=0.05, local_steps=3, hessian_lr=0.1, truncation="full"
        )
        estimates[rounds], y = fb.estimate_hypergradient(PROBLEM, CLIENTS.data, algorithm, X, Y, key=KEY)
    close(y, solution(X), 1e-10)
    close(estimates[800], differences, 1e-7)
    apart(estimates[5], differences, 1e-3)

"""On a lower level that is not quadratic: which cohorts bias the estimate, the centralised limit, finite differences.

The task is logistic regression with a penalty exp(x_k) s y_k^2 / 2 on each weight (algorithms.md, task 2; s differs
between clients, so that their cross terms do). The algorithms are written out in numpy, with the client of every
exchange as an argument, and averaged over all the choices there are.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb

CLIENTS = range(3)
KEY = jax.random.key(0)


def inner(x, y, e):
    return jax.nn.softplus(-e["b"] * (e["a"] @ y)) + 0.5 * e["s"] * jnp.sum(jnp.exp(x) * y**2)


def outer(x, y, e):
    return jax.nn.softplus(-e["b"] * (e["a"] @ y)) + 0.5 * e["s"] * jnp.sum(x**2)


PROBLEM = fb.Problem(inner, outer)
X, Y = np.array([-0.7, -0.2]), np.array([0.9, -0.6])


def rows(seed, n, spread):
    draw = np.random.default_rng(seed)
    a = spread * (1.5 * draw.normal(size=(n, 2)) + draw.normal(size=2))
    return {"a": a, "b": np.where(draw.random(n) < 0.7, 1.0, -1.0), "s": np.full(n, 0.4 + spread / 2)}


INNER = [rows(10 + i, 2 + i, 1 + i) for i in CLIENTS]
OUTER = [rows(20 + i, 4 - i, 3 - i) for i in CLIENTS]
DATA = fb.FederatedData.stack(INNER, OUTER)

# The oracles in numpy, of the clients `who` together


def over(who, oracle):
    return np.mean([oracle(i) for i in who], axis=0)


def slopes(e, y):
    p = 1 / (1 + np.exp(e["b"] * (e["a"] @ y)))
    return p, (-(e["b"] * p)[:, None] * e["a"]).mean(0)


def gradient(x, y, who):
    return over(who, lambda i: slopes(INNER[i], y)[1] + INNER[i]["s"].mean() * np.exp(x) * y)


def hessian(x, y, who):
    def one(i):
        e, (p, _) = INNER[i], slopes(INNER[i], y)
        return (e["a"].T * (p * (1 - p))) @ e["a"] / len(p) + e["s"].mean() * np.diag(np.exp(x))

    return over(who, one)


def outer_y(y, who):
    return over(who, lambda i: slopes(OUTER[i], y)[1])


def compose(x, y, v, who):
    """d_x f - J v."""
    return over(who, lambda i: OUTER[i]["s"].mean() * x - INNER[i]["s"].mean() * np.exp(x) * y * v)


def corrected_steps(x, y, q, lr, steps, who):
    def one(i):
        z = y
        for _ in range(steps):
            z = z - lr * (gradient(x, z, [i]) - gradient(x, y, [i]) + q)
        return z

    return over(who, one)


# Cohorts: fresh ones for every factor, or one for all (algorithms.md 6.4) ---------------------------------------------

N, LR, TAU, LAM = 2, 0.2, 2, 0.25


def path_of(x, y, choices, turns):
    """[y^0, ..., y^turns] when the exchanges of the turns ask choices[0], choices[1], ..."""
    path = [y]
    for t in range(turns):
        q = gradient(x, path[-1], choices[2 * t])
        path.append(corrected_steps(x, path[-1], q, LR, TAU, choices[2 * t + 1]))
    return path


def aggitd(Q, choices):
    """AggITD's estimate; choices: anchor 0, lower 0, anchor 1, ..., vector, hypergradient."""
    path = path_of(X, Y, choices, N)
    asked = [*choices[0 : 2 * N : 2], choices[2 * N]]
    r = outer_y(path[Q], asked[Q])
    for t in range(Q + 1, N + 1):
        r = r - LAM * hessian(X, path[t], asked[t]) @ r
    return compose(X, path[N], LAM * (N + 1) * r, choices[2 * N + 1])


def fednest(n, choices):
    """FedNest's estimate with one turn; choices: gradient, lower, start, n factors, hypergradient."""
    y = path_of(X, Y, choices, 1)[-1]
    p = outer_y(y, choices[2])
    for k in range(n):
        p = p - LAM * hessian(X, y, choices[3 + k]) @ p
    return compose(X, y, N * LAM * p, choices[3 + n])


KINDS = {  # name: (class, settings, estimate, numbers drawn, exchanges for each of them, exchanges that move y)
    "aggitd": (fb.AggITD, {"inner_rounds": N}, aggitd, N + 1, lambda Q: 2 * N + 2, range(2 * N)),
    "fednest": (fb.FedNest, {"inner_rounds": 1, "neumann_terms": N}, fednest, N, lambda n: 4 + n, range(2)),
}


def averages(name):
    """(fresh cohorts of one, one client for all factors, what the factors estimate), each averaged over all choices."""
    _, _, estimate, drawn, exchanges, moving = KINDS[name]
    alone = [[i] for i in CLIENTS]
    fresh, fixed, exact = [], [], []
    for number in range(drawn):
        many = exchanges(number)
        fresh.append(np.mean([estimate(number, choice) for choice in itertools.product(alone, repeat=many)], axis=0))
        fixed.append(np.mean([estimate(number, [i] * many) for i in alone], axis=0))
        paths = itertools.product(alone, repeat=len(moving))  # of y as it is; every factor the mean over all clients
        every = [[*path, *[CLIENTS] * (many - len(moving))] for path in paths]
        exact.append(np.mean([estimate_with(name, number, choice) for choice in every], axis=0))
    return np.mean(fresh, axis=0), np.mean(fixed, axis=0), np.mean(exact, axis=0)


def estimate_with(name, number, choices):
    """The estimate whose factors are exact, along the path of y that `choices` gives."""
    if name == "fednest":
        return fednest(number, choices)
    path = path_of(X, Y, choices, N)
    r = outer_y(path[number], CLIENTS)
    for t in range(number + 1, N + 1):
        r = r - LAM * hessian(X, path[t], CLIENTS) @ r
    return compose(X, path[N], LAM * (N + 1) * r, CLIENTS)


class OneCohort:
    """`fed`, but every exchange asks the same clients."""

    def __init__(self, fed):
        self._fed, self._cohort = fed, fed.draw_cohort()

    def average(self, *args, **kwargs):
        return self._fed.average(*args, **kwargs, cohort=self._cohort)

    def __getattr__(self, name):
        return getattr(self._fed, name)


def probing(kind, cohorts):
    class Probe(kind):
        """The estimate at the same place again and again."""

        def step(self, fed, state):
            h, _ = self.estimate(OneCohort(fed) if cohorts == "fixed" else fed, state.x, state.y)
            return state, {"h0": h[0], "h1": h[1]}

    return Probe


@pytest.mark.parametrize("name", KINDS)
def test_fresh_cohorts_are_unbiased_and_a_fixed_one_is_not(name):
    fresh, fixed, exact = averages(name)
    size = np.abs(exact).max()
    if name == "fednest":  # every factor, and y, has clients of its own
        np.testing.assert_allclose(fresh, exact, rtol=0, atol=1e-12)
    else:  # the clients that answer r also move y: a bias of order inner_lr * hessian_lr, a few per cent
        assert 1e-3 * size < np.abs(fresh - exact).max() < 0.03 * size
    assert np.abs(fixed - exact).max() > max(0.03 * size, 2 * np.abs(fresh - exact).max())
    kind, settings = KINDS[name][:2]
    for cohorts, expected, other in (("fresh", fresh, fixed), ("fixed", fixed, fresh)):
        algorithm = probing(kind, cohorts)(inner_lr=LR, local_steps=TAU, hessian_lr=LAM, **settings)
        run = fb.solve(PROBLEM, DATA, algorithm, X, Y, 20_000, key=KEY, engine=fb.Simulation(cohort=1))
        h = np.stack([run.history.column("h0"), run.history.column("h1")], 1)[1:]
        error = h.std(0) / np.sqrt(len(h))
        assert (np.abs(h.mean(0) - expected) < 5 * error).all()
        assert (np.abs(h.mean(0) - other) > 5 * error).any()


# The centralised limit, and finite differences ------------------------------------------------------------------------


def test_one_client_and_one_local_step_is_gradient_descent_on_y_and_v_in_lock_step():
    rounds, lr, lam, outer_lr, me = 4, 0.2, 0.15, 0.5, [2]

    def descend(x, y, ahead=0):
        """One iteration: v descends on v'Hv/2 - v'd_y f while y descends on g; `ahead` of y's own steps, to be wrong."""
        v, path = np.zeros(2), [y]
        for _ in range(rounds + 1):
            path.append(path[-1] - lr * gradient(x, path[-1], me))
        for t in range(rounds + 1):
            at = path[t + ahead]
            v = v - lam * (hessian(x, at, me) @ v - outer_y(at, me))
        return x - outer_lr * compose(x, path[rounds], v, me), path[rounds]

    steps = {"inner_lr": lr, "hessian_lr": lam, "outer_lr": outer_lr}
    algorithm = fb.AggITD(inner_rounds=rounds, local_steps=1, truncation="full", **steps)
    for iterations in (1, 10):
        data = fb.FederatedData.stack([INNER[2]], [OUTER[2]])
        run = fb.solve(PROBLEM, data, algorithm, X, Y, iterations, key=KEY)
        x, y = X, Y
        for _ in range(iterations):
            x, y = descend(x, y)
        np.testing.assert_allclose(run.x, x, rtol=0, atol=1e-12)
        np.testing.assert_allclose(run.y, y, rtol=0, atol=1e-12)
        if iterations == 1:
            assert np.abs(run.x - descend(X, Y, ahead=1)[0]).max() > 1e-6


def solution(x):
    y = np.zeros(2)
    for _ in range(50):
        y = y - np.linalg.solve(hessian(x, y, CLIENTS), gradient(x, y, CLIENTS))
    return y


def phi(x):
    y = solution(x)
    value = lambda i: np.log1p(np.exp(-OUTER[i]["b"] * (OUTER[i]["a"] @ y))).mean() + OUTER[i]["s"].mean() / 2 * (x @ x)
    return np.mean([value(i) for i in CLIENTS])


def test_the_hypergradient_is_the_slope_of_phi():
    differences = np.array([(phi(X + d) - phi(X - d)) / 2e-4 for d in 1e-4 * np.eye(2)])
    assert np.abs(differences - compose(X, solution(X), np.zeros(2), CLIENTS)).max() > 1e-2  # more than d_x f
    estimates = {}
    for rounds in (5, 800):
        algorithm = fb.AggITD(inner_rounds=rounds, inner_lr=0.05, local_steps=3, hessian_lr=0.1, truncation="full")
        h, y = fb.estimate_hypergradient(PROBLEM, DATA, algorithm, X, Y, key=KEY)
        estimates[rounds] = np.asarray(h)
    np.testing.assert_allclose(y, solution(X), rtol=0, atol=1e-10)
    np.testing.assert_allclose(estimates[800], differences, rtol=0, atol=1e-7)
    assert np.abs(estimates[5] - differences).max() > 1e-3

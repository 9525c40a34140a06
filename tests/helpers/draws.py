"""Estimates written out in numpy, with the clients that every factor is taken from as an argument."""

from __future__ import annotations

import itertools

import numpy as np

import fedbilevel as fb
from helpers.logistic import ALL, CLIENTS, X, Y

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

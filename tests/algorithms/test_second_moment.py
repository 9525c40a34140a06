"""The second moment of AggITD's estimate over Q: below its bound, and growing about linearly with N (algorithms.md 6.3)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fedbilevel as fb
from fedbilevel.algorithms import aggitd
from helpers.plain import plain
from helpers.quadratic import DX, DY, quadratic

TAU, INNER_LR, HESSIAN_LR = 3, 0.12, 0.2
STEPS = {"inner_lr": INNER_LR, "local_steps": TAU, "hessian_lr": HESSIAN_LR}
Q0 = quadratic()
T, Z = Q0.t, Q0.z
H = Q0.hessians(T).mean(0)


def second_moment(hs, y_N, rounds):
    """(E |v_Q|^2 as in h_Q = d_x f - J v_Q, its bound divided by N+1)."""
    J, direct = Q0.crosses(T, y_N).mean(0), Q0.outer_x(T, y_N).mean(0)
    assert np.linalg.matrix_rank(J) == DY  # so that v_Q can be read off h_Q
    v = np.linalg.lstsq(J, (direct - hs).T, rcond=None)[0].T
    mu, largest = np.linalg.eigvalsh(H)[[0, -1]]
    assert HESSIAN_LR * (largest + mu) <= 2
    path = Q0.corrected_path(T, Z, INNER_LR, TAU, rounds)
    C = max(np.linalg.norm(Q0.outer_y(T, y).mean(0)) for y in path)
    return np.mean(np.sum(v**2, axis=1)), HESSIAN_LR * C**2 / (mu * (2 - HESSIAN_LR * mu))


class Counting(aggitd.State):
    q: jax.Array


class Enumerated(fb.AggITD):
    """AggITD's estimator at the same place again and again, with Q = 0, 1, 2, ... in one compiled run."""

    def init(self, x, y):
        own = super().init(x, y)
        return Counting(*(getattr(own, field.name) for field in dataclasses.fields(own)), jnp.zeros((), jnp.int32))

    def step(self, fed, state):
        h, y = dataclasses.replace(self, truncation=state.q).estimate(fed, state.x, state.y)
        numbers = enumerate(jnp.concatenate([ravel_pytree(h)[0], ravel_pytree(y)[0]]))
        return dataclasses.replace(state, q=state.q + 1), {f"n{i}": number for i, number in numbers}


def enumerated(rounds):
    """(h for each Q, y^N)."""
    algorithm = plain(Enumerated, inner_rounds=rounds, truncation=0, **STEPS)
    history = fb.solve(Q0.problem, Q0.data, algorithm, Q0.x, Q0.y, rounds + 1, key=jax.random.key(0)).history
    numbers = np.stack([history.column(f"n{i}")[1:] for i in range(DX + DY)], axis=1)
    return numbers[:, :DX], numbers[-1, DX:]


def test_the_second_moment_is_bounded_and_grows_linearly():
    moments = {}
    for rounds in (15, 63):
        hs, y_N = enumerated(rounds)
        moments[rounds + 1], slope = second_moment(hs, y_N, rounds)
        assert moments[rounds + 1] <= slope * (rounds + 1)
        assert moments[rounds + 1] > 4 * slope  # a bound that did not grow would be broken
    ratio = moments[64] / moments[16]
    assert ratio == pytest.approx(4, rel=0.2)

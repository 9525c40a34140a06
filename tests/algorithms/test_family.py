"""The family of algorithms on closed forms: where each goes, and where those stop that use clients' own Hessians or steps.

`quadratics`: D_i is linear, so that every fixed point is the solution of a linear system. `ridge`: x enters through exp(x),
and local hypergradients have a root beside the solution that Newton's method finds.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.tasks.ridge import BIAS_PENALTY
from fedbilevel.watch import attributes
from fedbilevel_studies.theory import unequal
from fedbilevel_studies.theory.family import CURVATURE, DX
from helpers.family import L_UPPER, STEPS, L, end, on_quadratic, quadratic, ridge
from helpers.plain import plain

# Where the exact ones go -------------------------------------------------------------------------------------------------

FIFTH = {"inner_lr": 0.2 / L, "hessian_lr": 0.2 / L, "outer_lr": 0.05 / L_UPPER}
EXACT = {
    "simfbo": (fb.SimFBO(**STEPS, local_steps=1), 1000),
    "shrofbo": (fb.ShroFBO(**STEPS, local_steps=1, server_lr=0.9), 1000),
    "memfbo": (fb.MemFBO(**STEPS, local_steps=1), 1000),
    "fedbio": (fb.FedBiO(**STEPS, local_steps=1), 1000),
    "fedbioacc": (fb.FedBiOAcc(**STEPS, local_steps=1), 1000),
    "fedmsa": (fb.FedMSA(**FIFTH, local_steps=5), 1000),
    "fedf2sa": (fb.FedF2SA(inner_lr=0.2 / L, outer_lr=0.25 / L_UPPER, penalty_growth=1.0), 2000),
    "lockstep": (fb.Lockstep(**{**FIFTH, "outer_lr": 0.25 / L_UPPER}, local_steps=5), 1500),
    "aggitd": (fb.AggITD(**{**STEPS, "inner_lr": 0.2 / L}, truncation="full", warm_start_v=True), 1000),
    "fednest": (
        fb.FedNest(**{**STEPS, "inner_lr": 0.2 / L}, inner_rounds=20, neumann_terms=80, truncation="full"), 1000,
    ),
    "fednest-sgd": (
        fb.FedNestSGD(**STEPS, local_steps=1, inner_rounds=40, neumann_terms=80, truncation="full"), 1000,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_exact_methods_become_stationary(name):
    algorithm, iterations = EXACT[name]
    setup = ridge()
    assert float(setup.stationarity(setup.x)) > 0.1
    assert float(setup.stationarity(end(setup, algorithm, iterations).x)) < 1e-8


def test_every_algorithm_is_exact_or_has_a_floor_that_is_known():
    others = {"lfednest", "lfednest-svrg", "localbsgm", "localbsgvrm", "adafbio", "fedmbo", "fedbioacc-local"}
    assert set(EXACT) | others == set(fb.algorithms.ALGORITHMS)
    assert set(EXACT).isdisjoint(fb.algorithms.BIASED)


# Where local Hessians lead -----------------------------------------------------------------------------------------------


def moments(level, i):
    """(a'a / n, a'b / n) of a client's rows, a column of ones for the bias."""
    rows = level.alone(i).rows
    a = np.concatenate([rows["a"], np.ones((len(rows["a"]), 1))], axis=1)
    return jnp.asarray(a.T @ a / len(a)), jnp.asarray(a.T @ np.asarray(rows["target"])[:, 0] / len(a))


CLIENTS = range(8)


@functools.cache
def all_moments():
    """Of both levels, for each client."""
    return [[moments(level, i) for i in CLIENTS] for level in (ridge().data.inner, ridge().data.outer)]


def hessian(inner, x):
    return inner[0] + jnp.diag(jnp.concatenate([jnp.exp(x), jnp.full((1,), BIAS_PENALTY)]))


def mean_local_hypergradient(x, vector):
    """mean_i -exp(x) y v_i, v_i = vector(H_i, d_y f_i), for J_i = diag(exp(x) y), at y*(x)."""
    inner, outer = all_moments()
    H = [hessian(each, x) for each in inner]
    y = jnp.linalg.solve(sum(H) / 8, sum(pull for _, pull in inner) / 8)
    total = 0
    for i in CLIENTS:
        total += -jnp.exp(x) * (y * vector(H[i], outer[i][0] @ y - outer[i][1]))[:-1]
    return total / 8


def root(of):
    x = ridge().stationarity.best
    all_moments()  # before anything is traced
    of, slope = jax.jit(of), jax.jit(jax.jacfwd(of))
    for _ in range(3000):
        x = x - 0.5 * of(x)
    for _ in range(6):
        x = x - jnp.linalg.solve(slope(x), of(x))
    assert float(jnp.abs(of(x)).max()) < 1e-13
    return x


TERMS, LAM = 20, 1 / 19.0


@functools.cache
def local_root():
    """Where the mean of the local hypergradients with TERMS + 1 terms is zero."""

    def vector(H, pull):
        return LAM * sum(jnp.linalg.matrix_power(jnp.eye(len(H)) - LAM * H, n) for n in range(TERMS + 1)) @ pull

    return root(lambda x: mean_local_hypergradient(x, vector))


LOCAL = {"hessian_lr": LAM, "neumann_terms": TERMS, "truncation": "full", "inner_lr": 1 / L, "local_steps": 1}


@pytest.mark.parametrize("kind", [fb.LocalBSGM, fb.LocalBSGVRM, fb.AdaFBiO, fb.LFedNest, fb.LFedNestSVRG])
def test_local_hessians_stop_at_the_floor_that_their_own_equation_predicts(kind):
    more: dict[str, Any] = {"forget": 0.5, "slow_after": 1e6}
    if kind in (fb.LFedNest, fb.LFedNestSVRG):
        more = {"inner_rounds": 60}
    if kind is fb.AdaFBiO:
        more["damping"] = 1.0  # where the estimates are zero, steps are the plain ones over this
    found, setup = end(ridge(), kind(**LOCAL, **more, outer_lr=0.1 / L_UPPER), 5000).x, ridge()
    predicted = setup.stationarity(local_root())
    assert float(predicted) > 1e-3  # off the solution, by far
    np.testing.assert_allclose(setup.stationarity(found), predicted, rtol=1e-3)
    np.testing.assert_allclose(found, local_root(), rtol=0, atol=1e-3)


def test_a_lower_level_of_each_clients_own_is_solved_exactly():
    """min_x mean_i f_i(x, y_i*(x)), with y_i* = H_i^{-1} (B_i x + b_i) and v_i* = H_i^{-1} A_i (y_i* - t_i)."""
    f = quadratic()
    own = lambda x: np.stack([np.linalg.solve(H, B @ x + b) for H, B, b in zip(f.H, f.B, f.b, strict=True)])

    def slope(x):
        pull = np.einsum("iab,ib->ia", f.A, own(x) - f.t)
        v = np.linalg.solve(f.H, pull[..., None])[..., 0]
        return CURVATURE * x + np.einsum("iab,ia->b", f.B, v) / len(f.H)

    curvature = np.linalg.eigvalsh(np.stack([slope(e) - slope(np.zeros(DX)) for e in np.eye(DX)])).max()
    steps = {"inner_lr": 0.2, "hessian_lr": 0.2, "outer_lr": 0.02 / curvature, "slow_after": 1e6}
    algorithm = fb.FedBiOAccLocal(**steps, local_steps=1, share_lower=True)
    result = end(on_quadratic(f), algorithm, 30_000)
    x = np.asarray(result.x)
    assert np.sum(slope(f.x) ** 2) > 0.1 and np.sum(slope(x) ** 2) < 1e-16
    assert np.sum(f.hypergradient(x) ** 2) > 1e-3  # it is another problem than everybody's
    np.testing.assert_allclose(result.y, own(x).mean(0), atol=1e-7)


# Where uncorrected local steps lead ----------------------------------------------------------------------------------------


UNEQUAL = unequal.steps()


@pytest.mark.parametrize(
    ("algorithm", "steps"),
    [
        (plain(fb.SimFBO, local_steps=5), (5,) * 8),
        (plain(fb.SimFBO, local_steps=3, server_lr=0.5), (3,) * 8),
        (plain(fb.FedBiO, local_steps=5), (5,) * 8),
        (plain(fb.MemFBO, local_steps=5), (5,) * 8),
        (plain(fb.SimFBO, client_steps=UNEQUAL), UNEQUAL),
        (plain(fb.ShroFBO, client_steps=UNEQUAL), UNEQUAL),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, fb.Algorithm) else str(value),
)
def test_local_steps_stop_where_the_mean_of_the_moves_is_zero(algorithm, steps):
    f, rates = quadratic(), (0.02, 0.03, 0.03)
    algorithm = dataclasses.replace(algorithm, outer_lr=rates[0], inner_lr=rates[1], hessian_lr=rates[2])
    z = unequal.fixed_point(f, rates, steps, isinstance(algorithm, fb.ShroFBO))
    result = end(on_quadratic(f), algorithm, 30_000)
    found = np.concatenate([result.x, result.y, attributes(result.state)["v"]])
    np.testing.assert_allclose(found, z, rtol=0, atol=1e-6 * np.abs(z).max())
    assert np.linalg.norm(f.hypergradient(z[:DX])) > 1e-3  # beside the solution


def test_unequal_steps_weigh_clients_in_simfbo_and_not_in_shrofbo():
    """With ever smaller steps SimFBO ends at the solution of the problem with weights tau_i, ShroFBO at the true one."""
    f = quadratic()
    weighted, true = unequal.weighted_solution(f, UNEQUAL), unequal.weighted_solution(f, None)
    mismatch = np.abs(weighted - true).max()
    np.testing.assert_allclose(f.hypergradient(true[:DX]), 0, atol=1e-12)
    assert mismatch > 0.1
    gaps = {"SimFBO": [], "ShroFBO": []}
    for scale in (0.1, 0.01, 0.001):
        rates = (0.02 * scale, 0.03 * scale, 0.03 * scale)
        for name, aim in (("SimFBO", weighted), ("ShroFBO", true)):
            gaps[name].append(np.abs(unequal.fixed_point(f, rates, UNEQUAL, name == "ShroFBO") - aim).max())
    for gap in gaps.values():  # of the order of the steps
        assert gap[0] / 20 < gap[1] < gap[0] / 5 and gap[1] / 12 < gap[2] < gap[1] / 8
    assert gaps["ShroFBO"][-1] < mismatch / 30

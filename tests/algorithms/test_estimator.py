"""The estimators against closed forms on a heterogeneous quadratic: shared/algorithms.md sections 2, 3 and 6.1.

The predictions are computed in numpy from the rows; each has wrong companions (an index off by one, another scale,
local instead of averaged Hessians) that must be seen to differ.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import fedbilevel as fb
from helpers.plain import plain
from helpers.quadratic import DY, estimate, flat, power, quadratic
from helpers.quadratic import inner as inner_loss

N, TAU, INNER_LR, HESSIAN_LR = 4, 3, 0.12, 0.2
STEPS = {"inner_lr": INNER_LR, "local_steps": TAU, "hessian_lr": HESSIAN_LR}
EXACT = 1e-12
Q0 = quadratic()
T, Z = Q0.t, Q0.z
H = Q0.hessians(T).mean(0)
M = np.eye(DY) - HESSIAN_LR * H


def aggitd(truncation, rounds=N):
    return plain(fb.AggITD, inner_rounds=rounds, truncation=truncation, **STEPS)


def fednest(truncation, terms=N):
    return plain(fb.FedNest, inner_rounds=3, neumann_terms=terms, truncation=truncation, **STEPS)


def close(one, other, tolerance=EXACT):
    np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * max(1.0, np.abs(other).max()))


def apart(one, other, least=1e-6):
    assert np.abs(np.asarray(one) - other).max() > least


@pytest.fixture(scope="module")
def counted():
    """The problem with an inner loss that counts how often it is traced."""
    traces = []

    def inner(x, y, e):
        traces.append(1)
        return inner_loss(x, y, e)

    return dataclasses.replace(Q0, problem=fb.Problem(inner, Q0.problem.outer)), traces


@pytest.fixture(scope="module")
def runs(counted):
    """(h for each Q, y^N for each Q, h of "full", y^N of "full", traces of the inner loss for each Q)."""
    problem, traces = counted
    hs, ys, seen = [], [], []
    for Q in range(N + 1):
        before = len(traces)
        h, y = estimate(problem, aggitd(Q), seed=Q)
        hs.append(h), ys.append(y), seen.append(len(traces) - before)
    return np.array(hs), np.array(ys), *estimate(problem, aggitd("full")), seen


# AggITD ---------------------------------------------------------------------------------------------------------------


def test_the_problem_is_heterogeneous_and_the_step_sizes_are_stable():
    curvatures = np.linalg.eigvalsh(Q0.hessians(T))
    assert curvatures[:, -1].max() > 3 * curvatures[:, -1].min()
    assert np.abs(np.linalg.eigvals(Q0.corrected_map(T, INNER_LR, TAU))).max() < 1
    assert np.abs(np.linalg.eigvals(M)).max() < 1
    apart(Q0.crosses(T, Z).mean(0), 0, 0.1)
    apart(Q0.outer_hessians().mean(0), np.diag(np.diag(Q0.outer_hessians().mean(0))), 0.1)


def test_the_mean_over_q_is_the_full_estimate(runs):
    hs, ys, full, y_full, _ = runs
    close(hs.mean(0), full)
    close(ys, np.tile(y_full, (N + 1, 1)))
    assert hs.std(0).max() > 0.1  # the single ones are not the estimate
    for wrong in (hs[:-1], hs[1:]):  # one Q forgotten
        apart(wrong.mean(0), full)


def expected(bias):
    """d_x f(x, y^N) - J(x, y^N) (v* + bias): what the estimate is on average."""
    best, y_N = Q0.solution(T), Q0.corrected_path(T, Z, INNER_LR, TAU, N)[-1]
    v_star = np.linalg.solve(H, Q0.outer_y(T, best).mean(0))
    return Q0.compose(T, y_N, v_star + bias(v_star, Z - best))


def bias_formula(last=N + 1, terms=N + 1, shift=0, lower_steps=TAU):
    """-M^last v* + lam sum_{q < terms} M^{N-q+shift} A P^q e0."""
    A, P = Q0.outer_hessians().mean(0), Q0.corrected_map(T, INNER_LR, lower_steps)

    def bias(v_star, e0):
        series = sum(power(M, N - q + shift) @ A @ power(P, q) @ e0 for q in range(terms))
        return -power(M, last) @ v_star + HESSIAN_LR * series

    return bias


def test_the_bias_formula_is_exact(runs):
    _, _, full, y_full, _ = runs
    close(y_full, Q0.corrected_path(T, Z, INNER_LR, TAU, N)[-1])
    close(full, expected(bias_formula()))


@pytest.mark.parametrize(
    "wrong",
    [{"last": N}, {"last": N + 2}, {"terms": N}, {"shift": 1}, {"lower_steps": 1}, {"lower_steps": TAU + 1}],
    ids=str,
)
def test_an_index_off_by_one_is_seen(runs, wrong):
    apart(runs[2], expected(bias_formula(**wrong)))


def test_each_q_is_one_term_of_the_series(runs):
    hs, path = runs[0], Q0.corrected_path(T, Z, INNER_LR, TAU, N)

    def term(Q, scale=N + 1, shift=0):
        r = power(M, N - Q + shift) @ Q0.outer_y(T, path[Q]).mean(0)
        return Q0.compose(T, path[N], HESSIAN_LR * scale * r)

    for Q in range(N + 1):
        close(hs[Q], term(Q))
        apart(hs[Q], term(Q, scale=N))
        apart(hs[Q], term(Q, shift=1))


def test_another_truncation_number_does_not_trace_the_losses_again(runs, counted):
    seen, (problem, traces) = runs[-1], counted
    before = len(traces)
    estimate(problem, aggitd(0))  # surely compiled: what is traced now is the protocol, on shapes alone
    again = len(traces) - before
    assert seen[1:] == [again] * N
    assert seen[0] > again  # the count sees a compilation


@pytest.fixture(scope="module")
def converged():
    """AggITD with so many rounds that nothing but rounding errors is left."""
    return estimate(Q0, aggitd("full", rounds=1000))


def test_many_rounds_give_the_hypergradient(converged, runs):
    h, y = converged
    close(y, Q0.solution(T), 1e-10)
    close(h, Q0.hypergradient(T), 1e-10)
    apart(runs[2], Q0.hypergradient(T), 1e-3)  # few rounds do not


def test_many_rounds_agree_with_the_reference(converged):
    close(converged[0], flat(fb.reference.hypergradient(Q0.problem, Q0.data, Q0.x, Q0.y)), 1e-10)


# FedNest --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nested():
    """(the mean of h over N' = 0..N-1, h of "full", y^T)."""
    hs = [estimate(Q0, fednest(cut))[0] for cut in range(N)]
    full, y_T = estimate(Q0, fednest("full"))
    close(y_T, Q0.corrected_path(T, Z, INNER_LR, TAU, 3)[-1])
    return np.mean(hs, axis=0), full, y_T


def neumann(y, exponent):
    """h with v = v* - (I - lam H)^exponent v*, v* = H^{-1} d_y f at y; equally the sum of the first `exponent` terms."""
    b = Q0.outer_y(T, y).mean(0)
    v_star = np.linalg.solve(H, b)
    v = v_star - power(M, exponent) @ v_star
    close(v, HESSIAN_LR * sum(power(M, n) @ b for n in range(exponent)))
    return Q0.compose(T, y, v)


def test_fednest_is_on_average_a_sum_of_n_terms(nested):
    mean, _, y = nested
    close(mean, neumann(y, N))
    apart(mean, neumann(y, N - 1))
    apart(mean, neumann(y, N + 1))


def test_fednest_full_is_the_sum_of_n_plus_one_terms(nested):
    _, full, y = nested
    close(full, neumann(y, N + 1))
    apart(full, neumann(y, N))
    apart(full, neumann(y, N + 2))


# LFedNest -------------------------------------------------------------------------------------------------------------


def test_lfednest_estimates_the_mean_of_local_hypergradients_instead():
    light = plain(
        fb.LFedNest,
        inner_rounds=1500,
        inner_lr=0.1,
        local_steps=1,
        neumann_terms=1500,
        hessian_lr=0.1,
        truncation="full",
    )
    h, y = estimate(Q0, light)
    best = Q0.solution(T)
    close(y, best, 1e-10)
    parts = zip(Q0.outer_x(T, best), Q0.crosses(T, best), Q0.hessians(T), Q0.outer_y(T, best), strict=True)
    local = np.mean([d_x - J @ np.linalg.solve(H_i, d_y) for d_x, J, H_i, d_y in parts], axis=0)
    close(h, local, 1e-9)
    apart(h, Q0.hypergradient(T), 0.1)  # and no number of terms brings it to the hypergradient

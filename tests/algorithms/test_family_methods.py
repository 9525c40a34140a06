"""What single methods of the family owe: identities, first order only, unbiased chains, a bias by its formula."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.watch import attributes
from fedbilevel_studies.theory import runner, unequal
from fedbilevel_studies.theory.family import CURVATURE, DX, DY
from helpers.family import STEPS, end, on_quadratic, power, quadratic, ridge
from helpers.plain import plain


class FirstOrder(fb.Problem):
    """A problem that has no second derivatives to give."""

    def hessian_vector(self, x, y, v, rows):
        raise RuntimeError("a second derivative was asked for")

    def cross_vector(self, x, y, v, rows):
        raise RuntimeError("a second derivative was asked for")


FIRST = ("memfbo", "fedf2sa", "simfbo", "aggitd")
REST = [pytest.param(name, marks=pytest.mark.slow) for name in fb.algorithms.ALGORITHMS if name not in FIRST]


@pytest.mark.parametrize("name", [*FIRST, *REST])
def test_first_order_methods_ask_for_no_second_derivative(name):
    setup = on_quadratic(quadratic())
    only = dataclasses.replace(setup, problem=FirstOrder(setup.problem.inner, setup.problem.outer))
    algorithm = fb.algorithms.checked(name)[0]
    if name in fb.algorithms.FIRST_ORDER:
        end(only, algorithm, 3)
    else:
        with pytest.raises(fb.InputError, match="a second derivative was asked for"):
            end(only, algorithm, 3)


def test_central_differences_are_the_derivatives_on_a_quadratic():
    setup = ridge()  # quadratic in y, with third derivatives in (x, y, y): central differences are exact there too
    one, other = (end(setup, kind(**STEPS, local_steps=2), 20) for kind in (fb.SimFBO, fb.MemFBO))
    np.testing.assert_allclose(one.x, other.x, rtol=0, atol=1e-10)


def test_the_same_method_by_other_names():
    setup = on_quadratic(quadratic())
    steps = {"inner_lr": 0.05, "hessian_lr": 0.05, "outer_lr": 0.02, "local_steps": 3}
    x = lambda algorithm, **options: end(setup, algorithm, 5, **options).x
    cohort = {"engine": fb.Simulation(cohort=3)}
    np.testing.assert_allclose(x(fb.FedBiO(**steps), **cohort), x(fb.SimFBO(**steps), **cohort), atol=1e-15)
    np.testing.assert_allclose(x(fb.ShroFBO(**steps), **cohort), x(fb.SimFBO(**steps), **cohort), atol=1e-14)
    named = fb.SimFBO(**{**steps, "client_steps": (3,) * 8})
    np.testing.assert_allclose(x(named), x(fb.SimFBO(**steps)), atol=1e-15)
    assert np.abs(x(fb.SimFBO(**steps, server_lr=0.5)) - x(fb.SimFBO(**steps))).max() > 1e-3
    # STORM that forgets everything is plain local steps, after a first one that only looks
    forgetful = fb.FedBiOAcc(**{**steps, "local_steps": 1}, forget=1.0, slow_after=1e12)
    plain = dataclasses.replace(fb.FedBiO(**steps), local_steps=1)
    np.testing.assert_allclose(x(forgetful), end(setup, plain, 4).x, atol=1e-9)


def test_one_client_and_one_local_step_is_a_step_along_d():
    f = quadratic()
    alone = dataclasses.replace(f, **{name: getattr(f, name)[:1] for name in "HBbAt"})
    M, m = unequal.linear(alone, 0)
    z, rates = np.concatenate([f.x, f.y, np.zeros(DY)]), np.repeat([0.02, 0.05, 0.04], [DX, DY, DY])
    for _ in range(7):
        z = z - rates * (M @ z + m)
    for kind in (fb.SimFBO, fb.ShroFBO, fb.FedBiO, fb.MemFBO, fb.FedMSA):
        more = {"forget": 1.0} if kind is fb.FedMSA else {}
        algorithm = kind(outer_lr=0.02, inner_lr=0.05, hessian_lr=0.04, local_steps=1, **more)
        np.testing.assert_allclose(end(on_quadratic(alone), algorithm, 7).x, z[:DX], atol=1e-10)


def test_the_projection_keeps_v_within_its_radius():
    setup = on_quadratic(quadratic())
    steps = {"inner_lr": 0.1, "hessian_lr": 0.1, "outer_lr": 0.02, "local_steps": 1}
    size = lambda result: float(np.linalg.norm(attributes(result.state)["v"]))
    free, held = end(setup, fb.SimFBO(**steps), 300), end(setup, fb.SimFBO(**steps, radius=0.3), 300)
    assert size(free) > 0.6 and size(held) <= 0.3 + 1e-12


def test_fedmbos_chains_are_unbiased_and_their_variance_falls_with_their_number():
    f, lam, N, draws = quadratic(), 0.5, 4, 20_000
    setup = on_quadratic(f)
    P, best = f.corrected(f.x, 0.3, 1)
    y = best + power(P, 2) @ (f.y - best)
    series = lam * sum(power(np.eye(DY) - lam * f.H.mean(0), n) for n in range(N))
    expected = f.compose(f.x, series @ f.outer_y(y).mean(0))
    spreads = {}
    for chains in (1, 4):
        algorithm = plain(fb.FedMBO, inner_rounds=2, inner_lr=0.3, hessian_lr=lam, neumann_terms=N, chains=chains)
        h = runner.draws(setup, algorithm, runner.hypergradient, draws)
        error = np.sqrt(h.var(axis=0, ddof=1) / draws)
        assert (np.abs(h.mean(0) - expected) < 5 * error).all() and error.max() < 0.02 * np.linalg.norm(expected)
        spreads[chains] = h.var(axis=0, ddof=1).sum()
    assert 3.7 < spreads[1] / spreads[4] < 4.3


@pytest.mark.parametrize("p", [1.0, 30.0])
def test_the_penalty_is_off_by_its_formula(p):
    f = quadratic()
    algorithm = plain(fb.FedF2SA, inner_rounds=1500, inner_lr=0.1, local_steps=3, penalty=p)
    at = on_quadratic(f)
    h, y = fb.estimate_hypergradient(at.problem, at.data, algorithm, at.x, at.y, key=at.key)
    H, A = f.H.mean(0), f.A.mean(0)
    solution = f.solution(f.x)
    apart = -np.linalg.solve(A + p * H, f.outer_y(solution).mean(0))  # u - y*
    np.testing.assert_allclose(y, solution, atol=1e-9)
    np.testing.assert_allclose(h, CURVATURE * f.x - p * f.B.mean(0).T @ apart, atol=1e-7 * p)
    assert np.linalg.norm(h - f.hypergradient(f.x)) > 0.01


def test_fedmsa_looks_at_all_clients_and_follows_the_mean_exactly():
    """With everyone's rows its estimate is D itself, whatever it forgets; the cohort moves along it."""
    setup = on_quadratic(quadratic())
    x = [
        end(setup, fb.FedMSA(inner_lr=0.1, hessian_lr=0.1, outer_lr=0.05, local_steps=1, forget=forget), 6,
            engine=fb.Simulation(cohort=2)).x
        for forget in (1.0, 0.3)
    ]  # fmt: skip
    plain = end(setup, fb.SimFBO(inner_lr=0.1, hessian_lr=0.1, outer_lr=0.05, local_steps=1), 6).x
    np.testing.assert_allclose(x[0], plain, atol=1e-12)
    np.testing.assert_allclose(x[1], plain, atol=1e-12)


@pytest.mark.parametrize("kind", [fb.FedF2SA, fb.FedMSA, fb.SimFBO, fb.AdaFBiO, fb.FedMBO])
def test_nonsense_is_refused(kind):
    for wrong in ({"inner_lr": -1.0}, {"outer_lr": float("nan")}, {"local_steps": 0}):
        with pytest.raises(fb.InputError, match=next(iter(wrong))):
            kind(**wrong)


def test_nonsense_of_single_methods_is_refused():
    setup = on_quadratic(quadratic())
    for make, what in (
        (lambda: fb.SimFBO(client_steps=(1, 0)), "client_steps"),
        (lambda: fb.SimFBO(client_steps="many"), "client_steps"),
        (lambda: fb.SimFBO(client_steps="1,,5"), "client_steps"),
        (lambda: fb.FedMSA(forget=2.0), "at most 1"),
        (lambda: fb.LocalBSGM(forget=1.5), "at most 1"),
        (lambda: fb.FedMBO(truncation="full"), "truncation"),
        (lambda: fb.AdaFBiO(truncation=9, neumann_terms=5), "truncation"),
        (lambda: fb.SimFBO(radius=-1.0), "radius"),
        (lambda: end(setup, fb.SimFBO(client_steps=(1, 2)), 1), "there are 8 clients"),
    ):
        with pytest.raises(fb.InputError, match=what):
            make()
    assert fb.SimFBO(client_steps="1, 2,3").client_steps == (1, 2, 3)
    assert eqx.tree_equal(fb.SimFBO(radius=None), fb.SimFBO())

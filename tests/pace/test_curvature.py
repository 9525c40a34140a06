"""`hessian_lr="auto"`: how near the measured curvature is, what it costs, and where a step from the mean Hessian fails."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax.tree
import pytest

import fedbilevel as fb
from fedbilevel.algorithm import component
from fedbilevel.pace.curvature import AutoStep, remembered
from fedbilevel.pace.lanczos import STEPS, extend, krylov, largest_ritz_value
from helpers.plain import plain
from helpers.quadratic import estimate, quadratic

KEY = jax.random.key(0)
KINDS = [kind for kind in fb.algorithms.ALGORITHMS.values() if "hessian_lr" in kind.__dataclass_fields__]


# The measurement ------------------------------------------------------------------------------------------------------


def spectra(kind, dim, draw, many=40):
    """(many, dim) positive eigenvalues."""
    uniform = draw.uniform(0.01, 1, (many, dim))
    if kind == "decaying":
        return uniform * 10.0 ** -np.linspace(0, 6, dim)
    if kind == "outlier":
        uniform[:, 0] = 5.0
    return uniform


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 10, 100])
@pytest.mark.parametrize("kind", ["uniform", "decaying", "outlier"])
def test_the_largest_curvature_is_found_within_a_fifth_and_never_exceeded(kind, dim):
    draw = np.random.default_rng(dim)
    eigenvalues = spectra(kind, dim, draw)
    frames = np.linalg.qr(draw.normal(size=(len(eigenvalues), dim, dim)))[0]
    matrices = np.einsum("nij,nj,nkj->nik", frames, eigenvalues, frames)

    def measure(matrix):
        like = jnp.zeros(dim)
        basis = jax.lax.fori_loop(0, STEPS, lambda t, b: extend(t, b, matrix @ b["v"]), krylov(like))
        return largest_ritz_value(basis), basis["diagonal"][0]

    measured, first = (np.asarray(each) for each in jax.jit(jax.vmap(measure))(matrices))
    true = eigenvalues.max(axis=1)
    assert (measured <= true * (1 + 1e-10)).all() and (measured >= 0.8 * true).all()
    if dim <= STEPS:
        np.testing.assert_allclose(measured, true, rtol=1e-5 if kind == "decaying" else 1e-9)
    if dim > 1:
        assert (first < 0.8 * true).any()  # one product does not do


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_it_is_measured_in_other_precisions_too(dtype):
    y = {"a": jnp.zeros(3, dtype), "b": jnp.zeros((), dtype)}
    scale = {"a": jnp.asarray([3.0, 1.0, 0.5], dtype), "b": jnp.asarray(2.0, dtype)}
    basis = krylov(y)
    for t in range(STEPS):
        basis = extend(t, basis, optax.tree.mul(scale, basis["v"]))
    measured = largest_ritz_value(basis)
    assert measured.dtype == dtype
    assert float(measured) == pytest.approx(3.0, rel=4 * float(jnp.finfo(dtype).eps) ** 0.5)


def test_the_step_is_that_of_the_clients_mean_curvature():
    q = quadratic()
    largest = np.linalg.eigvalsh(q.hessians(q.t))[:, -1]  # four dimensions: five steps are exact
    assert largest.max() > 1.1 * largest.mean() > 1.1 * np.linalg.eigvalsh(q.hessians(q.t).mean(0)).max()
    common = {"inner_rounds": 4, "inner_lr": 0.1, "truncation": "full"}
    h, _ = estimate(q, plain(fb.AggITD, hessian_lr="auto", **common))
    fixed = lambda lam: estimate(q, plain(fb.AggITD, hessian_lr=lam, **common))[0]
    np.testing.assert_allclose(h, fixed(1 / (1.2 * largest.mean())), rtol=0, atol=1e-9)
    assert np.abs(h - fixed(1 / (1.3 * largest.mean()))).max() > 1e-3


# What it costs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "engine", "batch_size", "more"),
    [
        (fb.AggITD, fb.Simulation(), None, 1),
        (fb.AggITD, fb.Loopback(), None, 1),
        (fb.AggITD, fb.Simulation(cohort=1), None, 2),  # everybody is asked, one after the other
        (fb.LFedNest, fb.Simulation(), 2, 1),
    ],
)
def test_the_rounds_of_a_measurement_are_counted(kind, engine, batch_size, more):
    q = quadratic(clients=2, sizes=((3, 3),))
    algorithm = plain(kind, inner_rounds=1, local_steps=1, hessian_lr="auto", batch_size=batch_size)
    result = fb.solve(q.problem, q.data, algorithm, q.x, q.y, 12, key=KEY, engine=engine)
    rounds, down = (np.diff(result.history.column(name)) for name in ("rounds", "bytes_down"))
    usual = 5 if kind is fb.AggITD else 2
    np.testing.assert_array_equal(rounds, np.add(usual, [more, *[0] * 11]))
    assert (result.protocol.rounds_most, result.protocol.rounds_rarely) == (usual, more)
    if kind is fb.LFedNest:  # whose iterations are alike
        measured = {k for k in range(1, 12) if down[k] > down[3]}
        assert measured == {1, 2, 4, 8, 10}


class Asking(fb.AggITD):
    """An algorithm of one's own, which asks for its step by itself."""

    paced = False


class AskingAlone(fb.LFedNest):
    """The same, of factors that are the clients' own."""

    paced = False


@pytest.mark.parametrize(
    ("kind", "engine", "batch_size", "more", "soon"),
    [
        (Asking, fb.Simulation(), None, 5, 5),
        (Asking, fb.Loopback(), None, 5, 5),
        (Asking, fb.Simulation(cohort=1), None, 5, 1),
        (AskingAlone, fb.Simulation(), 2, 5, 1),
        (AskingAlone, fb.Simulation(), None, 1, 1),  # all that there is to ask is asked in one round
    ],
)
def test_an_algorithm_may_ask_by_itself(kind, engine, batch_size, more, soon):
    q = quadratic(clients=2, sizes=((3, 3),))
    algorithm = plain(kind, inner_rounds=1, local_steps=1, hessian_lr="auto", batch_size=batch_size)
    result = fb.solve(q.problem, q.data, algorithm, q.x, q.y, 42, key=KEY, engine=engine)
    rounds = np.diff(result.history.column("rounds"))
    usual = 5 if kind is Asking else 2
    extra = [more if k % 20 == 0 else soon if k in (1, 2, 4, 8, 16) else 0 for k in range(42)]
    np.testing.assert_array_equal(rounds, np.add(usual, extra))
    assert result.protocol.rounds_most == usual + more


def test_the_step_that_is_asked_for_is_that_of_the_mean_hessian():
    q = quadratic()
    largest = np.linalg.eigvalsh(q.hessians(q.t).mean(0)).max()  # four dimensions: five steps are exact
    common = {"inner_rounds": 4, "inner_lr": 0.1, "truncation": "full"}
    h, _ = estimate(q, plain(Asking, hessian_lr="auto", **common))
    np.testing.assert_allclose(
        h, estimate(q, plain(fb.AggITD, hessian_lr=1 / (1.2 * largest), **common))[0], rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("cohort", [None, 1])
def test_a_curvature_that_grows_at_first_is_followed(cohort):
    inner = lambda x, y, example: 0.5 * jnp.exp(x) * y**2 - example * y
    problem = fb.Problem(inner, lambda x, y, example: -x + 0 * (y + example))
    data = fb.FederatedData.stack([np.ones(1)] * 2, [np.ones(1)] * 2)
    algorithm = plain(Asking, inner_rounds=1, inner_lr=1e-3, local_steps=1, outer_lr=1.0, hessian_lr="auto")
    run = lambda iterations: fb.solve(
        problem,
        data,
        algorithm,
        jnp.zeros(()),
        jnp.zeros(()),
        iterations,
        key=KEY,
        engine=fb.Simulation(cohort=cohort),
        check=False,  # the outer loss is flat in y: x is driven from outside
    )
    for iterations, measured in ((1, 0), (2, 1), (4, 2), (5, 4), (8, 4), (9, 8)):  # x grows by one in each iteration
        largest = remembered(run(iterations).state).largest
        np.testing.assert_allclose(largest, np.exp(measured), rtol=1e-6)


def test_the_steps_travel_with_the_messages():
    q = quadratic(clients=2, sizes=((3, 3),))
    numbers = {"inner_lr": 0.01, "hessian_lr": 0.01, "outer_lr": 0.05}
    of = lambda **steps: (
        fb.solve(
            q.problem, q.data, fb.AggITD(inner_rounds=2, truncation="full", **numbers | steps), q.x, q.y, 4, key=KEY
        ).history
    )
    without = np.diff(of().column("bytes_down"))[3]  # no measurement in the fourth
    for found in (1, 2, 3):
        auto = of(**dict.fromkeys(list(numbers)[:found], "auto"))
        assert np.diff(auto.column("bytes_down"))[3] - without == 2 * 8 * 7 * found  # two clients, seven messages


# Curvature in single clients or rows ----------------------------------------------------------------------------------

SPIKES = 6
GOAL = np.arange(1.0, SPIKES + 1)
SPIKY = fb.Problem(
    lambda x, y, e: 0.5 * (y - x) @ e["H"] @ (y - x),
    lambda x, y, e: 0.5 * jnp.sum((y - GOAL) ** 2),
)


def spiky(scale, pooled):
    """H_i = scale (6 e_i e_i' + I/10), of one scale or of one for each: of one the mean is 1.1 scale I.

    At x = y = GOAL every gradient of g_i and of f is zero.
    """
    scale = np.reshape(scale, (-1, 1, 1))
    hessians = scale * (6 * np.einsum("ij,ik->ijk", np.eye(SPIKES), np.eye(SPIKES)) + 0.1 * np.eye(SPIKES))
    rows = [{"H": hessians}] if pooled else [{"H": H[None]} for H in hessians]
    return fb.FederatedData.stack(rows, rows)


def distance(hessian_lr, kind: Any = fb.AggITD, scale=1.0, pooled=False, cohort=None, iterations=400, **settings):
    """How far x and y are from the solution at the end, in starting distances; infinite if the run diverges."""
    data, start = spiky(scale, pooled), np.zeros(SPIKES)
    algorithm = plain(
        kind,
        inner_rounds=20,
        inner_lr=0.1 / np.max(scale),
        local_steps=1,
        hessian_lr=hessian_lr,
        outer_lr=0.05,
        truncation="full",
        **settings,
    )
    try:
        engine = fb.Simulation(cohort)
        result = fb.solve(
            SPIKY, data, algorithm, start, start, iterations, key=KEY, engine=engine, evaluate_every=iterations
        )
    except fb.Diverged:
        return np.inf
    return np.linalg.norm([result.x - GOAL, result.y - GOAL]) / np.linalg.norm(GOAL)


@pytest.mark.parametrize(
    "sampled", [{"cohort": 2}, {"pooled": True, "batch_size": 1}], ids=["two of six clients", "one of six rows"]
)
def test_a_step_from_the_mean_hessian_grows_where_clients_or_rows_are_sampled(sampled):
    assert distance(1 / 1.1, **sampled) > 10
    assert distance("auto", **sampled) < 1e-3
    assert distance(1 / 1.1) < 1e-3  # with everyone it does


class MeanStep(fb.LFedNest):
    """Wrong on purpose: the step of the clients' mean curvature for factors that are the clients' own."""

    @component
    def hessian(self):
        return AutoStep(self.hessian_lr, self.batch_size)


def test_local_factors_need_the_largest_curvature_of_the_clients():
    data, start = spiky([10, *[0.5] * 5], False), np.zeros(SPIKES)
    steps = {
        kind: fb.solve(SPIKY, data, plain(kind, hessian_lr="auto"), start, start, 1, key=KEY).history[-1]["hessian_lr"]
        for kind in (fb.LFedNest, MeanStep)
    }
    assert steps[fb.LFedNest] == pytest.approx(1 / (1.2 * 61))
    assert steps[MeanStep] > 2 / 61  # beyond which a client's own factors grow


def test_where_the_default_step_diverges_the_measured_one_does_not():
    assert distance(0.01, scale=300.0) == np.inf
    assert distance("auto", scale=300.0) < 1e-3


# Everywhere -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [fb.AggITD, fb.Lockstep, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (fb.FedNest, fb.FedMBO))]
)
def test_what_is_measured_is_alike_in_both_engines(kind):
    """Of every algorithm in `test_automatic.test_every_algorithm_runs_alike_on_both_engines`."""
    q = quadratic(seed=1, clients=3, sizes=((4, 4),))
    turns = {"inner_rounds": 2} if "inner_rounds" in kind.__dataclass_fields__ else {}
    algorithm = plain(kind, **turns, hessian_lr="auto", local_steps=2, batch_size=2)
    ends = [
        fb.solve(q.problem, q.data, algorithm, q.x, q.y, 2, key=KEY, engine=engine)
        for engine in (fb.Simulation(cohort=2), fb.Loopback(cohort=2))
    ]
    assert fb.testing.distance(ends[0].state, ends[1].state) <= 1e-12
    rows = [[row[name] for name in ("rounds", "bytes_down", "bytes_up")] for row in ends[0].history]
    assert rows == [[row[name] for name in ("rounds", "bytes_down", "bytes_up")] for row in ends[1].history]
    curvature = np.asarray(remembered(ends[0].state).largest)
    assert 0.1 < curvature < 100


@pytest.mark.slow
def test_the_conformance_suite_passes():
    assert fb.testing.check_algorithm(fb.AggITD(inner_rounds=2, hessian_lr="auto")).passed


def test_another_word_is_refused():
    with pytest.raises(
        fb.InputError, match=r"hessian_lr=...\) is a step size, a positive number or 'auto'; got 'automatic'"
    ):
        fb.AggITD(hessian_lr="automatic")
    with pytest.raises(fb.InputError, match="outer_lr"):
        fb.AdaFBiO(outer_lr="auto")


def test_the_command_line_takes_it(fedbilevel):
    words = ("protocol", "quadratic", "--algorithm", "aggitd", "--set", "inner_rounds=3", "--json")
    code, out, _ = fedbilevel(*words, "--set", "hessian_lr=auto")
    assert code == 0 and (json.loads(out)["rounds"], json.loads(out)["rounds_rarely"]) == (2 * 3 + 3, 1)
    assert json.loads(fedbilevel(*words)[1])["rounds"] == 2 * 3 + 3
    code, _, errors = fedbilevel(*words, "--set", "hessian_lr=automatic")
    assert code == 2 and "hessian_lr" in errors

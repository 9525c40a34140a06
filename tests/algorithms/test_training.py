"""Training against numpy, step by step: its fixed point, its measured step, and what it costs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax.tree
import pytest

import fedbilevel as fb
from fedbilevel.algorithms.components.inner_step import rounds_of_first, share_of_curvature, watched_descent
from fedbilevel.algorithms.training import Training
from fedbilevel.engines.base import Carry
from helpers.quadratic import DX, DY, flat, orthogonal, quadratic

Q = quadratic()
CLIENTS = len(Q.inner)
STIFFEST = np.linalg.eigvalsh(Q.hessians(Q.t))[:, -1].max()


def by_hand(q, rounds, lr, local_steps):
    """y after so many rounds with everyone and all rows."""
    z, kept, mean, H = q.z, np.zeros((CLIENTS, DY)), np.zeros(DY), q.hessians(q.t)
    for _ in range(rounds):
        own, zs = H @ z - q.targets(q.t), np.tile(z, (CLIENTS, 1))
        for _ in range(local_steps):
            zs = zs - lr * (np.einsum("ijk,ik->ij", H, zs) - q.targets(q.t) - kept + mean)
        z, kept, mean = zs.mean(0), own, own.mean(0)
    return z


def run(q, algorithm, iterations, **options):
    return fb.solve(q.problem, q.data, algorithm, q.x, q.y, iterations, key=jax.random.key(0), check=False, **options)


@pytest.mark.parametrize("local_steps", [1, 3])
def test_iterations_are_those_made_by_hand(local_steps):
    result = run(Q, Training(0.05, local_steps), 4)
    np.testing.assert_allclose(flat(result.y), by_hand(Q, 4, 0.05, local_steps), atol=1e-13)
    assert np.abs(flat(result.y) - by_hand(Q, 4, 0.05, local_steps + 1)).max() > 1e-3
    np.testing.assert_array_equal(flat(result.x), Q.t)


@pytest.mark.parametrize("local_steps", [1, 5])
def test_the_step_follows_the_stiffest_client_and_the_number_of_local_steps(local_steps):
    result = run(Q, Training(local_steps=local_steps), 4)
    lr = share_of_curvature(local_steps, CLIENTS, CLIENTS) / (1.2 * STIFFEST)
    np.testing.assert_allclose(result.history.column("inner_lr")[1:], lr, rtol=1e-10)
    np.testing.assert_allclose(flat(result.y), by_hand(Q, 4, lr, local_steps), atol=1e-12)
    assert [row["rounds"] for row in result.history] == [0, 2, 4, 6, 7]  # iterations 0, 1 and 2 measure


def test_how_long_a_step_may_be():
    share = share_of_curvature
    assert [share(T, 9, 9) for T in (1, 2, 3)] == [1.0] * 3
    assert 0.55 < share(5, 9, 9) < 0.65 and 2.9 < 1000 * share(1000, 9, 9) < 3.1
    assert share(5, 9, 1) == pytest.approx(1 / 15) and share(1, 9, 1) == pytest.approx(1 / 3)
    assert share(5, 9, 1) < share(5, 9, 3) < share(5, 9, 9)
    assert share(1, 1, 1) == 1.0
    assert [rounds_of_first(9, size) for size in (9, 8, 2, 1)] == [1, 2, 5, 9]
    assert rounds_of_first(1_000, 1) == 20


@pytest.mark.parametrize("cohort", [None, 2])
def test_nothing_moves_where_every_gradient_is_known(cohort):
    best = jax.flatten_util.ravel_pytree(Q.y)[1](jnp.asarray(Q.solution(Q.t)))
    algorithm = Training(0.05, 3)
    begin = algorithm.init(Q.x, best)
    execution = fb.Simulation(cohort=cohort).bind(Q.problem, Q.data, algorithm, begin, jax.random.key(0))
    own = Q.hessians(Q.t) @ flat(best) - Q.targets(Q.t)
    stacked = jax.vmap(jax.flatten_util.ravel_pytree(Q.y)[1])(jnp.asarray(own))
    moved = []
    for clients in (stacked, optax.tree.zeros_like(stacked)):
        after, _ = execution.advance(algorithm, Carry(begin, clients, 0), 5, np.inf)
        moved.append(np.abs(flat(after.state.y) - flat(best)).max())
    assert moved[0] < 1e-12 and moved[1] > 1e-3


@pytest.mark.parametrize("q", [Q, orthogonal(Q)], ids=["ragged", "orthogonal"])
@pytest.mark.parametrize("cohort", [None, 2])
@pytest.mark.parametrize("inner_lr", ["auto", 0.01])
def test_the_error_falls_geometrically_to_nothing(q, cohort, inner_lr):
    """No floor from clients that differ, nor from cohorts as long as all rows are used."""
    result = run(q, Training(inner_lr), 3_000, engine=fb.Simulation(cohort=cohort), evaluate_every=100)
    size = result.history.column("lower_gradient_norm")[1:]
    rounding = 1e-12 * size[0]
    falling = size[: 1 + int(np.argmax(size < rounding))]
    assert np.all(falling[1:] < 0.9 * falling[:-1])
    np.testing.assert_allclose(flat(result.y), q.solution(q.t), rtol=0, atol=1e-10)


def test_what_it_exchanges():
    protocol = fb.protocol(Training(0.1), Q.problem, Q.data, Q.x, Q.y)
    assert (protocol.rounds, protocol.bytes_down) == (1, 8 * CLIENTS * (DX + 2 * DY))
    assert protocol.bytes_up == 8 * CLIENTS * 2 * DY
    measured = fb.protocol(Training(), Q.problem, Q.data, Q.x, Q.y)
    assert (measured.rounds_most, measured.bytes_up_most) == (2, protocol.bytes_up + 2 * 8 * CLIENTS)
    cohort = fb.protocol(Training(), Q.problem, Q.data, Q.x, Q.y, engine=fb.Simulation(cohort=2))
    assert cohort.rounds_most == 3 + 1  # everybody, cohort by cohort


def stiff(factor=1e6):
    """One client of five is steeper than the rest."""
    inside = [dict(e, a=e["a"] * (factor**0.5 if i == 3 else 1)) for i, e in enumerate(Q.inner)]
    return dataclasses.replace(Q, data=fb.FederatedData.stack(inside, Q.outer), inner=inside)


def test_everybody_is_measured_before_anybody_moves():
    """A cohort of one that left the steep client out would throw y away."""
    q = stiff()
    result = run(q, Training(), 3, engine=fb.Simulation(cohort=1))
    lr = share_of_curvature(5, CLIENTS, 1) / (1.2 * np.linalg.eigvalsh(q.hessians(q.t))[:, -1].max())
    np.testing.assert_allclose(result.history[1]["inner_lr"], lr, rtol=1e-6)
    assert (result.history.column("inner_lr")[1:] > 0).all()
    assert [row["rounds"] for row in result.history] == [0, 6, 8, 10]
    assert [row["halvings"] for row in result.history] == [0] * 4


@pytest.mark.parametrize(("local_steps", "batch_size"), [(5, None), (1, None), (3, 2)])
def test_a_round_that_would_throw_y_away_moves_nothing(local_steps, batch_size):
    """The steep client was not there to be measured: the others are all that is known."""
    q = stiff()
    algorithm = Training(local_steps=local_steps, batch_size=batch_size)
    begin = algorithm.init(q.x, q.y)
    assert begin.curvature is not None
    known = dataclasses.replace(begin.curvature, largest=jnp.asarray(STIFFEST), iteration=jnp.asarray(3, jnp.int32))
    begin = dataclasses.replace(begin, curvature=known)
    execution = fb.Simulation().bind(q.problem, q.data, algorithm, begin, jax.random.key(0))
    start = dataclasses.replace(execution.start(algorithm, begin), iteration=3)
    after, record = execution.advance(algorithm, start, 1, np.inf)
    assert record.info["inner_lr"].tolist() == [0.0]
    np.testing.assert_array_equal(flat(after.state.y), q.z)
    assert np.abs(flat(after.state.control)).max() > 1  # what was learnt of everybody stays
    later, record = execution.advance(algorithm, after, 40, np.inf)
    assert record.info["inner_lr"][-1] > 0
    size = lambda z: np.linalg.norm((q.hessians(q.t) @ flat(z) - q.targets(q.t)).mean(0))
    assert size(later.state.y) < size(q.y)


def path(w, lr, local_steps, gradient=lambda w: 3.0 * w):
    """(The end of local steps from w, the steepest curvature on the way)."""
    along = lambda s: lambda z: {"w": gradient(z["w"])}
    begin = along(0)({"w": w}), {"w": jnp.zeros_like(w)}
    end, steepest = watched_descent(along, {"w": w}, *begin, jnp.asarray(lr), local_steps, True)
    return end["w"], steepest


@pytest.mark.parametrize(("local_steps", "lr"), [(1, 1.5), (4, 0.8)])
def test_the_curvature_of_a_path(local_steps, lr):
    """Of an eigenvector's it is the eigenvalue, where steps are too long; where rounding makes it, there is none."""
    end, steepest = path(jnp.asarray([1.0, -2.0]), lr, local_steps)
    np.testing.assert_allclose(end, (1 - 3 * lr) ** local_steps * np.asarray([1.0, -2.0]), rtol=1e-13)
    np.testing.assert_allclose(steepest, 3.0, rtol=1e-10)
    assert path(jnp.asarray([1.0, -2.0]), 0.2, local_steps)[1] == 0  # nothing grows
    assert path(jnp.zeros(2), lr, local_steps)[1] == 0
    assert not np.isfinite(path(jnp.full(2, np.nan), lr, local_steps)[1])


@pytest.mark.parametrize("length", [1e-2, 1e-6])
def test_a_kink_is_no_curvature(length):
    """The gradient jumps by more than its own length, however short the step across."""
    valley = lambda w: jnp.where(w > 0, jnp.asarray([1.0, 1.0]), jnp.asarray([1.0, -0.5]))
    end, steepest = path(jnp.asarray([1.0, length / 2]), length, 4, valley)  # across, and two steps back
    np.testing.assert_allclose(end, [1 - 4 * length, -length / 2], atol=1e-12)
    assert steepest == 0


@pytest.mark.parametrize("company", [{}, {"cohort": 2}], ids=["everyone", "cohort"])
def test_a_network_with_kinks_is_trained_to_its_end(company):
    """Few rows at a client, so that one row's kink counts: steps once fell to 1e-12 on the way."""
    draw = np.random.default_rng(3)
    centres = draw.normal(size=(4, 6))
    rows = [
        {"a": centres[i] + draw.normal(size=(n, 6)), "label": np.where(draw.random(n) < 0.8, i, draw.integers(0, 4, n))}
        for i, n in enumerate((6, 14, 9, 20))
    ]

    def inner(x, y, row):
        logits = jax.nn.relu(row["a"] @ y["in"]) @ y["out"]
        return jax.nn.logsumexp(logits) - logits[row["label"]] + 5e-4 * sum(jnp.sum(leaf**2) for leaf in y.values())

    y = {"in": jnp.asarray(draw.normal(size=(6, 24))) / 2, "out": jnp.asarray(draw.normal(size=(24, 4))) / 4}
    problem, data = fb.Problem(inner, lambda x, y, row: jnp.sum(x**2)), fb.FederatedData.stack(rows, rows)
    loss = lambda x, y: fb.reference.inner_value(problem, data, x, y)
    given = {"rounds": 300, "key": jax.random.key(0), "engine": fb.Simulation(**company), "metrics": {"g": loss}}
    found = fb.train(problem, data, jnp.zeros(1), y, evaluate_every=50, **given)
    g, lr = (found.history.column(name)[1:] for name in ("g", "inner_lr"))
    assert lr.min() > 0.3 * lr.max() and (np.diff(g) < 0).all()
    by_hand = fb.train(problem, data, jnp.zeros(1), y, inner_lr=float(lr.mean()), evaluate_every=300, **given)
    assert g[-1] < 1.1 * by_hand.history[-1]["g"]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [Training(0.05, 2), Training(local_steps=2, batch_size=2)])
def test_it_passes_the_conformance_suite(algorithm):
    assert fb.testing.check_algorithm(algorithm).passed


def test_weighted_clients_have_to_be_all_there():
    weighted = fb.FederatedData.stack(Q.inner, Q.outer, weights="rows")
    with pytest.raises(fb.InputError, match="needs all of them"):
        fb.protocol(Training(), Q.problem, weighted, Q.x, Q.y, engine=fb.Simulation(cohort=2))

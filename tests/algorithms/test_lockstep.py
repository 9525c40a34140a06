"""Lockstep against numpy, step by step; its fixed point, whatever clients, local steps and cohorts; what it costs."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax.tree
import pytest
import scipy.optimize

import fedbilevel as fb
from fedbilevel.engines.base import Carry
from fedbilevel.watch import attributes
from helpers.plain import plain
from helpers.quadratic import DX, DY, flat, orthogonal, quadratic

Q = quadratic()
CLIENTS = len(Q.inner)
RATES = {"inner_lr": 0.05, "hessian_lr": 0.08, "outer_lr": 0.03}


def directions(q, t, z, v):
    """(clients, dx), (clients, dy), (clients, dy): every client's D_i."""
    H = q.hessians(t)
    x = q.outer_x(t, z) - q.crosses(t, z) @ v
    return x, H @ z - q.targets(t), H @ v - q.outer_y(t, z)


def by_hand(q, iterations, local_steps, outer_steps, shift=0):
    """(x, y, v) after so many iterations with everyone and all rows; `shift`: local steps on x too many."""
    t, z, v = q.t, q.z, np.zeros(DY)
    kept, mean = [np.zeros((CLIENTS, d)) for d in (DX, DY, DY)], [np.zeros(d) for d in (DX, DY, DY)]
    for _ in range(iterations):
        a = directions(q, t, z, v)
        correction = [c - own for c, own in zip(mean, kept, strict=True)]
        zs = np.tile(z, (CLIENTS, 1))
        for _ in range(local_steps):
            own = np.einsum("ijk,ik->ij", q.hessians(t), zs) - q.targets(t)
            zs = zs - RATES["inner_lr"] * (own + correction[1])
        vs = v - RATES["hessian_lr"] * (a[2] + correction[2])
        ts = np.tile(t, (CLIENTS, 1))
        for _ in range(outer_steps + shift):
            own = np.stack([directions(q, ts[i], z, v)[0][i] for i in range(CLIENTS)])
            ts = ts - RATES["outer_lr"] * (own + correction[0])
        mean = [c + np.mean(new - old, axis=0) for c, new, old in zip(mean, a, kept, strict=True)]
        kept, t, z, v = list(a), ts.mean(0), zs.mean(0), vs.mean(0)
    return t, z, v


def run(q, algorithm, iterations, **options):
    return fb.solve(q.problem, q.data, algorithm, q.x, q.y, iterations, key=jax.random.key(0), **options)


@pytest.mark.parametrize(("local_steps", "outer_steps"), [(1, 1), (3, 2)])
def test_iterations_are_those_made_by_hand(local_steps, outer_steps):
    algorithm = fb.Lockstep(**RATES, local_steps=local_steps, outer_steps=outer_steps)
    state = run(Q, algorithm, 4).state
    found = flat(state.x), flat(state.y), flat(attributes(state)["v"])
    for one, other in zip(found, by_hand(Q, 4, local_steps, outer_steps), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)
    assert np.abs(found[0] - by_hand(Q, 4, local_steps, outer_steps, shift=1)[0]).max() > 1e-6


def test_one_local_step_is_plain_simultaneous_descent():
    """Its centralised counterpart: (x, y, v) - rates * mean D."""
    t, z, v = Q.t, Q.z, np.zeros(DY)
    for _ in range(5):
        x, y, u = (d.mean(0) for d in directions(Q, t, z, v))
        t, z, v = t - RATES["outer_lr"] * x, z - RATES["inner_lr"] * y, v - RATES["hessian_lr"] * u
    state = run(Q, fb.Lockstep(**RATES, local_steps=1), 5).state
    np.testing.assert_allclose(flat(state.x), t, atol=1e-12)
    np.testing.assert_allclose(flat(state.y), z, atol=1e-12)


def at_the_solution():
    """x*, y*, v* as pytrees: numpy's grad Phi made zero, from near by."""
    near = run(Q, fb.Lockstep(**RATES | {"outer_lr": 0.1}, local_steps=3), 2_000, evaluate_every=2_000)
    t = scipy.optimize.root(Q.hypergradient, flat(near.x), tol=1e-14).x
    z = Q.solution(t)
    v = np.linalg.solve(Q.hessians(t).mean(0), Q.outer_y(t, z).mean(0))
    back = [jax.flatten_util.ravel_pytree(part)[1] for part in (Q.x, Q.y, Q.y)]
    return tuple(each(jnp.asarray(part)) for each, part in zip(back, (t, z, v), strict=True))


@pytest.mark.parametrize("local_steps", [1, 2, 5])
@pytest.mark.parametrize("cohort", [None, 2])
def test_nothing_moves_where_every_direction_is_known(local_steps, cohort):
    x, y, v = at_the_solution()
    algorithm = fb.Lockstep(**RATES, local_steps=local_steps, outer_steps=local_steps)
    engine = fb.Simulation(cohort=cohort)
    execution = engine.bind(Q.problem, Q.data, algorithm, algorithm.init(x, y), jax.random.key(0))
    own = directions(Q, flat(x), flat(y), flat(v))
    start = dataclasses.replace(algorithm.init(x, y), v=v)
    ravel = [jax.flatten_util.ravel_pytree(part)[1] for part in (x, y, y)]
    stacked = tuple(jax.vmap(back)(jnp.asarray(part)) for back, part in zip(ravel, own, strict=True))
    known = Carry(start, stacked, 0)
    unknown = dataclasses.replace(known, client_state=optax.tree.zeros_like(stacked))
    moved = [
        flat((after.state.x, after.state.y)) - flat((x, y))
        for after, _ in (execution.advance(algorithm, each, 5, np.inf) for each in (known, unknown))
    ]
    assert np.abs(moved[0]).max() < 1e-9
    drifts = cohort is not None or local_steps > 1
    assert (np.abs(moved[1]).max() > 1e-4) == drifts


class Uncorrected(fb.Lockstep):
    """Without control variates."""

    def moves(self, client, x, y, v, c, lam):
        moved, change = super().moves(client, x, y, v, c, lam).reply
        return fb.Reply((moved, optax.tree.zeros_like(change)), optax.tree.zeros_like(client.state))


@pytest.mark.parametrize("q", [Q, orthogonal(Q)], ids=["ragged", "orthogonal"])
@pytest.mark.parametrize("cohort", [None, 2])
def test_no_floor_from_clients_that_differ_nor_from_cohorts(q, cohort):
    rates = {"inner_lr": 0.02, "hessian_lr": 0.05, "outer_lr": 0.1}
    end = {}
    for kind in (fb.Lockstep, Uncorrected):
        result = run(
            q, kind(**rates, local_steps=4), 12_000, engine=fb.Simulation(cohort=cohort), evaluate_every=12_000
        )
        end[kind] = np.linalg.norm(q.hypergradient(flat(result.x)))
    assert end[fb.Lockstep] < 1e-7
    assert end[Uncorrected] > 1e-3


def test_one_round_and_its_floats():
    for cohort in (None, 2):
        engine = fb.Simulation(cohort=cohort)
        protocol = fb.protocol(plain(fb.Lockstep), Q.problem, Q.data, Q.x, Q.y, engine=engine)
        asked = cohort or CLIENTS
        assert protocol.rounds == 1
        assert protocol.bytes_down == protocol.bytes_up == 8 * asked * (2 * DX + 4 * DY)


def test_a_measured_step_serves_too():
    algorithm = fb.Lockstep(**RATES | {"hessian_lr": "auto", "outer_lr": 0.1}, local_steps=2)
    result = run(Q, algorithm, 8_000, evaluate_every=8_000)
    assert np.linalg.norm(Q.hypergradient(flat(result.x))) < 1e-7
    assert result.history[-1]["rounds"] == 8_000 + 1  # at the start; later measurements take no round


@pytest.mark.parametrize(("name", "value"), [("inner_lr", 4.0), ("hessian_lr", 5.0), ("outer_lr", 30.0)])
def test_the_step_that_is_too_large_is_named(name, value):
    with pytest.raises(fb.Diverged, match=f"lower {name} ") as failure:
        run(Q, fb.Lockstep(**RATES | {name: value}, local_steps=2), 2_000)
    assert np.isfinite(flat(eqx.filter(failure.value.result.state, eqx.is_array))).all()


def test_what_it_cannot_do_is_said():
    with pytest.raises(fb.InputError, match="never forms a hypergradient"):
        fb.estimate_hypergradient(Q.problem, Q.data, fb.Lockstep(), Q.x, Q.y, key=jax.random.key(0))
    weighted = fb.FederatedData.stack(Q.inner, Q.outer, weights="rows")
    with pytest.raises(fb.InputError, match="needs all of them"):
        fb.solve(
            Q.problem, weighted, plain(fb.Lockstep), Q.x, Q.y, 1, key=jax.random.key(0), engine=fb.Simulation(cohort=2)
        )

"""One text, several engines: simulation, loopback and a mesh of devices agree; what `fed` offers works on all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax.tree
import pytest
from cases import CASES, OneRound
from quadratic import flat, quadratic

import fedbilevel as fb

HERE = Path(__file__).parent
ENGINES = (fb.Simulation, fb.Loopback)
both = pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.__name__)
AGREE = 1e-12


@pytest.fixture(scope="module")
def simulated():
    """Each case's run in simulation, compiled when it is first asked for."""
    done: dict[str, Any] = {}

    def get(name):
        if name not in done:
            done[name] = cases.run(name, fb.Simulation(cohort=4))
        return done[name]

    return get


def agree(one, other):
    np.testing.assert_allclose(one[0], other[0], rtol=0, atol=AGREE * np.maximum(1, np.abs(other[0])).max())
    np.testing.assert_array_equal(one[1], other[1])


@pytest.mark.parametrize("name", CASES)
def test_loopback_is_the_simulation(simulated, name):
    expected = simulated(name)
    looped = cases.run(name, fb.Loopback(cohort=4, shuffle=5))
    agree(looped, expected)
    with pytest.raises(AssertionError):  # other keys, other rows and cohorts: what is compared depends on them
        np.testing.assert_allclose(cases.run(name, fb.Simulation(cohort=4), seed=1)[0], expected[0], rtol=0, atol=1e-6)


def test_four_devices_are_one(simulated, tmp_path):
    path = tmp_path / "mesh.npz"
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"  # the latter compiles faster
    source = str(HERE.parent / "src")
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{source}{os.pathsep}{HERE}"}
    command = [sys.executable, str(HERE / "cases.py"), str(path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    mesh = np.load(path)
    assert mesh["devices"] == 4
    for name in CASES:
        agree((mesh[f"{name}/numbers"], mesh[f"{name}/ledger"]), simulated(name))


def test_clients_in_batches_are_all_at_once(simulated):
    agree(cases.run("one-round", fb.Simulation(cohort=4, client_batch=3)), simulated("one-round"))


# The conformance suite -----------------------------------------------------------------------------------------------------


def test_the_conformance_suite_passes_the_stateful_algorithm():
    report = fb.testing.check_algorithm(OneRound(batch_size=2))
    assert report.passed and len(report.lines) >= 6


class Padded(fb.Algorithm):
    """Wrong on purpose: its step depends on how the client's rows are padded, which differs between engines."""

    lr: Any = fb.rate(0.01)

    def step(self, fed, state):
        return fb.State(state.x, optax.tree.add_scale(state.y, -self.lr, fed.average(self.gradient, state.x, state.y))), {}

    def gradient(self, client, x, y):
        return optax.tree.scale(len(client.inner.weights) / 6, client.problem.inner_gradient(x, y, client.inner))


def test_the_conformance_suite_finds_an_algorithm_that_sees_padding():
    with pytest.raises(fb.testing.CheckFailed, match="FAILED loopback = simulation"):
        fb.testing.check_algorithm(Padded())


# Client state ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stalling", [False, True])
def test_control_variates_reach_the_solution_with_3_of_8_clients(stalling):
    q = quadratic(seed=2, clients=8)
    curvature = np.linalg.eigvalsh(q.hessians(q.t)).max()
    algorithm = OneRound(inner_lr=0.2 / curvature, local_steps=2, stalling=stalling)
    engine = fb.Simulation(cohort=3)
    result = fb.solve(q.problem, q.data, algorithm, q.x, q.y, 4000, key=jax.random.key(0), engine=engine, evaluate_every=4000)
    off = np.linalg.norm(flat(result.y) - q.solution(q.t)) / np.linalg.norm(q.solution(q.t))
    assert off > 1e-3 if stalling else off < 1e-11


class Forgetful(Padded):
    def gradient(self, client, x, y):
        return fb.Reply(client.problem.inner_gradient(x, y, client.inner), y)


@both
def test_a_client_state_that_was_not_declared_is_refused(engine):
    q = cases.problem()
    with pytest.raises(fb.InputError, match="client_init"):
        fb.solve(q.problem, q.data, Forgetful(), q.x, q.y, 1, key=jax.random.key(0), engine=engine())


# Loops, draws and cohorts ----------------------------------------------------------------------------------------------------


MOST = 6


class Everything(fb.Algorithm):
    """Halves y until it is below one, then, a drawn number of times, asks cohorts for their clients' numbers."""

    def step(self, fed, state):
        small = lambda y: jnp.max(jnp.abs(y)) < 1  # noqa: E731
        y = fed.until(small, lambda t, y: fed.average(self.half, y), state.y, most=20)
        drawn = fed.randint(0, MOST + 1)

        def ask(t, seen):
            same = fed.draw_cohort()
            more = fed.when(t > 1, jnp.ones(()))
            return tuple(fed.average(self.number, more, cohort=cohort) for cohort in (same, same, None))

        first, again, fresh = fed.repeat(drawn, ask, (jnp.zeros(()),) * 3, most=MOST)
        return fb.State(state.x, y), {"drawn": drawn, "first": first, "again": again, "fresh": fresh}

    def half(self, client, y):
        return y / 2

    def number(self, client, more):
        return jnp.mean(client.inner.examples["number"]) + jnp.where(more.present, more.value, 0)


@pytest.fixture(scope="module")
def everything():
    """Client i's rows hold 100^i, so that a mean of two tells who was asked; the run on both engines."""
    rows = [{"number": np.full(1 + i % 2, 100.0**i)} for i in range(4)]
    loss = lambda x, y, e: 0.5 * (x**2 + jnp.sum(y**2)) + 0 * e["number"]  # noqa: E731
    args = fb.Problem(loss, loss), fb.FederatedData.stack(rows, rows), Everything(), jnp.zeros(()), jnp.asarray([100.0, 3.0])
    return [fb.solve(*args, 40, key=jax.random.key(3), engine=engine(cohort=2)) for engine in ENGINES]


def test_loops_and_draws_work_on_both_engines(everything):
    one, other = everything
    np.testing.assert_array_equal(one.y, other.y)
    for column in ("rounds", "bytes_down", "bytes_up", "drawn", "first", "again", "fresh"):
        np.testing.assert_array_equal(one.history.column(column), other.history.column(column))

    np.testing.assert_array_equal(one.y, np.array([100.0, 3.0]) / 2**7)  # 100 / 2^7 is the first below one
    drawn = one.history.column("drawn")[1:].astype(int)
    assert set(drawn) == set(range(MOST + 1))
    halvings = np.eye(40, dtype=int)[0] * 7  # in the first iteration only
    np.testing.assert_array_equal(np.diff(one.history.column("rounds")), halvings + 3 * drawn)
    down = 2 * 8 * (2 * halvings + 3 * np.maximum(drawn - 2, 0))  # cohort * float64 * (y, or the part from t = 2 on)
    np.testing.assert_array_equal(np.diff(one.history.column("bytes_down")), down)
    assert one.protocol.kind == "bound" and one.protocol.rounds == one.protocol.rounds_most == 20 + 3 * MOST


def test_a_drawn_cohort_is_asked_again_and_another_is_fresh(everything):
    history = everything[0].history
    first, again, fresh, drawn = (history.column(name)[1:] for name in ("first", "again", "fresh", "drawn"))
    pairs = {(100.0**i + 100.0**j) / 2 for i in range(4) for j in range(i)}
    late = drawn > 2  # the part that travels from t = 2 on adds one
    asked = np.concatenate([(numbers - late)[drawn > 0] for numbers in (first, fresh)])
    assert set(asked) == pairs  # without replacement, and every pair comes up
    np.testing.assert_array_equal(first, again)
    assert (fresh != first).any()


# Refusals and failures -------------------------------------------------------------------------------------------------------


class Nested(Padded):
    inside: str = fb.option("scan")

    def step(self, fed, state):
        ask = lambda y: fed.average(self.gradient, state.x, y)  # noqa: E731
        twice = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state.y)
        run = {
            "scan": lambda: jax.lax.scan(lambda y, _: (ask(y), None), state.y, None, length=2),
            "fori_loop": lambda: fed.repeat(2, lambda t, y: jax.lax.fori_loop(0, 2, lambda _, y: ask(y), y), state.y),
            "vmap": lambda: jax.vmap(ask)(twice),
            "jit": lambda: jax.jit(ask)(state.y),
            "cond": lambda: jax.lax.cond(True, ask, lambda y: y, state.y),
        }
        run[self.inside]()
        return state, {}


@both
@pytest.mark.parametrize("inside", ["scan", "fori_loop", "vmap", "jit", "cond"])
def test_fed_within_a_jax_transformation_is_refused(engine, inside):
    q = cases.problem()
    with pytest.raises(fb.InputError, match="use fed.repeat"):
        fb.solve(q.problem, q.data, Nested(inside=inside), q.x, q.y, 1, key=jax.random.key(0), engine=engine())


class Failing(Padded):
    """A client with an odd number of rows fails (the protocol's trace sees an even one)."""

    def gradient(self, client, x, y):
        client.inner.examples["c"].reshape(2, -1, 4)
        return client.problem.inner_gradient(x, y, client.inner)


@pytest.mark.parametrize("jit", [True, False])
def test_a_failing_client_is_named_with_its_method_and_shapes(jit):
    q = quadratic(clients=4, sizes=((4, 2), (2, 2), (3, 2)))
    with pytest.raises(fb.ClientError) as failure:
        fb.solve(q.problem, q.data, Failing(), q.x, q.y, 1, key=jax.random.key(0), engine=fb.Loopback(jit=jit))
    for part in ("client 2 failed in Failing.gradient", "'w': f64[3]", "'u': f64[4]", "3 inner and 2 outer rows"):
        assert part in str(failure.value)

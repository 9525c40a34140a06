"""Runs whose clients' states are written over from stretch to stretch go the same way, and end with all there is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel import run
from fedbilevel.callbacks import Callback, Checkpoint
from fedbilevel.engines import simulation
from helpers.quadratic import flat, quadratic

Q = quadratic(seed=3, clients=4)
GIVEN = {"problem": Q.problem, "data": Q.data, "x": Q.x, "y": Q.y, "key": jax.random.key(1)}
STEPS = {"inner_lr": 0.02, "hessian_lr": 0.02, "outer_lr": 0.02}
SIZE = {"size": lambda x, y: jnp.sum(y["w"] ** 2)}


def solve(iterations=9, wild=False, **options):
    algorithm = fb.Lockstep(**STEPS | ({"outer_lr": 20.0} if wild else {}))
    given = {"algorithm": algorithm, "iterations": iterations, "metrics": SIZE, "engine": fb.Simulation(cohort=2)}
    return fb.solve(**{**GIVEN, **given, **options})


@pytest.fixture
def heavy(monkeypatch):
    """States of any size are."""
    monkeypatch.setattr(simulation, "LARGE", 0)
    written, over = [], simulation._Simulated.write_over
    monkeypatch.setattr(
        simulation._Simulated, "write_over", lambda self, carry: written.append(carry) or over(self, carry)
    )
    return written


def deleted(carry):
    return all(leaf.is_deleted() for leaf in jax.tree.leaves(carry.client_state))


def same(one, other):
    for name in ("x", "y"):
        np.testing.assert_array_equal(flat(getattr(one, name)), flat(getattr(other, name)))
    assert [row["size"] for row in one.history] == [row["size"] for row in other.history]


def test_it_goes_the_same_way_and_keeps_few_states(heavy, monkeypatch):
    whole = solve()
    assert len(heavy) == 8 and all(deleted(carry) for carry in heavy)
    heavy.clear()
    monkeypatch.setattr(run, "_APART", 0.0)  # each is kept
    same(solve(), whole)
    assert not heavy
    monkeypatch.setattr(simulation, "LARGE", 2**40)
    same(solve(), whole)
    assert not heavy


def test_one_that_blows_up_ends_where_it_did(heavy, monkeypatch):
    with pytest.raises(fb.Diverged) as failure:
        solve(200, wild=True, evaluate_every=3)
    assert heavy
    monkeypatch.setattr(simulation, "LARGE", 2**40)
    with pytest.raises(fb.Diverged) as expected:
        solve(200, wild=True, evaluate_every=3)
    assert failure.value.result.iteration == expected.value.result.iteration > 3
    same(failure.value.result, expected.value.result)


class Stop(Callback):
    """Interrupts, as Ctrl-C does while the next stretch is under way."""

    def __init__(self, monkeypatch, at):
        self.monkeypatch, self.at = monkeypatch, at

    def advance(self, run):
        def interrupted(self, *args, **options):
            out = before(self, *args, **options)
            test.monkeypatch.setattr(simulation._Simulated, "_stretch", before)
            raise KeyboardInterrupt if out else None

        if run.iteration == self.at:
            test, before = self, simulation._Simulated._stretch
            self.monkeypatch.setattr(simulation._Simulated, "_stretch", interrupted)


def test_an_interrupted_one_can_be_resumed(heavy, monkeypatch, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        solve(callbacks=[Stop(monkeypatch, 5), Checkpoint(tmp_path)])
    assert heavy[-1].iteration == 5 and deleted(heavy[-1])
    same(solve(resume=tmp_path), solve())

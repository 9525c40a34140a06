"""A run that is interrupted and resumed gives the numbers of the uninterrupted one; nothing else can be resumed."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.callbacks import Callback, Checkpoint
from fedbilevel.callbacks.checkpoint import FILE
from fedbilevel.callbacks.earlier import reordered
from helpers import earlier
from helpers.cases import OneRound
from helpers.quadratic import flat, quadratic

Q0 = quadratic(seed=6, clients=6)
STEPS = {"inner_lr": 0.01, "hessian_lr": 0.01, "outer_lr": 0.02}
SETTINGS = {"inner_rounds": 1, "local_steps": 1, "neumann_terms": 3, "batch_size": 2, **STEPS}
NEST = fb.FedNest(**SETTINGS)  # draws N', cohorts and rows
STATEFUL = OneRound(batch_size=2)
METRICS = {"size": lambda x, y: jnp.sum(y["w"] ** 2)}
both = pytest.mark.parametrize("algorithm", [NEST, STATEFUL], ids=["fednest", "one-round"])


def solve(algorithm=NEST, iterations=12, **options):
    good = {"data": Q0.data, "x": Q0.x, "y": Q0.y, "key": jax.random.key(0), "engine": fb.Simulation(cohort=3)}
    return fb.solve(**{**good, "problem": Q0.problem, "algorithm": algorithm, "iterations": iterations, **options})


def same(one, other):
    """Equal in every number but the seconds."""
    np.testing.assert_array_equal(*(flat(eqx.filter(run.state, eqx.is_array)) for run in (one, other)))
    rows = lambda run: [{name: value for name, value in row.items() if name != "seconds"} for row in run.history]
    np.testing.assert_equal(rows(one), rows(other))
    assert one.iteration == other.iteration


@both
@pytest.mark.parametrize(
    "options",
    [{}, {"metrics": METRICS}, {"metrics": METRICS, "evaluate_every": 4}],
    ids=["plain", "metrics", "every-4"],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, algorithm, options):
    whole = solve(algorithm, **options)
    part = solve(algorithm, 6, callbacks=[Checkpoint(tmp_path)], **options)
    assert part.iteration == 6 and part.history[-1]["iteration"] == 6
    resumed = solve(algorithm, resume=tmp_path, **options)
    same(resumed, whole)
    assert resumed.history[-1]["seconds"] > part.history[-1]["seconds"]


class Forget(Callback):
    """Before the checkpoint that follows is written, the clients forget what they kept."""

    def finish(self, run, error):
        zeros = jax.tree.map(jnp.zeros_like, run.carry.client_state)
        run.carry = dataclasses.replace(run.carry, client_state=zeros)


def test_the_clients_states_that_are_kept_matter(tmp_path):
    whole = solve(STATEFUL)
    solve(STATEFUL, 6, callbacks=[Forget(), Checkpoint(tmp_path)])
    assert np.abs(flat(solve(STATEFUL, resume=tmp_path).y) - flat(whole.y)).max() > 1e-6


def test_loopback_resumes_its_clients_states_too(tmp_path):
    engine = fb.Loopback(cohort=3)
    whole = solve(STATEFUL, 3)
    solve(STATEFUL, 2, engine=engine, callbacks=[Checkpoint(tmp_path)])
    resumed = solve(STATEFUL, 3, engine=engine, resume=tmp_path)
    np.testing.assert_allclose(flat(resumed.y), flat(whole.y), rtol=0, atol=1e-12)


class Crash(Callback):
    """Fails at the first look after iteration 5."""

    def advance(self, run):
        if run.iteration >= 5:
            raise KeyboardInterrupt


@both
def test_a_crashed_run_can_be_resumed(tmp_path, algorithm):
    options = {"metrics": METRICS}  # a look after every iteration
    with pytest.raises(KeyboardInterrupt):
        solve(algorithm, callbacks=[Checkpoint(tmp_path), Crash()], **options)
    same(solve(algorithm, resume=tmp_path, **options), solve(algorithm, **options))


def test_a_diverged_run_leaves_its_last_finite_state(tmp_path):
    wild = dataclasses.replace(NEST, outer_lr=1e3)
    with pytest.raises(fb.Diverged) as failure:
        solve(wild, 100, callbacks=[Checkpoint(tmp_path)])
    ended = solve(wild, failure.value.result.iteration, resume=tmp_path)
    assert np.isfinite(flat((ended.x, ended.y))).all()
    same(ended, failure.value.result)


@pytest.mark.parametrize("every", [1, 4])
def test_a_budget_of_rounds_is_resumed_and_a_finished_run_is_finished(tmp_path, every):
    options = {"iterations": None, "evaluate_every": every}
    whole = solve(rounds=40, **options)
    assert whole.iteration % 4 != 0  # the last row is off the grid
    solve(rounds=20, **options, callbacks=[Checkpoint(tmp_path)])
    same(solve(rounds=40, **options, resume=tmp_path, callbacks=[Checkpoint(tmp_path)]), whole)
    same(solve(rounds=40, **options, resume=tmp_path), whole)


# Refused --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    solve(iterations=4, callbacks=[Checkpoint(folder)])
    return folder


OTHERS = {
    "cohort": {"engine": fb.Simulation(cohort=2)},
    "key": {"key": jax.random.key(1)},
    "inner_lr": {"algorithm": dataclasses.replace(NEST, inner_lr=0.02)},
    "neumann_terms": {"algorithm": dataclasses.replace(NEST, neumann_terms=2)},
    "batch_size": {"algorithm": dataclasses.replace(NEST, batch_size=3)},
    "algorithm": {"algorithm": fb.FedNestSGD(**SETTINGS)},
    "evaluate_every": {"evaluate_every": 2},
    "start": {"x": jax.tree.map(lambda a: a + 1, Q0.x)},
    "data": {"data": quadratic(seed=7, clients=6).data},
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_of_another_run_is_refused_and_the_difference_named(saved, what):
    with pytest.raises(fb.InputError, match="of another run: ") as refusal:
        solve(**OTHERS[what], resume=saved)
    named = str(refusal.value).split("of another run: ")[1]
    assert f"{what} was " in named
    assert named.count(" was ") == 1  # that, and nothing else


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(fb.InputError, match="no checkpoint in"):
        solve(resume=tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 0.95, 0.999])
def test_a_truncated_checkpoint_is_refused(saved, tmp_path, share):
    content = (saved / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(content)
    assert solve(iterations=5, resume=tmp_path).iteration == 5  # whole, it is good
    (tmp_path / FILE).write_bytes(content[: int(share * len(content))])
    with pytest.raises(fb.InputError, match="cannot be read as a checkpoint"):
        solve(resume=tmp_path)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / FILE).write_text('{"iteration": 3}\n[1, 2]')
    with pytest.raises(fb.InputError, match="cannot be read as a checkpoint"):
        solve(resume=tmp_path)


def test_a_checkpoint_of_the_other_engine_is_refused_or_resumed(tmp_path):
    """Clients' states are kept otherwise there: a sentence, not a traceback; without states it simply goes on."""
    solve(STATEFUL, 2, callbacks=[Checkpoint(tmp_path)])
    with pytest.raises(fb.InputError):
        solve(STATEFUL, 3, engine=fb.Loopback(cohort=3), resume=tmp_path)


def test_checkpoints_replace_each_other_in_one_step(tmp_path):
    solve(iterations=2, callbacks=[Checkpoint(tmp_path, every=0.0)], metrics=METRICS)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


# Checkpoints of an earlier version -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", earlier.AUTOMATIC)
def test_a_run_whose_steps_were_found_otherwise_begins_anew(name, tmp_path):
    shutil.copy(Path(__file__).parent / "earlier" / f"{name}.eqx", tmp_path / FILE)
    with pytest.raises(fb.InputError, match="cannot be read as a checkpoint: start without resuming"):
        earlier.solve(name, resume=tmp_path)


@pytest.mark.parametrize("name", [name for name in earlier.RUNS if name not in earlier.AUTOMATIC])
def test_a_run_goes_on_from_what_an_earlier_version_wrote(name, tmp_path):
    shutil.copy(Path(__file__).parent / "earlier" / f"{name}.eqx", tmp_path / FILE)
    resumed, whole = earlier.solve(name, resume=tmp_path), earlier.solve(name)
    assert resumed.iteration == whole.iteration == earlier.WHOLE
    parts = [flat(eqx.filter(run.state, eqx.is_inexact_array)) for run in (resumed, whole)]
    np.testing.assert_allclose(*parts, rtol=1e-10, atol=1e-12)
    assert [row["rounds"] for row in resumed.history] == [row["rounds"] for row in whole.history]


def test_an_order_of_before_is_not_that_of_today():
    state = fb.Lockstep().init(jnp.zeros(2), jnp.zeros(2))
    leaves = jax.tree.leaves(state)
    arrays = [np.full(2, place) for place in range(len(leaves))]
    back = reordered(state, arrays, number=2)
    assert [int(each[0]) for each in back] != list(range(len(leaves)))
    assert [int(each[0]) for each in reordered(state, arrays, number=3)] == list(range(len(leaves)))
    with pytest.raises(ValueError, match="arrays where"):
        reordered(state, arrays[:-1], number=2)

"""`Lockstep(anderson=)`: what it gains on ragged clients that differ, what it leaves alone, and where it mixes nothing."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.callbacks import Checkpoint
from fedbilevel.watch import attributes
from helpers.quadratic import flat

TASK = fb.tasks.quadratic(seed=0)  # eight clients of five, eight and eleven rows; dx 4, dy 6
CLIENTS = TASK.data.clients
RATES = {"inner_lr": 0.03, "hessian_lr": 0.03, "outer_lr": 3.0}
PLAIN, MIXING = fb.Lockstep(**RATES), fb.Lockstep(**RATES, anderson=16)


def run(algorithm, iterations, data=TASK.data, **options):
    return fb.solve(TASK.problem, data, algorithm, TASK.x, TASK.y, iterations, key=jax.random.key(0), **options)


def slope(result, data=TASK.data):
    """|grad Phi|^2; 3 at the start."""
    x, y = (np.asarray(part, np.float64) for part in (result.x, result.y))
    return float(fb.reference.stationarity(TASK.problem, data, x, y))


def carried(algorithm, iterations, **engine):
    """The carry after some iterations."""
    state = algorithm.init(TASK.x, TASK.y)
    execution = fb.Simulation(**engine).bind(TASK.problem, TASK.data, algorithm, state, jax.random.key(1))
    carry = execution.start(algorithm, state)
    return execution.advance(algorithm, carry, iterations, np.inf)[0]


def test_it_is_stationary_where_plain_rounds_have_hardly_begun():
    assert slope(run(MIXING, 60)) < 1e-12
    assert slope(run(PLAIN, 60)) > 1e-2


def test_in_float32_it_gets_as_far_as_float32_goes():
    with jax.enable_x64(False):
        task = fb.tasks.quadratic(seed=0)
        result = fb.solve(task.problem, task.data, MIXING, task.x, task.y, 60, key=jax.random.key(0))
    assert flat(result.x).dtype == np.float32
    assert slope(result) < 1e-8
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.state))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_mean_of_what_clients_keep_is_known_after_every_step(dropout):
    """Nothing of it is mixed. The clients are ragged, and their curvatures differ."""
    mixed = 0
    for iterations in (1, 2, 3, 7, 12):
        carry = carried(MIXING, iterations, dropout=dropout)
        apart = []
        for kept, mean in zip(carry.client_state, attributes(carry.state)["control"], strict=True):
            own = np.stack([flat(jax.tree.map(lambda leaf, i=i: leaf[i], kept)) for i in range(CLIENTS)])
            np.testing.assert_allclose(own.mean(0), flat(mean), rtol=1e-12, atol=1e-12)
            apart.append(np.abs(own - flat(mean)).max())
        assert max(apart) > 0.1
        mixed += int(attributes(carry.state)["past"].filled) > 0
    assert mixed == (4 if dropout == 0 else mixed)


@pytest.mark.parametrize("off", [{"cohort": 3}, {"batch_size": 2}, {"dropout": 0.9}], ids=str)
def test_where_something_is_drawn_every_round_is_a_plain_one_and_says_so(off):
    """The run without; bit for bit where the program is the same."""
    rows = {"batch_size": off["batch_size"]} if "batch_size" in off else {}
    engine = fb.Simulation(**off) if not rows else fb.Simulation()
    one, other = (run(fb.Lockstep(**RATES, **rows, anderson=m), 6, engine=engine) for m in (None, 16))
    for a, b in zip(jax.tree.leaves((one.x, one.y)), jax.tree.leaves((other.x, other.y)), strict=True):
        np.testing.assert_allclose(a, b, atol=0 if "dropout" not in off else 1e-12)  # there another program rounds
    assert [row["mixed"] for row in other.history[1:]] == [0.0] * 6
    assert "mixed" not in one.history.columns


def test_with_all_of_them_the_history_says_when_it_mixed():
    result = run(MIXING, 5)
    assert [row["mixed"] for row in result.history[1:]] == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert slope(result) != slope(run(PLAIN, 5))


def test_a_client_that_drops_out_costs_the_memory_and_nothing_else():
    result = run(MIXING, 150, engine=fb.Simulation(dropout=0.01))
    flags = [row["mixed"] for row in result.history[1:]]
    assert 2 < flags.count(0.0) < 75
    assert slope(result) < 1e-6


def test_messages_are_those_of_plain_rounds():
    one, other = (fb.protocol(each, TASK.problem, TASK.data, TASK.x, TASK.y) for each in (PLAIN, MIXING))
    assert (one.rounds, one.bytes_down, one.bytes_up) == (other.rounds, other.bytes_down, other.bytes_up)


def test_messages_lead_to_the_same_iterates_as_simulation():
    ends = [run(MIXING, 12, engine=kind(dropout=0.03)) for kind in (fb.Simulation, fb.Loopback)]
    np.testing.assert_allclose(flat(ends[0].x), flat(ends[1].x), rtol=1e-8)
    flags = [[row["mixed"] for row in end.history[1:]] for end in ends]
    assert flags[0] == flags[1] and 1.0 in flags[0] and 0.0 in flags[0][1:]


@pytest.mark.slow
def test_the_conformance_suite_passes():
    assert fb.testing.check_algorithm(fb.Lockstep(anderson=3)).passed


def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(tmp_path):
    run(MIXING, 7, callbacks=[Checkpoint(tmp_path)])
    one, other = run(MIXING, 14), run(MIXING, 14, resume=tmp_path)
    np.testing.assert_array_equal(flat((one.x, one.y)), flat((other.x, other.y)))
    assert one.history[-1]["mixed"] == other.history[-1]["mixed"] == 1.0


def test_weights_count_in_what_it_finds():
    levels = ([level.alone(i).rows for i in range(CLIENTS)] for level in (TASK.data.inner, TASK.data.outer))
    weighted = fb.FederatedData.stack(*levels, weights="rows")
    result = run(MIXING, 60, data=weighted)
    assert sum(row["mixed"] for row in result.history[1:]) > 50
    assert slope(result, weighted) < 1e-8 < 1e-3 < slope(result)


def test_bad_counts_are_refused():
    for bad in (0, -1, 2.5, True):
        with pytest.raises(fb.InputError, match="anderson"):
            fb.Lockstep(anderson=bad)


def test_a_step_that_is_too_large_is_still_named():
    with pytest.raises(fb.Diverged, match="lower inner_lr "):
        run(fb.Lockstep(**RATES | {"inner_lr": 40.0}, anderson=5), 100)

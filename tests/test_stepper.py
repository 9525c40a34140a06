"""Iterations as a function: what `solve` does, in loops of one's own, under jit, scan and vmap, compiled once."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb

TASK = fb.tasks.quadratic(clients=5)
GIVEN = TASK.problem, TASK.data
STEPS = {"inner_lr": 0.05, "hessian_lr": 0.05, "outer_lr": 0.05}
ALGORITHM = fb.AggITD(inner_rounds=3, **STEPS)  # a random number of terms: rounds differ between iterations
ENGINE = fb.Simulation(cohort=2)


def bound(algorithm=ALGORITHM, **options):
    return fb.stepper(*GIVEN, algorithm, TASK.x, TASK.y, engine=ENGINE, **options)


def walk(stepper, key, iterations, algorithm):
    """Where so many iterations lead, and the rounds of each."""
    turn = lambda at, k: stepper(at, k, key, algorithm)
    return jax.lax.scan(turn, stepper.start, jnp.arange(iterations))


def alone(algorithm, iterations=6, x=TASK.x, key=TASK.key):
    return fb.solve(*GIVEN, algorithm, x, TASK.y, iterations, key=key, engine=ENGINE)


@pytest.mark.parametrize("algorithm", [ALGORITHM, fb.FedBiOAcc(**STEPS)], ids=["aggitd", "whose clients keep a state"])
def test_it_does_what_solve_does(algorithm):
    stepper = bound(algorithm)
    at, rounds = stepper.compiled(walk, TASK.key, 6, stepper.algorithm)
    result = alone(algorithm)
    np.testing.assert_allclose(at.state.x, result.x, rtol=0, atol=1e-14)
    assert np.cumsum(rounds).tolist() == result.history.column("rounds")[1:].tolist()
    step, by_hand = stepper.start, []
    for k in range(6):
        step, used = stepper(step, k, TASK.key)
        by_hand.append(int(used))
    np.testing.assert_allclose(step.state.x, result.x, rtol=0, atol=1e-14)
    assert by_hand == rounds.tolist()


@pytest.mark.slow
def test_many_settings_and_many_keys_side_by_side():
    stepper, rates = bound(), [0.02, 0.08]
    many = eqx.tree_at(lambda a: a.outer_lr, stepper.algorithm, jnp.asarray(rates))
    axes = jax.tree.map(lambda leaf: 0 if leaf.ndim else None, many)
    ends = jax.vmap(lambda one: walk(stepper, TASK.key, 4, one)[0].state.x, in_axes=(axes,))(many)
    for rate, end in zip(rates, ends, strict=True):
        np.testing.assert_allclose(end, alone(dataclasses.replace(ALGORITHM, outer_lr=rate), 4).x, rtol=0, atol=1e-13)
    keys = jax.random.split(TASK.key, 2)
    ends = jax.vmap(lambda key: walk(stepper, key, 4, stepper.algorithm)[0].state.x)(keys)
    np.testing.assert_allclose(ends[1], alone(ALGORITHM, 4, key=keys[1]).x, rtol=0, atol=1e-13)
    assert np.abs(ends[1] - ends[0]).max() > 1e-4


def both_levels(algorithm, fed, state):
    """A program of one's own: the estimate in place of x, and nothing else."""
    h, y = algorithm.estimate(fed, state.x, state.y)
    return fb.State(h, y), ()


def test_another_program_runs_in_place_of_the_step():
    stepper = bound(program=both_levels)
    at, rounds = stepper(stepper.start, 0, TASK.key)
    h, y = fb.estimate_hypergradient(*GIVEN, ALGORITHM, TASK.x, TASK.y, key=TASK.key, engine=ENGINE)
    np.testing.assert_allclose(at.state.x, h, rtol=0, atol=1e-14)
    np.testing.assert_allclose(at.state.y, y, rtol=0, atol=1e-14)
    assert 0 < rounds <= fb.protocol(ALGORITHM, *GIVEN, TASK.x, TASK.y).rounds_most


def traced(stepper, key, seen):
    seen.times.append(1)
    return stepper(stepper.start, 0, key)[0].state.x


class Seen:
    """Notes how often a function is traced: the same for the compiler whatever it has noted."""

    def __init__(self):
        self.times = []


def test_what_computes_the_same_compiles_once():
    other, seen = fb.tasks.quadratic(clients=5, seed=1), Seen()
    steppers = [fb.stepper(*given) for given in (
        (*GIVEN, ALGORITHM, TASK.x, TASK.y), (other.problem, other.data, ALGORITHM, other.x, other.y),
    )]  # fmt: skip
    ends = [stepper.compiled(traced, TASK.key, seen) for stepper in steppers]
    assert len(seen.times) == 1
    assert np.abs(ends[0] - ends[1]).max() > 1e-3  # and the rows are each one's own


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"engine": fb.Loopback()}, r"engine is Simulation\(\.\.\.\); got Loopback"),
        ({"x": "here"}, "x"),
        ({"algorithm": "aggitd"}, "algorithm"),
    ],
)
def test_what_it_cannot_use_is_refused(words, sentence):
    given = {"problem": TASK.problem, "data": TASK.data, "algorithm": ALGORITHM, "x": TASK.x, "y": TASK.y}
    with pytest.raises(fb.InputError, match=sentence):
        fb.stepper(**(given | words))


def test_a_stepper_s_key_is_one_key():
    stepper = bound()
    with pytest.raises(fb.InputError, match="one key"):
        stepper(stepper.start, 0, 3)
    assert isinstance(stepper, fb.Stepper) and isinstance(stepper.start, fb.Standing)

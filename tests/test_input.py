"""What cannot be used is refused before anything runs, in one sentence that names the value and says what to do."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from helpers.plain import plain
from helpers.quadratic import quadratic

Q0 = quadratic(clients=3)
ALGORITHM = plain(fb.AggITD, inner_rounds=1, local_steps=1)
KEY = jax.random.key(0)


def solve(**changed):
    """A good call, but for what is changed."""
    good = {
        "problem": Q0.problem, "data": Q0.data, "algorithm": ALGORITHM, "x": Q0.x, "y": Q0.y,
        "iterations": 1, "key": KEY, "engine": fb.Simulation(),
    }  # fmt: skip
    return fb.solve(**{**good, **changed})


def estimate(**changed):
    good = {"problem": Q0.problem, "data": Q0.data, "algorithm": ALGORITHM, "x": Q0.x, "y": Q0.y, "key": KEY}
    return fb.estimate_hypergradient(**{**good, **changed})


def protocol(**changed):
    good = {"algorithm": ALGORITHM, "problem": Q0.problem, "data": Q0.data, "x": Q0.x, "y": Q0.y}
    return fb.protocol(**{**good, **changed})


def stack(level="inner", client=1, **changed):
    """The clients' data, but one client's arrays at one level changed by functions."""
    levels = {"inner": list(Q0.inner), "outer": list(Q0.outer)}
    levels[level][client] = {**levels[level][client], **{k: f(levels[level][client][k]) for k, f in changed.items()}}
    return fb.FederatedData.stack(**levels)


def none(rows):
    return rows[:0]


def weigh(weights):
    return fb.FederatedData.stack(Q0.inner, Q0.outer, weights=weights)


def loss(value):
    return fb.Problem(value, Q0.problem.outer)


def spoiled(number):
    return {**Q0.x, "u": Q0.x["u"].at[1].set(number)}


CALLS = {
    # who takes part
    "cohort larger than clients": (lambda: solve(engine=fb.Simulation(cohort=4)), "cohort of 4 .* from 3 clients"),
    "the same in loopback": (lambda: solve(engine=fb.Loopback(cohort=4)), "cohort of 4 .* from 3 clients"),
    "cohort of none": (lambda: fb.Simulation(cohort=0), "at least 1; got 0"),
    "cohort of a half": (lambda: fb.Simulation(cohort=1.5), "whole number; got 1.5"),
    "client batch of none": (lambda: fb.Simulation(client_batch=0), "client_batch=.*got 0"),
    # data
    "no clients": (lambda: fb.FederatedData.stack([], []), "no clients"),
    "unequal lists": (lambda: fb.FederatedData.stack(Q0.inner, Q0.outer[:2]), "3 inner and 2 outer"),
    "empty client": (lambda: stack(a=none, B=none, c=none), "client 1 has no inner rows"),
    "unequal arrays": (lambda: stack(a=lambda a: a[:1]), "client 1: .*same number of rows"),
    "other shapes": (lambda: stack(a=lambda a: a[:, :2]), "client 1 has other inner data than client 0"),
    "other dtype": (lambda: stack(level="outer", b=lambda b: b.astype(np.float32)), "client 1 has other outer data"),
    "NaN": (lambda: stack(c=lambda c: np.where(c == c[0, 0], np.nan, c)), "client 1 has NaN .*inner"),
    "infinity": (lambda: stack(level="outer", client=2, b=lambda b: b / 0.0), "client 2 has NaN or infinite .*outer"),
    "negative weights": (lambda: weigh([1, -1, 1]), "weights must be positive"),
    "too few weights": (lambda: weigh([1, 1]), "each of the 3 clients"),
    "unknown weights": (lambda: weigh("row"), "got 'row'"),
    "a share of two": (lambda: fb.FederatedData.split(Q0.inner, outer=2, key=KEY), "between 0 and 1; got 2"),
    "a list for data": (lambda: solve(data=Q0.inner), "data is a FederatedData .*got list"),
    # losses
    "vector loss": (lambda: solve(problem=loss(lambda x, y, e: e["c"])), r"inner loss must return .*scalar.*[([]4"),
    "integer loss": (lambda: solve(problem=loss(lambda x, y, e: 1)), "inner loss must return a floating-point scalar"),
    "no loss": (lambda: loss(3.0), r"Problem\(inner=\.\.\.\) takes a function"),
    "loss that fails": (lambda: solve(problem=loss(lambda x, y, e: e["d"])), "inner loss failed .*KeyError"),
    "losses for a problem": (lambda: solve(problem=Q0.problem.inner), "problem is a fedbilevel.Problem; got function"),
    # settings
    "negative step": (lambda: fb.AggITD(inner_lr=-0.1), r"AggITD\(inner_lr=...\) is a step size.*got -0.1"),
    "zero step": (lambda: fb.FedNest(hessian_lr=0), r"FedNest\(hessian_lr=...\) is a step size.*got 0"),
    "NaN step": (lambda: fb.LFedNest(outer_lr=float("nan")), "outer_lr=.*got nan"),
    "word for a step": (lambda: fb.AggITD(inner_lr="0.1"), "inner_lr=.*got '0.1'"),
    "no rounds": (lambda: fb.AggITD(inner_rounds=0), r"AggITD\(inner_rounds=...\) is a count.*got 0"),
    "half a step": (lambda: fb.FedNest(local_steps=2.5), "local_steps=.*got 2.5"),
    "empty batch": (lambda: fb.FedNest(batch_size=0), "batch_size=.*got 0"),
    "Q too large": (lambda: fb.AggITD(inner_rounds=3, truncation=4), r"AggITD\(truncation=...\).*0\.\.3; got 4"),
    "N' too large": (lambda: fb.FedNest(neumann_terms=3, truncation=3), r"0\.\.2; got 3"),
    "unknown truncation": (lambda: fb.AggITD(truncation="fixed"), "'uniform', 'full' or a whole number; got 'fixed'"),
    "a class for an algorithm": (lambda: solve(algorithm=fb.AggITD), "algorithm is an instance"),
    # the call
    "no iterations": (lambda: solve(iterations=0), "iterations= .*at least 1; got 0"),
    "iterations and rounds": (lambda: solve(rounds=100), "one of the two"),
    "neither": (lambda: solve(iterations=None), "one of the two"),
    "rounds too few": (lambda: solve(iterations=None, rounds=4), "4 rounds are too few.* 5"),
    "never evaluated": (lambda: solve(evaluate_every=0), "evaluate_every= .*got 0"),
    "number for a key": (lambda: solve(key=0), "key= is a jax.random.key.*got 0"),
    "old key": (lambda: solve(key=np.zeros(2, np.uint32)), "key= is a jax.random.key"),
    "many keys": (lambda: solve(key=jax.random.split(KEY)), "key= is a jax.random.key"),
    # where to start
    "NaN start": (lambda: solve(x=spoiled(jnp.nan)), r"start point x\['u'\] .*NaN"),
    "infinite start": (lambda: solve(y={**Q0.y, "w": jnp.full(3, jnp.inf)}), r"start point y\['w'\] .*infinite"),
    "integers to optimise": (lambda: solve(x={"u": jnp.arange(4)}), "x holds no floating-point array"),
    "nothing to optimise": (lambda: solve(y=()), "y holds no floating-point array"),
    "other shape of x": (lambda: solve(x={**Q0.x, "u": jnp.zeros(7)}), "inner loss failed on"),
    # the estimator refuses the same
    "estimate: list for data": (lambda: estimate(data=Q0.inner), "data is a FederatedData .*got list"),
    "estimate: losses": (lambda: estimate(problem=Q0.problem.inner), "problem is a fedbilevel.Problem"),
    "estimate: class": (lambda: estimate(algorithm=fb.AggITD), "algorithm is an instance"),
    "estimate: NaN start": (lambda: estimate(x=spoiled(jnp.nan)), r"start point x\['u'\]"),
    "estimate: key": (lambda: estimate(key=0), "key= is a jax.random.key"),
    "protocol: list for data": (lambda: protocol(data=Q0.inner), "data is a FederatedData"),
    "protocol: class": (lambda: protocol(algorithm=fb.AggITD), "algorithm is an instance"),
}


@pytest.mark.parametrize("what", CALLS)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_it_is_refused_in_one_sentence(what):
    call, pattern = CALLS[what]
    with pytest.raises(fb.InputError, match=pattern) as refusal:
        call()
    text = str(refusal.value)
    assert isinstance(refusal.value, ValueError)
    assert "\n" not in text and len(text) < 600
    assert text[-1] in ".:?)" or ": " in text  # a sentence, or a sentence and what the user's own code said


def test_what_is_not_changed_is_good():
    result = solve()
    assert result.iteration == 1 and len(result.history) == 2
    assert stack(a=lambda a: 2 * a).clients == 3


def test_an_algorithm_without_an_estimator_says_so():
    class Moving(fb.Algorithm):
        def step(self, fed, state):
            return fb.State(state.x, fed.average(self.same, state.y)), {}

        def same(self, client, y):
            return y

    with pytest.raises(fb.InputError, match="Moving never forms a hypergradient"):
        estimate(algorithm=Moving())


def test_a_setting_is_refused_when_it_is_changed_too():
    with pytest.raises(fb.InputError, match="inner_lr="):
        dataclasses.replace(ALGORITHM, inner_lr=-1.0)


def test_python_numbers_and_numpy_arrays_are_fine_to_start_from():
    loss = lambda x, y, e: 0.5 * (y - e) ** 2 + 0.1 * x**2 + x * y
    data = fb.FederatedData.stack([np.ones(2), np.zeros(2)], [np.ones(2), np.zeros(2)])
    starts = (0.5, 1.0), (np.float64(0.5), jnp.ones(()))
    one, other = (solve(problem=fb.Problem(loss, loss), data=data, x=x, y=y) for x, y in starts)
    assert one.x == other.x != 0.5 and one.y == other.y

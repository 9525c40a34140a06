"""`fb.tune`: no step, no algorithm, one run."""

from __future__ import annotations

import dataclasses
import inspect
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.callbacks import Callback, Checkpoint
from fedbilevel.pace.automatic import STEPS, ready
from fedbilevel.race.heats import heats_of, most_candidates
from helpers.quadratic import quadratic

KEY = jax.random.key(0)
AUTO = dict.fromkeys(STEPS, "auto")
Q = quadratic(clients=4, sizes=((3, 3), (5, 4)))
R = 90  # two heats, of 12 iterations or more


def tune(q=Q, rounds=R, **more):
    return fb.tune(q.problem, q.data, q.x, q.y, rounds=rounds, key=KEY, **more)


@pytest.fixture(scope="module")
def tuned():
    return tune()


def alone(name, tempo, iterations, **more):
    """What a candidate does without a race."""
    running = ready({"lockstep": fb.Lockstep(**AUTO), "simfbo": fb.SimFBO(**AUTO)}[name], Q.x)
    running = dataclasses.replace(running, tempo=tempo)
    return fb.solve(Q.problem, Q.data, running, Q.x, Q.y, iterations, key=KEY, **more)


class At(Callback):
    """Stops at an iteration."""

    def __init__(self, iteration):
        self.iteration = iteration

    def record(self, run, rows):
        if run.iteration == self.iteration:
            run.stop("far enough")


def test_the_winner_goes_on_from_its_state(tuned):
    """Nothing is drawn here: it does what it would have done alone, and nothing was begun again."""
    (winner,) = [each for each in tuned.candidates if each.round is None]
    own = alone(winner.name.partition(",")[0], winner.tempo, tuned.iteration)
    assert fb.testing.distance((tuned.x, tuned.y), (own.x, own.y)) <= 1e-10
    assert R - 2 <= tuned.rounds <= R
    judged = tuned.rounds - own.history[-1]["rounds"]
    assert 2 <= judged <= 2 * 5  # of two heats


def test_all_rounds_and_bytes_are_told(tuned):
    left = tuned.history.column("candidates")
    assert left[0] == 4 and left[-1] == 1 and set(left) == {4, 2, 1}
    assert [each.round for each in tuned.candidates].count(None) == 1
    assert tuned.rounds == tuned.history[-1]["rounds"] and tuned.bytes_up == tuned.history[-1]["bytes_up"]
    per_round = np.diff(tuned.history.column("bytes_up")) / np.diff(tuned.history.column("rounds"))
    assert per_round[1] > 2 * per_round[-1]  # they fall where candidates do
    assert list(tuned.table.columns) == ["name", "algorithm", "tempo", "score", "round", "why"]


def test_a_metric_that_fails_when_candidates_are_judged_loses_nothing():
    def fails(x, y):
        raise ValueError("no such thing")

    def later(x, y):  # fine at the start
        return 0.0 if fb.testing.distance(x, Q.x) == 0 else fails(x, y)

    with pytest.raises(fb.RunError, match="no such thing") as failure:
        tune(metrics={"later": later}, metric="later", direction="min", evaluate_every=1000)
    assert failure.value.result.iteration > 0


def test_the_algorithm_is_told_with_its_numbers(tuned):
    assert type(tuned.algorithm) in (fb.Lockstep, fb.SimFBO)
    last = tuned.history[-1]
    assert tuned.algorithm.inner_lr == pytest.approx(last["inner_lr"])
    assert tuned.algorithm.hessian_lr == pytest.approx(last["hessian_lr"])
    assert isinstance(tuned.algorithm.outer_lr, float) and tuned.algorithm.outer_lr > 0
    fb.solve(Q.problem, Q.data, tuned.algorithm, tuned.x, tuned.y, 2, key=KEY)  # it is one


def test_x_is_better(tuned):
    value = lambda x: float(fb.reference.value(Q.problem, Q.data, x, Q.y))
    best = value(Q.minimum()[0]) if hasattr(Q, "minimum") else None
    assert value(tuned.x) < value(Q.x)
    assert best is None or value(tuned.x) < best + 0.5 * (value(Q.x) - best)


@pytest.mark.slow
@pytest.mark.parametrize(("more", "candidates"), [({"cohort": 3}, 4), ({"weights": True}, 2)])
def test_engines_agree(more, candidates):
    q = (
        dataclasses.replace(Q, data=fb.FederatedData.stack(Q.inner, Q.outer, weights="rows"))
        if "weights" in more
        else Q
    )
    own = {name: value for name, value in more.items() if name != "weights"}
    given = {"batch_size": 2, "candidates": candidates}
    ends = [tune(q, 48, engine=engine(dropout=0.2, **own), **given) for engine in (fb.Simulation, fb.Loopback)]
    assert fb.testing.distance((ends[0].x, ends[0].y), (ends[1].x, ends[1].y)) <= 1e-10
    assert [each.round for each in ends[0].candidates] == [each.round for each in ends[1].candidates]
    for name in ("rounds", "bytes_down", "bytes_up", "candidates"):
        np.testing.assert_array_equal(ends[0].history.column(name), ends[1].history.column(name))


@pytest.mark.parametrize("stop", [5, 18, 30])
def test_it_is_resumed_in_any_heat(tuned, tmp_path, stop):
    tune(callbacks=[Checkpoint(tmp_path), At(stop)])
    resumed = tune(callbacks=[Checkpoint(tmp_path)], resume=tmp_path)
    assert fb.testing.distance((tuned.x, tuned.y), (resumed.x, resumed.y)) <= 1e-12
    assert resumed.rounds == tuned.rounds and resumed.bytes_up == tuned.bytes_up
    assert [dataclasses.astuple(each)[:3] for each in resumed.candidates] == [
        dataclasses.astuple(each)[:3] for each in tuned.candidates
    ]
    np.testing.assert_array_equal(resumed.history.column("candidates"), tuned.history.column("candidates"))


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    fb.solve(Q.problem, Q.data, fb.Lockstep(**AUTO), Q.x, Q.y, 3, key=KEY, callbacks=[Checkpoint(tmp_path)])
    with pytest.raises(fb.InputError, match="of a run without candidates"):
        tune(resume=tmp_path)
    with pytest.raises(fb.InputError, match="there is no checkpoint"):
        tune(resume=tmp_path / "none")


@pytest.mark.parametrize("rounds", [1, 4])
def test_too_few_rounds_for_x_to_move_are_told(rounds):
    with pytest.warns(
        fb.errors.FedbilevelWarning, match=rf"x is where it started, after {rounds} rounds?: .*Give more"
    ):
        result = tune(rounds=rounds, candidates=1)
    assert result.rounds == rounds and fb.testing.distance(result.x, Q.x) == 0


def test_one_candidate_is_a_run():
    one, own = tune(rounds=20, candidates=1), alone("lockstep", 1.0, 19)
    assert fb.testing.distance((one.x, one.y), (own.x, own.y)) <= 1e-12
    assert one.rounds == 20 and len(one.candidates) == 1 and "candidates" not in one.history.columns
    assert len(tune(rounds=20).candidates) == 1  # there is no room for more


def test_the_budget_of_bytes_holds(tuned):
    most = (tuned.bytes_down + tuned.bytes_up) // 2
    less = tune(max_bytes=most)
    assert most * 0.9 < less.bytes_down + less.bytes_up <= most and less.rounds < tuned.rounds


@pytest.mark.slow
def test_a_metric_of_ones_own_judges():
    far = lambda x, y: sum(jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (x, Q.x)), strict=True))
    ends = [tune(metric="far", direction=way, metrics={"far": far}) for way in ("min", "max")]
    scores = [{each.name: each.score for each in end.candidates} for end in ends]
    assert ends[0].candidates != ends[1].candidates
    least, most = (float(far(end.x, end.y)) for end in ends)
    assert all(0 <= score < 1e6 for score in scores[1].values())  # as the metric has it
    assert least < most and all(math.isfinite(value) for value in scores[0].values())


def test_the_best_row_is_kept():
    kept = tune(keep="validation_loss:min")
    values = kept.history.column("validation_loss")
    assert kept.best().value == np.nanmin(values) and kept.rounds <= R


@pytest.mark.slow
def test_own_candidates_race():
    steps = {"inner_lr": 0.02, "hessian_lr": 0.02}
    several = [fb.Lockstep(**steps, outer_lr=lr) for lr in (1e-3, 2e-2)] + [fb.SimFBO(**AUTO), fb.Lockstep(**AUTO)]
    end = tune(algorithms=several)
    assert sorted(each.algorithm for each in end.candidates) == ["Lockstep"] * 3 + ["SimFBO"]
    assert "outer_lr=0.001" in " ".join(each.name for each in end.candidates)


def test_what_blows_up_is_dropped():
    bad = {"inner_lr": 1e6, "hessian_lr": 0.02, "outer_lr": 0.02}
    end = tune(algorithms=[fb.Lockstep(**bad), fb.Lockstep(**AUTO)])
    first, second = end.candidates
    assert (first.why, second.round) == ("blew up", None) and math.isnan(first.score)


def test_where_all_blow_up_the_first_begins_anew_and_says_so():
    bad = [fb.Lockstep(inner_lr=step, hessian_lr=0.02, outer_lr=0.02) for step in (1e6, 2e6)]
    with pytest.raises(fb.Diverged) as failure:
        tune(algorithms=bad)
    end = failure.value.result
    assert end.candidates[0].why == "began anew when all had blown up" and end.candidates[1].why == "blew up"


@pytest.mark.slow
def test_where_a_cohort_is_drawn_by_weights_lockstep_is_left_out():
    q = dataclasses.replace(Q, data=fb.FederatedData.stack(Q.inner, Q.outer, weights="rows"))
    end = tune(q, 60, engine=fb.Simulation(cohort=2))
    assert {each.algorithm for each in end.candidates} == {"SimFBO"}


def test_heats_take_a_fifth_of_the_rounds():
    assert heats_of(4, 300, 1) == [(30, 2), (60, 1)]
    assert heats_of(8, 300, 1) == [(20, 4), (40, 2), (60, 1)]
    assert heats_of(3, 300, 1) == [(30, 2), (60, 1)]
    assert heats_of(1, 300, 1) == []
    assert heats_of(2, 1300, 13) == [(20, 1)]
    assert most_candidates(4, 300, 1) == 4 and most_candidates(4, 30, 1) == 2 and most_candidates(4, 20, 1) == 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"rounds": 0}, "rounds= is a whole number of at least 1"),
        ({"rounds": 4, "algorithms": [fb.AggITD(inner_rounds=5, **AUTO)]}, r"one iteration of AggITD takes \d+"),
        ({"max_bytes": 10}, "one iteration of Lockstep takes"),
        ({"metric": "loss", "metrics": {"loss": lambda x, y: 0.0}}, "direction="),
        ({"metric": "loss", "direction": "min"}, "loss"),
        ({"metric": "loss", "direction": "maximum", "metrics": {"loss": lambda x, y: 0.0}}, "maximum"),
        ({"direction": "max"}, "goes with metric="),
        ({"keep": "loss"}, "keep="),
        ({"keep": "loss:min"}, "loss"),
        ({"candidates": 0}, "candidates="),
        ({"candidates": 99}, "candidates="),
        ({"algorithms": []}, "algorithms= is a list"),
        ({"algorithms": "lockstep"}, "algorithms= is a list"),
        ({"algorithms": [fb.Lockstep()] * 9}, "at most 8"),
        ({"algorithms": [fb.FedBiOAccLocal()] * 2}, "a y of their own"),
        ({"algorithms": [fb.Lockstep()], "batch_size": 2}, "batch_size="),
        ({"engine": fb.Simulation(cohort=9)}, "9"),
        ({"engine": "simulation"}, "engine is"),
        ({"x": jax.tree.map(lambda leaf: leaf * jnp.nan, Q.x)}, "nan|finite"),
        ({"x": jax.tree.map(lambda leaf: leaf.astype(complex), Q.x)}, "complex"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_sentence(given, says):
    arguments = {"x": Q.x, "y": Q.y, "rounds": R, "key": KEY} | given
    with pytest.raises(fb.InputError, match=says):
        fb.tune(Q.problem, Q.data, **arguments)


def test_it_is_a_function_that_has_what_its_package_offers():
    assert inspect.isfunction(fb.tune)
    assert callable(fb.tune.search) and callable(fb.tune.sweep)
    from fedbilevel.tune import search

    assert search is fb.tune.search
    assert next(iter(inspect.signature(fb.tune).parameters)) == "problem"


@pytest.mark.slow
def test_few_rounds_for_many_candidates_are_said():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tune(rounds=30, candidates=4)
    assert any("2 of 4 candidates race" in str(each.message) for each in said)

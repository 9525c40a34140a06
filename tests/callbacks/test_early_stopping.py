"""A run is stopped at the row at which its metric has not got better for a while, on any engine, resumed or not."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.callbacks import Checkpoint, EarlyStopping
from fedbilevel.result import EMPTY
from helpers.listening import Told
from helpers.quadratic import quadratic

Q = quadratic(seed=3, clients=4)
LOCKSTEP = fb.Lockstep(inner_lr=0.02, hessian_lr=0.02, outer_lr=0.02)


def solve(values, iterations=30, engine=None, **options):
    """A run whose metric says these values, one after the other; `start` of them have been said before."""
    values = iter(values)
    return fb.solve(
        Q.problem, Q.data, LOCKSTEP, Q.x, Q.y, iterations, key=jax.random.key(1), engine=engine or fb.Simulation(),
        metrics={"loss": lambda x, y: next(values)}, **options,
    )  # fmt: skip


def stopped(values, *words, **settings):
    """(iteration, reason) of the stop that a history of these values makes."""
    run, watch = Told("loss"), EarlyStopping("loss", *words, **settings)
    watch.start(run)
    for row in rows(values):
        run.tell(watch, row)
        if run.reasons:
            return row["iteration"], run.reasons[0]
    return None


def rows(values, first=0):
    return [{"iteration": iteration, "loss": value} for iteration, value in enumerate(values, first)]


NAN = float("nan")
FALLS = [5.0, 4.0, 4.5, 4.2, 4.1, 3.9]
CASES = {
    "patience": (FALLS, {"patience": 3}, 4, "loss has not got better for 3 rows (best at iteration 1, 4)"),
    "patient": (FALLS, {"patience": 4}, None, ""),
    "just as good is not better": ([1.0] * 5, {"patience": 2}, 2, "loss has not got better for 2 rows"),
    "min_delta": ([5.0, 4.9, 4.8, 4.7], {"patience": 2, "min_delta": 0.25}, 2, "(best at iteration 0, 5)"),
    "exceeded": ([5.0, 4.7, 4.4, 4.1, 3.8], {"patience": 2, "min_delta": 0.25}, None, ""),
    "target": (FALLS, {"target": 4.0}, 1, "loss is 4, as good as the target 4"),
    "not finite": ([NAN, -np.inf, NAN], {"patience": 3}, 2, "loss has not got better for 3 rows (never finite)"),
    "finite at last": ([NAN, NAN, 7.0, -np.inf, 6.0], {"patience": 3}, None, ""),
    "an infinite value is no target": ([5.0, -np.inf, 3.0], {"target": 3.5}, 2, "loss is 3, as good as the target 3.5"),
    "not taken": ([5.0, *[EMPTY] * 20, 4.0], {"patience": 2}, None, ""),
}


@pytest.mark.parametrize("direction", ["min", "max"])
@pytest.mark.parametrize("case", CASES)
def test_where_it_stops_and_why(case, direction):
    values, settings, at, why = CASES[case]
    if direction == "max":  # the same, turned over
        values = [value if value is EMPTY else -value for value in values]
        settings = {name: -value if name == "target" else value for name, value in settings.items()}
        for number in ("is 4,", "is 3,", "1, 4)", "0, 5)", "target 4", "target 3.5"):
            why = why.replace(number, f"{number[:-2]}-{number[-2:]}" if number[-1] in ",)" else f"target -{number[7:]}")
    found = stopped(values, direction, **settings)
    assert found is None if at is None else (found[0] == at and why in found[1])


@pytest.mark.parametrize("engine", [fb.Simulation(), fb.Loopback()], ids=["sim", "loop"])
def test_it_stops_at_the_same_iteration_everywhere(engine):
    result = solve([5.0, 4.0, *[4.5] * 40], engine=engine, callbacks=[EarlyStopping("loss", "min", patience=5)])
    assert result.iteration == 6
    assert result.stopped == "loss has not got better for 5 rows (best at iteration 1, 4)"


def test_a_resumed_run_stops_where_the_uninterrupted_one_does(tmp_path):
    watch = lambda: EarlyStopping("loss", "min", patience=5)
    values = [5.0, 4.0, *[4.5] * 40]
    solve(values, 4, callbacks=[watch(), Checkpoint(tmp_path)])
    result = solve(values[5:], resume=tmp_path, callbacks=[watch(), Checkpoint(tmp_path)])
    assert result.iteration == 6 and result.stopped
    again = solve([], resume=tmp_path, callbacks=[watch()])
    assert (again.iteration, again.stopped) == (6, result.stopped)
    on = solve(values, 8, resume=tmp_path, callbacks=[EarlyStopping("loss", "min", patience=9)])
    assert (on.iteration, on.stopped) == (8, None)


def test_going_back_takes_back_what_was_given_up():
    run, watch = Told("loss"), EarlyStopping("loss", "min", patience=2)
    watch.start(run)
    run.tell(watch, *rows([5.0, 1.0, 3.0]))
    run.history.give_up(0)
    watch.went_back(run)
    run.tell(watch, *rows([4.0, 3.5, 3.0], 1))
    assert run.reasons == []
    run.tell(watch, *rows([3.0, 3.0], 4))
    assert run.reasons == ["loss has not got better for 2 rows (best at iteration 3, 3)"]


@pytest.mark.parametrize(
    ("words", "settings", "sentence"),
    [
        (("loss", "down"), {}, "there is no direction 'down': known are max, min."),
        (("loss", "min"), {"patience": 0}, r"EarlyStopping\(patience=\) is a whole number of at least 1; got 0"),
        (("loss", "min"), {"min_delta": -1.0}, r"EarlyStopping\(min_delta=\) is a number of at least 0; got -1.0"),
        (("loss", "min"), {"target": "low"}, r"EarlyStopping\(target=\) is a finite number; got 'low'"),
        (("lost", "min"), {}, "there is no metric 'lost': did you mean 'loss'[?] known are loss."),
    ],
)
def test_what_cannot_be_used_is_refused(words, settings, sentence):
    with pytest.raises(fb.InputError, match=sentence):
        solve([1.0], callbacks=[EarlyStopping(*words, **settings)])


def test_a_run_without_metrics_is_told_so():
    with pytest.raises(fb.InputError, match="there is no metric 'loss': the run has none; pass metrics="):
        EarlyStopping("loss", "min").start(Told())

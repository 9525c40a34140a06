"""`validation_loss` is the outer loss over all clients, on every engine, and what it takes is counted."""

from __future__ import annotations

import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.callbacks import Checkpoint, EarlyStopping
from fedbilevel.engines.messaging.client_side import Methods
from fedbilevel.reference import outer_value
from fedbilevel.threefry import new_key
from helpers.quadratic import flat, quadratic

Q = quadratic(seed=3, clients=4)
UNALIKE = fb.FederatedData.stack(Q.inner, Q.outer, "rows")  # clients count by their rows
LOCKSTEP = fb.Lockstep(inner_lr=0.02, hessian_lr=0.02, outer_lr=0.02)
FEDERATION = {"validation_loss": fb.validation_loss}
of = lambda data: {"own": lambda x, y: outer_value(Q.problem, data, x, y)}
engines = pytest.mark.parametrize("engine", [fb.Simulation(cohort=2), fb.Loopback(cohort=2)], ids=["sim", "loop"])


def solve(iterations=None, engine=None, algorithm=LOCKSTEP, data=Q.data, **options):
    return fb.solve(
        Q.problem, data, algorithm, Q.x, Q.y, iterations, key=new_key(1), engine=engine or fb.Simulation(cohort=2), **options
    )  # fmt: skip


def totals(result):
    return [[row[name] for name in ("rounds", "bytes_down", "bytes_up")] for row in result.history]


@pytest.mark.parametrize("data", [Q.data, UNALIKE], ids=["alike", "weighted"])
@pytest.mark.parametrize("kind", [fb.Simulation, fb.Loopback])
def test_it_is_the_loss_over_all_clients_and_costs_a_round_a_row(kind, data):
    engine = kind(cohort=2 if data is Q.data else None)
    how = {"engine": engine, "data": data, "metrics": of(data), "evaluate_every": 2}
    result, plain = solve(5, **how, keep="validation_loss:min"), solve(5, **how)
    column, own = (result.history.column(name) for name in ("validation_loss", "own"))
    np.testing.assert_allclose(column, own, rtol=1e-12)
    np.testing.assert_array_equal(own, plain.history.column("own"))  # the run itself is the same
    best = result.best()
    assert best.value == column.min() and best.iteration == [0, 2, 4, 5][column.argmin()]
    (line,) = result.protocol.each_row
    assert line.name == "validation_loss" + " (4 asked)" * (data is Q.data) and (line.down, line.up) == ("x, y", "8 B")
    size = 8 * (flat(Q.x).size + flat(Q.y).size)
    assert (line.times_most, line.bytes_down_most, line.bytes_up_most) == (1, 4 * size, 4 * 8)
    more = np.subtract(totals(result), totals(plain))
    np.testing.assert_array_equal(more, np.outer([1, 2, 3, 4], [1, 4 * size, 4 * 8]))
    assert plain.protocol.each_row == () and plain.protocol.rounds == result.protocol.rounds


def test_a_client_traces_its_loss_once():
    before = Methods.traced["validation_loss"]
    solve(3, fb.Loopback(), metrics=FEDERATION)
    assert Methods.traced["validation_loss"] - before in (
        0,
        4,
    )  # of each client, not at each row; 0 if one has run before


@engines
@pytest.mark.parametrize(
    ("rounds", "every", "done"), [(3, 1, 1), (4, 1, 1), (9, 1, 4), (9, 2, 5), (9, 9, 7), (10, 3, 6)]
)
def test_a_budget_of_rounds_pays_for_it(engine, rounds, every, done):
    """The start, each row and the end cost one: 9 = 5 + rows 0, 2, 4 and 5."""
    result = solve(rounds=rounds, engine=engine, metrics=FEDERATION, evaluate_every=every)
    assert result.iteration == done and result.history[-1]["rounds"] <= rounds
    rows = len(result.history)
    assert result.history[-1]["rounds"] == done + rows and result.history[-1]["iteration"] == done


def test_a_budget_without_room_for_it_is_refused():
    with pytest.raises(
        fb.InputError, match=r"2 rounds are too few: one iteration .* 1, and validation_loss 1 at the start"
    ):
        solve(rounds=2, metrics=FEDERATION)


@pytest.mark.parametrize("at", [3, 5])
def test_a_run_that_goes_on_measures_nothing_twice(tmp_path, at):
    """At 3 the last row lies off the grid, and its round is spent; a longer run has no such row."""
    how = {"keep": "validation_loss:max", "evaluate_every": 5}
    first = solve(at, callbacks=[Checkpoint(tmp_path)], **how)
    again = solve(at, resume=tmp_path, **how)
    whole, resumed = solve(8, **how), solve(8, resume=tmp_path, **how)
    assert totals(again) == totals(first)
    np.testing.assert_array_equal(*(run.history.column("validation_loss") for run in (resumed, whole)))
    spent, (one, other) = {3: 1, 5: 0}[at], (run.best() for run in (resumed, whole))
    assert (one.iteration, one.rounds, one.value) == (8, other.rounds + spent, other.value)
    assert totals(resumed)[-1][0] == totals(whole)[-1][0] + spent


def test_where_clients_drop_out_it_is_the_mean_of_those_who_answer():
    one, other = (
        solve(6, engine(cohort=2, dropout=0.4), metrics=FEDERATION) for engine in (fb.Simulation, fb.Loopback)
    )
    np.testing.assert_allclose(*(run.history.column("validation_loss") for run in (one, other)), rtol=1e-12)
    sent = np.diff(one.history.column("bytes_up"))
    assert len(set(sent)) > 1 and totals(one) == totals(other)


def test_clients_with_lower_variables_of_their_own_are_judged_by_the_mean():
    algorithm = fb.FedBiOAccLocal(inner_lr=0.02, hessian_lr=0.02, outer_lr=0.02)
    result = solve(2, fb.Simulation(), algorithm, UNALIKE, metrics=of(UNALIKE) | FEDERATION)
    np.testing.assert_allclose(*(result.history.column(name) for name in ("validation_loss", "own")), rtol=1e-12)


def test_training_keeps_the_best_y():
    result = fb.train(Q.problem, Q.data, Q.x, Q.y, rounds=12, key=new_key(1), keep="validation_loss:min", check=False)
    column, best = result.history.column("validation_loss"), result.best()
    assert best.value == column.min() and result.history[-1]["rounds"] <= 12
    np.testing.assert_allclose(best.value, outer_value(Q.problem, Q.data, best.x, best.y), rtol=1e-12)
    np.testing.assert_array_equal(flat(best.x), flat(Q.x))


@pytest.mark.parametrize("rounds", [4, 5, 7])
def test_training_on_a_small_budget_measures_its_step_less(rounds):
    how = {"key": new_key(1), "check": False, "engine": fb.Simulation(cohort=1), "metrics": FEDERATION}
    result = fb.train(Q.problem, Q.data, Q.x, Q.y, rounds=rounds, evaluate_every=99, **how)
    assert result.iteration == 1 and result.history[-1]["rounds"] == rounds
    with pytest.raises(fb.InputError, match="3 rounds are too few"):
        fb.train(Q.problem, Q.data, Q.x, Q.y, rounds=3, **how)


def test_a_callback_may_go_by_it_and_it_may_have_another_name():
    stopping = EarlyStopping("f", "max", patience=2)  # f falls
    result = solve(9, metrics={"f": fb.validation_loss}, callbacks=[stopping], keep="f:min")
    assert result.stopped == f"f has not got better for 2 rows (best at iteration 0, {result.history[0]['f']:.6g})"
    assert result.best().value == min(row["f"] for row in result.history)


def test_a_metric_of_that_name_is_the_users_own():
    result = solve(2, metrics={"validation_loss": lambda x, y: 1.0}, keep="validation_loss:min")
    assert result.best()[2:] == (0, 0, 1.0) and result.protocol.each_row == ()


def test_it_cannot_be_called_and_says_what_can():
    with pytest.raises(fb.InputError, match=r"measured by the run.*fb.reference.outer_value\(problem, data, x, y\)"):
        fb.validation_loss(Q.x, Q.y)


def test_the_command_names_it(fedbilevel):
    words = (
        "ridge",
        "--dataset",
        "diabetes",
        "--clients",
        3,
        "--algorithm",
        "lockstep",
        "--keep",
        "validation_loss:min",
    )
    code, text, errors = fedbilevel("protocol", *words)
    assert code == 0 and "at each row of the history validation_loss: x, y down, 4 B up; 1 round" in text, errors
    code, text, errors = fedbilevel("run", *words, "--iterations", 3)
    assert code == 0 and "best: validation_loss 0." in text, errors

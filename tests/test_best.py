"""The best x and y are those of a row of the history, and a run that goes back, or is resumed, finds the same."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedbilevel as fb
from fedbilevel.app import load_app
from fedbilevel.best import Goal, Kept
from fedbilevel.callbacks import Callback, Checkpoint
from fedbilevel.compare import Plan, Shipped
from fedbilevel.sampled import Sampled
from fedbilevel.tasks import Options
from helpers import apps
from helpers.quadratic import flat, quadratic

Q = quadratic(seed=3, clients=4)
LOCKSTEP = fb.Lockstep(inner_lr=0.02, hessian_lr=0.02, outer_lr=0.02)
NAN = math.nan
engines = pytest.mark.parametrize("engine", [fb.Simulation(cohort=2), fb.Loopback(cohort=2)], ids=["sim", "loop"])


def solve(values=(), iterations=7, engine=None, **options):
    """A run whose metric says these values, one after the other."""
    values = iter(values)
    return fb.solve(
        Q.problem, Q.data, LOCKSTEP, Q.x, Q.y, iterations, key=jax.random.key(1), engine=engine or fb.Simulation(cohort=2),
        **{"metrics": {"loss": lambda x, y: next(values)}, "keep": "loss:min", **options},
    )  # fmt: skip


def figures(best):
    return best.iteration, best.rounds, best.value


def same(one, other):
    assert figures(one) == figures(other)
    for name in "xy":
        np.testing.assert_array_equal(flat(getattr(one, name)), flat(getattr(other, name)))


# Which row ------------------------------------------------------------------------------------------------------------


CASES = {
    "the smallest": ([5, 4, 3, 4, 5, 6, 7, 8], "min", 2),
    "the largest": ([5, 4, 3, 4, 5, 6, 7, 6], "max", 6),
    "the first of equals": ([5, 4, 3, 3, 5, 3, 7, 8], "min", 2),
    "the start": ([1, 4, 3, 3, 5, 3, 7, 8], "min", 0),
    "what is not finite does not count": ([NAN, 4, -np.inf, 3, NAN, 5, 7, 8], "min", 3),
    "nor does an infinite one that is the largest": ([NAN, 4, np.inf, 3, NAN, 5, 7, np.inf], "max", 6),
}


@engines
@pytest.mark.parametrize("case", CASES)
def test_the_best_and_the_last_are_returned(case, engine):
    values, direction, at = CASES[case]
    result = solve(map(float, values), engine=engine, keep=f"loss:{direction}")
    best, last = result.best(), solve(engine=engine, metrics=None, keep=None)
    assert figures(best) == (at, at, values[at]) and result.iteration == 7
    np.testing.assert_array_equal(flat(result.x), flat(last.x))
    there = Q if at == 0 else solve(iterations=at, engine=engine, metrics=None, keep=None)
    np.testing.assert_array_equal(flat(best.x), flat(there.x))
    np.testing.assert_array_equal(flat(best.y), flat(there.y))
    assert [type(leaf) for leaf in jax.tree.leaves(best)[:2]] == [type(leaf) for leaf in jax.tree.leaves(last.x)[:2]]


@engines
def test_what_an_algorithm_tells_of_an_iteration_may_decide(engine):
    result = solve(engine=engine, metrics=None, keep="lower_gradient_norm:min")
    told = result.history.column("lower_gradient_norm")
    assert np.isnan(told[0]) and result.best().iteration == np.nanargmin(told) == 6
    assert result.best().value == np.nanmin(told)
    np.testing.assert_array_equal(
        flat(result.best().y), flat(solve(iterations=6, engine=engine, metrics=None, keep=None).y)
    )


def test_a_callback_sees_the_best_so_far():
    seen = []

    class Look(Callback):
        def record(self, run, rows):
            seen.append(run.kept.best.iteration)

    solve([3.0, 2.0, 5.0, 1.0], iterations=3, callbacks=[Look()])
    assert seen == [0, 1, 1, 3]


# Going on, going back -------------------------------------------------------------------------------------------------


class Copied(Callback):
    """Keeps a copy of the checkpoint as it is after some iterations, as a process that is killed would leave it."""

    def __init__(self, folder, to, iteration):
        self._folder, self._to, self._iteration = folder, to, iteration

    def advance(self, run):
        if run.iteration == self._iteration:
            shutil.copytree(self._folder, self._to)


VALUES = [5.0, 4.0, 2.0, 3.0, 2.5, 2.0, 1.5, 9.0]


@engines
@pytest.mark.parametrize(("at", "every"), [(1, 1), (4, 1), (7, 1), (4, 2), (6, 2)])
def test_a_killed_run_that_goes_on_finds_the_same(tmp_path, engine, at, every):
    there, later = tmp_path / "there", tmp_path / "later"
    values = [value for k, value in enumerate(VALUES) if k % every == 0 or k == 7]
    watch = [Checkpoint(there, every=0.0), Copied(there, later, at)]
    whole = solve(values, engine=engine, callbacks=watch, evaluate_every=every)
    left = values[at // every + 1 :]
    resumed = solve(left, engine=engine, evaluate_every=every, resume=later)
    same(resumed.best(), whole.best())
    assert whole.best().iteration == {1: 6, 2: 6}[every]


def test_a_last_row_off_the_grid_counts_there_and_not_in_a_run_that_goes_on(tmp_path):
    values = [5.0, 4.0, 3.0, 1.0]  # at 0, 2, 4, and 5, the end
    short = solve(values, iterations=5, evaluate_every=2, callbacks=[Checkpoint(tmp_path)])
    assert figures(short.best()) == (5, 5, 1.0)
    same(solve([1.0], iterations=5, evaluate_every=2, resume=tmp_path).best(), short.best())
    longer = solve([3.5, 6.0], iterations=7, evaluate_every=2, resume=tmp_path)
    assert figures(longer.best()) == (4, 4, 3.0)


@pytest.mark.parametrize(
    ("first", "second", "sentence"),
    [
        (None, "loss:min", "keeps no best, and this run 'loss:min'"),
        ("loss:min", "loss:max", "keeps 'loss:min', and this run 'loss:max': go on with the same keep="),
    ],
)
def test_a_checkpoint_that_keeps_something_else_is_refused(tmp_path, first, second, sentence):
    solve([1.0] * 3, iterations=2, keep=first, callbacks=[Checkpoint(tmp_path)])
    with pytest.raises(fb.InputError, match=sentence):
        solve([1.0] * 9, keep=second, resume=tmp_path)
    assert solve([1.0] * 9, keep=None, resume=tmp_path).kept is None  # it may be left out


@given(st.data())
def test_a_run_that_goes_back_keeps_the_best_of_the_rows_that_stay(data):
    """Rows, snapshots and going back at random, and a checkpoint in between, against a look at all rows that are left."""
    every, kept = data.draw(st.integers(1, 3)), None
    kept = Kept(Goal("loss", "min"), every)
    rows, snapshot, at = [], 0, 0
    for _ in range(data.draw(st.integers(1, 30))):
        what = data.draw(st.sampled_from(["on", "on", "on", "snapshot", "back", "resume"]))
        if what == "on":
            value = data.draw(st.sampled_from([1.0, 2.0, 3.0, 4.0, NAN, math.inf]))
            if at % every == 0:
                x = np.array([at, len(rows)])
                rows.append((at, value, x))
                kept.look({"loss": value, "iteration": at, "rounds": at}, lambda x=x: (x, -x), snapshot)
            at += 1
        elif what == "snapshot" and at:
            snapshot = at - 1  # of the state that the last row, if there is one, tells of
        elif what == "back":
            rows, at = [row for row in rows if row[0] <= snapshot], snapshot + 1
            kept.went_back(snapshot)
        elif what == "resume":
            told, parts = kept.saved()
            found = {name: list(both) for name, both in parts.items()}
            kept = Kept(Goal("loss", "min"), every)
            kept.restore(json.loads(json.dumps(told)), found, (np.zeros(2, int), np.zeros(2, int)), "it")
        finite = [row for row in rows if math.isfinite(row[1])]
        if not finite:
            assert kept.best is None
            continue
        iteration, value, x = min(finite, key=lambda row: row[1])
        assert figures(kept.best) == (iteration, iteration, value)
        np.testing.assert_array_equal(kept.best.x, x)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "sentence"),
    [
        ("loss", "keep= names a metric and its direction, as in 'test_loss:min' .*; got 'loss'"),
        ("loss:", "names a metric and its direction"),
        (":min", "names a metric and its direction"),
        ("", "names a metric and its direction"),
        (3, "names a metric and its direction"),
        ("loss:maximum", "there is no direction 'maximum': did you mean 'max'"),
        ("los:min", "there is no metric 'los': did you mean 'loss'.* known are hypergradient_norm, .*loss, "),
        ("rounds:min", "there is no metric 'rounds'"),
        ("vector_growth:min", "there is no metric 'vector_growth'"),  # Lockstep never tells it
    ],
)
def test_what_cannot_be_kept_is_refused_at_the_start(keep, sentence):
    with pytest.raises(fb.InputError, match=sentence):
        solve([1.0] * 9, keep=keep)


def test_a_name_is_said_once_where_a_metric_is_called_as_what_the_run_measures():
    with pytest.raises(fb.InputError) as refused:
        Goal("los", "min").known(["loss", "validation_loss", "validation_loss"])
    assert str(refused.value).count("validation_loss") == 1


def test_without_a_finite_value_the_run_ends_with_all_there_is():
    with pytest.raises(
        fb.RunError, match="keep='loss:min' found no best: loss is not finite at any of the 8 rows"
    ) as error:
        solve([NAN, math.inf] * 4)
    result = error.value.result
    assert result.iteration == 7 and len(result.history) == 8
    for without in (result, solve([1.0] * 9, keep=None)):
        with pytest.raises(fb.InputError, match="there is no best: keep= was not given"):
            without.best()


# In a folder, from the command line -----------------------------------------------------------------------------------


def test_a_folder_has_best_npz(tmp_path):
    values = iter([3.0, 1.0, 2.0])
    described = lambda **how: fb.Description(
        problem=Q.problem, algorithm=LOCKSTEP, data=Q.data, start=(Q.x, Q.y), key=jax.random.key(1), iterations=2,
        engine=fb.Simulation(cohort=2), metrics={"loss": lambda x, y: next(values)}, **how,
    )  # fmt: skip
    result = fb.results.keep(described(keep="loss:min"), tmp_path, quiet=True)
    found = json.loads((tmp_path / "outcome.json").read_text())["best"]
    assert found == {"iteration": 1, "rounds": 1, "value": 1.0}
    with np.load(tmp_path / "best.npz") as best, np.load(tmp_path / "variables.npz") as last:
        assert set(best) - set(last) == {"iteration", "rounds", "value"} and best["iteration"] == 1
        np.testing.assert_array_equal(best["y['w']"], result.best().y["w"])
        assert (best["y['w']"] != last["y['w']"]).any()
    values = iter([3.0, 1.0, 2.0])
    fb.results.keep(described(), tmp_path, quiet=True)
    assert not (tmp_path / "best.npz").exists()  # an earlier run's is not this one's


RIDGE = ("run", "ridge", "--dataset", "diabetes", "--clients", "4", "--algorithm", "lockstep", "--iterations", "5")


def test_the_command_says_where_the_best_is(fedbilevel):
    code, text, errors = fedbilevel(*RIDGE, "--keep", "test_error:max", "--json")
    assert code == 0 and json.loads(text), errors
    assert re.search(r"^best: test_error [\d.]+ \(max\) at iteration \d, round \d$", errors, re.M)


def test_what_is_kept_stands_in_config_json_and_nowhere_else():
    source = Shipped("ridge", Options())
    plan = Plan(source, {"lockstep": {}}, (0,), 5, keep="test_error:min")
    config, without = plan.config(4), dataclasses.replace(plan, keep=None).config(4)
    assert config == {**without, "keep": "test_error:min"}  # folders of earlier versions go on


def test_an_applications_file_may_say_it(fedbilevel, tmp_path):
    settings = f"iterations=2, metrics={{'size': lambda x, y: (y**2).sum()}}, {apps.LOCKSTEP}, keep='size:min'"
    file = apps.write(tmp_path, apps.CLOSED_FORM, settings)
    plan = Sampled(load_app(file), ("site-1", "site-2")).plan("simulation")
    assert plan.keep == "size:min" and plan.first().describe(LOCKSTEP, keep=plan.keep).keep == "size:min"
    assert load_app(file).with_(keep="size:max").keep == "size:max"
    code, _, errors = fedbilevel("run", apps.write(tmp_path, apps.CLOSED_FORM, settings.replace(":min", "")))
    assert code == 2 and "keep= names a metric and its direction" in errors


@pytest.mark.parametrize(
    ("keep", "sentence"), [("test_error", "names a metric"), ("a:maximum", "no direction"), ("a:min", "no metric 'a'")]
)
def test_a_word_that_means_nothing_ends_with_code_2(fedbilevel, tmp_path, keep, sentence):
    code, _, errors = fedbilevel(*RIDGE, "--keep", keep, "--out", tmp_path / "out")
    assert code == 2 and sentence in errors and len(errors.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "history.csv").exists()

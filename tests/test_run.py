"""What a callback sees of a run, how it stops one, and what is left when one fails."""

from __future__ import annotations

import csv
import inspect
import resource
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pandas
import pytest

import fedbilevel as fb
from fedbilevel.callbacks import CSV, Callback, Checkpoint, Running
from fedbilevel.run import Run
from helpers.quadratic import flat, quadratic

Q = quadratic(seed=3, clients=4)
GIVEN = {"problem": Q.problem, "data": Q.data, "x": Q.x, "y": Q.y, "key": jax.random.key(1)}
STEPS = {"inner_lr": 0.02, "hessian_lr": 0.02, "outer_lr": 0.02}
LOCKSTEP = fb.Lockstep(**STEPS)
SIZE = {"size": lambda x, y: jnp.sum(y["w"] ** 2)}
engines = pytest.mark.parametrize("engine", [fb.Simulation(cohort=2), fb.Loopback(cohort=2)], ids=["sim", "loop"])


def solve(iterations=12, engine=None, **options):
    engine = engine or fb.Simulation(cohort=2)
    return fb.solve(**{**GIVEN, "algorithm": LOCKSTEP, "iterations": iterations, "engine": engine, **options})


def rows(result):
    """The history without seconds."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in result.history]


def lines(file):
    with file.open(newline="") as text:
        return list(csv.DictReader(text))


class At(Callback):
    """Does something in one of its methods, from an iteration on, and counts what it hears."""

    def __init__(self, method, act, iteration=0):
        self.heard, self.sizes, self.error = [], [], None
        self._method, self._act, self._iteration = method, act, iteration

    def _hear(self, method, run):
        self.heard.append(method)
        if method == self._method and run.iteration >= self._iteration:
            self._act(run)

    def start(self, run):
        self._hear("start", run)

    def advance(self, run):
        self._hear("advance", run)

    def record(self, run, rows):
        self.sizes.append(len(rows))
        self._hear("record", run)

    def finish(self, run, error):
        self.error = error
        self._hear("finish", run)


class Bulk(At):
    in_bulk = True


enough = lambda run: run.stop("enough")


def fails(run):
    raise TypeError("no such thing")


# What it sees ---------------------------------------------------------------------------------------------------------


def test_the_constructor_takes_words_alone_and_says_of_what_kind():
    given = list(inspect.signature(Run.__init__).parameters.values())[1:]
    assert all(each.kind is each.KEYWORD_ONLY and each.annotation is not each.empty for each in given)
    names = {each.name for each in inspect.signature(fb.solve).parameters.values()}
    assert {each.name for each in given} - {"sane", "upper", "heats", "most_bytes"} == names - {"check"}
    result = Run(**GIVEN, algorithm=LOCKSTEP, iterations=2, engine=fb.Simulation(cohort=2)).go()
    np.testing.assert_array_equal(flat(result.y), flat(solve(2).y))


@engines
def test_a_row_comes_with_the_variables_and_totals_that_are_its_own(engine):
    seen = []

    def look(run):
        assert (
            isinstance(run, Running)
            and isinstance(run.algorithm, fb.Lockstep)
            and run.goal == 4
            and run.stopped is None
        )
        row = run.history[-1]
        assert row["iteration"] == run.iteration == run.progress == len(seen)
        assert (row["rounds"], row["bytes_down"], row["bytes_up"]) == (run.rounds, run.bytes_down, run.bytes_up)
        assert row["seconds"] == pytest.approx(run.seconds, abs=1e-5)
        seen.append((run.x, run.y))

    solve(4, engine, callbacks=[At("record", look)])
    for k, (x, y) in enumerate(seen[1:], 1):
        alone = solve(k)
        np.testing.assert_allclose(flat((x, y)), flat((alone.x, alone.y)), rtol=0, atol=1e-12)
    assert jax.tree.structure(seen[0]) == jax.tree.structure((Q.x, Q.y))


def test_only_who_waits_for_rows_holds_the_run_up():
    waits, bulk = At("", enough), Bulk("", enough)
    solve(40, callbacks=[bulk])
    assert sum(bulk.sizes) == 41 and max(bulk.sizes) > 10
    solve(40, callbacks=[waits], evaluate_every=5)
    assert waits.sizes == [1] * 9


# Stopping -------------------------------------------------------------------------------------------------------------


@engines
@pytest.mark.parametrize(("every", "last"), [(1, 7), (3, 9)])
def test_it_stops_at_the_very_row(tmp_path, engine, every, last):
    options = {"evaluate_every": every, "engine": engine}
    files = [CSV(tmp_path / "h.csv", {"seed": 4}), Checkpoint(tmp_path)]
    result = solve(30, callbacks=[*files, At("record", enough, 7)], **options)
    assert result.iteration == last and result.stopped == result.history.stopped == "enough"
    frame, whole = result.history.to_dataframe(), solve(last, evaluate_every=every)
    assert frame["stopped"].iloc[-1] == "enough" and frame["stopped"].iloc[:-1].isna().all()
    assert whole.stopped is None and list(frame) == [*whole.history.columns, "stopped"]
    np.testing.assert_allclose(flat((result.x, result.y)), flat((whole.x, whole.y)), rtol=0, atol=1e-12)
    assert [row["rounds"] for row in result.history] == [row["rounds"] for row in whole.history]
    assert [row["stopped"] for row in lines(tmp_path / "h.csv")] == [""] * (len(frame) - 1) + ["enough"]

    longer = solve(last + 3, resume=tmp_path, callbacks=[CSV(tmp_path / "h.csv")], **options)
    np.testing.assert_equal(rows(longer), rows(solve(last + 3, **options)))
    assert longer.stopped is None and "stopped" not in lines(tmp_path / "h.csv")[0]


@pytest.mark.parametrize("method", ["start", "advance", "record"])
def test_any_method_stops_it_and_the_first_reason_counts(method):
    second = At("record", lambda run: run.stop("more than enough"))
    result = solve(500, callbacks=[At(method, lambda run: run.stop(" enough ")), second], evaluate_every=400)
    assert result.stopped == ("more than enough" if method == "advance" else "enough")
    assert result.iteration == 0 and len(result.history) == 1 and second.heard[-1] == "finish"


def test_one_that_stops_by_the_clock_has_a_last_row(tmp_path):
    result = solve(5000, callbacks=[Checkpoint(tmp_path), At("advance", enough)], evaluate_every=4000)
    assert 0 < result.iteration < 4000 and result.history.column("stopped")[-1] == "enough"
    assert result.history[-1]["iteration"] == result.iteration
    again = solve(5000, callbacks=[At("start", enough)], evaluate_every=4000, resume=tmp_path)
    np.testing.assert_equal(rows(again), rows(result))


def test_a_budget_of_rounds_that_was_not_spent(tmp_path):
    options = {"iterations": None, "rounds": 9}
    part = solve(callbacks=[Checkpoint(tmp_path), At("record", enough, 4)], **options)
    assert part.history[-1]["rounds"] == 4 and part.stopped == "enough"
    np.testing.assert_equal(rows(solve(resume=tmp_path, **options)), rows(solve(**options)))


@pytest.mark.parametrize("reason", ["", "  ", "two\nlines", None, 3])
def test_a_reason_is_a_line(reason):
    with pytest.raises(fb.InputError, match=r"run.stop\(reason\) takes a text of one line, not empty; got"):
        solve(callbacks=[At("start", lambda run: run.stop(reason))])
    with pytest.raises(fb.RunError, match=r"^the callback At failed: InputError: run.stop\(reason\) takes a text"):
        solve(callbacks=[At("record", lambda run: run.stop(reason))])


def test_no_metric_is_named_like_the_reason(tmp_path):
    with pytest.raises(fb.InputError, match="a metric cannot be named 'stopped'"):
        solve(metrics={"stopped": lambda x, y: 1.0})
    with pytest.raises(fb.InputError, match=r"CSV\(extra=...\) cannot have stopped"):
        solve(callbacks=[CSV(tmp_path / "h.csv", {"stopped": 1})])


# A callback that fails ------------------------------------------------------------------------------------------------


@engines
@pytest.mark.parametrize("method", ["start", "advance", "record", "finish"])
def test_nothing_is_lost_when_one_fails(tmp_path, method, engine):
    before, bad, after = At("", enough), At(method, fails, 0 if method == "start" else 3), At("", enough)
    kept = [CSV(tmp_path / "h.csv"), Checkpoint(tmp_path)]
    with pytest.raises(fb.RunError, match=r"^the callback At failed: TypeError: no such thing$") as failure:
        solve(5, engine, callbacks=[before, *kept[: method == "start"], bad, *kept, after])
    result, done = failure.value.result, {"start": 0, "finish": 5}.get(method, 3)
    assert isinstance(failure.value.__cause__, TypeError)
    assert result.iteration == done and result.stopped is None
    assert before.heard.count("finish") == 1 and isinstance(before.error, fb.RunError | None)
    assert len(result.history) == len(lines(tmp_path / "h.csv")) if method != "start" else not result.history
    if method != "start":
        assert before.sizes == after.sizes and bad.heard.count("finish") == after.heard.count("finish") == 1
        alone = solve(done)
        np.testing.assert_allclose(flat((result.x, result.y)), flat((alone.x, alone.y)), rtol=0, atol=1e-12)
        np.testing.assert_equal(rows(solve(5, engine, resume=tmp_path)), rows(solve(5, engine)))


def test_one_that_cannot_be_used_is_refused(tmp_path):
    def refuse(run):
        raise fb.InputError("not so")

    other = At("", enough)
    with pytest.raises(fb.InputError, match=r"^not so$") as refusal:
        solve(callbacks=[other, At("start", refuse)])
    assert other.heard == ["start", "finish"] and other.error is refusal.value


class Full(Checkpoint):
    """On a disk that is full by now."""

    def advance(self, run):
        raise OSError(28, "No space left on device")

    def finish(self, run, error):
        self.advance(run)


def test_a_checkpoint_that_cannot_be_written_keeps_the_result(tmp_path):
    with pytest.raises(fb.RunError, match=r"^the callback Full failed: OSError: .*No space left") as failure:
        solve(3, callbacks=[Full(tmp_path), CSV(tmp_path / "h.csv")])
    assert failure.value.result.iteration == len(lines(tmp_path / "h.csv")) - 1 == 1
    assert fb.errors.with_notes(failure.value) == str(failure.value)  # at the end it fails alike: said once


def test_files_that_cannot_grow_keep_the_result(tmp_path):
    """As on a disk that is full: the system refuses to make any file larger than the history is by then."""
    file, whole = tmp_path / "h.csv", resource.getrlimit(resource.RLIMIT_FSIZE)
    full = lambda run: resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size, whole[1]))
    try:
        with pytest.raises(fb.RunError, match=r"^the callback CSV failed: OSError: .*File too large") as failure:
            solve(9, callbacks=[CSV(file), Checkpoint(tmp_path), At("record", full, 3)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, whole)
    result = failure.value.result
    assert result.iteration == 4 and len(result.history) == 5 and len(lines(file)) == 4
    assert "(Then the callback Checkpoint failed: OSError" in fb.errors.with_notes(failure.value)
    np.testing.assert_array_equal(flat(result.y), flat(solve(4).y))


def test_a_folder_that_is_gone_keeps_the_result(tmp_path):
    place = tmp_path / "gone"
    away = At("record", lambda run: (place / "checkpoint.eqx").unlink(missing_ok=True) or place.rmdir(), 3)
    with pytest.raises(fb.RunError, match=r"^the callback Checkpoint failed: FileNotFoundError") as failure:
        solve(3, callbacks=[Checkpoint(place), away])
    assert failure.value.result.iteration == 3 and len(failure.value.result.history) == 4


def test_the_first_error_is_the_one_that_is_told():
    wild, bad = fb.Lockstep(**STEPS | {"outer_lr": 1e8}), At("finish", fails)
    with pytest.raises(fb.Diverged) as failure:
        solve(200, algorithm=wild, callbacks=[bad, At("finish", fails)])
    then = "(Then the callback At failed: TypeError: no such thing)"
    assert fb.errors.with_notes(failure.value) == f"{failure.value} {then} {then}"
    assert failure.value.result.iteration == len(failure.value.result.history) - 1
    assert bad.error is failure.value


def test_one_that_fails_at_the_last_row_of_a_run_that_blew_up_is_a_note():
    wild = fb.Lockstep(**STEPS | {"outer_lr": 1e8})
    with pytest.raises(fb.Diverged) as failure:
        solve(200, algorithm=wild, callbacks=[At("record", fails, 1)], evaluate_every=150)
    assert failure.value.__notes__ == ["Then the callback At failed: TypeError: no such thing"]
    assert failure.value.result.history[-1]["iteration"] == failure.value.result.iteration > 0


@pytest.mark.parametrize("method", ["start", "advance", "record", "finish"])
def test_an_interruption_passes_and_the_others_hear_of_it(method):
    def interrupt(run):
        raise KeyboardInterrupt

    first, last = At("finish", fails), At("", enough)
    with pytest.raises(KeyboardInterrupt):
        solve(3, callbacks=[first, At(method, interrupt), last])
    assert first.heard[-1] == "finish"
    assert (last.heard == []) if method == "start" else (last.heard[-1] == "finish")


def test_the_reason_is_no_number_for_tables(tmp_path):
    solve(3, callbacks=[CSV(tmp_path / "h.csv"), At("record", enough, 2)], metrics=SIZE)
    frame = pandas.read_csv(tmp_path / "h.csv")
    assert frame["stopped"].tolist()[-1] == "enough" and frame["stopped"].notna().sum() == 1


DONE = """
    import gc, weakref
    import jax, numpy as np
    import fedbilevel as fb
    from fedbilevel.run import Run

    rows = [np.ones((3, 2), np.float32)] * 2
    problem = fb.Problem(lambda x, y, row: ((y - x) ** 2 * row).sum(), lambda x, y, row: (y**2).sum())
    algorithm = fb.SimFBO(inner_lr=0.1, hessian_lr=0.1, outer_lr=0.1)
    start = np.ones(2, np.float32)
    gc.disable()
    for engine in fb.Simulation(), fb.Loopback():
        run = Run(problem=problem, data=fb.FederatedData.stack(rows, rows), algorithm=algorithm, x=start, y=start,
                  iterations=2, key=jax.random.key(0), engine=engine)
        result, there = run.go(), weakref.ref(run)
        del run
        print(there())
"""


def test_a_run_that_is_done_leaves_memory_at_once():
    """With its states, and not when Python next looks for objects that hold on to each other."""
    words = [sys.executable, "-c", textwrap.dedent(DONE)]  # without the checks of types, which hold on to functions
    assert subprocess.run(words, check=True, capture_output=True, text=True).stdout.split() == ["None", "None"]

"""A run in progress: stretches of iterations, with rows, callbacks, a budget, and what to do when it blows up."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Key, PyTree

from . import cache, owned
from .algorithm import Algorithm
from .beginning import first_state
from .best import Kept, goal
from .by_client import BAD, SUFFIX, ClientMetrics, Column, Share, check_names, checked, checked_share, columns, measures
from .callbacks.base import Callback
from .callbacks.checkpoint import load, load_kept
from .callbacks.listeners import Listeners
from .client_table import ClientTable, named, table
from .cohorts import check_cohort
from .component import title_of
from .data import FederatedData
from .diagnosis import LEAST, diagnose, largest
from .diagnosis.still import tell_still
from .diagnosis.swing import Trail
from .diagnosis.swinging import tell
from .engines.base import Carry, Engine, Execution, Record
from .engines.simulation import Simulation
from .errors import Diverged, InputError, RunError, check, warn
from .foreign import as_given
from .given import JSON, Whole, whole_number
from .identity import Identity
from .keys import KeyLike, as_key, threefry
from .means.carried import begins, fewest_of, measuring, rounds_first
from .memory import seldom_collecting
from .metrics import STOPPED, Metric, check_diagnostics, checked_metrics, measured, names_taken
from .own_lower import Away, Lower
from .problem import Problem, bind
from .program import settle
from .protocol import Protocol, check_kinds
from .protocol import running as as_it_runs
from .race.heats import Heats, heats_in, narrowed, smaller
from .race.racing import Race
from .recovery import Back, recovery, saved_snapshot
from .result import EMPTY, History, Result, Row
from .sanity import check_sane
from .validation import NAME as VALIDATION
from .validation import Judge, Judged, Validation, asked, judged
from .variables import trainable
from .watch import Seen, precision

_STRETCH = 0.5  # seconds between looks at a run: progress, Ctrl-C, checkpoints
_RECENT = 64  # stretches of which is remembered how large the state was, where they cannot be repeated
_AT_LEAST_ONE = "{}= is a whole number of at least 1"
_APART = 5.0  # seconds of a run between the states that are kept, where each takes long to copy
_BLOWN_UP = 1e10  # how far beyond the start's size an iterate counts as diverged


class Run:
    """A run in progress: what `solve` makes and has `go`. Callbacks see it as a `callbacks.Running`.

    Args:
        problem, data, algorithm, x, y, iterations, rounds, key, engine, callbacks, metrics, evaluate_every, keep, resume:
            as `solve` takes them.
        client_metrics, share_metrics: as `solve` takes them.
        sane: whether the problem is looked at before the first iteration: `check` of `solve`.
        upper: whether the upper level is looked at too; not where x stays.
        heats: where `algorithm` is a race, when its worse candidates are dropped.
        most_bytes: of payload, down and up: the run ends before it exceeds them.

    Attributes:
        algorithm, history, protocol, metrics: what runs, its rows so far, its protocol, and its metrics by name.
        lower: where its lower variable is.
        clients: how each client fares at the last row of the history; None where that is not asked, or not known here.
        kept: the best x and y so far; None without `keep=`.
        processes: those that it runs over.
        carry: the state after `iteration` iterations.
        rounds, bytes_down, bytes_up, seconds: totals so far.
        goal, progress: the iterations or rounds asked for, and how many of them are done.
        stopped: the reason for which a callback has stopped it; None as long as none has.

    Raises:
        InputError: something cannot be used.
    """

    def __init__(
        self,
        *,
        problem: Problem,
        data: FederatedData,
        algorithm: Algorithm,
        x: PyTree,
        y: PyTree,
        iterations: Whole | None = None,
        rounds: Whole | None = None,
        key: KeyLike,
        engine: Engine | None = None,
        callbacks: Sequence[Callback] = (),
        metrics: Mapping[str, Metric] | None = None,
        evaluate_every: Whole = 1,
        keep: str | None = None,
        resume: str | os.PathLike[str] | None = None,
        sane: bool = True,
        upper: bool = True,
        heats: Heats | None = None,
        most_bytes: Whole | None = None,
        client_metrics: ClientMetrics | None = None,
        share_metrics: Share = "mean",
    ):
        cache.begin()
        check_kinds(problem, data, algorithm)
        check(
            engine is None or isinstance(engine, Engine), f"engine is Simulation(...) or Loopback(...); got {engine!r}."
        )
        check((iterations is None) != (rounds is None), "give iterations= or rounds=, one of the two.")
        self._most_iterations, self._budget = _count("iterations", iterations), _count("rounds", rounds)
        self._every = whole_number(evaluate_every, 1, _AT_LEAST_ONE.format("evaluate_every"))
        self.kept = None if keep is None else Kept(goal(keep), self._every)
        Listeners(callbacks)  # refuses what is none
        self._x, self._x_rest = trainable(x, "x")
        self._y, self._y_rest = trainable(y, "y")
        self.algorithm, self.metrics = settle(algorithm, self._x), checked_metrics(metrics)
        self._by_client = checked(client_metrics)
        self._share: Share = share_metrics
        checked_share(share_metrics)
        bound, engine, key = bind(problem, self._x_rest, self._y_rest), engine or Simulation(), check_key(key)

        # not `self`: a run that held itself would stay in memory, with its states, until garbage is looked for
        start = self._x, self._y

        def begun(running: Algorithm) -> Execution:
            made = engine.bind(bound, data, running, first_state(running, *start), key)
            if heats is not None:
                made.race(tuple(heats.left))
            return made

        self._begun, self._data, self._heats = begun, data, heats
        self._most_bytes = None if most_bytes is None else int(most_bytes)
        with seldom_collecting():
            asks = check_cohort(getattr(engine, "cohort", None), data.clients)
            self._running = as_it_runs(algorithm, bound, data, *start, asks)
            self._execution: Execution = begun(self._running)
            rows = self._by_client or judged(asked(keep, self.metrics, list(_fields(self._execution.protocol.info))))
            less = _measuring_less(self._running, self._execution.protocol, self._budget, bool(rows))
            if less is not None:
                self._running, self._execution = less, begun(less)
            if sane and resume is None:
                check_sane(self._execution.problem, data, self._x, self._y, upper)
        algorithm, state = self._running, first_state(self._running, self._x, self._y)
        self.processes = self._execution.processes
        self._listeners = Listeners(callbacks, self.processes)
        whole = (self._x, self._x_rest), (self._y, self._y_rest)
        self._identity = Identity(self._execution, self.algorithm, *whole, data, self._every)
        self.protocol = self._execution.protocol
        if less is not None:
            self.protocol = dataclasses.replace(self.protocol, rounds_rarely=rounds_first(less))
        check_diagnostics(title_of(algorithm), _fields(self.protocol.info))
        checked_metrics(metrics, _fields(self.protocol.info))
        check_names(self._by_client, {*names_taken(_fields(self.protocol.info)), *self.metrics})
        self.metrics |= self._of_clients()
        told = [name for name, value in self._scalars().items() if value is not None]
        if self.kept is not None:
            self._check_known(self.kept.goal.metric)
            self.kept.goal.known([*self.metrics, *told, VALIDATION])
        self.metrics = asked(keep, self.metrics, told)
        self.lower = Lower(self._execution, algorithm, state, self._y_rest)
        self._judge = self._judging(data)
        if self._judge is not None:
            self.protocol = dataclasses.replace(self.protocol, each_row=self._judge.protocol.exchanges)
        self._check_budget()
        self.goal = self._most_iterations or self._budget
        self.carry = self._execution.start(algorithm, state)
        self.history = History()
        self.rounds = self.bytes_down = self.bytes_up = 0
        self.seconds = 0.0
        self.stopped: str | None = None
        self._limit = _BLOWN_UP * max(1.0, largest(state))
        self._first: Carry | None = self.carry  # for as long as a run that blows up is repeated from there
        self._healthy, self._healthy_at = self.carry, 0.0
        self._recovery = recovery(self._execution, algorithm, self.carry)
        self._pace: float | None = None
        self._last: Record | None = None
        self._last_info: PyTree = None
        self._trail, self._last_turn = Trail(), EMPTY
        self._recent: deque[Seen] = deque(maxlen=_RECENT)
        self._last_row: Row | None = None
        self._refused: str | None = None  # what a metric failed with
        self.clients: ClientTable | None = None
        self._told: set[str] = set()  # client metrics that have been warned of
        if resume is not None:
            self._resume(resume)

    def _of_clients(self) -> dict[str, Metric]:
        """The columns of the client metrics, as far as they are known here."""
        here = self._execution.holds_clients
        return columns(self._by_client, here or self._share is not False, here or self._share is True)

    def _tell_of_sites(self) -> None:
        """Warn, where nothing of the clients' metrics will be known here."""
        if self._by_client and not self._execution.holds_clients and self._share is False:
            warn(
                "client_metrics: each site's numbers stay at the site, in metrics.csv of its folder, and the history "
                "has none: App(share_metrics='mean') has it take their mean, App(share_metrics=True) each site's."
            )

    def _check_known(self, column: str) -> None:
        """Refuse to keep by a column of clients' numbers that stay with them."""
        name = column.removesuffix(SUFFIX)
        there = column in self.metrics or name not in self._by_client
        needed = (
            "App(share_metrics=True) lets each one's leave it"
            if column != name
            else ("App(share_metrics='mean') lets their mean be taken")
        )
        check(there, f"keep= names {column}, and the sites' numbers stay at the sites: {needed}.")

    def _judging(self, data: FederatedData) -> Judge | None:
        """What is asked of the clients at a row of the history, where something is."""
        loss = bool(judged(self.metrics))
        if not (loss or self._by_client):
            return None
        check(
            not self.lower.away,
            f"{' and '.join([VALIDATION] * loss + list(self._by_client))} cannot be measured, for y stays at the sites: let "
            "the algorithm share it (share_lower=True).",
        )
        check(
            not self._away,
            f"{' and '.join([VALIDATION] * loss + list(self._by_client))} cannot be measured over a network where leaves "
            "of x or y are kept at the sites: leave keep='site' out, or measure at each site, whose blocks.npz has its own.",
        )
        rests = self._x_rest, self._y_rest
        found = measures(self._by_client, self._execution.problem, (self._x, self._y), rests, data)
        program = Validation(loss, found, self._share, data.clients)
        return Judge(self._execution, self._x, self._y, data, program)

    @property
    def _away(self) -> bool:
        """Whether leaves of x or y are kept at the sites, and these are elsewhere."""
        return self._execution.protocol.at_sites is not None and not self._execution.holds_clients

    @property
    def _reserve(self) -> int:
        """Rounds that a row of the history takes."""
        return 0 if self._judge is None else self._judge.protocol.rounds_most

    @property
    def running(self) -> Algorithm:
        """What runs: `algorithm` with its steps as they are found, or of a race who is left."""
        return self._running

    @property
    def _kept_for_heats(self) -> int:
        """Rounds that judging candidates takes yet."""
        return 0 if self._heats is None else self._heats.reserve

    @property
    def candidates(self) -> int:
        """How many race; one, where there is no race."""
        return 1 if self._heats is None else len(self._heats.left)

    def _check_budget(self) -> None:
        least, name = self.protocol.rounds_most + fewest_of(self._running), title_of(self.algorithm)
        what = " and ".join([VALIDATION] * bool(judged(self.metrics)) + ["the client metrics"] * bool(self._by_client))
        rows = f", and {what} {self._reserve} at the start and the end" if self._reserve else ""
        check(
            self._budget is None or self._budget >= least + 2 * self._reserve,
            f"{self._budget} rounds are too few: one iteration of {name} takes up to {least}{rows}.",
        )

    def _resume(self, folder: str | os.PathLike[str]) -> None:
        """Go to where the checkpoint in a folder is."""
        if self._heats is not None:
            told = heats_in(folder)
            self._heats.restore(told)
            if self.candidates < len(self._heats.table):
                running = self._heats.algorithm()
                begun = self._begun(running)
                begun.follow(told["way"])
                self._become(running, begun, begun.start(running, first_state(running, self._x, self._y)))
        start = self.carry
        self.carry, totals, rows = load(folder, start, self._identity, self.processes)
        if self._recovery is not None:
            self._recovery.snapshot = saved_snapshot(folder, start)
        for row in rows:
            row.pop(STOPPED, None)  # it goes on
        # a last row off the grid: the uninterrupted run may have none
        off_grid = rows and rows[-1]["iteration"] % self._every
        self._last_row = rows.pop() if off_grid else None
        self.history.add(rows)
        if self.kept is not None:
            load_kept(folder, self.kept, self.variables())
        if "trail" in totals:
            self._trail.restore(totals.pop("trail"))
        totals.pop("heats", None)
        for name, value in totals.items():
            setattr(self, name, value)
        if self._execution.heavy:
            self._healthy, self._healthy_at = self.carry, self.seconds

    @property
    def x(self) -> PyTree:
        """The upper variable as it stands, structured like the start."""
        return self.given()[0]

    @property
    def y(self) -> PyTree:
        """The lower variable as it stands, structured like the start; None where it stays with the clients."""
        return self.given()[1]

    def stop(self, reason: str) -> None:
        """End well, where the run has come to; the first reason counts."""
        text = isinstance(reason, str) and reason.strip() and len(reason.splitlines()) == 1
        check(text, f"run.stop(reason) takes a text of one line, not empty; got {reason!r}.")
        self.stopped = self.stopped or reason.strip()

    @property
    def iteration(self) -> int:
        """Iterations done."""
        return self.carry.iteration

    @property
    def progress(self) -> int:
        """How much of `goal` is done."""
        return self.iteration if self._budget is None else self.rounds

    def totals(self) -> dict[str, JSON]:
        """The cumulative figures, for a checkpoint, and how x moved."""
        told: dict[str, JSON] = {**self._figures(), "trail": self._trail.saved()}
        return told if self._heats is None else {**told, "heats": {**self._heats.saved(self._execution.way)}}

    def _figures(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("rounds", "bytes_down", "bytes_up", "seconds")}

    def keep(self, carry: Carry) -> None:
        """Hear that the run can be resumed from `carry`, so that nothing before it is needed any more.

        (But for what it may go back to.)
        """
        self._execution.keep(self.snapshot or carry)

    @property
    def snapshot(self) -> Carry | None:
        """Where the run goes back to if it blows up; None: it then ends."""
        return None if self._recovery is None else self._recovery.snapshot

    def fingerprint(self) -> dict[str, JSON]:
        """What makes this run itself: a checkpoint of another one is refused."""
        return self._identity.saved(self.carry.state)

    def go(self) -> Result:
        """Run to the end; callbacks hear of the end however it comes."""
        error: BaseException | None = None
        try:
            self._listeners.start(self)
            self._iterate()
        except BaseException as failure:
            error = self.processes.judged(failure)
        error = self._listeners.finish(self, error)
        if isinstance(error, RunError) and error.result is None:
            error.result = self._result()
        if error is not None:
            raise error
        if self.candidates == 1 and self._last is not None:
            if (swing := self._trail.swing()) is not None:
                tell(self._execution, self._running, self.carry, swing, self._last)
            tell_still(self._running, self.carry, self._last)
        return self._result()

    def _iterate(self) -> None:
        """The first row, stretches up to the goal or until it is stopped, the last row."""
        self.lower.tell()
        self._tell_of_sites()
        self._prepare()
        if not self.history:
            self._record([self._row(None)])
        while self.stopped is None and (length := self._next_stretch()) > 0:
            if not self._stretch(length):
                break
            self._narrow()
            self._listeners.advance(self)
        if self.history[-1]["iteration"] != self.iteration:
            self._record([self._row(self._last_info) | self._restored()])
        self._look_again()
        if self.stopped is not None:
            self.history.stop(self.stopped)
        if self.kept is not None and self.kept.best is None:
            raise RunError(self.kept.nothing(len(self.history)), self._result())

    def _prepare(self) -> None:
        """Tell the engine how long what runs will run: each heat of a race is compiled as is best for it."""
        left = self._iterations_left()
        heat = left if self._heats is None else self._heats.until(self.iteration) or left
        self._execution.prepare(self._running, self.carry, min(left, heat), self._limit)

    def _iterations_left(self) -> int:
        """About how many iterations are to come."""
        if self._budget is None:
            return (self._most_iterations or 0) - self.iteration
        return int((self._budget - self.rounds) / max(1.0, self.protocol.rounds + self._reserve / self._every))

    # One stretch of iterations --------------------------------------------------------------------------------------

    def _next_stretch(self) -> int:
        """Iterations until the next look: what fits the goal, half a second, and the next evaluation."""
        if self._budget is None:
            left = (self._most_iterations or 0) - self.iteration
        else:  # the last iterations one by one, as long as another one may fit
            spare = self._budget - self.rounds - self._reserve - self._kept_for_heats
            spare -= self.protocol.rounds_rarely if begins(self.carry.state) else 0
            left = max(spare // self.protocol.rounds_most, int(spare >= self._fewest_rounds()))
        paced = 1 if self._pace is None else max(1, int(_STRETCH / max(self._pace, 1e-9)))
        row_by_row = self.metrics or self._by_client or self.kept is not None or self._listeners.row_by_row
        to_row = self._every - self.iteration % self._every if row_by_row else left
        to_snapshot = left if self._recovery is None else self._recovery.until_snapshot(self.iteration)
        to_heat = left if self._heats is None else self._heats.until(self.iteration) or left
        left = min(left, self._within_bytes(left))
        return min(left, paced, to_row, to_snapshot, to_heat, self._execution.longest or left)

    def _within_bytes(self, left: int) -> int:
        """Iterations that the bytes left are enough for."""
        if self._most_bytes is None:
            return left
        found, rare = self.protocol, self.protocol.rarely
        most = found.bytes_down_most + found.bytes_up_most + sum(e.bytes_down_most + e.bytes_up_most for e in rare)
        return max(0, int(self._most_bytes - self.bytes_down - self.bytes_up) // most)

    def _fewest_rounds(self) -> int:
        return (
            self.protocol.rounds_most
            if self.protocol.rounds == self.protocol.rounds_most and self.protocol.kind == "exact"
            else 1
        )

    def _stretch(self, length: int) -> bool:
        """Advance by `length` iterations; False if they do not fit the budget (nothing is changed then)."""
        before = self.carry
        after, record = self._advance(before, length)
        if not self._fits(record):
            return False
        before = self.carry
        if not record.finite:
            return self._go_back(before, after, record) or self._fail(before, after, record)
        self.carry = after if self._recovery is None else self._recovery.note(after)
        if not self._listeners.saves:
            self.keep(after)
        self._pace, self._last = record.seconds / length, record
        if not self._execution.replays and record.seen is not None:
            self._recent.append(record.seen)
        self._account(before.iteration, record)
        due = not self._execution.heavy or self.seconds - self._healthy_at >= _APART
        if due and largest((after.state.x, after.state.y)) <= 10 * (1 + self._limit / _BLOWN_UP):
            self._healthy, self._healthy_at = after, self.seconds
        if after.iteration > LEAST:
            self._first = None
        return True

    def _narrow(self) -> None:
        """Drop the worse candidates, where a heat ends."""
        heats, execution, race = self._heats, self._execution, self._running
        if heats is None or not heats.racing:
            return
        if not any(np.any(np.asarray(alive)) for alive in self.carry.state.alive):
            before = heats.saved(execution.way)
            heats.alone(self.rounds)
            running = heats.algorithm()
            begun = self._begun(running)
            try:
                start = begun.begin_again(running, first_state(running, self._x, self._y))
            except BaseException:  # a checkpoint is then of the race that it holds
                heats.restore(before)
                raise
            self._become(running, begun, dataclasses.replace(start, iteration=self.iteration))
            self._prepare()
        elif heats.due(self.iteration):
            assert isinstance(race, Race)
            whole = lambda x, y: self._given(eqx.combine(x, self._x_rest), eqx.combine(y, self._y_rest))
            judged = heats.best(execution, race, self.carry, self._data, execution.key, whole)
            self._spend(*judged.spent)
            heats.drop(judged, self.rounds)
            running, state = smaller(race, self.carry.state, judged.kept)
            begun, own = self._begun(running), narrowed(race, judged.kept)
            self._become(running, begun, begun.taking_over(execution, self.carry, running, state, own))
            self._prepare()

    def _become(self, running: Algorithm, execution: Execution, carry: Carry) -> None:
        """Go on as a smaller race, or as the algorithm that has won it."""
        self._running, self._execution, self.carry = running, execution, carry
        self.protocol = dataclasses.replace(execution.protocol, each_row=self.protocol.each_row)
        self.lower = Lower(execution, running, carry.state, self._y_rest)
        self._recovery = recovery(execution, running, carry)
        self._healthy, self._healthy_at, self._first = carry, self.seconds, None
        self._recent.clear()
        self._trail, self._pace = Trail(), None  # another x may lead now

    def _fits(self, record: Record) -> bool:
        """Whether a stretch is within the budget."""
        blown = record.spent[0] if self._recovery is not None else 0
        return self._budget is None or self.rounds + sum(record.rounds) + blown + self._reserve <= self._budget

    def _advance(self, before: Carry, length: int) -> tuple[Carry, Record]:
        """What the engine gives, who may write over `before`; where it is needed after all, it is computed anew."""
        over = (
            self._execution.heavy
            and self._recovery is None
            and all(before is not kept for kept in (self._healthy, self._first))
        )
        if over:
            self._execution.write_over(before)
        good = False
        try:
            after, record = self._execution.advance(self._running, before, length, self._limit)
            good = record.finite and self._fits(record)
        finally:
            if over and not good:
                missing = before.iteration - self._healthy.iteration
                self.carry, _ = self._execution.advance(self._running, self._healthy, missing, self._limit)
        return after, record

    def _account(self, first: int, record: Record) -> None:
        rows = []
        turns = (
            self._trail.add(record.seen, record.done, precision(self._x))
            if record.seen is not None and record.done
            else []
        )
        for k in range(record.done):
            self._last_turn = EMPTY if np.isnan(turns[k]) else float(turns[k])
            self.rounds += record.rounds[k]
            self.bytes_down += record.bytes_down[k]
            self.bytes_up += record.bytes_up[k]
            self.seconds += record.seconds / max(record.done, 1)
            self._last_info = jax.tree.map(lambda leaf, k=k: leaf[k], record.info)
            if (first + k + 1) % self._every == 0:
                rows.append(self._row(self._last_info, first + k + 1))
        if rows:
            self._record(rows)

    def _last_good(self, before: Carry, record: Record) -> Carry:
        """The carry after the last good iteration of a stretch in which one blew up."""
        if record.last is not None or not record.done:
            return record.last or before
        return self._execution.advance(self._running, before, record.done, self._limit)[0]

    def _go_back(self, before: Carry, after: Carry, record: Record) -> bool:
        """After a blow-up, to the last snapshot with half the automatic step; False if the run has to end."""
        if self._recovery is None:
            return False
        spent = self.rounds + sum(record.rounds) + record.spent[0] + self._reserve
        spare = None if self._budget is None else self._budget - spent
        back = self._recovery.back(self._last_good(before, record), after, self._limit, spare)
        if back is None:
            return False
        if back.last is not None:
            return self._took_again(back, before, record)
        self.carry = back.carry
        self._give_up(record, *back.tried)
        self._last_info, self._last_row, self._last_turn = None, None, EMPTY
        self._trail = Trail()  # moves that were given up say nothing
        self._recent.clear()
        self._first = self._healthy = self.carry
        self.history.give_up(self.iteration)
        if self.kept is not None:
            self.kept.went_back(self.iteration)
        self._listeners.went_back(self)
        return True

    def _took_again(self, back: Back, before: Carry, record: Record) -> bool:
        """Go on from the end of an iteration that was taken again."""
        assert back.last is not None and self._recovery is not None
        *given_up, counted = back.tried
        self.carry = back.last
        self._account(before.iteration, record)
        self._spend(*record.spent)
        self._give_up(*given_up)
        self.carry = self._recovery.note(back.carry)
        self._account(back.last.iteration, counted)
        return True

    def _give_up(self, *records: Record) -> None:
        """Count what iterations cost of which no row tells."""
        for record in records:
            self._spend(sum(record.rounds), sum(record.bytes_down), sum(record.bytes_up), record.seconds)
            self._spend(*record.spent)

    def _spend(self, rounds: int, down: int, up: int, seconds: float = 0.0) -> None:
        """Count what no row tells of."""
        self.rounds, self.bytes_down, self.bytes_up = self.rounds + rounds, self.bytes_down + down, self.bytes_up + up
        self.seconds += seconds

    def _fail(self, before: Carry, after: Carry, record: Record) -> NoReturn:
        """Go back to the last finite iteration, say what blew up, and raise with all there is."""
        self.carry = self._last_good(before, record)
        beside: list[RunError] = []
        with _set_aside(beside):
            self._account(before.iteration, record)
        with _set_aside(beside):
            if self.history[-1]["iteration"] != self.iteration:
                self._record([self._row(self._last_info)])
        # the first step may be the one that goes too far: what follows it looks healthy and is not
        healthy = self._first if self._first is not None and after.iteration <= LEAST else self._healthy
        recent = [*self._recent, record.seen]
        why = diagnose(self._execution, self._running, healthy, after, self._limit, recent)
        error = Diverged(why if self._recovery is None else self._recovery.spent(why), self._result())
        for other in beside:
            error.add_note(f"Then {other}")
        raise error

    # Rows -----------------------------------------------------------------------------------------------------------

    def _record(self, rows: list[Row]) -> None:
        self.history.add(rows)
        if self.kept is not None:  # the run then waits at every row: x and y are those of the last one
            self.kept.look(rows[-1], self.variables, None if self.snapshot is None else self.snapshot.iteration)
        self._listeners.record(self, rows)
        if self._refused is not None:
            message, self._refused = self._refused, None
            raise RunError(message, self._result())

    def _measured(self, x: PyTree, y: PyTree, asked: dict[str, float]) -> tuple[dict[str, float], str | None]:
        """(The metrics, what failed): one that does while running leaves its place empty, and ends the run.

        Args:
            asked: those that the clients have said.
        """
        found, refused = dict(asked), None
        for name, metric in self.metrics.items():
            if name in found:
                continue
            try:
                found[name] = y.number(name, metric, x) if isinstance(y, Away) else measured(name, metric, x, y)
            except InputError as error:
                if not self.iteration:
                    raise
                found[name], refused = EMPTY, refused or str(error)
        return found, refused

    def _row(self, info: PyTree, iteration: int | None = None) -> Row:
        asked = self._asked()
        row = {"iteration": self.iteration if iteration is None else iteration, **self._figures()}
        row["seconds"] = round(row["seconds"], 6)
        if self.metrics:
            x, y = self.given()
            y = Away() if self.lower.away else y
            found, refused = self.processes.said(lambda: self._measured(x, y, asked))
            row, self._refused = row | found, self._refused or refused
        turn = {"turn": EMPTY if info is None else self._last_turn}
        halvings = {} if self._recovery is None else {"halvings": self._recovery.halvings}
        race = {} if self._heats is None else {"candidates": self.candidates}
        return row | self._diagnostics(info) | turn | halvings | race

    def _asked(self) -> dict[str, float]:
        """What the clients say where the run is, by column, if they are asked; what it takes is counted."""
        if self._judge is None:
            return {}
        names = [*judged(self.metrics), *(name for name, each in self.metrics.items() if isinstance(each, Column))]
        restored = self._restored()
        before = {name: float(restored[name]) for name in names if name in restored}
        counted = bool(restored) and len(before) == len(names)  # before the run was interrupted
        if counted:
            return before
        found = self._measure_clients(self._judge)
        said = self._said_by_clients(found)
        self._spend(found.rounds, found.bytes_down, found.bytes_up)
        return {**dict.fromkeys(judged(self.metrics), found.value), **said}

    def _measure_clients(self, judge: Judge) -> Judged:
        x, y = self.carry.state.x, self.carry.state.y
        if self.lower.own:
            y, _ = trainable(self.lower.one(self.carry), "y")
        return judge(x, y, self.iteration)

    def _look_again(self) -> None:
        """Make the table where the last row was counted before the run was interrupted: what is here costs nothing."""
        if self.clients is None and self._by_client and self._judge is not None and self._execution.holds_clients:
            self._said_by_clients(self._measure_clients(self._judge))

    def _said_by_clients(self, told: Judged) -> dict[str, float]:
        """The columns of the client metrics, and the table, where it is known."""
        found, metrics, names = told.found, list(self._by_client), self._data.names
        if found.mean is None or found.bad is None:
            return {}
        judge = self._judge
        assert judge is not None
        if found.each is not None:
            here = self._execution.holds_clients
            rows = self._data.count("outer") if here else None
            self.clients = table(judge.measures, found, names, None if rows is None else rows.tolist())
        for k in np.flatnonzero(found.bad):
            those = [] if found.each is None else np.flatnonzero(found.each.status[:, k] == BAD)
            self._not_finite(metrics[k], named(names, those) if len(those) else "a client")
        worst = {} if self.clients is None else self.clients.worst
        said = {name: float(value) for name, value in zip(metrics, found.mean, strict=True)}
        said |= {name + SUFFIX: value for name, value in worst.items()}
        return {name: said[name] for name, each in self.metrics.items() if isinstance(each, Column)}

    def _not_finite(self, name: str, who: str) -> None:
        """Refuse a client metric that is not finite at the start; warn of it later, once."""
        what = f"the client metric {name!r} is not a finite number at {who}"
        check(
            self.iteration > 0,
            f"{what}, at the start: a row's number must be finite; return a pair (numerator, denominator) where some rows "
            "do not count.",
        )
        if name in self._told:
            return
        self._told.add(name)
        warn(f"{what} after {self.iteration} iterations: the history has no {name} there.")

    def _diagnostics(self, info: PyTree) -> dict[str, float]:
        """Scalars of the algorithm's diagnostics as columns; NaN at the start, where there are none yet."""
        told = {} if info is None else _fields(info)
        number = lambda name: float("nan") if info is None else float(told[name])
        return {name: EMPTY if value is None else number(name) for name, value in self._scalars().items()}

    def _scalars(self) -> dict[str, PyTree]:
        """The algorithm's diagnostics that are columns, by name; None where it never tells."""
        return {name: value for name, value in _fields(self.protocol.info).items() if np.shape(value) == ()}

    def _restored(self) -> Row:
        """What the checkpoint's last row says of this iteration, if it is of this iteration."""
        last = self._last_row
        here = last is not None and last["iteration"] == self.iteration
        return {name: value for name, value in last.items() if value is not EMPTY} if last and here else {}

    def variables(self) -> tuple[PyTree, PyTree]:
        """(x, y) as they stand, arrays of JAX structured like the start; y is None where it stays with the clients.

        A leaf that is kept at sites elsewhere is a `KeptAtSites`.
        """
        both = eqx.combine(self.carry.state.x, self._x_rest), self.lower.one(self.carry)
        return owned.away(both) if self._away else both

    def given(self) -> tuple[PyTree, PyTree]:
        """`variables`, with arrays of another library where the start had them."""
        return self._given(*self.variables())

    def _given(self, x: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
        return as_given(x, self._x_rest), as_given(y, self._y_rest)

    def _result(self) -> Result:
        both = self.variables()
        names = self._data.names
        for sentence in (*owned.beyond(both[0], "x", names), *owned.beyond(both[1], "y", names)):
            warn(sentence)
        x, y = self._given(*both)
        own = as_given(self.lower.everybody(self.carry), self._y_rest)
        state, stopped = self.carry.state, self.history.stopped
        how, kept = self._execution.way, None if self.kept is None else self.kept.result(both)
        if kept is not None:
            kept = kept._replace(**dict(zip("xy", self._given(kept.x, kept.y), strict=True)))
        return Result(
            x, y, self.history, self.protocol, state, self.iteration, own, stopped, how, kept, self.clients,
            self._identity.config,
        )  # fmt: skip


@contextlib.contextmanager
def _set_aside(errors: list[RunError]) -> Iterator[None]:
    """Keep an error of a callback or a metric, where there is another one to raise."""
    try:
        yield
    except RunError as error:
        errors.append(error)


def _measuring_less(running: Algorithm, protocol: Protocol, budget: int | None, rows: bool) -> Algorithm | None:
    """What runs where the budget does not hold both an iteration and all that is measured before; else None.

    Args:
        rows: whether the first and the last row of the history take a round each.
    """
    if budget is None:
        return None
    room = max(0, budget - protocol.rounds_most - 2 * rows)
    return measuring(running, room) if room < protocol.rounds_rarely else None


def _count(name: str, value: Whole | None) -> int | None:
    """Iterations or rounds, if they are given."""
    return None if value is None else whole_number(value, 1, _AT_LEAST_ONE.format(name))


def _fields(info: PyTree) -> dict[str, PyTree]:
    if dataclasses.is_dataclass(info):
        return {f.name: getattr(info, f.name) for f in dataclasses.fields(info)}
    return info if isinstance(info, dict) else {}


def check_key(key: KeyLike) -> Key[Array, ""]:
    """A key as `solve` takes it; `jax.random.PRNGKey(seed)` means the same as `jax.random.key(seed)`."""
    return threefry(as_key(key))

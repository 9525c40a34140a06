"""`tune`: x without a step size, an algorithm or a search: candidates race in the rounds of one run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from .. import errors
from ..algorithm import Algorithm
from ..algorithms.lockstep import Lockstep
from ..algorithms.simfbo import SimFBO
from ..beginning import as_leaves
from ..best import goal
from ..callbacks.base import Callback
from ..cohorts import check_cohort
from ..component import title_of
from ..data import FederatedData
from ..engines.base import Engine
from ..engines.simulation import Simulation
from ..given import Whole, whole_number
from ..keys import KeyLike
from ..metrics import Metric, measured, validation_loss
from ..pace.automatic import STEPS, Auto, numbered, ready
from ..problem import Problem
from ..protocol import Protocol, check_kinds, protocol
from ..race.family import Family
from ..race.heats import Candidate, Heats, Judge, heats_of, most_candidates
from ..race.racing import Race
from ..result import History, Result
from ..run import Run
from ..validation import NAME as VALIDATION
from ..variables import trainable

if TYPE_CHECKING:
    import pandas

MOST = 8  # candidates
_TEMPOS = (1.0, 0.5)  # of steps of x as they are found: one in a hurry leads at first, and leaves y behind


@dataclasses.dataclass
class Tuned(Result):
    """What `tune` returns: a `Result` of the whole run, of whichever candidate led, and who took part.

    Attributes:
        algorithm: the one that won, with the numbers that it took last.
        candidates: all that raced, in their order at the start: name, algorithm, tempo, score (f at x with y where it should
            be, or the metric, as it was judged last; NaN where it never was, or blew up), round (after which it was
            dropped; None for the winner), why.
    """

    algorithm: Algorithm = dataclasses.field(kw_only=True)
    candidates: list[Candidate] = dataclasses.field(kw_only=True)

    @property
    def rounds(self) -> int:
        """Communication rounds in all: of the race, of judging, of the winner."""
        return int(self.history[-1]["rounds"])

    @property
    def bytes_down(self) -> int:
        """Payload from the server in all, in bytes, over all clients and candidates."""
        return int(self.history[-1]["bytes_down"])

    @property
    def bytes_up(self) -> int:
        """Payload to the server in all."""
        return int(self.history[-1]["bytes_up"])

    @property
    def table(self) -> pandas.DataFrame:
        """The candidates, a row each."""
        import pandas

        return pandas.DataFrame([dataclasses.asdict(each) for each in self.candidates])


def tune(
    problem: Problem,
    data: FederatedData,
    x: PyTree,
    y: PyTree,
    *,
    rounds: Whole,
    key: KeyLike,
    engine: Engine | None = None,
    metric: str | None = None,
    direction: str | None = None,
    algorithms: Sequence[Algorithm] | None = None,
    candidates: Whole | None = None,
    batch_size: Whole | None = None,
    max_bytes: Whole | None = None,
    callbacks: Sequence[Callback] = (),
    metrics: Mapping[str, Metric] | None = None,
    evaluate_every: Whole = 1,
    keep: str | None = None,
    resume: str | os.PathLike[str] | None = None,
    check: bool = True,
) -> Tuned:
    """Minimise f(x, y*(x)) over x in one federated run, with no step size and no algorithm to choose.

    Candidates share the rounds of the first fifth: what they ask of the clients travels in one message a round. After each
    heat the worse half is dropped, by f at each one's x with y where it should be (`fedbilevel.race.scoring`); the best goes
    on from its state. A round of the race is one round; its bytes are those of all who race.

    Args:
        problem, data: what to tune, on which data.
        x, y: where to start, pytrees of floating-point arrays (equinox modules too).
        rounds: communication rounds in all: racing, measuring and judging are in them.
        key: a `jax.random.key`; the same key gives the same run on every engine.
        engine: `Simulation()` (the default) or `Loopback()`, with their `cohort=`.
        metric: the name of one of `metrics`, by which candidates are judged in place of f; with `direction=`.
            "validation_loss" is f.
        direction: "min" or "max", which of `metric` is the better.
        algorithms: candidates of your own, such as [fb.Lockstep(), fb.AggITD()], with "auto" or numbers; by default
            Lockstep and SimFBO, each with steps of x as they are found and half as long ones. Where clients count
            unequally and a cohort is drawn, SimFBO alone.
        candidates: how many race, the first of those; 1 for no race. By default all, or fewer where the rounds are few.
        batch_size: rows of a minibatch, fresh for every local step; None for all rows. Not with `algorithms=`.
        max_bytes: of payload, down and up, over all clients: the run ends before it exceeds them.
        callbacks, metrics, evaluate_every, keep, resume, check: as `solve` takes them. The history's rows are the leader's;
            its column `candidates` says how many raced.

    Returns:
        A `Tuned`.

    Raises:
        InputError: something cannot be used, or the rounds or bytes are too few for one iteration.
        Diverged: all candidates blew up, and the first one again.
        RunError: as `solve`.
    """
    check_kinds(problem, data, Lockstep())
    budget = whole_number(rounds, 1, "rounds= is a whole number of at least 1")
    purse = None if max_bytes is None else whole_number(max_bytes, 1, "max_bytes= is a whole number of at least 1")
    engine = engine or Simulation()
    errors.check(isinstance(engine, Engine), f"engine is Simulation(...) or Loopback(...); got {engine!r}.")
    metrics = metrics or {}
    judge = _judged_by(metric, direction, metrics)
    inner, _ = trainable(x, "x")
    trainable(y, "y")
    asked = (
        None if candidates is None else whole_number(candidates, 1, f"candidates= is a whole number from 1 to {MOST}")
    )
    entrants = _entrants(data, engine, algorithms, asked, batch_size)
    protocols = [protocol(each.algorithm, problem, data, x, y, engine) for each in entrants]
    _check_least(protocols[0], budget, purse)
    many = most_candidates(len(entrants), budget, max(each.rounds_most for each in protocols))
    if asked is not None and many < asked:
        errors.warn(f"{budget} rounds are few: {many} of {asked} candidates race in them.")
    entrants, longest = entrants[:many], max(each.rounds_most for each in protocols[:many])
    table = [each.candidate for each in entrants]
    heats, running = None, entrants[0].algorithm
    if many > 1:
        running, table = _race(entrants, inner)
        heats = Heats(running, table, heats_of(many, budget, longest), judge)
    run = Run(
        problem=problem, data=data, algorithm=running, x=x, y=y, rounds=budget, key=key, engine=engine,
        callbacks=callbacks, metrics=metrics, evaluate_every=evaluate_every, keep=keep, resume=resume, sane=check,
        heats=heats, most_bytes=purse,
    )  # fmt: skip
    try:
        return _tuned(run, run.go(), table if heats is None else heats.table)
    except errors.RunError as error:
        if isinstance(error.result, Result):
            error.result = _tuned(run, error.result, table if heats is None else heats.table)
        raise


class _Entrant(NamedTuple):
    """A candidate before the race, and what runs.

    Attributes:
        tempo: None for an algorithm of the user's own, which is as it is.
    """

    candidate: Candidate
    algorithm: Algorithm
    tempo: float | None


def _entrants(
    data: FederatedData,
    engine: Engine,
    algorithms: Sequence[Algorithm] | None,
    many: int | None,
    batch_size: Whole | None,
) -> list[_Entrant]:
    """All candidates that are asked for."""
    if algorithms is not None:
        errors.check(
            batch_size is None, "batch_size= goes with the candidates of tune's own: give it to each algorithm."
        )
        good = isinstance(algorithms, Sequence) and len(algorithms) > 0
        good = good and all(isinstance(each, Algorithm) for each in algorithms)
        errors.check(
            good, f"algorithms= is a list of algorithms, such as [fb.Lockstep(), fb.AggITD()]; got {algorithms!r}."
        )
        found = [_Entrant(_candidate(_shown(each), each, 1.0), each, None) for each in algorithms]
        errors.check(many is None or many <= len(found), f"candidates={many}, and algorithms= has {len(found)}.")
        found = found[:many]
    else:
        found = _usual(data, engine, batch_size)
        errors.check(
            many is None or many <= len(found), f"candidates= is a whole number from 1 to {len(found)}; got {many}."
        )
        found = found[:many]
    errors.check(len(found) <= MOST, f"at most {MOST} candidates race; got {len(found)}.")
    for each in found:
        errors.check(
            getattr(each.algorithm, "own_lower", None) is None,
            f"{title_of(each.algorithm)} cannot race: its clients have a y of their own. Run it by solve.",
        )
    return found


def _usual(data: FederatedData, engine: Engine, batch_size: Whole | None) -> list[_Entrant]:
    """Those of tune's own, in the order in which they are taken."""
    everyone = check_cohort(getattr(engine, "cohort", None), data.clients) == data.clients
    size = None if batch_size is None else whole_number(batch_size, 1, "batch_size= is a whole number of at least 1")
    lockstep, simfbo = Lockstep(batch_size=size), SimFBO(batch_size=size)
    both = everyone or data.weights is None  # what Lockstep asks for
    names: dict[str, Algorithm] = {"lockstep": lockstep, "simfbo": simfbo} if both else {"simfbo": simfbo}
    order = [(name, tempo) for tempo in _TEMPOS for name in names]
    of = lambda name, tempo: name if tempo == 1 else f"{name}, x {tempo:g} times"
    return [_Entrant(_candidate(of(n, t), names[n], t), names[n], t) for n, t in order]


def _candidate(name: str, algorithm: Algorithm, tempo: float) -> Candidate:
    return Candidate(name, title_of(algorithm), tempo)


def _shown(algorithm: Algorithm) -> str:
    """An algorithm as its user wrote it: with what differs from the defaults."""
    fields = dataclasses.fields(algorithm)
    given = [f"{f.name}={getattr(algorithm, f.name)!r}" for f in fields if getattr(algorithm, f.name) != f.default]
    return f"{title_of(algorithm)}({', '.join(given)})"


def _race(entrants: Sequence[_Entrant], x: PyTree) -> tuple[Race, list[Candidate]]:
    """The race, and its candidates in the race's order."""
    groups: dict[Hashable, list[tuple[_Entrant, Algorithm]]] = {}
    for each in entrants:
        running = ready(each.algorithm, x)
        if isinstance(running, Auto) and each.tempo is not None:
            running = dataclasses.replace(running, tempo=each.tempo)
        running = as_leaves(running)
        groups.setdefault((type(numbered(running)), jax.tree.structure(running)), []).append((each, running))
    titles = [title_of(own[0][1]).lower() for own in groups.values()]
    names = [title if titles.count(title) == 1 else f"{title}-{k}" for k, title in enumerate(titles)]
    families = [Family.of(name, [one for _, one in own]) for name, own in zip(names, groups.values(), strict=True)]
    return Race(tuple(families)), [each.candidate for own in groups.values() for each, _ in own]


def _judged_by(metric: str | None, direction: str | None, metrics: Mapping[str, Metric]) -> Judge | None:
    """What candidates are judged by; None for f."""
    if metric is None:
        errors.check(direction in (None, "min"), f"direction={direction!r} goes with metric=: f is minimised.")
        return None
    words = f"{metric}:{direction}" if direction is not None else metric
    errors.check(
        isinstance(metric, str) and (direction is None or isinstance(direction, str)) and ":" in words,
        f"metric= names one of metrics=, and direction= says whether it is to fall ('min') or to rise ('max'); got "
        f"metric={metric!r}, direction={direction!r}.",
    )
    wanted = goal(words)
    wanted.known([*metrics, VALIDATION])
    taken = metrics.get(wanted.metric, validation_loss)
    if taken is validation_loss:  # that is f
        errors.check(wanted.direction == "min", f"{wanted.metric} is f, which is minimised: direction='min'.")
        return None
    return Judge(lambda x, y: measured(wanted.metric, taken, x, y), 1 if wanted.direction == "min" else -1)


def _check_least(first: Protocol, rounds: int, purse: int | None) -> None:
    """Refuse a budget of less than an iteration."""
    errors.check(
        rounds >= first.rounds_most,
        f"rounds={rounds} is too few: one iteration of {first.algorithm} takes {first.rounds_most}. Give at least so many.",
    )
    least = first.bytes_down_most + first.bytes_up_most
    errors.check(
        purse is None or purse >= least,
        f"max_bytes={purse} is too few: one iteration of {first.algorithm} takes {least:,}. Give at least so many.",
    )


def _tuned(run: Run, result: Result, table: Sequence[Candidate]) -> Tuned:
    held = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    return Tuned(**held, algorithm=_with_numbers(run.running, result.history), candidates=list(table))


def _with_numbers(algorithm: Algorithm, history: History) -> Algorithm:
    """The algorithm with the steps that it took last."""
    if isinstance(algorithm, Race):
        algorithm = algorithm.families[0].one(0)
    plain = lambda leaf: leaf.item() if isinstance(leaf, jax.Array) and leaf.shape == () else leaf
    algorithm = jax.tree.map(plain, algorithm)
    if not isinstance(algorithm, Auto):
        return algorithm
    taken = {}
    for name in algorithm.found:
        values = history.column(name) if name in history.columns else np.zeros(0)
        good = values[np.isfinite(values) & (values > 0)]
        taken[name] = float(good[-1]) if len(good) else STEPS[name]
    return dataclasses.replace(algorithm.algorithm, **taken)

"""The heats of a race: when candidates are judged, who goes on, and how the race becomes a smaller one.

The heats take a fifth of the rounds. At the end of each the worse half is dropped; in the end the best goes on from its
state, and its clients from theirs, as if it had run alone. Before the last candidate of an algorithm is dropped, all are
judged again at a trained y (`scoring`). Rounds of judging are the run's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypedDict

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from ..algorithm import Algorithm
from ..callbacks.checkpoint import FILE, read
from ..data import FederatedData
from ..engines.base import Carry, Execution
from ..errors import InputError, RunError, check
from ..pace.automatic import Auto
from .family import Family, taken
from .racing import Race, Standing
from .scoring import TURNS, Candidates, Scoring


class Told(TypedDict):
    """What a checkpoint says of heats: who is left, all, and how what runs is compiled."""

    left: list[int]
    table: list[dict]
    way: str


class Judge(NamedTuple):
    """What candidates are judged by.

    Attributes:
        value: (x, y) -> a number.
        sign: 1 where the least is the best, -1 where the highest is.
    """

    value: Callable[[PyTree, PyTree], float]
    sign: int


Whole: TypeAlias = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]

KEY = 2**32 - 3  # no iteration has this number
_SHARE = 0.2  # of the rounds, in which candidates race
_LEAST = 12, 3  # rounds and iterations of a heat, at least: x waits for y and v in the first ones


@dataclasses.dataclass
class Candidate:
    """One that took part.

    Attributes:
        name: what it is called.
        algorithm: its class, in words.
        tempo: how many times as long its steps of x are as they were found to be.
        score: what it was judged last; not finite where it blew up, NaN before it was judged.
        round: when it was dropped; None as long as it is not.
        why: in words.
    """

    name: str
    algorithm: str
    tempo: float
    score: float = math.nan
    round: int | None = None
    why: str = ""


def heats_of(candidates: int, rounds: int, of_iteration: int) -> list[tuple[int, int]]:
    """[(iteration, how many go on from there)], as few as there is room for.

    Args:
        rounds: of the whole run.
        of_iteration: the rounds of an iteration, at most.
    """
    found, left = [], candidates
    count = math.ceil(math.log2(candidates)) if candidates > 1 else 0
    least = max(math.ceil(_LEAST[0] / of_iteration), _LEAST[1])
    length = max(least, math.ceil(_SHARE * rounds / of_iteration / max(1, count)))
    for heat in range(count):
        left = math.ceil(left / 2)
        found.append((length * (heat + 1), left))
    return found


def most_candidates(asked: int, rounds: int, of_iteration: int) -> int:
    """How many can race, so that half of the rounds are left for the best."""
    for many in range(asked, 1, -1):
        if heats_of(many, rounds, of_iteration)[-1][0] * of_iteration <= rounds / 2:
            return many
    return 1


class Heats:
    """A race on its way.

    Args:
        race: at its start, one or more settings in each of its families.
        table: its candidates, family by family.
        rungs: `heats_of`.
        judge: what they are judged by; None: the outer loss.

    Attributes:
        table: all candidates, in their order at the start.
        left: the places in it of those that still race, in the race's order.
    """

    def __init__(
        self, race: Race, table: Sequence[Candidate], rungs: Sequence[tuple[int, int]], judge: Judge | None = None
    ):
        self.table, self._rungs, self._judge = list(table), list(rungs), judge
        self._first, self.left = race, list(range(len(table)))

    @property
    def racing(self) -> bool:
        """Whether more than one is left."""
        return len(self.left) > 1

    def until(self, iteration: int) -> int:
        """Iterations until the next heat ends; none: zero."""
        return next((at - iteration for at, _ in self._rungs if at > iteration), 0)

    def due(self, iteration: int) -> bool:
        """Whether a heat ends here."""
        return self.racing and any(at == iteration for at, _ in self._rungs)

    @property
    def reserve(self) -> int:
        """Rounds that are kept for what is to be judged yet."""
        return (2 * TURNS + 1) * (len(self.left) - 1).bit_length()

    # Who goes on ------------------------------------------------------------------------------------------------------

    def best(
        self, execution: Execution, race: Race, carry: Carry, data: FederatedData, key: Key[Array, ""], whole: Whole
    ) -> Judged:
        """Judge those that are left.

        Args:
            whole: (x, y) with what of them is not trained.
        """
        keep = next(left for at, left in self._rungs if at == carry.iteration)
        alive = np.concatenate([np.asarray(each) for each in carry.state.alive])
        judge = _Asking(execution, race, carry, data, key)
        scores, spent = self._scores(judge, 0, whole), judge.spent
        order = self._order(scores, alive)
        if self._loses_one(race, order[:keep]) or not judge.keeps_v:
            scores = self._scores(judge, TURNS, whole)
            spent, order = judge.spent, self._order(scores, alive)
        for place, score, good in zip(self.left, scores, alive, strict=True):
            self.table[place].score = float(score) if good else math.nan
        kept = order[: max(1, min(keep, int(alive.sum())))]
        return Judged(race.in_order(kept), [k for k in order if k not in kept], spent)

    def _scores(self, judge: _Asking, turns: int, whole: Whole) -> np.ndarray:
        """Of each: f, or what the judge says."""
        scores, xs, ys = judge(turns)
        if self._judge is None:
            return scores
        lane = lambda tree, k: jax.tree.map(lambda leaf: leaf[k], tree)
        try:
            return np.array([self._judge.value(*whole(lane(xs, k), lane(ys, k))) for k in range(len(scores))])
        except InputError as error:  # in the middle of a run, which keeps what there is
            raise RunError(str(error)) from error

    def _order(self, scores: np.ndarray, alive: np.ndarray) -> list[int]:
        """Places in the race, the best first; equals in their order."""
        sign = 1 if self._judge is None else self._judge.sign
        worth = np.where(alive & np.isfinite(scores), sign * scores, np.inf)
        return [int(k) for k in np.argsort(worth, kind="stable")]

    @staticmethod
    def _loses_one(race: Race, kept: Sequence[int]) -> bool:
        """Whether an algorithm would be dropped for good."""
        return len({race.place(k)[0] for k in kept}) < len(race.families)

    def drop(self, judged: Judged, rounds: int) -> None:
        """Note who goes on, after so many rounds."""
        for k in judged.dropped:
            gone = self.table[self.left[k]]
            gone.round, gone.why = rounds, "blew up" if math.isnan(gone.score) else "worse"
        self.left = [self.left[k] for k in judged.kept]

    def alone(self, rounds: int) -> None:
        """Note that all have blown up: the first candidate begins anew, and goes back as it would alone."""
        for place in self.left:
            gone = self.table[place]
            gone.round, gone.why = rounds, "blew up"
        self.table[0].round, self.table[0].why = None, "began anew when all had blown up"
        self.left = [0]

    # The smaller race -------------------------------------------------------------------------------------------------

    def algorithm(self) -> Algorithm:
        """What runs with those that are left."""
        return self._first.only([self._first.place(k) for k in self.left])

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def saved(self, way: str) -> Told:
        """For a checkpoint."""
        return {"left": list(self.left), "table": [dataclasses.asdict(each) for each in self.table], "way": way}

    def restore(self, told: Told) -> None:
        """Go on from what a checkpoint holds."""
        self.left = list(told["left"])
        self.table = [Candidate(**each) for each in told["table"]]


@dataclasses.dataclass(frozen=True)
class Judged:
    """What a heat's end said.

    Attributes:
        kept: places in the race of those that go on, in the order of the smaller race; the best is its first.
        dropped: of the others.
        spent: (rounds, bytes down, bytes up) of judging.
    """

    kept: list[int]
    dropped: list[int]
    spent: tuple[int, int, int]


class _Asking:
    """Asks for the scores of all that race, beside a run."""

    def __init__(self, execution: Execution, race: Race, carry: Carry, data: FederatedData, key: Key[Array, ""]):
        self._execution, self._data, self._carry = execution, data, carry
        self._key = jax.random.fold_in(key, np.uint32(KEY))
        self.keeps_v = all(_v(member) is not None for member in carry.state.members)
        facts = execution.protocol.clients, execution.protocol.cohort
        self._race, self._state = race, candidates_of(race, carry.state, *facts)
        self.spent = (0, 0, 0)

    def __call__(self, turns: int) -> tuple[np.ndarray, PyTree, PyTree]:
        """(Each one's score, their x, their y), y trained for so many turns; the first time it is asked: for none."""
        program = scoring_of(self._race, turns)
        execution = self._execution.another(program, self._state, self._data, self._key)
        execution.follow(self._execution.way)
        start = dataclasses.replace(execution.start(program, self._state), iteration=self._carry.iteration)
        after, record = execution.advance(program, start, 1, np.inf)
        spent = (record.rounds[0], record.bytes_down[0], record.bytes_up[0]) if record.done else record.spent
        before, self._state = self.spent, after.state
        self.spent = (before[0] + spent[0], before[1] + spent[1], before[2] + spent[2])
        return np.asarray(record.info["score"][-1], float), after.state.xs, after.state.ys


def candidates_of(race: Race, state: Standing, clients: int, cohort: int) -> Candidates:
    """What of a race is judged."""
    xs, ys, vs, steps = _gathered(race.families, state.members, clients, cohort)
    return Candidates(state.x, state.y, xs, ys, vs, steps, jax.tree.map(jnp.zeros_like, ys))


def scoring_of(race: Race, turns: int) -> Scoring:
    """The program that judges those who race."""
    return Scoring(turns, min(getattr(family.algorithm, "local_steps", 1) for family in race.families))


@eqx.filter_jit
def _gathered(
    families: tuple[Family, ...], members: tuple, clients: int, cohort: int
) -> tuple[PyTree, PyTree, PyTree, Array]:
    """(x, y, v, the step of y) of all settings, as one program."""

    def step(algorithm: Algorithm, state: PyTree) -> Array:
        own = algorithm.inner_lr_of(state, clients, cohort) if isinstance(algorithm, Auto) else None
        return jnp.asarray(getattr(algorithm, "inner_lr", 0.0) if own is None else own, float)

    def of(family: Family, member: PyTree) -> tuple[PyTree, PyTree, PyTree, Array]:
        v = _v(member)
        vs = jax.tree.map(jnp.zeros_like, member.y) if v is None else v
        return member.x, member.y, vs, family.each(step, member)

    parts = [of(family, member) for family, member in zip(families, members, strict=True)]
    join = lambda *trees: jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)
    xs, ys, vs, steps = (join(*pieces) for pieces in zip(*parts, strict=True))
    return xs, ys, vs, steps


def _v(member: PyTree) -> PyTree:
    """The adjoint, where a state keeps one."""
    return getattr(member, "kept", {}).get("v") if hasattr(member, "kept") else getattr(member, "v", None)


def smaller(race: Race, state: Standing, kept: Sequence[int]) -> tuple[Algorithm, PyTree]:
    """(What runs with those that go on, its state).

    Args:
        kept: places in the race, the best first.
    """
    places, families, indices = _places(race, kept)
    alone = len(places) == 1
    members = _picked(state.members, families, indices, alone)
    if alone:
        return race.only(places), members
    first = _picked(members, (0,), (np.zeros(1, np.int32),), True)
    alive = _picked(state.alive, families, indices, False)
    return race.only(places), Standing(first.x, first.y, members, alive, state.limit)


def narrowed(race: Race, kept: Sequence[int]) -> Callable[[PyTree], PyTree]:
    """What a client keeps of its own state, as a function of it."""
    places, families, indices = _places(race, kept)
    return functools.partial(_own, families, indices, len(places) == 1)


def _places(race: Race, kept: Sequence[int]) -> tuple[list[tuple[int, int]], tuple[int, ...], tuple[np.ndarray, ...]]:
    """(Family and place in it of each; the families; the places in each of these)."""
    places = [race.place(k) for k in kept]
    groups = race.groups(places)
    return places, tuple(family for family, _ in groups), tuple(np.asarray(own, np.int32) for _, own in groups)


def _own(families: tuple[int, ...], indices: tuple, alone: bool, kept: PyTree) -> PyTree:
    return None if kept is None else _picked(kept, families, indices, alone)


@eqx.filter_jit
def _picked(every: tuple, families: tuple[int, ...], indices: tuple, alone: bool) -> PyTree:
    """Some settings of some families; of one alone without the axis. Compiled for how many there are, not for which."""
    found = tuple(taken(every[family], own) for family, own in zip(families, indices, strict=True))
    return jax.tree.map(lambda leaf: leaf[0], found[0]) if alone else found


def heats_in(folder: str | os.PathLike[str]) -> Told:
    """What the checkpoint in a folder says of its heats.

    Raises:
        InputError: there is none, or it is of no race.
    """
    path = Path(folder) / FILE
    check(path.is_file(), f"there is no checkpoint in {folder}: nothing to resume. Start without resuming.")
    told = read(path, {}).head["totals"].get("heats")
    check(told is not None, f"the checkpoint in {folder} is of a run without candidates: go on with solve(resume=).")
    return told

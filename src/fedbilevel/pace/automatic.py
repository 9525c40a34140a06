"""An algorithm whose steps are found while it runs: `Auto`, which stands for one that has "auto" in place of a number.

It is made where something begins to run (`ready`), and is nothing that users write. Before each iteration it puts numbers in
the place of "auto", has the algorithm take the iteration, and puts x where its own pace says. The numbers travel with each
message, so that clients have them too. With M the largest and L the mean of the clients' largest curvatures of g at (x, y):

    inner_lr     b / (1.2 M), b from the number of local steps and the cohort (`algorithms.components.inner_step`)
    hessian_lr   where everyone takes part with all rows 1.6 / (1.1 L), for algorithms that make v anew in each iteration
                 1 / (1.2 L): L is no less than the mean Hessian's curvature;
                 1 / (1.2 M) where clients or rows are sampled, leaves of y belong to clients (`owned`), or single
                 clients' factors act between two means (b / (1.2 M) where these are local steps on a v that is kept)
    outer_lr     `outer`

The curvatures are measured by five Lanczos steps of each client on one batch, one number up: at the start in as many
rounds as it takes to ask everybody (20 at most), and beside an exchange of iterations 1, 2, 4, 8 and of every tenth, which
is no round. So is it where the vector v has grown fourfold since (`curvature`). Where a run blows up all the same it goes
back, and goes on with half the steps (`fedbilevel.recovery`).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import types
from collections.abc import Callable, Mapping
from typing import ClassVar, final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax.tree
from jaxtyping import Array, Bool, Float, Int, PyTree

from .. import owned
from ..algorithm import Algorithm, Info, State, Truncation
from ..component import component, method_named, title_of
from ..federation import Client, Federation, Method
from ..program import settle
from ..watch import attributes
from . import outer
from .curvature import GROWN, MARGIN, AutoStep, Curvature, Rate
from .inner import everybody_in_turn, rounds_of_first, share_of_curvature
from .meter import Meter, Seen
from .outer import Pace
from .relayed import Relayed, with_steps

STEPS = {"inner_lr": 0.01, "hessian_lr": 0.01, "outer_lr": 0.05}  # and what stands for them where nothing is measured
_OWN = ("outer_optimizer", "anderson")  # options that move x in a way of their own: its step is then a number
_METER = "meter"
_EVERY = 10  # iterations between two measurements
_OF_MEAN = 1.6 / 1.1  # of 1 / L: L is the mean of clients' curvatures, and no less than the mean's
_KEPT, _KEPT_SAMPLED = 0.6, 0.97  # of an earlier, larger curvature, at least

Scalar = Float[Array, ""]


def ready(algorithm: Algorithm, x: PyTree) -> Algorithm:
    """The algorithm as it runs: its optimizers settled, and `Auto` in its place where steps of it are to be found."""
    algorithm = settle(algorithm, x)
    asked = [name for name in STEPS if isinstance(getattr(algorithm, name, None), str)]
    if isinstance(algorithm, Auto) or not asked or not algorithm.paced:
        return algorithm
    numbers = dataclasses.replace(algorithm, **{name: STEPS[name] for name in asked})
    if any(getattr(algorithm, name, None) is not None for name in _OWN):
        asked = [name for name in asked if name != "outer_lr"]
    return Auto(numbers, tuple(asked)) if asked else numbers


def measures_first(state: PyTree) -> bool:
    """Whether the next iteration is the first one of a run, in which what is measured takes rounds of its own."""
    several = getattr(state, "members", (state,))  # of a race
    memories = [attributes(one).get("memory") for one in several]
    return any(isinstance(memory, Curvature) and not np.any(np.asarray(memory.iteration)) for memory in memories)


def numbered(algorithm: Algorithm) -> Algorithm:
    """The algorithm that stands in an `Auto`, and in what else stands for one; another one as it is."""
    within = stands_in(algorithm)
    return algorithm if within is None else numbered(within)


def stands_in(algorithm: Algorithm) -> Algorithm | None:
    """The algorithm for which this one stands: as an `Auto`, or as what is made of an `Auto`; None: it is itself."""
    return algorithm.algorithm if getattr(type(algorithm), "stands_for_one", False) else None  # pyright: ignore


def found_in(algorithm: Algorithm) -> tuple[str, ...]:
    """The names of the steps that are found while it runs."""
    within = stands_in(algorithm)
    return algorithm.found if isinstance(algorithm, Auto) else () if within is None else found_in(within)


def made_like(algorithm: Algorithm, held: Mapping[str, PyTree]) -> PyTree:
    """An algorithm's state of its parts by name, as `attributes` gives them; other names do not count."""
    like = eqx.filter_eval_shape(algorithm.init, held["x"], held["y"])
    if not dataclasses.is_dataclass(like):
        return type(like)(**{name: held[name] for name in like._asdict()})
    kept = getattr(like, "kept", None)
    inside = {name: held[name] for name in kept} if isinstance(kept, dict) else held.get("kept")
    own = {f.name: inside if f.name == "kept" else held[f.name] for f in dataclasses.fields(like)}
    return type(like)(**own)  # pyright: ignore[reportCallIssue]


class Paced(State):
    """The state of the algorithm, by name, and what is remembered of its steps."""

    kept: dict[str, PyTree]
    memory: Curvature
    log_mean: Scalar  # log L: its size is its own
    pace: Pace | None


class Told(Info):
    """`Info`, and the steps that were taken.

    Attributes:
        inner_lr, hessian_lr, outer_lr: None where the algorithm has none.
        recovered: how often the run went back until then.
    """

    inner_lr: Scalar | None = None
    hessian_lr: Scalar | None = None
    outer_lr: Scalar | None = None
    recovered: Int[Array, ""] | None = None


@functools.cache
def _with_told(kind: type[Info]) -> Callable[..., Info]:
    """The diagnostics of an algorithm, which may be more than `Info`, and the steps."""
    both: tuple[type, ...] = (kind, Told)
    held = {"__module__": __name__, "__doc__": kind.__doc__}
    return Told if kind is Info else types.new_class("Told", both, exec_body=lambda space: space.update(held))


@final
class Auto(Algorithm):
    """See the head of this file.

    Args:
        algorithm: with numbers, for which others are put.
        found: the names of the steps that are found.
        first: rounds of the first measurement, at most; None for as many as it takes to ask everybody. With none,
            the first steps are `STEPS`.
        tempo: how many times as long the steps of x are as they are found to be.
    """

    stands_for_one: ClassVar[bool] = True

    algorithm: Algorithm
    found: tuple[str, ...] = eqx.field(static=True)
    first: int | None = eqx.field(default=None, static=True)
    tempo: Rate = 1.0

    @property
    def title(self) -> str:
        """The algorithm's own name."""
        return title_of(self.algorithm)

    @property
    def follows(self) -> dict[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Which setting moves which part of its state; steps that are found are nobody's setting."""
        return {part: name for part, name in self.algorithm.follows.items() if name not in self.found}

    def __getattr__(self, name: str):
        if name.startswith("__") or name in ("algorithm", "found", "first", "tempo"):
            raise AttributeError(name)
        return getattr(self.algorithm, name)  # what it knows of itself, such as `own_lower`

    @component
    def meter(self) -> Meter:
        """What clients measure."""
        inner = self.algorithm
        hessian = getattr(inner, "hessian", None)
        known = isinstance(hessian, AutoStep)
        local, own = (hessian.local_factors, hessian.own_lower) if known else (True, None)
        step = AutoStep("auto", getattr(inner, "batch_size", None), local, own)
        return Meter(step, "outer_lr" in self.found)

    def inner_lr_of(self, state: Paced, clients: int, cohort: int) -> Rate | None:
        """The step of one local step on y, as it is taken from a state on; None where there is none."""
        if "inner_lr" not in self.found:
            return getattr(self.algorithm, "inner_lr", None)
        share = share_of_curvature(getattr(self.algorithm, "local_steps", 1), clients, cohort)
        return jnp.where(state.memory.largest > 0, state.memory.step * share, STEPS["inner_lr"])

    # States ---------------------------------------------------------------------------------------------------------

    def init(self, x: PyTree, y: PyTree) -> Paced:
        held = attributes(self.algorithm.init(x, y))
        kept = {name: part for name, part in held.items() if name not in ("x", "y")}
        memory = self.meter.step.begin(y)
        assert memory is not None  # it measures
        pace = None
        if "outer_lr" in self.found:
            pace = outer.begin(x, y, kept.get("v") if self._gated(kept) else None)
        return Paced(held["x"], held["y"], kept, memory, jnp.zeros_like(memory.largest), pace)

    def client_init(self, x: PyTree, y: PyTree) -> PyTree:
        return self.algorithm.client_init(x, y)

    def _inner(self, state: Paced) -> PyTree:
        """The algorithm's own state."""
        like = eqx.filter_eval_shape(self.algorithm.init, state.x, state.y)
        fields = {"x": state.x, "y": state.y, **state.kept}
        return type(like)(**fields)

    @staticmethod
    def _gated(kept: dict[str, PyTree]) -> bool:
        """Whether the algorithm goes on with v from iteration to iteration, and says how far it is."""
        return kept.get("v") is not None and kept.get("pull") is not None

    # Steps ----------------------------------------------------------------------------------------------------------

    def step(self, fed: Federation, state: Paced) -> tuple[Paced, PyTree]:
        k = state.memory.iteration
        state = self._begun(fed, state)
        steps = self._steps(fed, state)
        numbers = with_steps(self.algorithm, steps)
        due = (k > 0) & ((k % _EVERY == 0) | (k < _EVERY) & (k & (k - 1) == 0))
        due = due | state.memory.longer(GROWN) | (state.memory.again > 0)
        relayed = Relayed(fed, self, numbers, steps, lambda: self._measured(fed, state, due))
        after, info = numbers.step(relayed, self._inner(state))
        seen = self._none(state) if relayed.seen is None else relayed.seen
        return self._after(fed, state, steps, attributes(after), info, due, seen)

    def _rule(self, fed: Federation, kept: dict[str, PyTree]) -> outer.Rule:
        cut = getattr(self.algorithm, "truncation", None)
        random = isinstance(cut, Truncation) and cut.mode == "uniform"
        return outer.rule(self._gated(kept), not self._everything(fed), random)

    def _everything(self, fed: Federation) -> bool:
        return fed.cohort_size == fed.clients and self.meter.step.batch_size is None

    def _steps(self, fed: Federation, state: Paced) -> dict[str, Scalar]:
        """The numbers of this iteration, of those that are found."""
        memory, numbers, known = state.memory, {}, state.memory.largest > 0
        longest = jnp.where(known, memory.step, STEPS["hessian_lr"])  # 1 / (1.2 M)
        if "inner_lr" in self.found:
            numbers["inner_lr"] = self.inner_lr_of(state, fed.clients, fed.cohort_size)
        if "hessian_lr" in self.found:
            kept, local = self._gated(state.kept), self.meter.step.local_factors
            # L is no bound where blocks of y are each one client's alone
            mean = self._everything(fed) and not local and not owned.nodes(state.y)
            if kept and local:
                local_steps = getattr(self.algorithm, "local_steps", 1)
                longest = longest * share_of_curvature(local_steps, fed.clients, fed.cohort_size)
            curved = jnp.maximum(jnp.minimum(jnp.exp(state.log_mean), memory.largest), memory.floor)
            alone = jnp.ldexp((_OF_MEAN if kept else 1 / MARGIN) / jnp.where(curved > 0, curved, 1), -memory.halvings)
            numbers["hessian_lr"] = jnp.where(known & (curved > 0), alone, longest) if mean else longest
        if state.pace is not None:
            numbers["outer_lr"] = jnp.exp(state.pace.log_probe)
        return numbers

    def _begun(self, fed: Federation, state: Paced) -> Paced:
        """What is known before an iteration: in a run's first one everybody is asked."""
        turns = rounds_of_first(fed.clients, fed.cohort_size)
        turns = turns if self.first is None else min(turns, self.first)
        if turns == 0:
            return state

        def turn(t: Int[Array, ""], seen: Seen) -> Seen:
            cohort = None if fed.cohort_size == fed.clients else everybody_in_turn(fed, t, turns)
            ways = ("mean", "maximum", "mean", "mean", "mean")
            mean, largest, *rest = fed.average(self.meter.begin, state.x, state.y, combine=ways, cohort=cohort)
            add = lambda old, new: old + new / turns
            pull = jax.tree.map(add, seen.pull, rest[0])
            # a block is asked of in one turn alone
            pull = owned.put(pull, jax.tree.map(jnp.add, seen.pull, rest[0]))
            sums = (add(old, new) for old, new in ((seen.loss, rest[1]), (seen.steepest, rest[2])))
            return Seen(jnp.maximum(seen.largest, largest), add(seen.mean, mean), pull, *sums)

        start = state.memory.iteration == 0
        seen = fed.rarely(jnp.where(start, turns, 0), turn, self._none(state), most=turns)
        choose = lambda new, old: jnp.where(start, new, old)
        memory = dataclasses.replace(state.memory, largest=choose(seen.largest, state.memory.largest))
        pace = state.pace
        if pace is not None:
            begun = outer.probed(outer.measured(pace, seen.pull, seen.loss), seen.loss, seen.steepest, state.x)
            pace = jax.tree.map(choose, begun, pace)
        return dataclasses.replace(
            state, memory=memory, log_mean=choose(outer.log(seen.mean), state.log_mean), pace=pace
        )

    def _none(self, state: Paced) -> Seen:
        """Of nobody."""
        zero = jnp.zeros_like(state.memory.largest)
        pull = zero if state.pace is None else optax.tree.zeros_like(state.y)
        return Seen(zero, zero, pull, zero, zero)

    def _measured(self, fed: Federation, state: Paced, due: Bool[Array, ""]) -> Seen:
        """What is measured beside an exchange, if it is due."""

        def turn(t: Int[Array, ""], _: Seen) -> Seen:
            ways = ("mean", "maximum", "mean", "mean")
            found = fed.average(self.meter.curvature, state.x, state.y, combine=ways, beside=True)
            return Seen(found[1], found[0], found[2], found[3], jnp.zeros_like(found[0]))

        return fed.rarely(jnp.where(due, 1, 0), turn, self._none(state))

    def _after(
        self, fed: Federation, state: Paced, steps: dict[str, Scalar], after: dict[str, PyTree], info: PyTree,
        due: Bool[Array, ""], seen: Seen,
    ) -> tuple[Paced, PyTree]:  # fmt: skip
        """(The state after an iteration of the algorithm, what it tells)."""
        before, kept = state.memory, {name: part for name, part in after.items() if name not in ("x", "y")}
        share = _KEPT if self._everything(fed) else _KEPT_SAMPLED
        memory = self.meter.step.renewed(before, due, jnp.maximum(seen.largest, share * before.largest))
        kept_mean = jnp.maximum(outer.log(seen.mean), state.log_mean + math.log(share))
        log_mean = jnp.where(due, kept_mean, state.log_mean)
        x, pace, taken = after["x"], state.pace, dict(steps)
        length = getattr(info, "hypergradient_norm", None)
        if pace is not None:
            k, rule, t = before.iteration, self._rule(fed, kept), jnp.ones_like(pace.radius)
            local = getattr(self.algorithm, "local_steps", 1) * getattr(self.algorithm, "inner_rounds", 1)
            steps_of_y = local * jnp.asarray(_step(self.algorithm, taken, "inner_lr"), before.largest.dtype)
            scale = jnp.exp(state.log_mean) * optax.tree.norm(state.y)
            of_y, pace = outer.gate_of_y(pace, optax.tree.sub(state.y, after["y"]), steps_of_y, scale, k, rule)
            t, v = jnp.minimum(t, of_y), None
            told = getattr(info, "vector_residual", None)
            if self._gated(kept) and told is not None:
                size, v = told * kept["pull"], kept["v"]
                of_v, pace = outer.gate(pace, optax.tree.sub(state.kept["v"], v), size, k, rule)
                t = jnp.minimum(t, of_v)
            moved, pace = outer.move(pace, state.x, x, v, t, k, before.largest, memory.halvings, rule, self.tempo)
            renewed = outer.measured(pace, seen.pull, seen.loss)
            pace = jax.tree.map(lambda new, old: jnp.where(due, new, old), renewed, pace)
            x, taken["outer_lr"], length = moved.x, moved.step, moved.length
        watched = kept["v"] if kept.get("v") is not None else length
        memory = memory if watched is None else self.meter.step.watch(memory, watched)
        assert memory is not None
        return Paced(x, after["y"], kept, memory, log_mean, pace), self._told(info, taken, memory)

    def _told(self, info: PyTree, taken: dict[str, Scalar], memory: Curvature) -> PyTree:
        """What the algorithm tells, and its steps."""
        for name in STEPS:
            value = getattr(self.algorithm, name, None)
            if value is not None and name not in taken:
                taken[name] = jnp.asarray(value, memory.largest.dtype)
        if isinstance(info, Info):
            whole = {f.name: getattr(info, f.name) for f in dataclasses.fields(info)}
            return _with_told(type(info))(**whole, **taken, recovered=memory.halvings)
        return {**info, **taken, "recovered": memory.halvings} if isinstance(info, dict) else info

    # Client methods -------------------------------------------------------------------------------------------------

    def client_method(self, name: str) -> Method:
        """Its own, or one of the algorithm's, to which the steps are sent before its message."""
        if name.partition(".")[0] == _METER:
            return method_named(self.meter, name.partition(".")[2])
        own = method_named(self.algorithm, name)

        def relayed(client: Client, steps: dict[str, Scalar], *message: PyTree) -> PyTree:
            return method_named(with_steps(self.algorithm, steps), name)(client, *message)

        first, *rest = inspect.signature(own).parameters.values()
        steps = inspect.Parameter("steps", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        relayed.__signature__ = inspect.Signature([first, steps, *rest])  # pyright: ignore[reportFunctionMemberAccess]
        return relayed


def _step(algorithm: Algorithm, taken: Mapping[str, Scalar], name: str) -> Rate:
    """A step, whether it was found or is a number."""
    return taken[name] if name in taken else getattr(algorithm, name)


# Measured once, for estimates --------------------------------------------------------------------------------------------


def measure(algorithm: Algorithm, fed: Federation, state: PyTree) -> tuple[PyTree, dict[str, Scalar]]:
    """The program that finds the steps of an `Auto` at its first state."""
    assert isinstance(algorithm, Auto)
    return state, algorithm._steps(fed, algorithm._begun(fed, state))


def with_numbers(algorithm: Algorithm, steps: Mapping[str, float]) -> Algorithm:
    """What stands in an `Auto`, with the steps that were found."""
    return dataclasses.replace(numbered(algorithm), **steps)

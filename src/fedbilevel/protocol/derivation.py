"""What one iteration of an algorithm exchanges: derived by tracing its `step`, never from a formula.

`step` is traced abstractly: no loss is evaluated, replies are opaque. The trace finds the exchanges; a small integer
program that it leaves behind is then evaluated for every number the server may draw (`fed.randint`), which gives the
expected and the largest rounds and bytes of an iteration exactly.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Hashable

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from .. import owned
from ..algorithm import Algorithm, State
from ..beginning import as_leaves, first_state
from ..cohorts import check_cohort
from ..compiled import Kept
from ..component import title_of
from ..data import FederatedData
from ..errors import check
from ..given import Whole
from ..means.carried import Carried, check_can
from ..means.seen import brings
from ..pace.automatic import ready
from ..problem import Problem, bind
from ..program import class_of, compiled_as, freeze
from ..variables import trainable
from . import at_sites
from .abstract import Given, Program, discover, step
from .counting import Counting, combinations
from .table import Protocol, summary


@typing.runtime_checkable
class Asks(typing.Protocol):
    """An engine, of which the protocol needs to know how many clients an exchange asks."""

    @property
    def cohort(self) -> Whole | None: ...


def protocol(
    algorithm: Algorithm, problem: Problem, data: FederatedData, x: PyTree, y: PyTree, engine: Asks | None = None
) -> Protocol:
    """The exchanges of one iteration of `algorithm`, without running it.

    Args:
        engine: its cohort counts; by default all clients take part.

    Returns:
        A `Protocol`: `.rounds`, `.bytes_down`, `.bytes_up`; `print` it for a table.

    Raises:
        InputError: the losses, the data or the algorithm's program cannot be used.
    """
    check_kinds(problem, data, algorithm)
    x, x_rest = trainable(x, "x")
    y, y_rest = trainable(y, "y")
    cohort, bound = check_cohort(getattr(engine, "cohort", None), data.clients), bind(problem, x_rest, y_rest)
    algorithm = running(algorithm, bound, data, x, y, cohort)
    return trace(algorithm, bound, data, first_state(algorithm, x, y), cohort)


def running(
    algorithm: Algorithm,
    problem: Problem,
    data: FederatedData,
    x: PyTree,
    y: PyTree,
    cohort: int,
    program: Program | None = None,
) -> Algorithm:
    """The algorithm as it runs: `pace.automatic.ready`, and for an outer loss of means a `Carried` around it.

    Which of its exchanges use the outer loss is seen in one abstract trace of the program.

    Args:
        problem: over the floating-point arrays of x and y alone (`bind`).
        program: by default the algorithm's `step`; another one begins with x and y alone.

    Raises:
        InputError: the losses cannot be used, or the algorithm cannot have an outer loss of means.
    """
    algorithm = ready(algorithm, x)
    if problem.outer_means is None or isinstance(algorithm, Carried):
        return algorithm
    check_can(algorithm)
    problem = freeze(problem, x, y, data)
    shapes = eqx.filter_eval_shape(problem.means, owned.own(x, 0), owned.own(y, 0), data.outer.client(0).all())
    like = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    carried = Carried(algorithm, like)
    state = first_state(carried, x, y) if program is None else State(x, y)
    found, _ = discover(program or step, as_leaves(carried), problem, data, state, cohort)
    using = {path: site.name for path, site in found.sites.items() if brings(site.reply)}
    if not using:
        return algorithm
    return Carried(algorithm, like, tuple(sorted(set(using.values()))), len(min(using)) > 1)


def check_kinds(problem: Problem, data: FederatedData, algorithm: Algorithm) -> None:
    """Refuse arguments of another kind, such as swapped ones."""
    check(isinstance(data, FederatedData), f"data is a FederatedData (stack or split); got {type(data).__name__}.")
    check(isinstance(problem, Problem), f"problem is a fedbilevel.Problem; got {type(problem).__name__}.")
    check(isinstance(algorithm, Algorithm), lambda: f"algorithm is an instance such as AggITD(...); got {algorithm!r}.")


def check_blocks(algorithm: Algorithm, state: PyTree, data: FederatedData) -> None:
    """Refuse leaves that belong to clients where the algorithm cannot take them, or there are other clients."""
    if not owned.nodes((state.x, state.y)):
        return
    why = getattr(getattr(algorithm, "about", None), "no_blocks", "")
    check(
        not why,
        f"{title_of(algorithm)} takes no leaves per client (fedbilevel.per_client): {why}. Take Lockstep or AggITD.",
    )
    for name in "xy":
        owned.check_clients(getattr(state, name), name, data.clients)


def trace(
    algorithm: Algorithm,
    problem: Problem,
    data: FederatedData,
    state: PyTree,
    cohort: int,
    program: Program | None = None,
) -> Protocol:
    """The protocol of `program(algorithm, fed, state)`, by default of `algorithm.step`."""
    program = program or step
    check_blocks(algorithm, state, data)
    problem = freeze(problem, state.x, state.y, data)
    given = as_leaves(algorithm), state, data
    known = _KNOWN.get(_key(program, problem, given, cohort), lambda: _Known(program, problem, given, cohort))
    return known.protocol(algorithm, given)


def _key(program: Program, problem: Problem, given: Given, cohort: int) -> Hashable:
    """What an iteration's exchanges can depend on, but for numbers."""
    arrays, rest = eqx.partition(given, eqx.is_array)
    static, structure = jax.tree.flatten(rest)
    leaves, places = jax.tree.flatten(arrays)
    shapes = tuple((leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)) for leaf in leaves)
    config = jax.config.jax_enable_x64, jax.config.jax_numpy_dtype_promotion  # pyright: ignore[reportAttributeAccessIssue]
    return program, compiled_as(problem), class_of(given[0]), structure, tuple(static), places, shapes, cohort, config


class _Known:
    """The exchanges of an iteration, and what counts them, from traces; no rows are kept."""

    def __init__(self, program: Program, problem: Problem, given: Given, cohort: int):
        algorithm, state, data = given
        found, self._info = discover(program, algorithm, problem, data, state, cohort)
        self._sites, self._cohort, self._clients = found.sites, cohort, data.clients
        self._rare = {path: turns for path, turns in found.turns.items() if path in found.rare}
        self._at_sites = at_sites.at_sites(program, algorithm, problem, data, state, cohort, found)
        self._draws, self._kind = combinations(found.draws, found.loops_draw)
        counting = lambda most: Counting(
            program, problem, given, cohort, found.sites, self._draws, found.loops_draw, most
        )
        self._counting = counting(False)
        if found.depends_on_data or self._counting.depends:
            self._counting, self._kind = counting(True), "bound"

    def protocol(self, algorithm: Algorithm, given: Given) -> Protocol:
        counts, taken = self._counting(given)
        if self._kind == "bound":
            counts = jax.tree.map(lambda value: value.max(axis=0, keepdims=True), counts)
        known = summary(algorithm, self._clients, self._cohort, self._sites, counts, self._kind, self._info, self._rare)
        certain = self._kind != "sampled" and not self._counting.varies
        rare = sum(each.times_most for each in known.rarely)
        most = int(taken.max()) + rare if certain else None
        return dataclasses.replace(known, taken_most=most, at_sites=self._at_sites)


_KNOWN: Kept[_Known] = Kept(64)

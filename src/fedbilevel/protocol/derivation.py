"""What one iteration of an algorithm exchanges: derived by tracing its `step`, never from a formula.

`step` is traced abstractly: no loss is evaluated, replies are opaque. The trace finds the exchanges; a small integer
program that it leaves behind is then evaluated for every number the server may draw (`fed.randint`), which gives the
expected and the largest rounds and bytes of an iteration exactly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..algorithm import Algorithm
from ..canonical import canonical
from ..cohorts import check_cohort, combine_replies
from ..compiled import Kept
from ..data import FederatedData
from ..errors import InputError, check
from ..federation import Client, Reply
from ..jaxprs import ClosedJaxpr, dce_jaxpr, jaxpr_as_fun
from ..problem import Problem, bind, describe, strong
from ..program import class_of, compiled_as, freeze, settle
from ..variables import trainable
from .calls import check_times
from .table import SAMPLED, Protocol, summary
from .traced import TracedFederation

_ENUMERATED = 10_000  # server draws with more combinations than this are sampled instead


def protocol(
    algorithm: Algorithm, problem: Problem, data: FederatedData, x: PyTree, y: PyTree, engine: Any = None
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
    algorithm = settle(algorithm, x)
    cohort = check_cohort(getattr(engine, "cohort", None), data.clients)
    return trace(algorithm, bind(problem, x_rest, y_rest), data, algorithm.init(x, y), cohort)


def check_kinds(problem: Any, data: Any, algorithm: Any) -> None:
    """Refuse arguments of another kind, such as swapped ones."""
    check(isinstance(data, FederatedData), f"data is a FederatedData (stack or split); got {type(data).__name__}.")
    check(isinstance(problem, Problem), f"problem is a fedbilevel.Problem; got {type(problem).__name__}.")
    check(isinstance(algorithm, Algorithm), lambda: f"algorithm is an instance such as AggITD(...); got {algorithm!r}.")


def trace(
    algorithm: Algorithm, problem: Problem, data: FederatedData, state: Any, cohort: int, program=None
) -> Protocol:
    """The protocol of `program(algorithm, fed, state)`, by default of `algorithm.step`."""
    program = program or step
    problem = freeze(problem, state.x, state.y, data)
    given = as_leaves(algorithm), state, data
    known = _KNOWN.get(_key(program, problem, given, cohort), lambda: _Known(program, problem, given, cohort))
    return known.protocol(algorithm, given)


def _key(program, problem, given, cohort) -> Hashable:
    """What an iteration's exchanges can depend on, but for numbers."""
    arrays, rest = eqx.partition(given, eqx.is_array)
    static, structure = jax.tree.flatten(rest)
    leaves, places = jax.tree.flatten(arrays)
    shapes = tuple((leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)) for leaf in leaves)
    config = jax.config.jax_enable_x64, jax.config.jax_numpy_dtype_promotion  # pyright: ignore[reportAttributeAccessIssue]
    return program, compiled_as(problem), class_of(given[0]), structure, tuple(static), places, shapes, cohort, config


class _Known:
    """The exchanges of an iteration, and what counts them, from traces; no rows are kept."""

    def __init__(self, program, problem, given, cohort):
        algorithm, state, data = given
        found, self._info = _discover(program, algorithm, problem, data, state, cohort)
        self._sites, self._cohort, self._clients = found.sites, cohort, data.clients
        self._draws, self._kind = _combinations(found.draws, found.loops_draw)
        counting = lambda most: _Counting(
            program, problem, given, cohort, found.sites, self._draws, found.loops_draw, most
        )
        self._counting = counting(False)
        if found.depends_on_data or self._counting.depends:
            self._counting, self._kind = counting(True), "bound"

    def protocol(self, algorithm, given) -> Protocol:
        counts = self._counting(given)
        if self._kind == "bound":
            counts = jax.tree.map(lambda value: value.max(axis=0, keepdims=True), counts)
        return summary(algorithm, self._clients, self._cohort, self._sites, counts, self._kind, self._info)


_KNOWN = Kept(64)
_COUNTERS = Kept(64)  # compiled, by their programs


def step(algorithm: Algorithm, fed: Any, state: Any) -> tuple[Any, Any]:
    """The program that an iteration runs."""
    return algorithm.step(fed, state)


class _AbstractFederation(TracedFederation):
    """Replies are opaque: shaped like the real ones, filled with a number from outside.

    Args:
        sites: the call sites, where they are known: the exchanges are counted, and no client method is traced again.
    """

    def __init__(self, algorithm, problem, data, cohort, key, sites, opaque, draws, client_state, most=False):
        layout = None if sites is None else {path: site.flags for path, site in sites.items()}
        super().__init__(algorithm, data.clients, cohort, data.weights, key, layout)
        self._known = sites
        self._problem, self._data, self._opaque, self._given = problem, data, opaque, draws
        self._client_shape, self._most = client_state, most
        self.draws: list[tuple[int, int]] = []
        self.loops_draw = self.depends_on_data = False

    def exchange(self, name, method, message, combine, wanted, key, cohort):
        known = self._known
        shapes = self._replied_with(name, method, message, wanted, key) if known is None else known[self._at].reply
        one = jax.tree.map(lambda s: jnp.broadcast_to(self._opaque.astype(s.dtype), (1, *s.shape)), shapes)
        return shapes, combine_replies(combine, one, None)

    def _replied_with(self, name, method, message, wanted, key):
        """The shapes of one client's reply: its method traced."""

        def reply(message, key):
            flags = tuple(jnp.asarray(True) for _ in wanted)
            rows = (self._data.inner.client(0), self._data.outer.client(0))
            client = Client(self._problem, rows, self._client_shape, key, flags, jnp.zeros((), jnp.int32))
            out = self.replied(name, method, client, message)
            if isinstance(out, Reply):
                stateful = jax.tree.leaves(self._client_shape)
                check(
                    stateful, f"{where} returns Reply(...), but {owner}.client_init gives no state to renew: write it."
                )
            return out.reply if isinstance(out, Reply) else out

        owner = type(self._algorithm).__name__
        where = f"{owner}.{name}"
        try:
            shapes = eqx.filter_eval_shape(reply, message, key)
        except (InputError, jax.errors.ConcretizationTypeError):
            raise
        except Exception as error:  # whatever a user's method raises
            sent = describe(eqx.filter_eval_shape(lambda: message))
            raise InputError(
                f"{where} fails on the message {sent}: {type(error).__name__}: {_first_line(error)}"
            ) from error
        good = jax.tree.leaves(shapes) and all(isinstance(s, jax.ShapeDtypeStruct) for s in jax.tree.leaves(shapes))
        check(good, lambda: f"{where} must return a pytree of arrays; it returned {describe(shapes)}.")
        return shapes

    def randint(self, low, high):
        self._scopes.check()
        if self._scopes._path:
            self.loops_draw = True
        if self._scopes._path or self._given is None:
            self.draws.append((low, high))
            return super().randint(low, high)
        self.draws.append((low, high))
        super().randint(low, high)
        return self._given[len(self.draws) - 1]

    def repeat(self, times, body, carry, most=None):
        path = self._scopes.advance()
        times = check_times(times, most)
        run = self._body(path, body)

        whole = isinstance(times, int) or self._most

        def turn(loop, t):
            new = run(t, loop)
            going = lambda new, old: jnp.where(t < times, new, old)
            return (new if whole else jax.tree.map(going, new, loop)), None

        # a scan, of which what does not count can be cut away
        length = times if isinstance(times, int) else most
        loop, _ = jax.lax.scan(turn, (self._ledger(), carry), jnp.arange(length, dtype=jnp.int32))
        self._restore(loop[0])
        return loop[1]

    def travelled(self, flags):
        return [True] * len(flags) if self._most else flags

    def until(self, condition, body, carry, most):
        self.depends_on_data = True
        check_times(most, most)
        return self.repeat(most, body, carry)


def _discover(program, algorithm, problem, data, state, cohort) -> tuple[_AbstractFederation, PyTree]:
    found = []

    def run(algorithm, state, opaque, key):
        fed = _AbstractFederation(
            algorithm, problem, data, cohort, key, None, opaque, None, client_state(algorithm, state)
        )
        out = program(algorithm, fed, state)
        pair = isinstance(out, tuple) and len(out) == 2
        check(pair, lambda: f"{name}.step must return (state, diagnostics), two things; it returned {describe(out)}.")
        found.append(fed)
        return out

    name = type(algorithm).__name__
    try:
        after, info = eqx.filter_eval_shape(run, algorithm, state, jnp.zeros(()), jax.random.key(0))
    except jax.errors.ConcretizationTypeError as error:
        raise InputError(
            f"{name} asks Python to decide (if, while, int, float) on a value known only while running: use jnp.where, "
            f"jax.lax.cond, fed.repeat(most=) or fed.until. {_first_line(error)}"
        ) from error
    before = eqx.filter_eval_shape(lambda: state)
    same = jax.tree.structure(before) == jax.tree.structure(after) and all(
        (a.shape, a.dtype) == (b.shape, b.dtype)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    )
    check(
        same or program is not step,
        lambda: (
            f"{name}.step must return a state like the one it was given, {describe(before)}; "
            f"it returned {describe(after)}."
        ),
    )
    check(found[0].sites, f"{type(algorithm).__name__} exchanges nothing: its step never calls fed.average.")
    return found[0], info


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0]


def as_leaves(algorithm: Any) -> Any:
    """The algorithm with its Python numbers as (weakly typed) arrays, so that compiled code takes them as arguments."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, (int, float)) else leaf, algorithm)


def client_state(algorithm: Algorithm, state: Any) -> PyTree:
    """What one client keeps, at the start."""
    return strong(jax.tree.map(jnp.asarray, algorithm.client_init(state.x, state.y)))


def _combinations(ranges: list[tuple[int, int]], sample: bool) -> tuple[np.ndarray, str]:
    """Rows of numbers the server may draw: all of them, or a sample where they are too many or drawn within loops."""
    combinations = math.prod(high - low for low, high in ranges)
    if combinations <= _ENUMERATED and not sample:
        every = list(itertools.product(*(range(*r) for r in ranges)))
        return np.array(every, np.int32).reshape(combinations, len(ranges)), "exact"
    draw = np.random.default_rng(0)
    return np.stack([draw.integers(low, high, SAMPLED) for low, high in ranges], 1).astype(np.int32), "sampled"


class _Counting:
    """Counts per site, (draws, 1 + flags): the program with all but its exchanges cut away.

    Attributes:
        depends: whether the counts depend on data.

    Args:
        by_draw: draws within loops get a key for each row of `draws`.
        most: count every conditional part, and every loop in full.
    """

    def __init__(self, program, problem, given, cohort, sites, draws, by_draw, most):
        arrays, rest = eqx.partition(given, eqx.is_array)
        leaves, structure = jax.tree.flatten(arrays)

        def run(opaque, numbers, key, leaves):
            algorithm, state, data = eqx.combine(jax.tree.unflatten(structure, leaves), rest)
            is_key = lambda a: jnp.issubdtype(a.dtype, jax.dtypes.prng_key)  # what is drawn from it is not from data
            fill = lambda a: a if is_key(a) else jnp.broadcast_to(opaque.astype(a.dtype), a.shape)
            filled = jax.tree.map(fill, state)
            kept = client_state(algorithm, state)
            fed = _AbstractFederation(algorithm, problem, data, cohort, key, sites, opaque, numbers, kept, most)
            program(algorithm, fed, filled)
            return fed.counts

        keys = jax.random.split(jax.random.key(0), len(draws))
        whole, shape = jax.make_jaxpr(run, return_shape=True)(jnp.zeros(()), jnp.asarray(draws[0]), keys[0], leaves)
        inputs = [False, True, True, *[False] * len(leaves)]
        kept, used = dce_jaxpr(whole.jaxpr, [True] * len(whole.jaxpr.outvars), instantiate=inputs)
        self.depends, self._used = used[0], used[3:]
        self._structure = jax.tree.structure(shape)
        self._draws, self._keys = (draws, keys) if by_draw else (draws, keys[0])
        counting = ClosedJaxpr(kept, whole.consts)
        name = canonical([counting]).digest, by_draw, self.depends
        self._run = _COUNTERS.get(name, lambda: _vectorised(jaxpr_as_fun(counting), by_draw, self.depends))
        self._counts: Any = None

    def __call__(self, given):
        if self._counts is None or any(self._used):
            leaves = jax.tree.leaves(eqx.filter(given, eqx.is_array))
            used = [leaf for leaf, used in zip(leaves, self._used, strict=True) if used]
            self._counts = [np.asarray(count) for count in self._run(self._draws, self._keys, used)]
        return jax.tree.unflatten(self._structure, self._counts)


def _vectorised(counting, by_draw, depends):
    opaque = (jnp.zeros(()),) if depends else ()
    one = lambda draw, key, used: counting(*opaque, draw, key, *used)
    return jax.jit(jax.vmap(one, in_axes=(0, 0 if by_draw else None, None)))

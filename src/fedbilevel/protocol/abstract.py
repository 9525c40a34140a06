"""One abstract trace of `step`: no loss is evaluated, replies are opaque, and the exchanges are found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from .. import owned
from ..algorithm import Algorithm
from ..beginning import client_state
from ..cohorts import combine_replies
from ..component import title_of
from ..data import FederatedData
from ..errors import InputError, check
from ..federation import Body, Client, Cohort, Combine, Federation, Flag, Index, Method, Reply
from ..problem import Problem, describe
from .calls import check_times
from .sites import Path, Site, Wanted, check_parts
from .traced import Loop, TracedFederation

Program: TypeAlias = Callable[[Algorithm, Federation, PyTree], tuple[PyTree, PyTree]]  # (state) -> (the next, info)
Given: TypeAlias = tuple[Algorithm, PyTree, FederatedData]  # the algorithm as leaves, the state, the data


def step(algorithm: Algorithm, fed: Federation, state: PyTree) -> tuple[PyTree, PyTree]:
    """The program that an iteration runs."""
    return algorithm.step(fed, state)


class AbstractFederation(TracedFederation):
    """Replies are opaque: shaped like the real ones, filled with a number from outside.

    Args:
        sites: the call sites, where they are known: the exchanges are counted, and no client method is traced again.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        problem: Problem,
        data: FederatedData,
        cohort: int,
        key: Key[Array, ""],
        sites: Mapping[Path, Site] | None,
        opaque: Float[Array, ""],
        draws: Int[Array, " draws"] | None,
        client_state: PyTree,
        most: bool = False,
    ):
        layout = None if sites is None else {path: site.flags for path, site in sites.items()}
        super().__init__(algorithm, data.clients, cohort, data.weights, key, layout)
        self._known = sites
        self._problem, self._data, self._opaque, self._given = problem, data, opaque, draws
        self._client_shape, self._most = client_state, most
        self.draws: list[tuple[int, int]] = []
        self.loops_draw = self.depends_on_data = False
        self.turns: dict[Path, int] = {}  # of each loop, at most
        self.rare: set[Path] = set()  # loops of what happens in few iterations

    def exchange(
        self,
        name: str,
        method: Method,
        message: PyTree,
        combine: Combine,
        wanted: Wanted,
        key: Key[Array, ""],
        cohort: Cohort,
    ) -> tuple[PyTree, PyTree]:
        known = self._known
        shapes = self._replied_with(name, method, message, wanted, key) if known is None else known[self._at].reply
        check_parts(f"{title_of(self._algorithm)}.{name}", combine, shapes)
        one = jax.tree.map(lambda s: jnp.broadcast_to(self._opaque.astype(s.dtype), (1, *s.shape)), shapes)
        reply = combine_replies(combine, owned.without(one), None)
        if owned.nodes(one):
            self._present = jnp.zeros(self.clients, bool)
            reply = owned.with_blocks(reply, one, jnp.zeros(1, jnp.int32), None, self.clients)
        return shapes, reply

    def _replied_with(self, name: str, method: Method, message: PyTree, wanted: Wanted, key: Key[Array, ""]) -> PyTree:
        """The shapes of one client's reply: its method traced."""

        def reply(message: PyTree, key: Key[Array, ""]) -> PyTree:
            flags = tuple(jnp.asarray(True) for _ in wanted)
            rows = (self._data.inner.client(0), self._data.outer.client(0))
            client = Client(self._problem, rows, self._client_shape, key, flags, jnp.zeros((), jnp.int32))
            out = self.replied(name, method, client, owned.own(message, 0))
            if isinstance(out, Reply):
                stateful = jax.tree.leaves(self._client_shape)
                check(
                    stateful, f"{where} returns Reply(...), but {owner}.client_init gives no state to renew: write it."
                )
            return out.reply if isinstance(out, Reply) else out

        owner = title_of(self._algorithm)
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

    def randint(self, low: int, high: int) -> Int[Array, ""]:
        self._scopes.check()
        if self._scopes._path:
            self.loops_draw = True
        if self._scopes._path or self._given is None:
            self.draws.append((low, high))
            return super().randint(low, high)
        self.draws.append((low, high))
        super().randint(low, high)
        return self._given[len(self.draws) - 1]

    def repeat(self, times: Index, body: Body, carry: PyTree, most: int | None = None) -> PyTree:
        path = self.loop(times, most)
        times = check_times(times, most)
        run = self._body(path, body)
        length = times if isinstance(times, int) else most or 0
        self.turns[path] = length

        whole = isinstance(times, int) or self._most

        def turn(loop: Loop, t: Int[Array, ""]) -> tuple[Loop, None]:
            new = run(t, loop)
            going = lambda new, old: jnp.where(t < times, new, old)
            return (new if whole else jax.tree.map(going, new, loop)), None

        # a scan, of which what does not count can be cut away
        loop, _ = jax.lax.scan(turn, (self._ledger(), carry), jnp.arange(length, dtype=jnp.int32))
        self._restore(loop[0])
        return loop[1]

    def rarely(self, times: Index, body: Body, carry: PyTree, most: int = 1) -> PyTree:
        self.rare.add(self._scopes.following)
        return self.repeat(jnp.zeros((), jnp.int32), body, carry, most)

    def travelled(self, flags: list[Flag]) -> list[Flag]:
        return [True for _ in flags] if self._most else flags

    def until(self, condition: Callable[[PyTree], Flag], body: Body, carry: PyTree, most: int) -> PyTree:
        self.depends_on_data = True
        check_times(most, most)
        return self.repeat(most, body, carry)


def discover(
    program: Program, algorithm: Algorithm, problem: Problem, data: FederatedData, state: PyTree, cohort: int
) -> tuple[AbstractFederation, PyTree]:
    """The federation that an iteration was traced with, which found its exchanges, and the shapes of its diagnostics."""
    found: list[AbstractFederation] = []

    def run(
        algorithm: Algorithm, state: PyTree, opaque: Float[Array, ""], key: Key[Array, ""]
    ) -> tuple[PyTree, PyTree]:
        fed = AbstractFederation(
            algorithm, problem, data, cohort, key, None, opaque, None, client_state(algorithm, state)
        )
        out = program(algorithm, fed, state)
        pair = isinstance(out, tuple) and len(out) == 2
        check(pair, lambda: f"{name}.step must return (state, diagnostics), two things; it returned {describe(out)}.")
        found.append(fed)
        return out

    name = title_of(algorithm)
    try:
        after, info = eqx.filter_eval_shape(run, algorithm, state, *unknown())
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
    check(found[0].sites, f"{title_of(algorithm)} exchanges nothing: its step never calls fed.average.")
    return found[0], info


def unknown() -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """The shapes of a number that fills replies, and of a key: nothing is compiled to have them."""
    return jax.ShapeDtypeStruct((), jnp.result_type(float)), jax.eval_shape(lambda: jax.random.key(0))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0]

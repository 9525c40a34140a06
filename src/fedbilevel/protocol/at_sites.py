"""What a site does with blocks that are kept there (`per_client(..., keep="site")`): it runs the server's program for them.

A server program is a function of its state, of what it draws and of the replies that it has had. What it does with a
block must depend on this block's own replies alone, and what it sends to all on no block: that is seen in the traced
program (`blockwise`), and whatever else is refused. Then a site that remembers its own replies, and which exchanges they
answered, comes to the very block that the server would send it: it runs the program with its block in place of all
blocks, and zeros in place of what others have said. The draws are the server's, by the run's key. An exchange that the
site has not answered changes nothing of its block but what the server changes for those who are away (`renewed`); so
iterations that it has missed are made up for when it is asked again.

The server runs the same program, with zeros in place of replies' blocks. What it holds of these means nothing.

A simulation holds all blocks anyway: it runs the program as it is, and counts nothing for what would not be sent.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from .. import owned
from ..algorithm import Algorithm
from ..beginning import client_state
from ..cohorts import combine_replies
from ..component import title_of
from ..data import FederatedData
from ..errors import check
from ..federation import Body, Cohort, Combine, Index, Method
from ..jaxprs import dce_jaxpr
from ..pace.automatic import found_in
from ..problem import Problem
from .abstract import AbstractFederation, Program, unknown
from .sites import Path, Site, Wanted
from .traced import TracedFederation

Blocks: TypeAlias = list[Array]  # of the leaves of a tree that are kept, in order, each with an axis of one client


class Held(eqx.Module):
    """What a site keeps.

    Attributes:
        own: what the algorithm has it keep (`Algorithm.client_init`), or None.
        state: of the server's state at the start of an iteration what the site's blocks depend on, with its own blocks.
        at: () int32, which iteration that is.
        counters: for each exchange whose reply has blocks, (most turns,) int32: which exchanges of that iteration the
            site has answered, by their numbers in it; -1: none.
        replies: the blocks of these replies, each with a leading axis (most turns,).
    """

    own: PyTree
    state: Blocks
    at: Int[Array, ""]
    counters: list[Int[Array, " turns"]]
    replies: list[Blocks]


@dataclasses.dataclass(frozen=True, eq=False)
class AtSites:
    """What sites need to know of the server's program, to run it for their blocks.

    Attributes:
        program: what an iteration runs.
        sites: its exchanges.
        turns: of each exchange whose reply has blocks, how often it is made in an iteration, at most.
        clients, cohort, weighted: as `Federation` has them.
        like: the shapes of the server's state where there is one client.
        needed: which leaves of it a block depends on.
        again: whether the program's end is where it can begin again.
    """

    program: Program
    sites: Mapping[Path, Site]
    turns: Mapping[Path, int]
    clients: int
    cohort: int
    weighted: bool
    like: PyTree
    needed: tuple[bool, ...]
    again: bool

    def begin(self, algorithm: Algorithm, state: PyTree, client: int) -> Held:
        """What a site keeps at the start.

        Args:
            state: the server's first, with all blocks.
            client: which one it is.
        """
        mine = owned.alone(state, client)
        counters = [jnp.full((turns,), -1, jnp.int32) for turns in self.turns.values()]
        replies = [
            [jnp.zeros((turns, *node.shape), node.dtype) for node in owned.kept(self.sites[path].reply)]
            for path, turns in self.turns.items()
        ]
        return Held(client_state(algorithm, mine), self._kept(mine), jnp.zeros((), jnp.int32), counters, replies)

    def _kept(self, state: PyTree) -> Blocks:
        return [jnp.asarray(leaf) for leaf, kept in zip(jax.tree.leaves(state), self.needed, strict=True) if kept]

    def state(self, held: Held) -> PyTree:
        """The server's state as the site runs the program from it: zeros in what its blocks do not depend on."""
        leaves, structure = jax.tree.flatten(self.like)
        left = iter(held.state)
        zeros = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)
        made = [next(left) if kept else zeros(leaf) for leaf, kept in zip(leaves, self.needed, strict=True)]
        return jax.tree.unflatten(structure, made)

    def noted(self, held: Held, path: Path, counter: int, reply: PyTree, own: PyTree) -> Held:
        """What a site keeps after it has answered an exchange.

        Args:
            counter: the exchange's number in the iteration.
            own: what the algorithm has it keep now.
        """
        held = dataclasses.replace(held, own=own)
        if path not in self.turns:
            return held
        place = list(self.turns).index(path)
        counters, replies = list(held.counters), list(held.replies)
        free = int(np.sum(np.asarray(counters[place]) >= 0))
        put = lambda all, new: jnp.asarray(all).at[free].set(new)
        counters[place] = put(counters[place], counter)
        replies[place] = [put(*pair) for pair in zip(replies[place], blocks_in(reply), strict=True)]
        return dataclasses.replace(held, counters=counters, replies=replies)


def blocks_in(tree: PyTree) -> list[PyTree]:
    """The numbers of what is kept at the sites."""
    return [node.value for node in owned.kept(tree)]


# Programs, for `compiled.run` -----------------------------------------------------------------------------------------


def sent(
    problem: Problem | None,
    algorithm: Algorithm,
    at_sites: AtSites,
    path: Path,
    held: Held,
    iteration: Int[Array, ""],
    counter: Int[Array, ""],
    key: Key[Array, ""],
) -> tuple[Held, Blocks]:
    """(What the site keeps, at the start of the iteration; the blocks that the server would send it in an exchange)."""
    held = _caught_up(algorithm, at_sites, held, iteration, key)
    fed = _AtSite(algorithm, at_sites, held, jax.random.fold_in(key, iteration), path, counter)
    at_sites.program(algorithm, fed, at_sites.state(held))
    return held, [block[0] for block in fed.client_state]


def ended(
    problem: Problem | None,
    algorithm: Algorithm,
    at_sites: AtSites,
    held: Held,
    iteration: Int[Array, ""],
    key: Key[Array, ""],
) -> Blocks:
    """The site's blocks of what the program returns, after so many iterations (of which there is one at least)."""
    held = _caught_up(algorithm, at_sites, held, iteration - 1, key)
    fed = _AtSite(algorithm, at_sites, held, jax.random.fold_in(key, iteration - 1))
    return [block[0] for block in blocks_in(at_sites.program(algorithm, fed, at_sites.state(held))[0])]


def _caught_up(
    algorithm: Algorithm, at_sites: AtSites, held: Held, iteration: Int[Array, ""], key: Key[Array, ""]
) -> Held:
    """At the start of an iteration; those that the site has missed change what the server changes for one who is away."""
    if not at_sites.again:
        return held

    def turn(k: Int[Array, ""], held: Held) -> Held:
        fed = _AtSite(algorithm, at_sites, held, jax.random.fold_in(key, k))
        after, _ = at_sites.program(algorithm, fed, at_sites.state(held))
        none = [jnp.full_like(counters, -1) for counters in held.counters]
        return dataclasses.replace(held, state=at_sites._kept(after), at=jnp.asarray(k + 1, jnp.int32), counters=none)

    return jax.lax.fori_loop(jnp.asarray(held.at, jnp.int32), jnp.asarray(iteration, jnp.int32), turn, held)


class _AtSite(TracedFederation):
    """`fed` where a site runs the server's program: it has its own replies' blocks, and zeros of all else.

    Args:
        path, counter: the exchange whose message is wanted, and its number in the iteration; `client_state` has its blocks.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        at_sites: AtSites,
        held: Held,
        key: Key[Array, ""],
        path: Path | None = None,
        counter: Int[Array, ""] | None = None,
    ):
        super().__init__(algorithm, at_sites.clients, at_sites.cohort, None, key, None)
        self.weighted = at_sites.weighted
        self._at_sites, self._held, self._path, self._wanted = at_sites, held, path, counter
        if path is not None:
            message = at_sites.sites[path].message
            self.client_state = [jnp.zeros((1, *node.shape), node.dtype) for node in owned.kept(message)]

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
        if self._at == self._path:
            here = self._counter == self._wanted
            pairs = zip(blocks_in(message), self.client_state, strict=True)
            self.client_state = [jnp.where(here, new, old) for new, old in pairs]
        shapes = self._at_sites.sites[self._at].reply
        one = jax.tree.map(lambda s: jnp.zeros((1, *s.shape), s.dtype), shapes)
        reply = combine_replies(combine, owned.without(one), None)
        if owned.nodes(one):
            answered, blocks = self._replied_here(one)
            self._present = answered.reshape(1)
            mine = owned.mapped(lambda node: node.holding(node.value, own=False), one)
            reply = owned.together(reply, owned.keeping(mine, blocks))
        return shapes, reply

    def _replied_here(self, one: PyTree) -> tuple[Bool[Array, ""], list[PyTree]]:
        """(Whether the site has answered this exchange, the blocks of its reply, or zeros)."""
        if self._at not in self._at_sites.turns:
            return jnp.asarray(False), blocks_in(one)
        place = list(self._at_sites.turns).index(self._at)
        match = jnp.asarray(self._held.counters[place]) == self._counter
        answered, which = jnp.any(match), jnp.argmax(match)
        found = [jnp.asarray(each)[which] for each in self._held.replies[place]]
        return answered, [jnp.where(answered, each, jnp.zeros_like(each))[None] for each in found]


# What can be kept -------------------------------------------------------------------------------------------------------


def at_sites(
    program: Program,
    algorithm: Algorithm,
    problem: Problem,
    data: FederatedData,
    state: PyTree,
    cohort: int,
    found: AbstractFederation,
) -> AtSites | None:
    """What sites need to know of a program; None where no leaf is kept there.

    Args:
        found: the federation that the program was traced with.

    Raises:
        InputError: it does with blocks what no site can do alone.
    """
    if not owned.kept((state.x, state.y)):
        return None
    needed, again = blockwise(program, algorithm, problem, data, state, cohort, found)
    of_blocks = [path for path in sorted(found.sites) if owned.kept(found.sites[path].reply)]
    loops = lambda path: [found.turns[path[:k]] for k in range(1, len(path)) if path[:k] in found.turns]
    turns = {path: math.prod(loops(path)) for path in of_blocks}
    like = eqx.filter_eval_shape(lambda: owned.alone(state, 0))
    return AtSites(program, found.sites, turns, data.clients, cohort, data.weights is not None, like, needed, again)


def blockwise(
    program: Program,
    algorithm: Algorithm,
    problem: Problem,
    data: FederatedData,
    state: PyTree,
    cohort: int,
    found: AbstractFederation,
) -> tuple[tuple[bool, ...], bool]:
    """(Which leaves of the state a block depends on, whether the program ends where it can begin again).

    Raises:
        InputError: the program does with blocks what no site can do alone.
    """
    title = title_of(algorithm)
    what = 'leaves at the sites (per_client(..., keep="site"))'
    steps = ", ".join(f"{name}=" for name in found_in(algorithm))
    check(
        not steps,
        f"{title} cannot keep {what} with steps that are found while it runs, for these depend on everybody's blocks: give "
        f"them as numbers ({steps}), or leave keep= out.",
    )
    refuse = lambda good, why: check(
        good,
        f"{title}, as it is set, cannot keep {what}: {why}. Leave keep= out, or take Lockstep or AggITD with steps given as "
        "numbers.",
    )
    refuse(not found.depends_on_data, "how many rounds it takes depends on what others send")
    leaves, structure = jax.tree.flatten(state)
    of_block = _of_blocks(state)

    def run(algorithm: Algorithm, leaves: list, others: Array, mine: Array, key: Key[Array, ""]) -> tuple:
        at = jax.tree.unflatten(structure, leaves)
        fed = _Marked(algorithm, problem, data, cohort, key, found.sites, others, None, client_state(algorithm, at))
        fed.begin(mine)
        after, _ = program(algorithm, fed, at)
        return fed.client_state, after

    number, key = unknown()
    arrays, rest = eqx.partition(algorithm, eqx.is_array)
    traced = lambda arrays, *given: run(eqx.combine(arrays, rest), *given)
    whole, (_, after) = jax.make_jaxpr(traced, return_shape=True)(arrays, leaves, number, number, key)
    before, outs = len(jax.tree.leaves(arrays)), len(whole.out_avals)

    def uses(place: int) -> tuple[set[int], bool, bool]:
        """(The leaves of the state that a result depends on, whether it does on others' replies, and on blocks' replies)."""
        used = dce_jaxpr(whole.jaxpr, [i == place for i in range(outs)])[1][before:]
        return {i for i in range(len(leaves)) if used[i]}, used[len(leaves)], used[len(leaves) + 1]

    again = jax.tree.structure(after) == structure
    after_of_block = _of_blocks(after)
    sent_to_all, sent_blocks, *ends = map(uses, range(outs))
    theirs, blocks = set[int](), {i for i, block in enumerate(of_block) if block}
    growing = again
    while growing:  # what of the state depends on what others send, and on blocks, in any iteration
        more = {i for i, (at, others, _) in enumerate(ends) if others or at & theirs}
        mine = {i for i, (at, _, own) in enumerate(ends) if own or at & blocks}
        growing = not (more <= theirs and mine <= blocks)
        theirs, blocks = theirs | more, blocks | mine
    own_results = [sent_blocks, *(end for end, block in zip(ends, after_of_block, strict=True) if block)]
    refuse(
        not any(others or at & theirs for at, others, _ in own_results),
        "what its server does with a block depends on what others send",
    )
    refuse(
        not (sent_to_all[2] or sent_to_all[0] & blocks),
        "what its server sends to all depends on the blocks",
    )
    needed = {i for i, block in enumerate(of_block) if block}.union(*(at for at, _, _ in own_results))
    growing = again
    while growing:
        more = needed.union(*(ends[i][0] for i in needed))
        growing, needed = more != needed, more
    return tuple(i in needed for i in range(len(leaves))), again


def _of_blocks(tree: PyTree) -> list[bool]:
    """Of each leaf of a tree, whether it is kept at the sites."""
    flags = owned.mapped(lambda node: node.holding(jax.tree.map(lambda _: node.site, node.value)), tree)
    return [leaf is True for leaf in jax.tree.leaves(flags)]


class _Marked(AbstractFederation):
    """`fed` for `blockwise`: `opaque` stands for what others send, another number for blocks.

    Its `client_state` is (the sum of all that it sends to all, that of the blocks that it would send).
    """

    def begin(self, mine: Float[Array, ""]) -> None:
        """Take the number that stands for blocks."""
        self._mine = mine
        self.client_state = jnp.zeros_like(self._opaque), jnp.zeros_like(self._opaque)

    def rarely(self, times: Index, body: Body, carry: PyTree, most: int = 1) -> PyTree:
        """As it runs: what it does decides how the exchanges after it are numbered."""
        return self.repeat(times, body, carry, most)

    @property
    def share(self) -> Array:
        """It depends on who else has answered."""
        return self._opaque

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
        total = lambda tree: sum((jnp.sum(leaf).astype(self._opaque.dtype) for leaf in jax.tree.leaves(tree)), 0)
        to_all, blocks = self.client_state
        number = self._counter.astype(self._opaque.dtype)  # a site knows exchanges by it
        self.client_state = to_all + total(owned.travelling(message)), blocks + total(blocks_in(message)) + number
        shapes, reply = super().exchange(name, method, message, combine, wanted, key, cohort)
        fill = lambda node: node.holding(jnp.broadcast_to((self._mine + number).astype(node.dtype), node.shape))
        return shapes, owned.mapped(lambda node: fill(node) if node.site else node, reply)

"""The federation capability: the only way in which a server program reaches data.

`fed.average(method, *message)` is ONE communication round: the message goes to a cohort of clients, each runs the
named method on its own data, and the mean of the replies comes back (of some of their parts the
maximum, with `combine=`). Loops over rounds are `fed.repeat` and
`fed.until`, so that an engine may compile them or run them over a network. `fed.when(flag, part)` is a part of a
message that travels only sometimes. The engines implement this interface; algorithms know nothing else.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Literal, TypeAlias

import equinox as eqx
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from . import owned
from .data import ClientRows
from .errors import check, unknown_name
from .problem import Problem, Rows

Way: TypeAlias = Literal["mean", "maximum"]
Combine: TypeAlias = Way | tuple[Way, ...]  # of a whole reply, or one for each part of it
Flag: TypeAlias = bool | np.bool_ | Bool[Array | np.ndarray, ""]  # whether a part travels
Method: TypeAlias = Callable[..., PyTree]  # of a client: (client, *message) -> its reply
Replies: TypeAlias = Flag | tuple[Flag, ...]
Cohort: TypeAlias = Int[Array | np.ndarray, " cohort"] | None  # indices of clients
Index: TypeAlias = int | np.integer | Int[Array, ""]
Present: TypeAlias = Bool[Array, " clients"] | None
Share: TypeAlias = float | Float[Array, ""] | None  # None: it is not defined
Body: TypeAlias = Callable[[Int[Array, ""], PyTree], PyTree]  # of a loop: (t, carry) -> carry


class When(eqx.Module):
    """A part of a message that is there only if `present`; a client that does not get it sees zeros.

    Attributes:
        present: () bool, known to both sides without being sent.
        value: the part, a pytree of arrays.
    """

    present: Flag
    value: PyTree


class Reply(eqx.Module):
    """What a client method returns when it also renews the client's state."""

    reply: PyTree
    state: PyTree


class Client(eqx.Module):
    """What a client method sees: one client's problem, rows, state and key, and what the server wants of it.

    Attributes:
        problem: the losses, behind their oracles.
        state: what this client keeps between exchanges (`Algorithm.client_init`), or None.
        key: this client's random key for this exchange.
        index: () int32, which of all clients this one is, for what the clients were told apart beforehand (how many local
            steps each takes, say).
        wanted: tuple of () bool, one per part of the reply, as `fed.average(replies=...)` declares them.
    """

    problem: Problem
    rows: tuple[ClientRows, ClientRows]
    state: PyTree
    key: Key[Array, ""]
    wanted: tuple[Flag, ...]
    index: Index = 0

    @property
    def inner(self) -> Rows:
        """All rows of the inner level."""
        return self.rows[0].all()

    @property
    def outer(self) -> Rows:
        """All rows of the outer level."""
        return self.rows[1].all()

    def batch(self, level: Literal["inner", "outer"], size: int | None = None, draw: int | Int[Array, ""] = 0) -> Rows:
        """`size` fresh rows, uniform with replacement; all rows if `size` is None.

        Within one exchange the same `draw` gives the same rows and another one independent rows; rows of the two
        levels are independent, and so are rows of different exchanges.
        """
        place = _place(level)
        check(
            size is None or size >= 1, f"client.batch needs a size of at least 1, or None for all rows; got {size!r}."
        )
        rows = self.rows[place]
        if size is not None and size < rows.most:
            rows = rows.without_features()  # a few rows: gathering them from all would compute more than they need
        return rows.draw(self.key, 2 * draw + place, size)

    def batches(
        self, level: Literal["inner", "outer"], size: int | None, draws: int, at: PyTree
    ) -> Callable[[int | Int[Array, ""]], Rows]:
        """`rows = client.batches(level, size, draws, at=x)`: `rows(s)` is `client.batch(level, size, s)`, for about
        `draws` of them used at one x.

        Where the problem has `features`, they come with the rows, so that local steps on y do not repeat them: of all
        the client's rows at once where the draws take as many, else of each draw as it comes. Call it outside the loop.
        """
        place = _place(level)
        problem, rows = self.problem, self.rows[place]
        if level == "outer" or problem.features is None or draws < 1:
            return lambda draw: self.batch(level, size, draw)
        if size is None or draws * size >= rows.most:
            rows = rows.with_features(problem, at)
            return lambda draw: rows.draw(self.key, 2 * draw + place, size)

        def some(draw: int | Int[Array, ""]) -> Rows:
            drawn = self.batch(level, size, draw)
            return dataclasses.replace(drawn, features=problem.row_features(at, drawn.examples), at=at)

        return some


def _place(level: str) -> int:
    if level not in ("inner", "outer"):
        raise unknown_name("level", level, ("inner", "outer"))
    return ("inner", "outer").index(level)


class Federation(abc.ABC):
    """What a server program may do. `clients` is how many there are, `cohort_size` how many one exchange asks.

    `weighted` says whether the clients' weights p_i differ.
    """

    clients: int
    cohort_size: int
    weighted: bool
    _asked: int  # how many clients the exchange just made asked
    _share: Share  # what `share` is
    _present: Present = None  # who answered it, where leaves belong to clients

    @property
    def share(self) -> float | Float[Array, ""]:
        """The share of ALL clients, by weight, that answered the exchange just made: what moves a mean over all of them.

        A mean c = sum_i p_i c_i of what clients keep, of whom S answered and changed theirs by d_i, moves by

            sum over S of p_i d_i   =   share * (the mean that `average` returns of the d_i)

        It is the sum of the p_i over S where everyone was asked, and n / m where n of m clients that count alike answered.

        Raises:
            InputError: clients of unequal weights were asked, and not all of them. They are drawn in proportion to their
                weights, some twice, and the plain mean of such draws is no multiple of the sum above.
        """
        check(
            self._share is not None,
            "fed.share is not known for a cohort of clients that are drawn in proportion to unequal weights: no number "
            "times the mean of their replies moves a mean over all clients. Ask everyone (leave cohort= out).",
        )
        assert self._share is not None
        return self._share

    def renewed(self, new: PyTree, old: PyTree) -> PyTree:
        """`new`; in leaves that belong to clients (`per_client`) the blocks of those who answered the exchange just made.

        The blocks of all others stay as they are in `old`, of the same structure. That is for whatever replaces what was
        there, as in `y = fed.renewed(fed.average(self.steps, x, y), y)`. A reply that is a change needs none of it: of a
        client that did not answer it is zero.
        """
        if self._present is None or not owned.nodes(new):
            return new
        return owned.chosen(self._present, new, old)

    def average(
        self,
        method: Method,
        *message: PyTree,
        replies: Replies = True,
        cohort: Cohort = None,
        beside: bool = False,
        combine: Combine = "mean",
    ) -> PyTree:
        """One communication round: broadcast, compute, mean of the replies.

        Args:
            method: a client method of the algorithm, as in `fed.average(self.anchor, x, y)`.
            message: pytrees of arrays; a part that travels only sometimes is wrapped by `fed.when`.
            replies: True, or one flag per part of the reply (a tuple): a part whose flag is False is not sent and
                comes back as zeros.
            cohort: client indices from `fed.draw_cohort`, to ask the same clients again, or fewer or more than usual; by
                default a fresh cohort.
            beside: ask in the same round as the exchange before, whose reply the message must not depend on: no
                round is counted.
            combine: "mean"; "maximum", the largest of the replies, number by number; or one of the
                two for each part of the reply (a tuple, as for `replies`): with
                `combine=("mean", "maximum")` the mean of the first parts comes back and the largest
                of the second, in one round.

        Returns:
            The mean of the replies over the cohort: plain, and with weighted clients and full participation weighted.
            (With weighted clients and a smaller cohort, the clients are drawn in proportion to their weights.)
            Where clients drop out, the mean of those who answered, their weights scaled to sum to one: biased towards
            light clients where weights differ (`Simulation`).
            Of a part that is combined by its maximum: the largest of those who answered, whatever
            their weights.
            Of a leaf that belongs to clients (`per_client`), however it is combined: each owner's own reply; zero for one
            that was not asked or did not answer (see `renewed`).

        Raises:
            InputError: when the protocol is derived, before anything runs: `combine` names another
                way, or has another number of parts than `replies` or the reply.
        """
        return self.ask(method, message, combine, replies, cohort, beside)

    def maximum(self, method: Method, *message: PyTree, cohort: Cohort = None) -> PyTree:
        """`average` with `combine="maximum"`: the largest of the replies, number by number.

        The clients' weights do not count.
        """
        return self.ask(method, message, "maximum", True, cohort, False)

    @abc.abstractmethod
    def ask(
        self, method: Method, message: tuple, combine: Combine, replies: Replies, cohort: Cohort, beside: bool
    ) -> PyTree:
        """What `average` and `maximum` do."""

    @abc.abstractmethod
    def repeat(self, times: Index, body: Body, carry: PyTree, most: int | None = None) -> PyTree:
        """`for t in range(times): carry = body(t, carry)`, a loop of rounds.

        Args:
            times: how often; if it is drawn at run time, `most` must bound it.
            body: (t, carry) -> carry of the same structure, shapes and dtypes; t is a () int32.
        """

    def rarely(self, times: Index, body: Body, carry: PyTree, most: int = 1) -> PyTree:
        """`repeat`, of what happens in few iterations: it is no part of what an iteration usually takes.

        The protocol says apart what is exchanged there. With most=1 an exchange in it may be beside the one before the
        loop; what takes rounds of its own belongs to a run's first iteration.
        """
        return self.repeat(times, body, carry, most)

    @abc.abstractmethod
    def until(self, condition: Callable[[PyTree], Flag], body: Body, carry: PyTree, most: int) -> PyTree:
        """Repeat `carry = body(t, carry)` until `condition(carry)` holds, at most `most` times."""

    @abc.abstractmethod
    def randint(self, low: int, high: int) -> Int[Array, ""]:
        """A number drawn by the server, uniform in {low, ..., high - 1}; `protocol` knows its distribution."""

    @abc.abstractmethod
    def draw_cohort(self, size: int | None = None) -> Int[Array, " cohort"]:
        """The client indices of one cohort, in order, for exchanges that must ask the same clients, or another number.

        Args:
            size: how many; None: `cohort_size`, and `clients` are everyone.
        """

    @staticmethod
    def when(flag: Flag, part: PyTree) -> When:
        """`part`, sent only if `flag` (a bool, or a () bool array that depends on loop counters and drawn numbers)."""
        return When(flag, part)

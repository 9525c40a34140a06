"""An algorithm for an outer loss of means: `Carried` stands for one that knows means alone.

    Phi(x) = F(M(x, y*(x))),   M = the mean over clients and their rows of m(x, y, row), a few numbers

It is made where something begins to run (`protocol.running`), and is nothing that users write. Each
message of an exchange that uses the outer loss brings the clients M, as the server knows it
(`running`). For them the outer loss is the tangent of F there,

    f(x, y) = F(M) + <F'(M), m(x, y) - M>,

which is a mean over rows, so that the algorithm, its local steps and its control variates are what
they always are. With their reply clients say m at the x and y of the message. So the numbers travel
with what travels anyway. In a run's first iteration everybody is asked for m at the start, in a
round of its own. What travels down is M and not F'(M), as many numbers: F is part of the problem,
which each client has, and a server that differentiated it would have to hold it beside the
algorithm.

That M lags behind by an exchange does not move where an algorithm comes to rest. Let everybody take
part with all rows, and (x, y, ..., M) be a fixed point of its iterations, of which none changes any
of these. The exchanges of an iteration bring m at the points that they send; the last of them
leaves M, so M = m(x, y) for the x and y it sends. There

    d_x f = <F'(M), d_x m> = d_x F(m(x, y)),   d_y f likewise,

hence what the algorithm computes from the tangent is what it would compute from F(m) itself, and
every fixed point is one of the algorithm whose f is F(m). Conversely at a fixed point of that one
every exchange brings the same M = m(x, y) again, so it is one of the lagged iteration. As the
conditions are the same, so is what they say: grad Phi = d_x f - J H^-1 d_y f = 0. (An algorithm that
sends several y in an iteration sends the same one each time when it stands still.)

An algorithm in which each client makes a hypergradient of its own, or has a lower level of its own,
is refused: its clients' Hessians are not averaged before they meet F'(M), and so it would not solve
the pooled problem that means are there for.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import ClassVar, final

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import PyTree

from .. import algorithm as base
from ..algorithm import Algorithm
from ..component import method_named, title_of
from ..errors import check
from ..federation import Client, Federation, Method, Reply, When
from ..pace.automatic import Auto, made_like, measure, measures_first, numbered
from ..problem import describe
from ..watch import attributes
from .carrying import DRY, Carrying
from .running import Running
from .seen import told, watched


class State(base.State):
    """The state of the algorithm, by name, and what is known of the means."""

    kept: dict[str, PyTree]
    of_means: Running


def why_not(kind: type[Algorithm]) -> str | None:
    """Why a class of algorithms cannot have an outer loss of means, by what it says of itself; None: it can."""
    if getattr(getattr(kind, "about", None), "biased", False):
        return "each client makes a hypergradient of its own, by its own Hessian"
    if getattr(kind, "own_lower", None) is not None:
        return "each client has a lower variable of its own"
    return None


def check_can(algorithm: Algorithm) -> None:
    """Refuse an algorithm for which an outer loss of means cannot be meant.

    Raises:
        InputError: with the reason.
    """
    check(
        not getattr(type(algorithm), "several", False),
        "several algorithms or settings cannot race for an outer loss of means (outer_means=), for each would need means "
        "of its own: give one, with its settings.",
    )
    why = why_not(type(numbered(algorithm)))
    check(
        why is None,
        f"{title_of(algorithm)} cannot have an outer loss of means (outer_means=): {why}, which a mean over all clients "
        "does not meet. Take an algorithm that averages before it composes, such as Lockstep or AggITD.",
    )


def begins(state: PyTree) -> bool:
    """Whether the next iteration is a run's first one, in which what is measured takes rounds of its own."""
    return measures_first(state) or (isinstance(state, State) and int(state.of_means.seen) == 0)


@final
class Carried(Algorithm):
    """See the head of this file.

    Args:
        algorithm: which knows means alone.
        like: the means, of which shapes and dtypes count.
        uses: the client methods that ask for the outer loss; None: any may (while that is found out).
        looped: whether the first of their exchanges is in a loop.
    """

    stands_for_one: ClassVar[bool] = True

    algorithm: Algorithm
    like: PyTree
    uses: tuple[str, ...] | None = eqx.field(static=True, default=None)
    looped: bool = eqx.field(static=True, default=True)

    @property
    def title(self) -> str:
        """The algorithm's own name."""
        return title_of(self.algorithm)

    @property
    def follows(self) -> dict[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Which setting moves which part of its state."""
        return self.algorithm.follows

    def __getattr__(self, name: str):
        if name.startswith("__") or name in ("algorithm", "like", "uses", "looped"):
            raise AttributeError(name)
        return getattr(self.algorithm, name)

    # States ---------------------------------------------------------------------------------------------------------

    def init(self, x: PyTree, y: PyTree) -> State:
        return self._with(self.algorithm.init(x, y), Running.none(self.like))

    def begun_again(self, state: State) -> State:
        return self._with(self.algorithm.begun_again(self.inner(state)), state.of_means)

    def client_init(self, x: PyTree, y: PyTree) -> PyTree:
        return self.algorithm.client_init(x, y)

    def inner(self, state: State) -> PyTree:
        """The algorithm's own state."""
        return made_like(self.algorithm, attributes(state))

    @staticmethod
    def _with(state: PyTree, running: Running) -> State:
        held = attributes(state)
        kept = {name: part for name, part in held.items() if name not in ("x", "y")}
        return State(held["x"], held["y"], kept, running)

    # Programs -------------------------------------------------------------------------------------------------------

    def step(self, fed: Federation, state: State) -> tuple[State, PyTree]:
        carrying = self._carrying(fed, self._begun(fed, state.x, state.y, state.of_means, rarely=True))
        after, info = self.algorithm.step(carrying, self.inner(state))
        return self._with(after, carrying.running), info

    def estimate(self, fed: Federation, x: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
        """As the algorithm's, at the means where its exchanges use the outer loss: they are asked for in a round before."""
        running = Running.none(self.like)
        if self.looped:
            running = self._begun(fed, x, y, running)
        return self.algorithm.estimate(self._carrying(fed, running, looks=self.uses is not None), x, y)

    def _carrying(self, fed: Federation, running: Running, looks: bool = False) -> Carrying:
        return Carrying(fed, self, self.algorithm, self.uses, running, looks)

    def _begun(self, fed: Federation, x: PyTree, y: PyTree, running: Running, rarely: bool = False) -> Running:
        """What is known before an iteration: in a run's first one everybody is asked, over all rows."""
        everybody = None if fed.cohort_size == fed.clients else jnp.arange(fed.clients, dtype=jnp.int32)
        ask = lambda t, known: known.begun(fed.average(self.means_at, x, y, cohort=everybody))
        return fed.rarely(jnp.where(running.seen == 0, 1, 0), ask, running) if rarely else ask(0, running)

    # Client methods -------------------------------------------------------------------------------------------------

    def means_at(self, client: Client, x: PyTree, y: PyTree) -> PyTree:
        """The client's means at (x, y), over all its outer rows."""
        return client.problem.means(x, y, client.outer)

    def client_method(self, name: str) -> Method:
        """Its own, or one of the algorithm's, to which the means are sent before its message."""
        if name == "means_at":
            return self.means_at
        dry, name = name.startswith(f"{DRY}."), name.removeprefix(f"{DRY}.")
        own, who = method_named(self.algorithm, name), f"{self.title}.{name}"
        if self.uses is not None and name not in self.uses:
            return own
        # what stands before the message is none of it
        before = int(isinstance(self.algorithm, Auto) and not name.startswith("meter."))

        def carried(client: Client, means: PyTree, *message: PyTree) -> PyTree:
            means = means.value if isinstance(means, When) else means
            parts = len(client.wanted) - (not dry)
            asked = dataclasses.replace(client, wanted=client.wanted[:parts])
            asked = watched(asked, means)
            out = own(asked, *message)
            brought = told(client, asked.notes, message[before:], who)
            if dry:
                return brought if parts == 1 else (brought, *[None] * (parts - 1))
            reply, state = (out.reply, out.state) if isinstance(out, Reply) else (out, None)
            reply = (reply, brought) if parts == 1 else (*_several(reply, parts, who), brought)
            return Reply(reply, state) if isinstance(out, Reply) else reply

        first, *rest = inspect.signature(own).parameters.values()
        means = inspect.Parameter("means", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        carried.__signature__ = inspect.Signature([first, means, *rest])  # pyright: ignore[reportFunctionMemberAccess]
        return carried


def _several(reply: PyTree, parts: int, who: str) -> tuple:
    several = isinstance(reply, tuple) and len(reply) == parts
    check(
        several,
        lambda: f"replies= has {parts} flags, but {who} returns {describe(reply)}: return a tuple of as many parts.",
    )
    return reply


def measure_steps(algorithm: Algorithm, fed: Federation, state: PyTree) -> tuple[PyTree, PyTree]:
    """`pace.automatic.measure`, of an `Auto` that may stand in a `Carried`."""
    if not isinstance(algorithm, Carried):
        return measure(algorithm, fed, state)
    carrying = algorithm._carrying(fed, algorithm._begun(fed, state.x, state.y, state.of_means))
    return state, measure(algorithm.algorithm, carrying, algorithm.inner(state))[1]


# Rounds of a run's first iteration that measure --------------------------------------------------------------------------


def fewest_of(algorithm: Algorithm) -> int:
    """How many there are at least: everybody's means are needed, the first steps may be others."""
    return int(isinstance(algorithm, Carried))


def measuring(algorithm: Algorithm, rounds: int) -> Algorithm | None:
    """The algorithm, measuring in so many rounds at most; None where it measures nothing that could be left out."""
    if isinstance(algorithm, Carried):
        within = measuring(algorithm.algorithm, max(0, rounds - 1))
        return None if within is None else dataclasses.replace(algorithm, algorithm=within)
    return dataclasses.replace(algorithm, first=rounds) if isinstance(algorithm, Auto) else None


def rounds_first(algorithm: Algorithm) -> int:
    """Of what `measuring` gave."""
    within = algorithm.algorithm if isinstance(algorithm, Carried) else algorithm
    own = within.first if isinstance(within, Auto) else 0
    return fewest_of(algorithm) + (own or 0)

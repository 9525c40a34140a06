"""The largest curvature of g, measured over the federation, what is remembered of it, and a step of the Hessian factors.

Ours, not a paper's. Algorithms that ship with the library have their steps found around them (`automatic`), and of what
follows take the clients' own measurement and what is said of growing vectors. An algorithm of one's own that says
`paced = False` may ask for a step by itself (`AutoStep.ask`), as follows.

The factors (I - lam H) shrink only below lam = 2/L, and L is known to nobody beforehand. It is
measured every 20 iterations, from the first on, and at first more often, in iterations 1, 2, 4, 8 and 16 too: a model that
learns its features changes L many times over (on MNIST fourteen-fold within 40 iterations; a step measured once was twice
too large after four). Then lam = 1/(1.2 L):

- everyone takes part with all rows: five Lanczos steps on the mean Hessian at (x, y), one round each (down x, y, v; up
  H_i v); L is the largest Ritz value, a lower bound that five steps bring close;
- cohorts or minibatches are sampled: every factor then has another Hessian, and the mean one says little (clients with
  H_i = 6 e_i e_i' have a mean with L = 1, yet lam = 1 makes the factors grow). In each of five rounds (one, between the
  twenties) a fresh cohort measures its clients' own curvatures by five local Lanczos steps on one batch (down x, y; up one
  number); L is the largest of them all, and never less than 0.9 of what it was before. The same where single clients'
  factors act between two averages (`local_factors`: LFedNest and its kin, FedMBO, and whatever takes two or more local
  steps on v): in one round if everyone takes part with all rows.

In either case the step travels with each message that a Hessian factor needs: one number more.

Curvature may grow in between (a loss that is flat far from its data; a threshold that x passes).
Then the vector that the factors act on grows: once it is four times as long as it was at the last
measurement, the next iteration measures again. If it is ten times as long, and its step is found to
have been beyond 2/L, x moved along what is no estimate of anything: the state raises an `alarm`. So
does an iteration that did not measure and leaves the vector ten times as long; it is taken again,
with a measurement (`fedbilevel.recovery`). Where the step was right the run goes on; else it goes
back to an earlier state, as after any blow-up. There the step is half of what it was (`halved`), up
to ten times; and the curvature where it went wrong is the least to reckon with for a while: this
floor is halved every 20 iterations. Algorithms that keep no vector are watched by the length of what
they make of it: v, or the hypergradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import optax.tree
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..algorithm import Algorithm, Component, State, count, modules_in, option, rate
from ..federation import Client, Federation
from ..watch import attributes
from .keeping import Keeping as Keeping
from .keeping import keeping as keeping
from .keeping import kept_in as kept_in
from .lanczos import STEPS, extend, krylov, largest_ritz_value

Rate: TypeAlias = float | Float[Array, "..."]  # a step size, or a grid of them

EVERY = 20  # iterations between measurements
MARGIN = 1.2
GROWN = 4.0  # how much longer a vector is than at the last measurement, for another one
THROWN = 10.0  # how much longer, for going back where the step was too large
HALVINGS = 10  # at most
_EXPLAINED = 2.0  # how much longer a vector may be than in proportion to the step
_FORGET = 0.9  # how much of an earlier, larger curvature of sampled clients is kept


def number(step: Rate | str) -> Rate:
    """A step where an algorithm takes it: there it is a number, for what runs has one in the place of "auto"."""
    return cast(Rate, step)


class Curvature(eqx.Module):
    """What an algorithm remembers of the curvature of g.

    Attributes:
        alarm: infinite where the run must not go on from here, else zero.
        floor: the least curvature to reckon with.
        largest: the curvature that was measured last.
        vector, watched: the length of the vector that the factors act on, now and at the last measurement.
        again: one, if the next iteration is to measure.
        asked: one, if this iteration did.
        halvings: how often the step was halved.
        iteration: how many there were.
    """

    alarm: Float[Array, ""]
    floor: Float[Array, ""]
    largest: Float[Array, ""]
    vector: Float[Array, ""]
    watched: Float[Array, ""]
    again: Int[Array, ""]
    asked: Int[Array, ""]
    halvings: Int[Array, ""]
    iteration: Int[Array, ""]

    @property
    def step(self) -> Float[Array, ""]:
        """lam of the curvature as it is known."""
        largest = jnp.maximum(self.largest, self.floor)
        step = 1 / (MARGIN * jnp.maximum(largest, float(jnp.finfo(largest.dtype).tiny) ** 0.5))
        return jnp.ldexp(step, -self.halvings)

    def longer(self, times: float) -> Bool[Array, ""]:
        """Whether the vector is so many times as long as at the last measurement."""
        return (self.watched > 0) & (self.vector > times * self.watched)

    # Going back, of which `fedbilevel.recovery` makes use -----------------------------------------------------------

    @property
    def calm(self) -> bool:
        """Whether the vector is no longer than may be, so that a run can come back to this state."""
        return not bool(self.longer(GROWN))

    @property
    def alarmed(self) -> bool:
        """Whether the state raises its alarm, and is no blow-up else."""
        return not bool(jnp.isfinite(self.alarm))

    def too_large(self, seen: Curvature) -> bool:
        """Whether the step is too large for the curvature that another state has measured since."""
        return not bool(self.step * seen.largest <= 2)  # or no number

    def made_by_step(self, other: Curvature) -> bool:
        """Whether the vector is longer than that of another state by more than their steps explain.

        A series that converges is at most so many times as long; one that does not grows by a power of it.
        """
        return bool(self.vector > _EXPLAINED * self.step / other.step * other.vector)

    def with_half_the_step(self) -> Curvature:
        """To try the next iteration with."""
        return dataclasses.replace(self, halvings=self.halvings + 1)

    def measuring(self) -> Curvature:
        """From which the next iteration measures."""
        return dataclasses.replace(self, again=jnp.ones((), jnp.int32))

    def halved(self, halvings: int, last: Curvature, seen: Curvature) -> Curvature:
        """With a step that was halved so often.

        Args:
            last: after the last good iteration.
            seen: after a measurement there. What it says beyond `HALVINGS` halvings is not believed.
        """
        known, largest = last.largest, seen.largest
        most = jnp.where(known > 0, jnp.ldexp(known, HALVINGS), largest)
        found = jnp.where(jnp.isfinite(largest), jnp.minimum(largest, most), jnp.zeros_like(self.floor))
        floor = jnp.maximum(self.floor, 2 * found)  # the measurement that comes next halves it
        return dataclasses.replace(self, halvings=jnp.asarray(halvings, jnp.int32), floor=floor)


class AutoStep(Component):
    """The step of the Hessian factors: a number, or "auto", and what the clients are asked for the latter.

    Args:
        hessian_lr: the step, or "auto".
        batch_size: rows of a minibatch; None for all rows.
        local_factors: whether several factors of a single client's own act before the next average, or one client's alone.
        own_lower: where clients have a y of their own, what finds it in the state that a client keeps.
    """

    hessian_lr: Rate | str = rate(0.01, "auto")
    batch_size: int | None = count(None)
    local_factors: bool = option(False)
    own_lower: Callable[[PyTree], PyTree] | None = option(None)

    @property
    def measures(self) -> bool:
        """Whether the step is found while running."""
        return isinstance(self.hessian_lr, str)

    def begin(self, y: PyTree) -> Curvature | None:
        """What is remembered at the start; None if the step is configured."""
        if not self.measures:
            return None
        none, zero = jnp.zeros((), jnp.int32), jnp.zeros((), optax.tree.norm(y).dtype)
        return Curvature(zero, zero, zero, zero, zero, none, none, none, none)

    def ask(
        self, fed: Federation, x: PyTree, y: PyTree, before: Curvature | None
    ) -> tuple[Float[Array, ""] | None, Curvature | None]:
        """(lam as it travels in messages: None if it is configured; what is remembered)."""
        if before is None:
            return None, None
        k = before.iteration
        due, soon = k % EVERY == 0, (k < EVERY) & (k & (k - 1) == 0)
        soon = soon | before.longer(GROWN) | (before.again > 0)
        everything = fed.cohort_size == fed.clients and self.batch_size is None
        if everything and not self.local_factors:
            turn = lambda t, basis: extend(t, basis, fed.average(self.curvature_product, x, y, basis["v"]))
            due = due | soon
            measured = largest_ritz_value(fed.repeat(jnp.where(due, STEPS, 0), turn, krylov(y), most=STEPS))
        else:
            most = 1 if everything else STEPS
            turn = lambda t, seen: jnp.maximum(seen, fed.maximum(self.largest_curvature, x, y))
            times = jnp.where(due, most, jnp.where(soon, 1, 0))
            due = due | soon
            measured = fed.repeat(times, turn, _FORGET * before.largest, most=most)
        now = self.renewed(before, due, measured)
        return now.step, now

    def renewed(self, before: Curvature, due: Bool[Array, ""], measured: Float[Array, ""]) -> Curvature:
        """What is remembered once `measured` is known; it counts if the iteration was `due` to measure."""
        k, largest = before.iteration, jnp.where(due, measured, before.largest)
        thrown = due & before.longer(THROWN) & ~(before.step * largest <= 2) & (before.halvings < HALVINGS)
        return Curvature(
            alarm=_alarm(thrown, largest),
            floor=jnp.where(k % EVERY == 0, 0.5, 1.0).astype(largest.dtype) * before.floor,
            largest=largest,
            vector=before.vector,
            watched=jnp.where(due, before.vector, before.watched),
            again=jnp.zeros_like(k),
            asked=jnp.asarray(due, jnp.int32),
            halvings=before.halvings,
            iteration=k + 1,
        )

    def lam(self, sent: Float[Array, ""] | None) -> Rate:
        """The step of the Hessian factors: the one that came with the message, or else the configured one."""
        if sent is not None:
            return sent
        assert not isinstance(self.hessian_lr, str)  # where it is measured, it travels
        return self.hessian_lr

    def watch(self, memory: Curvature | None, vector: PyTree) -> Curvature | None:
        """What is remembered after an iteration, of how long it left the vector: v, or what was made of it."""
        if memory is None:
            return None
        memory = dataclasses.replace(memory, vector=optax.tree.norm(vector).astype(memory.vector.dtype))
        alarm = memory.longer(THROWN) & (memory.asked == 0) & (memory.halvings < HALVINGS)
        return dataclasses.replace(memory, alarm=jnp.maximum(memory.alarm, _alarm(alarm, memory.alarm)))

    # The clients' side ----------------------------------------------------------------------------------------------

    def curvature_product(self, client: Client, x: PyTree, y: PyTree, v: PyTree) -> PyTree:
        """d2_yy g_i v."""
        return client.problem.hessian_vector(x, y, v, client.batch("inner", self.batch_size))

    def largest_curvature(self, client: Client, x: PyTree, y: PyTree) -> Float[Array, ""]:
        """The largest curvature of g_i on one batch, by Lanczos steps at the client; at its own y, if it has one."""
        y = y if self.own_lower is None else self.own_lower(client.state)
        rows = client.batches("inner", self.batch_size, 1, at=x)(0)
        turn = lambda t, basis: extend(t, basis, client.problem.hessian_vector(x, y, basis["v"], rows))
        return largest_ritz_value(jax.lax.fori_loop(0, STEPS, turn, krylov(y)))


def _alarm(raised: Bool[Array, ""], like: Float[Array, ""]) -> Float[Array, ""]:
    """Infinite, so that no run goes on from the state, or zero."""
    return jnp.where(raised, jnp.inf, 0.0).astype(like.dtype)


# Where a run keeps it, for `fedbilevel.recovery` ------------------------------------------------------------------------


def automatic(algorithm: Algorithm) -> AutoStep | None:
    """The step that an algorithm finds while running; None if there is none."""
    found = [each for each in modules_in(algorithm).values() if isinstance(each, AutoStep)]
    return next((each for each in found if each.measures), None)


def remembered(state: State) -> Curvature:
    """What the state remembers of the curvature, whatever its attribute's name is."""
    return next(each for each in attributes(state).values() if isinstance(each, Curvature))


def remembering(state: State, memory: Curvature) -> State:
    """The state with another memory."""
    name = next(name for name, each in attributes(state).items() if isinstance(each, Curvature))
    return eqx.tree_at(lambda state: attributes(state)[name], state, memory)

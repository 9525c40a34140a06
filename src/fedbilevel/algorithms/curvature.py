"""`hessian_lr="auto"`: the step of the Hessian factors from the largest curvature of g, measured over the federation.

Ours, not a paper's. The factors (I - lam H) shrink only below lam = 2/L, and L is known to nobody beforehand. It is
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

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax.tree
from jaxtyping import Array, Bool, Float, PyTree

from ..algorithm import Algorithm, State
from ..federation import Client, Federation
from .steps import growth

EVERY = 20  # iterations between measurements
STEPS = 5  # of Lanczos; also the rounds of a measurement
MARGIN = 1.2
GROWN = 4.0  # how much longer a vector is than at the last measurement, for another one
THROWN = 10.0  # how much longer, for going back where the step was too large
HALVINGS = 10  # at most
_EXPLAINED = 2.0  # how much longer a vector may be than in proportion to the step
_FORGET = 0.9  # how much of an earlier, larger curvature of sampled clients is kept


class Keeping(State):
    """A state that holds more than x and y, by name."""

    kept: dict[str, PyTree]


def kept_in(state: State) -> dict[str, PyTree]:
    """What a state holds besides x and y."""
    return state.kept if isinstance(state, Keeping) else {}


def keeping(x: PyTree, y: PyTree, kept: dict[str, PyTree]) -> State:
    """The state of x, y and what else is kept."""
    return Keeping(x, y, kept) if kept else State(x, y)


def of_each(*names: str) -> dict[str, str]:
    """`Algorithm.follows` of parts that are made like (x, y, v)."""
    return {f"{name}.{k}": AutoStep.follows[part] for name in names for k, part in enumerate(("x", "y", "v"))}


def residual(kept: dict[str, PyTree], now: Any, first: Any = None) -> tuple[Any, dict[str, PyTree]]:
    """(|H v - d_y f| against |d_y f|, what is kept), from the former.

    The latter is known in the first iteration, where v = 0: it is `first`, or `now`, and is kept as "pull". A state
    that was not begun at v = 0 has none: None.
    """
    if "pull" not in kept:
        return None, kept
    pull = jnp.where(kept["pull"] > 0, kept["pull"], now if first is None else first).astype(kept["pull"].dtype)
    return growth(now, pull), {**kept, "pull": pull}


class AutoStep(Algorithm):
    """The setting `hessian_lr`, a number or "auto", and what the clients are asked for the latter."""

    hessian_lr: eqx.AbstractVar[Any]
    batch_size: eqx.AbstractVar[int | None]

    def init(self, x: PyTree, y: PyTree) -> Any:
        return keeping(x, y, self.keeps(x, y))

    def keeps(self, x: PyTree, y: PyTree) -> dict[str, PyTree]:
        """What the state holds besides x and y, at the start."""
        if not self.measures_curvature:
            return {}
        none, zero = jnp.zeros((), jnp.int32), jnp.zeros((), optax.tree.norm(y).dtype)
        numbers = dict.fromkeys(("largest", "floor", "vector", "watched", "alarm"), zero)
        return {"curvature": numbers | dict.fromkeys(("iteration", "again", "asked", "halvings"), none)}

    @property
    def measures_curvature(self) -> bool:
        """Whether the step is found while running."""
        return isinstance(self.hessian_lr, str)

    @property
    def local_factors(self) -> bool:
        """Whether several factors of a single client's own act before the next average, or one client's alone."""
        return False

    def hessian_step(self, fed: Federation, state: State) -> tuple[Any, dict[str, PyTree]]:
        """(lam as it travels in messages: None if it is configured; what the state keeps)."""
        kept = kept_in(state)
        if not self.measures_curvature:
            return None, kept
        before = kept["curvature"]
        k, size = before["iteration"], before["vector"]
        due, soon = k % EVERY == 0, (k < EVERY) & (k & (k - 1) == 0)
        soon = soon | _longer(before, GROWN) | (before["again"] > 0)
        x, y = state.x, state.y
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
            measured = fed.repeat(times, turn, _FORGET * before["largest"], most=most)
        largest = jnp.where(due, measured, before["largest"])
        thrown = due & _longer(before, THROWN) & ~(_step(before) * largest <= 2) & (before["halvings"] < HALVINGS)
        now = {
            **before,
            "alarm": _alarm(thrown, largest),
            "largest": largest,
            "floor": jnp.where(k % EVERY == 0, 0.5, 1.0).astype(largest.dtype) * before["floor"],
            "watched": jnp.where(due, size, before["watched"]),
            "iteration": k + 1,
            "again": jnp.zeros_like(k),
            "asked": jnp.asarray(due, jnp.int32),
        }
        return _step(now), {**kept, "curvature": now}

    def watch(self, kept: dict[str, PyTree], size: Any = None) -> dict[str, PyTree]:
        """What the state keeps after an iteration, with how long it left the vector: v, or what was made of it."""
        if not self.measures_curvature:
            return kept
        memory, size = kept["curvature"], optax.tree.norm(kept["v"]) if "v" in kept else size
        memory = {**memory, "vector": jnp.asarray(size).astype(memory["vector"].dtype)}
        alarm = _longer(memory, THROWN) & (memory["asked"] == 0) & (memory["halvings"] < HALVINGS)
        alarm = jnp.maximum(memory["alarm"], _alarm(alarm, memory["alarm"]))
        return {**kept, "curvature": {**memory, "alarm": alarm}}

    # Going back, of which `fedbilevel.recovery` makes use -----------------------------------------------------------

    def calm(self, state: Any) -> bool:
        """Whether the vector is no longer than may be, so that a run can come back to this state."""
        return not bool(_longer(state.kept["curvature"], GROWN))

    def alarmed(self, state: Any) -> bool:
        """Whether the state raises its alarm, and is no blow-up else."""
        return not bool(jnp.isfinite(state.kept["curvature"]["alarm"]))

    def too_large(self, state: Any, seen: Any) -> bool:
        """Whether the state's step is too large for the curvature that another one has measured since."""
        return not bool(_step(state.kept["curvature"]) * seen.kept["curvature"]["largest"] <= 2)  # or no number

    def made_by_step(self, state: Any, other: Any) -> bool:
        """Whether the vector is longer than that of another state by more than their steps explain.

        A series that converges is at most so many times as long; one that does not grows by a power of it.
        """
        one, two = (each.kept["curvature"] for each in (state, other))
        return bool(one["vector"] > _EXPLAINED * _step(one) / _step(two) * two["vector"])

    def with_half_the_step(self, state: Any) -> Any:
        """The state, to try the next iteration with."""
        return _remembering(state, halvings=state.kept["curvature"]["halvings"] + 1)

    def measuring(self, state: Any) -> Any:
        """The state, from which the next iteration measures."""
        return _remembering(state, again=jnp.ones((), jnp.int32))

    def halved(self, state: Any, halvings: int, last: Any, seen: Any) -> Any:
        """The state, with a step that was halved so often.

        Args:
            last: the state after the last good iteration.
            seen: the state after a measurement there. What it says beyond `HALVINGS` halvings is not believed.
        """
        floor, known = state.kept["curvature"]["floor"], last.kept["curvature"]["largest"]
        largest = seen.kept["curvature"]["largest"]
        most = jnp.where(known > 0, jnp.ldexp(known, HALVINGS), largest)
        found = jnp.where(jnp.isfinite(largest), jnp.minimum(largest, most), jnp.zeros_like(floor))
        floor = jnp.maximum(floor, 2 * found)  # the measurement that comes next halves it
        return _remembering(state, halvings=jnp.asarray(halvings, jnp.int32), floor=floor)

    def lam(self, sent: Any) -> Any:
        """The step of the Hessian factors: the one that came with the message, or else the configured one."""
        return self.hessian_lr if sent is None else sent

    # The clients' side ----------------------------------------------------------------------------------------------

    def curvature_product(self, client: Client, x: PyTree, y: PyTree, v: PyTree) -> PyTree:
        """d2_yy g_i v."""
        return client.problem.hessian_vector(x, y, v, client.batch("inner", self.batch_size))

    def largest_curvature(self, client: Client, x: PyTree, y: PyTree) -> Float[Array, ""]:
        """The largest curvature of g_i on one batch, by Lanczos steps at the client."""
        rows = client.batches("inner", self.batch_size, 1, at=x)(0)
        turn = lambda t, basis: extend(t, basis, client.problem.hessian_vector(x, y, basis["v"], rows))
        return largest_ritz_value(jax.lax.fori_loop(0, STEPS, turn, krylov(y)))


def _step(memory: dict[str, Any]) -> Float[Array, ""]:
    """lam of the curvature as it is known."""
    largest = jnp.maximum(memory["largest"], memory["floor"])
    step = 1 / (MARGIN * jnp.maximum(largest, float(jnp.finfo(largest.dtype).tiny) ** 0.5))
    return jnp.ldexp(step, -memory["halvings"])


def _alarm(raised: Any, like: Any) -> Float[Array, ""]:
    """Infinite, so that no run goes on from the state, or zero."""
    return jnp.where(raised, jnp.inf, 0.0).astype(like.dtype)


def _longer(memory: dict[str, Any], times: float) -> Bool[Array, ""]:
    """Whether the vector is so many times as long as at the last measurement."""
    return (memory["watched"] > 0) & (memory["vector"] > times * memory["watched"])


def _remembering(state: Any, **changes: Any) -> Any:
    return keeping(state.x, state.y, {**state.kept, "curvature": {**state.kept["curvature"], **changes}})


# Lanczos on a pytree ----------------------------------------------------------------------------------------------------


def krylov(like: PyTree) -> dict[str, PyTree]:
    """A start of `STEPS` Lanczos steps: a fixed random direction, and the tridiagonal matrix still empty."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    draw = [jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    v = jax.tree.unflatten(structure, draw)
    size = optax.tree.norm(v)
    zeros = jnp.zeros((STEPS,), size.dtype)
    return {
        "v": optax.tree.scale(1 / size, v), "before": optax.tree.zeros_like(v),
        "diagonal": zeros, "beside": zeros, "beta": jnp.zeros_like(size),
    }  # fmt: skip


def extend(t: Any, basis: dict[str, PyTree], product: PyTree) -> dict[str, PyTree]:
    """One Lanczos step, given the product of the matrix with `basis["v"]`; an exhausted space goes on with zeros."""
    v = basis["v"]
    alpha = jnp.asarray(optax.tree.vdot(v, product))
    rest = optax.tree.add_scale(optax.tree.add_scale(product, -alpha, v), -basis["beta"], basis["before"])
    beta = optax.tree.norm(rest)
    alive = beta > 1e-6 * jnp.maximum(jnp.abs(alpha), basis["beta"])
    beta = jnp.where(alive, beta, jnp.zeros_like(beta))
    following = optax.tree.scale(jnp.where(alive, 1 / jnp.where(alive, beta, 1), jnp.zeros_like(beta)), rest)
    return {
        "v": following, "before": v,
        "diagonal": basis["diagonal"].at[t].set(alpha), "beside": basis["beside"].at[t].set(beta), "beta": beta,
    }  # fmt: skip


def largest_ritz_value(basis: dict[str, PyTree]) -> Float[Array, ""]:
    """The largest eigenvalue, in absolute value, of the tridiagonal matrix."""
    beside = basis["beside"][:-1]
    matrix = jnp.diag(basis["diagonal"]) + jnp.diag(beside, 1) + jnp.diag(beside, -1)
    half = jnp.finfo(matrix.dtype).bits < 32  # no eigenvalues in half precision
    wide = matrix.astype(jnp.float32) if half else matrix
    return jnp.max(jnp.abs(jnp.linalg.eigvalsh(wide))).astype(matrix.dtype)

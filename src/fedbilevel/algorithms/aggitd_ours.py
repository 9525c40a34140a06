"""What `AggITD` can do beyond the paper, each a component that its constructor chooses. The letters are
those of `aggitd.py`.

`truncation="full"` (ours) sums all terms by Horner's rule in the same rounds, without the variance of Q:
z_t = z_{t-1} - lam (H_t z_{t-1} - d_y f(x, y^t)), z_{-1} = 0, and v = z_N; about twice the Hessian-vector
products. Floats as with Q = 0.

`warm_start_v` ("full" only): the recursion starts from the last iteration's z_N instead of 0 and so never ends; v follows
v* as y follows y*. One dy more down. The largest gain known. `vector_growth` is not measured.

`one_round`: control variates c_i at the clients and c = mean c_i at the server, both 0 at first; N+3 rounds:

    corrected   a_i = d_y g_i(x, y^t);  y_i = y^t, then steps y_i -= inner_lr [d_y g_i(x, y_i) - c_i + c]
                up y_i - y^t, a_i - c_i and r_i;  c_i <- a_i
                y^{t+1} = y^t + mean (y_i - y^t),  c += sum of p_i (a_i - c_i) over those who answered

y* is still the fixed point, with cohorts too. The gradient at y^t is a_i and the first local step, on the same rows. In the
loop down N (dx + 2 dy) and up 2 N dy, and r as above; in all, down (N+4) dx + (3N-Q+5) dy, up 2N dy + (N-Q+1) dy + 2 dx.

`independent_cohorts`: a second cohort answers r in the same round: without the bias named above, for twice the clients
asked. Down (N-Q) (dx + dy) more: x and y^t once more for each r that is made in the loop; up the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import jax
import jax.numpy as jnp
import optax.tree
from jaxtyping import Array, Int, PyTree

from .. import owned
from ..errors import check
from ..federation import Client, Federation, Reply, When
from ..pace.curvature import number
from ..problem import Rows
from .components.diagnostics import residual
from .components.directions import inner_gradient
from .components.riding import Flag, Scalar, Terms, Told, Turn, Turns
from .components.steps import controlled_descent, descend, drift, fedsvrg, growth, moved_mean, norm

# How v is made ----------------------------------------------------------------------------------------------------------


@final
class AllTerms(Terms):
    """`truncation="full"`: all terms by Horner's rule, z <- (I - lam H) z + lam d_y f from z = 0, and v = z."""

    def begin(self, y: PyTree) -> tuple[PyTree, Scalar | None]:
        return None, None

    def draw(self, fed: Federation) -> Int[Array, ""]:
        return jnp.zeros((), jnp.int32)

    def start(self, y: PyTree, v: PyTree) -> PyTree:
        return optax.tree.zeros_like(y)

    def exists(self, t: Turn, Q: Int[Array, ""]) -> Flag:
        return t > Q

    def reply(
        self, client: Client, x: PyTree, y: PyTree, r: When, lam: Scalar | None, inner: Callable[[], Rows]
    ) -> PyTree:
        return _horner(self, client, x, y, r, lam, inner)

    def size(self, before: PyTree, after: PyTree) -> Scalar:
        return norm(optax.tree.sub(after, before))

    def solution(self, r: PyTree, lam: Scalar | None) -> tuple[PyTree, PyTree]:
        return r, None

    def told(self, last: Scalar, first: Scalar, lam: Scalar | None, pull: Scalar | None) -> Told:
        stretched = growth(last, first)  # Horner's increments are -lam (H z - d_y f)
        return stretched, stretched, None


@final
class WarmTerms(Terms):
    """`warm_start_v`: Horner's rule from the last iteration's z, which the state keeps."""

    def begin(self, y: PyTree) -> tuple[PyTree, Scalar | None]:
        return optax.tree.zeros_like(y), jnp.zeros_like(norm(y))

    def draw(self, fed: Federation) -> Int[Array, ""]:
        return jnp.zeros((), jnp.int32)

    def start(self, y: PyTree, v: PyTree) -> PyTree:
        return v

    def exists(self, t: Turn, Q: Int[Array, ""]) -> Flag:
        return True

    def reply(
        self, client: Client, x: PyTree, y: PyTree, r: When, lam: Scalar | None, inner: Callable[[], Rows]
    ) -> PyTree:
        return _horner(self, client, x, y, r, lam, inner)

    def size(self, before: PyTree, after: PyTree) -> Scalar:
        return norm(optax.tree.sub(after, before))

    def solution(self, r: PyTree, lam: Scalar | None) -> tuple[PyTree, PyTree]:
        return r, r

    def told(self, last: Scalar, first: Scalar, lam: Scalar | None, pull: Scalar | None) -> Told:
        assert pull is not None
        step = self.hessian.lam(lam)
        lag, pull = residual(pull, last / step, first / step)
        return None, lag, pull  # increments begin near zero: their growth would tell nothing


def _horner(
    terms: Terms, client: Client, x: PyTree, y: PyTree, r: When, lam: Scalar | None, inner: Callable[[], Rows]
) -> PyTree:
    """(I - lam H_i) z + lam d_y f_i."""
    scaled = optax.tree.scale(terms.hessian.lam(lam), terms.pull(client, x, y))
    added = lambda: optax.tree.add(terms.factor(client, x, y, r, lam, inner), scaled)
    return jax.lax.cond(r.present, added, lambda: scaled)


# The turns of the lower loop --------------------------------------------------------------------------------------------


@final
class OneRound(Turns):
    """`one_round`: steps corrected by control variates; y, the control variates and r in one round."""

    def begin(self, y: PyTree) -> PyTree:
        return optax.tree.zeros_like(y)

    def turn(
        self, fed: Federation, x: PyTree, y: PyTree, control: PyTree, r: When, wanted: Flag, lam: Scalar | None,
        cohort: jax.Array | None,
    ) -> tuple[PyTree, PyTree, PyTree]:  # fmt: skip
        _need_everyone(fed)
        sent, parts = (x, y, control, r, lam), (True, True, wanted)
        step, change, new = fed.average(self.corrected_anchor, *sent, replies=parts, cohort=cohort)
        new = fed.renewed(new, r.value)
        return optax.tree.add(y, step), moved_mean(control, fed.share, change), new

    def corrected_anchor(self, client: Client, x: PyTree, y: PyTree, c: PyTree, r: When, lam: Scalar | None) -> Reply:
        """y_i - y, a_i - c_i, and r_i where wanted; the client keeps a_i = d_y g_i(x, y)."""
        rows = client.batches("inner", self.batch_size, self.local_steps + 1, at=x)
        step, change, a = _corrected(self, client, x, y, c, rows)
        own = lambda: rows(self.local_steps)  # a draw that no local step takes: every factor has rows of its own
        return Reply((step, change, self.if_wanted(client, x, y, r, lam, own)), a)


@final
class OneRoundApart(Turns):
    """`one_round` and `independent_cohorts`: a second cohort makes r, in the same round."""

    def begin(self, y: PyTree) -> PyTree:
        return optax.tree.zeros_like(y)

    def turn(
        self, fed: Federation, x: PyTree, y: PyTree, control: PyTree, r: When, wanted: Flag, lam: Scalar | None,
        cohort: jax.Array | None,
    ) -> tuple[PyTree, PyTree, PyTree]:  # fmt: skip
        _need_everyone(fed)
        step, change = fed.average(self.corrected, x, y, control, cohort=cohort)
        control = moved_mean(control, fed.share, change)
        at = fed.when(wanted, (x, y))
        new = fed.renewed(fed.average(self.vector_apart, at, r, lam, replies=(wanted,), beside=True), r.value)
        return optax.tree.add(y, step), control, new

    def corrected(self, client: Client, x: PyTree, y: PyTree, c: PyTree) -> Reply:
        """y_i - y and a_i - c_i; the client keeps a_i = d_y g_i(x, y)."""
        rows = client.batches("inner", self.batch_size, self.local_steps, at=x)
        step, change, a = _corrected(self, client, x, y, c, rows)
        return Reply((step, change), a)

    def vector_apart(self, client: Client, at: When, r: When, lam: Scalar | None) -> PyTree:
        """r_i where wanted, asked of a second cohort; `at` is (x, y^t)."""
        return _vector_apart(self, client, at, r, lam)


@final
class AnchoredApart(Turns):
    """`independent_cohorts`: a second cohort makes r, in the round of the anchor."""

    def begin(self, y: PyTree) -> PyTree:
        return None

    def turn(
        self, fed: Federation, x: PyTree, y: PyTree, control: PyTree, r: When, wanted: Flag, lam: Scalar | None,
        cohort: jax.Array | None,
    ) -> tuple[PyTree, PyTree, PyTree]:  # fmt: skip
        q = fed.average(self.gradient, x, y, cohort=cohort)
        at = fed.when(wanted, (x, y))
        new = fed.renewed(fed.average(self.vector_apart, at, r, lam, replies=(wanted,), beside=True), r.value)
        if self.skip_idle_rounds and self.local_steps == 1:
            return descend(y, number(self.inner_lr), q), control, new
        return fed.renewed(fed.average(self.lower, x, y, q, cohort=cohort), y), control, new

    def gradient(self, client: Client, x: PyTree, y: PyTree) -> PyTree:
        """d_y g_i."""
        return client.problem.inner_gradient(x, y, client.batch("inner", self.batch_size))

    def vector_apart(self, client: Client, at: When, r: When, lam: Scalar | None) -> PyTree:
        """r_i where wanted, asked of a second cohort; `at` is (x, y^t)."""
        return _vector_apart(self, client, at, r, lam)

    def lower(self, client: Client, x: PyTree, y: PyTree, q: PyTree) -> PyTree:
        """FedSVRG steps on y around the mean gradient q at y."""
        rows = client.batches("inner", self.batch_size, self.local_steps - 1, at=x)  # the first step needs none
        return fedsvrg(
            lambda s: inner_gradient(client.problem, x, rows(s)), y, q, number(self.inner_lr), self.local_steps
        )


def _need_everyone(fed: Federation) -> None:
    good = not fed.weighted or fed.cohort_size == fed.clients
    check(good, "AggITD(one_round=True) with weighted clients needs all of them: leave cohort= out.")


def _corrected(
    turns: Turns, client: Client, x: PyTree, y: PyTree, c: PyTree, rows: Callable[[int | jax.Array], Rows]
) -> tuple[PyTree, PyTree, PyTree]:
    """(y_i - y, a_i - c_i, a_i) of steps corrected by control variates."""
    gradient = lambda s: inner_gradient(client.problem, x, rows(s))
    a = gradient(0)(y)
    correction = drift(c, client.state)
    moved = controlled_descent(gradient, y, a, correction, number(turns.inner_lr), turns.local_steps)
    return optax.tree.sub(moved, y), optax.tree.sub(a, client.state), owned.with_zeros(a)


def _vector_apart(turns: Turns, client: Client, at: When, r: When, lam: Scalar | None) -> PyTree:
    x, y = at.value
    return turns.if_wanted(client, x, y, r, lam, lambda: client.batch("inner", turns.batch_size, 1), place=0)

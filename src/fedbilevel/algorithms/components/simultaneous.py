"""x, y and v = H^{-1} d_y f moved together by local steps, whose ends are averaged once a round.

    D_i(z) = ( d_x f_i - d2_xy g_i v,   d_y g_i,   d2_yy g_i v - d_y f_i )        at z = (x, y, v)

The mean D over clients is zero at the solution: each factor is averaged before it is composed, for v and y are the same for
every client at the start of a round. Two or more uncorrected local steps pull z to where the mean of the clients' steps is
zero, which is beside the solution where clients differ, by the order of the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import jax.numpy as jnp
import optax.tree
from jaxtyping import Array, Float, Int, PyTree

from ...algorithm import Component, Info, choice, count, rate
from ...errors import check
from ...federation import Client
from ...pace.curvature import AutoStep, Rate, number
from ...problem import Problem, Rows
from .diagnostics import residual
from .directions import direction
from .steps import Gradient, local_descent, norm

Direction = Callable[[Problem, PyTree, Rows, Rows], PyTree]  # (problem, z, inner rows, outer rows) -> D_i(z)


@final
class LocalRounds(Component):
    """Rounds of plain local steps z_i <- z_i - (outer_lr, inner_lr, hessian_lr) D_i(z_i).

    Args:
        hessian: the step of v.
        direction: what makes D_i.
        outer_lr, inner_lr: the steps of x and of y.
        local_steps: local steps a round.
        batch_size: rows of a minibatch, fresh for every local step; None for all rows.
        client_steps: each client's number of local steps, in place of `local_steps`.
    """

    hessian: AutoStep
    direction: Direction
    outer_lr: Rate | str = rate(0.05, "auto")
    inner_lr: Rate | str = rate(0.01, "auto")
    local_steps: int = count(5)
    batch_size: int | None = count(None)
    client_steps: tuple[int, ...] | None = choice(None)

    def told(
        self, moved: PyTree, lam: Float[Array, ""] | None, pull: Float[Array, ""]
    ) -> tuple[Info, Float[Array, ""]]:
        """(The diagnostics of a round that moved z, |d_y f|): mean directions, from the steps that all local steps make."""
        each, steps = self.client_steps, self.local_steps
        mean_steps = steps if each is None else sum(each) / len(each)
        h, q, w = (norm(part) / (lr * mean_steps) for part, lr in zip(moved, self._rates(lam), strict=True))
        lag, pull = residual(pull, w)
        return Info(h, None, lag, q), pull

    def _rates(self, lam: Float[Array, ""] | None) -> tuple[Rate, Rate, Rate]:
        return number(self.outer_lr), number(self.inner_lr), self.hessian.lam(lam)

    # The clients' side ----------------------------------------------------------------------------------------------

    def moves(self, client: Client, x: PyTree, y: PyTree, v: PyTree, lam: Float[Array, ""] | None) -> PyTree:
        """How far this client's local steps go from z."""
        z = x, y, v
        gradient = along(client, self.batch_size, self.direction)
        return optax.tree.sub(local_descent(gradient, z, self._rates(lam), self.steps(client)), z)

    def steps(self, client: Client) -> Int[Array, ""] | int:
        """Local steps of this client."""
        return self.local_steps if self.client_steps is None else jnp.asarray(self.client_steps)[client.index]


Simultaneous = LocalRounds  # the name under which algorithms once derived from it


def along(client: Client, batch_size: int | None, field: Direction = direction) -> Gradient:
    """s -> z -> D_i(z), each s on rows of its own."""

    def on_rows(s: int | Int[Array, ""]) -> Callable[[PyTree], PyTree]:
        inner, outer = (client.batch(level, batch_size, s) for level in ("inner", "outer"))
        return lambda z: field(client.problem, z, inner, outer)

    return on_rows


def told(moved: PyTree, step: Rate) -> Info:
    """The diagnostics of a round that moved x: the mean direction, from the step that all its local steps make."""
    return Info(norm(moved) / step)


def projected(v: PyTree, radius: Rate | None) -> PyTree:
    """v on |v| <= radius, where that is given."""
    if radius is None:
        return v
    length = norm(v)
    return optax.tree.scale(jnp.where(length > radius, radius / length, 1), v)


# `client_steps` ---------------------------------------------------------------------------------------------------------


def as_counts(steps: str | list[int] | tuple[int, ...] | None) -> str | tuple[int, ...] | None:
    """A tuple of whole numbers; also from words such as "1,5,20"."""
    words = steps.split(",") if isinstance(steps, str) else []
    if words and all(word.strip().isdecimal() for word in words):
        return tuple(map(int, words))
    return tuple(steps) if isinstance(steps, list) else steps


def check_client_steps(owner: str, steps: tuple[int, ...] | None, clients: int | None = None) -> None:
    """Refuse what is no tuple of counts; and one that has not a number for each client, once it is known how many there are.

    Raises:
        InputError: they are refused; `owner` is the algorithm's name.
    """
    whole = lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 1
    good = steps is None or (isinstance(steps, tuple) and len(steps) > 0 and all(map(whole, steps)))
    what = "is each client's number of local steps, a tuple of counts"
    check(good, f"{owner}(client_steps=...) {what}; got {steps!r}.")
    fits = steps is None or clients is None or len(steps) == clients
    check(fits, f"{owner}(client_steps={steps}) has a number for each client, and there are {clients} clients.")

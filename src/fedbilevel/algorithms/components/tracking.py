"""Clients follow an estimate of a direction while they move along it.

With z the point, D_i a direction of client i, e the estimate and a_t a falling step:

    locally, `local_steps` times, on fresh rows each:
        z' = z - a_t (steps) e
        e' = D_i(z') + (1 - b_t) [e - D_i(z)]      STORM,     b_t = forget a_t^2
        e' = (1 - b_t) e + b_t D_i(z')             momentum,  b_t = forget a_t
    server: z and e are averaged over the clients

t counts local steps over the whole run, a_t = (1 + t / slow_after)^{-1/3}. e starts as D_i(z): the first local step of a
run moves nothing and looks. With one local step, all rows and everybody, the mean of e follows the mean of D_i exactly.
With more, the clients' own D_i enter before they are averaged: where clients differ that leaves a floor, of the order of
the steps times b. Floats per client and round: down 2 |z| + 1, up 2 |z|.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ...algorithm import Component, count, option, rate
from ...errors import check
from ...federation import Client
from ...pace.curvature import Rate
from .neumann import LocalNeumann
from .steps import Gradient, descend, momentum, storm, tracked_descent

Scalar = Float[Array, ""]
Number = int | Int[Array, ""]
Point = tuple[PyTree, ...]  # z, of which x is the first part
Scale = Callable[[Point], Point]


def check_forget(forget: Rate, owner: str) -> None:
    """Refuse what forgets more than everything."""
    good = not isinstance(forget, float) or forget <= 1
    check(good, f"{owner}(forget=...) is a share, at most 1; got {forget!r}.")


@final
class Tracking(Component):
    """Local steps along a tracked estimate, within a client.

    Args:
        local_steps: local steps a round.
        forget: how much of the estimate a local step forgets at first; at most 1.
        slow_after: after how many local steps the steps have fallen to 0.79 (2^{-1/3}).
        by_momentum: renew the estimate by momentum; else by STORM.
    """

    local_steps: int = count(5)
    forget: Rate = rate(0.1)
    slow_after: Rate = rate(1000.0)
    by_momentum: bool = option(False)

    def follow(
        self, along: Gradient, z: Point, e: Point, t: Number, steps: tuple[Rate, ...], scale: Scale | None = None
    ) -> tuple[Point, Point]:
        """(z, e) after a round's local steps.

        Args:
            along: s -> z -> D_i(z), each s on rows of its own.
            t: local steps before this round.
            steps: the first steps of z's parts.
            scale: what is done to e before z moves along it; None: nothing.
        """
        renewed = lambda s, before, after, e: self.renewed(along(s), t + s, before, after, e)
        return tracked_descent(z, e, self.move(t, steps, scale), renewed, self.local_steps)

    def move(self, t: Number, steps: tuple[Rate, ...], scale: Scale | None = None) -> Callable[..., Point]:
        """(s, z, e) -> z'."""

        def move(s: Number, z: Point, e: Point) -> Point:
            pace = self._pace(t + s, z)
            return descend(z, tuple(step * pace for step in steps), e if scale is None else scale(e))

        return move

    def renewed(self, gradient: Callable[[Point], Point], time: Number, before: Point, after: Point, e: Point) -> Point:
        """e', after a move."""
        power = 1 if self.by_momentum else 2
        forget = jnp.where(time == 0, 1.0, self.forget * self._pace(time, after) ** power)
        return (momentum if self.by_momentum else storm)(gradient, before, after, e, forget)

    def _pace(self, time: Number, z: Point) -> Scalar:
        """a_t."""
        age = jnp.asarray(time).astype(jnp.result_type(*jax.tree.leaves(z)))
        return (1 + age / self.slow_after) ** (-1 / 3)


def along_local_hypergradients(client: Client, series: LocalNeumann, lam: Scalar | None) -> Gradient:
    """s -> (x, y) -> (h_i, d_y g_i): the client's own hypergradient, and the lower gradient."""

    def on_rows(s: Number) -> Callable[[Point], Point]:
        own = series.along(client, lam, s)
        inner = client.batch("inner", series.batch_size, s * (series.neumann_terms + 1))
        return lambda z: (own(z[0], z[1]), client.problem.inner_gradient(z[0], z[1], inner))

    return on_rows

"""What the methods share whose clients follow an estimate of a direction while they move along it.

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

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax.tree
from jaxtyping import PyTree

from ..algorithm import Info, State, count, rate
from ..errors import check
from ..federation import Client, Federation
from .components.simultaneous import told
from .components.steps import Gradient, descend, norm, storm, tracked_descent
from .curvature import AutoStep, keeping, of_each, residual


class Tracking(AutoStep):
    """Rounds of tracked local steps; a subclass says what z is, and along what it moves."""

    follows: ClassVar[dict[str, str]] = AutoStep.follows | of_each("estimate")
    renewal: ClassVar[Any] = storm
    power: ClassVar[int] = 2  # of a_t in b_t

    inner_lr: Any = rate(0.01)
    local_steps: int = count(5)
    hessian_lr: Any = rate(0.01, "auto")
    outer_lr: Any = rate(0.05)
    batch_size: int | None = count(None)
    forget: Any = rate(0.1)
    slow_after: Any = rate(1000.0)

    def __check_init__(self):
        good = not isinstance(self.forget, float) or self.forget <= 1
        check(good, f"{type(self).__name__}(forget=...) is a share, at most 1; got {self.forget!r}.")

    @abc.abstractmethod
    def point(self, state: State, kept: dict[str, PyTree]) -> tuple[PyTree, ...]:
        """z, of which x is the first part and y the second."""

    @abc.abstractmethod
    def along(self, client: Client, lam: Any) -> Gradient:
        """s -> z -> D_i(z), each s on rows of its own."""

    @abc.abstractmethod
    def rates(self, lam: Any) -> tuple[Any, ...]:
        """The local steps of z's parts."""

    def keeps(self, x, y):
        z = self.point(State(x, y), {"v": optax.tree.zeros_like(y)})
        own = {"estimate": optax.tree.zeros_like(z), "time": jnp.zeros((), jnp.int32)}
        return super().keeps(x, y) | own | ({"v": z[2], "pull": jnp.zeros_like(norm(y))} if len(z) > 2 else {})

    def step(self, fed: Federation, state: State) -> tuple[State, Info]:
        lam, kept = self.hessian_step(fed, state)
        z, t = self.point(state, kept), kept["time"]
        moved, e = fed.average(self.moves, z, kept["estimate"], t, lam, self.scales(kept))
        x, y, *rest = optax.tree.add(z, moved)
        after = self.renewed({**kept, "estimate": e, "time": t + self.local_steps})
        info = told(moved[0], self.outer_lr * self.local_steps)
        lag = None
        if rest:
            lag, after = residual({**after, "v": rest[0]}, norm(e[2]))
        info = dataclasses.replace(info, vector_residual=lag, lower_gradient_norm=norm(e[1]))
        return keeping(x, y, self.watch(after, info.hypergradient_norm)), info

    def moves(self, client: Client, z: PyTree, e: PyTree, t: Any, lam: Any, scales: PyTree) -> tuple[PyTree, PyTree]:
        """How far the client's steps go from z, and its estimate there."""
        along = self.along(client, lam)
        end, e = tracked_descent(z, e, *self.turns(along, t, lam, scales), self.local_steps)
        return optax.tree.sub(end, z), e

    def turns(self, along: Gradient, t: Any, lam: Any, scales: PyTree) -> tuple[Any, Any]:
        """(move, renew) of `tracked_descent`."""

        def pace(s, z):
            age = (t + s).astype(jnp.result_type(*jax.tree.leaves(z)))
            return (1 + age / self.slow_after) ** (-1 / 3)

        def move(s, z, e):
            steps = tuple(rate * pace(s, z) for rate in self.rates(lam))
            return descend(z, steps, e if scales is None else self.scaled(scales, e))

        def renew(s, before, after, e):
            forget = jnp.where(t + s == 0, 1.0, self.forget * pace(s, after) ** self.power)
            return type(self).renewal(along(s), before, after, e, forget)

        return move, renew

    def scales(self, kept: dict[str, PyTree]) -> PyTree:
        """What scales the estimates' parts, sent with the message; None: nothing."""
        return None

    def scaled(self, scales: PyTree, e: PyTree) -> PyTree:
        """The estimate, scaled."""
        return e

    def renewed(self, kept: dict[str, PyTree]) -> dict[str, PyTree]:
        """What the server keeps for the next iteration."""
        return kept

"""FedF2SA: the lower level as a penalty, with first-order oracles only. T+1 rounds an iteration, T = `inner_rounds`.

After Kwon, Kwon, Wright & Nowak, "A Fully First-Order Method for Stochastic Bilevel Optimization" (F2SA), ICML 2023, arXiv
2301.10945, whose equations are REMEMBERED, not verified. The federated form is ours. With a penalty p:

    y   follows argmin_y g(x, y)                  u   follows argmin_u f(x, u) + p g(x, u)
    h = d_x f(x, u) + p [d_x g(x, u) - d_x g(x, y)]   ->   grad Phi(x)   as p grows

    T times  lower           at the clients `local_steps` steps on y along d_y g_i and on u along d_y g_i + d_y f_i / p, both
                             corrected by control variates as in AggITD's `one_round`: no drift, also with cohorts
    hypergradient            h = mean h_i at (x, y, u);   x <- x - outer_lr h

No Hessian, no cross derivative, no series: memory and time are those of gradients. The price is a bias of the order 1/p: on
a quadratic f and g with A = d2_yy f, u - y* = -(A + p H)^{-1} d_y f(y*) and h = d_x f(u) + p J (u - y*). `penalty_growth`
is added to p after every iteration; then the bias goes to zero, and rounding or sampling noise in d_x g counts p-fold.

Floats per client: down T (dx + 4 dy + 1) + dx + 2 dy + 1, up 4 T dy + dx.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, final

import jax.numpy as jnp
import optax.tree
from jaxtyping import Array, Float, Int, PyTree

from .. import algorithm, owned
from ..algorithm import About, Algorithm, Info, choice, component, count, rate
from ..errors import check
from ..federation import Client, Federation, Reply
from ..pace.curvature import Rate, number
from .components.optimizer import Optimizer, OuterOptimizer, resolve
from .components.steps import controlled_descent, descend, drift, moved_mean, norm


class State(algorithm.State):
    """x, y, and what follows the penalised lower level.

    Attributes:
        u: like y.
        control: c, like (y, u).
        penalty: p.
        optimizer: optax's state (`outer_optimizer`); None without one.
    """

    u: PyTree
    control: PyTree
    penalty: Float[Array, ""]
    optimizer: PyTree


@final
class FedF2SA(Algorithm):
    """FedF2SA (after F2SA, ICML 2023): a penalty in place of second derivatives; a bias of the order 1 / penalty.

    Args:
        inner_rounds: T >= 1, rounds on y and u.
        inner_lr: the step of ONE local lower step.
        local_steps: local lower steps a round.
        outer_lr: the step of x.
        penalty: p, in the first iteration.
        penalty_growth: what is added to p after every iteration; None: nothing.
        batch_size: rows of a minibatch, fresh for every local step; None for all rows.
        outer_optimizer: an optax transformation applied at the server to outer_lr h, or its name and learning rate as in
            "adam:0.01".
    """

    about: ClassVar[About] = About(
        name="fedf2sa",
        rounds="T+1",
        when="the lower level is too large for second derivatives; off by 1 / penalty",
        hypergradient="off by the order of 1 / penalty, by first-order oracles only",
        lower="at y* for any `local_steps`",
        order="first",
    )

    follows: ClassVar[dict[str, str]] = {
        "x": "outer_lr", "y": "inner_lr", "u": "inner_lr", "control.0": "inner_lr", "control.1": "inner_lr",
        "penalty": "penalty_growth", "optimizer": "outer_optimizer",
    }  # fmt: skip

    inner_rounds: int = count(5)
    inner_lr: Rate | str = rate("auto", "auto")
    local_steps: int = count(5)
    outer_lr: Rate | str = rate("auto", "auto")
    penalty: Rate = rate(10.0)
    penalty_growth: Rate | None = rate(None)
    batch_size: int | None = count(None)
    outer_optimizer: Optimizer = choice(None)

    def __check_init__(self):
        resolve(self.outer_optimizer, "FedF2SA")

    @component
    def optimizer(self) -> OuterOptimizer:
        """The server's step on x."""
        return OuterOptimizer(self.outer_optimizer, "FedF2SA")

    @property
    def spares_unasked(self) -> bool:
        return self.outer_optimizer is None

    def init(self, x: PyTree, y: PyTree) -> State:
        p = jnp.asarray(self.penalty, norm(y).dtype)
        return State(x, y, y, optax.tree.zeros_like((y, y)), p, self.optimizer.begin(x))

    def client_init(self, x: PyTree, y: PyTree) -> PyTree:
        return optax.tree.zeros_like((y, y))

    def step(self, fed: Federation, state: State) -> tuple[State, Info]:
        h, (y, u), c, slope = self._estimate(fed, state)
        x, kept = self.optimizer.step(state.x, descend(state.x, number(self.outer_lr), h), state.optimizer)
        x = fed.renewed(x, state.x)
        p = state.penalty
        growth = 0 if self.penalty_growth is None else self.penalty_growth
        return State(x, y, u, c, p + jnp.asarray(growth, p.dtype), kept), Info(norm(h), None, None, slope)

    def estimate(self, fed: Federation, x: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
        h, (y, _), *_ = self._estimate(fed, self.init(x, y))
        return h, y

    def _estimate(self, fed: Federation, state: State) -> tuple[PyTree, PyTree, PyTree, Float[Array, ""]]:
        """(h, (y, u) after their rounds, c, |d_y g| as the last of them saw it)."""
        everyone = fed.cohort_size == fed.clients
        check(everyone or not fed.weighted, "FedF2SA with weighted clients needs all of them: leave cohort= out.")
        x, p = state.x, state.penalty

        def turn(t: Int[Array, ""], loop: PyTree) -> PyTree:
            lower, c, _ = loop
            moved, change = fed.average(self.lower, x, *lower, c, p)
            slope = norm(optax.tree.add(c[0], change[0]))  # of d_y g, as the control variates know it
            return optax.tree.add(lower, moved), moved_mean(c, fed.share, change), slope

        start = (state.y, state.u), state.control, jnp.zeros_like(norm(state.y))
        lower, c, slope = fed.repeat(self.inner_rounds, turn, start)
        return fed.average(self.hypergradient, x, *lower, p), lower, c, slope

    def lower(self, client: Client, x: PyTree, y: PyTree, u: PyTree, c: PyTree, p: Float[Array, ""]) -> Reply:
        """How far the client's steps go from (y, u), and a_i - c_i; it keeps a_i, its gradients there."""
        problem = client.problem
        rows = client.batches("inner", self.batch_size, 2 * self.local_steps, at=x)

        def along(s: int | Int[Array, ""]) -> Callable[[PyTree], PyTree]:
            inner, outer = rows(s), client.batch("outer", self.batch_size, s)

            def gradients(lower: PyTree) -> PyTree:
                y, u = lower
                pull = optax.tree.scale(1 / p, problem.outer_gradients(x, u, outer)[1])
                return problem.inner_gradient(x, y, inner), optax.tree.add(problem.inner_gradient(x, u, inner), pull)

            return gradients

        lower = y, u
        a = along(0)(lower)
        correction = drift(c, client.state)
        end = controlled_descent(along, lower, a, correction, number(self.inner_lr), self.local_steps)
        return Reply((optax.tree.sub(end, lower), optax.tree.sub(a, client.state)), owned.with_zeros(a))

    def hypergradient(self, client: Client, x: PyTree, y: PyTree, u: PyTree, p: Float[Array, ""]) -> PyTree:
        """d_x f_i(x, u) + p [d_x g_i(x, u) - d_x g_i(x, y)], the same rows in both."""
        problem = client.problem
        inner, outer = (client.batch(level, self.batch_size) for level in ("inner", "outer"))
        direct, _ = problem.outer_gradients(x, u, outer)
        apart = optax.tree.sub(problem.inner_gradient_x(x, u, inner), problem.inner_gradient_x(x, y, inner))
        return optax.tree.add_scale(direct, p, apart)

"""What AggITD is made of: the turns of its lower loop, in which a vector r rides along, and the terms that r stands for."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import final

import jax
import optax.tree
from jaxtyping import Array, Bool, Float, Int, PyTree

from ...algorithm import Component, Truncation, count, option, rate
from ...federation import Client, Federation, When
from ...pace.curvature import AutoStep, Rate
from ...problem import Rows
from .directions import hessian_factor
from .steps import growth, norm

Scalar = Float[Array, ""]
Turn = int | Int[Array, ""]
Told = tuple[Scalar | None, Scalar | None, Scalar | None]
Flag = bool | Bool[Array, ""]


class Terms(Component):
    """How the vector r is made from turn to turn, and v of the last one, r^N. Abstract."""

    hessian: AutoStep
    truncation: Truncation
    most: int = count(5)  # N
    batch_size: int | None = count(None)

    @abc.abstractmethod
    def begin(self, y: PyTree) -> tuple[PyTree, Scalar | None]:
        """(v, |d_y f|) as the algorithm's state keeps them at the start; None: it does not."""

    @abc.abstractmethod
    def draw(self, fed: Federation) -> Int[Array, ""]:
        """Q, the turn from which on there is r."""

    @abc.abstractmethod
    def start(self, y: PyTree, v: PyTree) -> PyTree:
        """What stands for r before there is one."""

    @abc.abstractmethod
    def exists(self, t: Turn, Q: Int[Array, ""]) -> Flag:
        """Whether there is an r^{t-1} to go on with."""

    @abc.abstractmethod
    def reply(
        self, client: Client, x: PyTree, y: PyTree, r: When, lam: Scalar | None, inner: Callable[[], Rows]
    ) -> PyTree:
        """r_i at y, of r if that is there; `inner` gives the rows of the Hessian."""

    @abc.abstractmethod
    def size(self, before: PyTree, after: PyTree) -> Scalar:
        """Norm of the latest vector that Hessian factors act on."""

    @abc.abstractmethod
    def solution(self, r: PyTree, lam: Scalar | None) -> tuple[PyTree, PyTree]:
        """(v from r^N, what of it the state keeps)."""

    @abc.abstractmethod
    def told(self, last: Scalar, first: Scalar, lam: Scalar | None, pull: Scalar | None) -> Told:
        """(`vector_growth`, `vector_residual`, |d_y f| as it is kept), from the last and the first `size`."""

    # The clients' side ----------------------------------------------------------------------------------------------

    def vector(self, client: Client, x: PyTree, y: PyTree, r: When, lam: Scalar | None) -> PyTree:
        """r_i at y^N."""
        return self.reply(client, x, y, r, lam, lambda: client.batch("inner", self.batch_size, 1))

    def pull(self, client: Client, x: PyTree, y: PyTree) -> PyTree:
        """d_y f_i."""
        return client.problem.outer_gradients(x, y, client.batch("outer", self.batch_size))[1]

    def factor(
        self, client: Client, x: PyTree, y: PyTree, r: When, lam: Scalar | None, inner: Callable[[], Rows]
    ) -> PyTree:
        """(I - lam d2_yy g_i) r."""
        return hessian_factor(client.problem, x, y, r.value, self.hessian.lam(lam), inner())


@final
class OneTerm(Terms):
    """One term of the series for all of them: r^Q = d_y f, then a factor a turn, and v = lam (N+1) r^N."""

    def begin(self, y: PyTree) -> tuple[PyTree, Scalar | None]:
        return None, None

    def draw(self, fed: Federation) -> Int[Array, ""]:
        return self.truncation.draw(fed, self.most)

    def start(self, y: PyTree, v: PyTree) -> PyTree:
        return optax.tree.zeros_like(y)

    def exists(self, t: Turn, Q: Int[Array, ""]) -> Flag:
        return t > Q

    def reply(
        self, client: Client, x: PyTree, y: PyTree, r: When, lam: Scalar | None, inner: Callable[[], Rows]
    ) -> PyTree:
        factor = lambda: self.factor(client, x, y, r, lam, inner)
        return jax.lax.cond(r.present, factor, lambda: self.pull(client, x, y))

    def size(self, before: PyTree, after: PyTree) -> Scalar:
        return norm(after)

    def solution(self, r: PyTree, lam: Scalar | None) -> tuple[PyTree, PyTree]:
        return optax.tree.scale(self.hessian.lam(lam) * (self.most + 1), r), None

    def told(self, last: Scalar, first: Scalar, lam: Scalar | None, pull: Scalar | None) -> Told:
        return growth(last, first), None, None  # a random term has no residual


class Turns(Component):
    """One turn of the lower loop, in which the clients make r too. Abstract."""

    terms: Terms
    inner_lr: Rate | str = rate(0.01, "auto")
    local_steps: int = count(5)
    batch_size: int | None = count(None)
    skip_idle_rounds: bool = option(False)

    @abc.abstractmethod
    def begin(self, y: PyTree) -> PyTree:
        """The control variate at the start, at the server and at each client; None: there is none."""

    @abc.abstractmethod
    def turn(
        self, fed: Federation, x: PyTree, y: PyTree, control: PyTree, r: When, wanted: Flag, lam: Scalar | None,
        cohort: jax.Array | None,
    ) -> tuple[PyTree, PyTree, PyTree]:  # fmt: skip
        """(The next y, the next control variate, the next r: zeros if it is not wanted)."""

    def if_wanted(
        self,
        client: Client,
        x: PyTree,
        y: PyTree,
        r: When,
        lam: Scalar | None,
        inner: Callable[[], Rows],
        place: int = -1,
    ) -> PyTree:
        """r_i, the reply's part in that place, if it is wanted."""
        make = lambda: self.terms.reply(client, x, y, r, lam, inner)
        return jax.lax.cond(client.wanted[place], make, lambda: optax.tree.zeros_like(r.value))

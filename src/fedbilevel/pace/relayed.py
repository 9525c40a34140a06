"""What an algorithm sees of `fed` where numbers were put in the place of its steps: they travel with each message."""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ..algorithm import Algorithm
from ..component import MethodOf, path_of
from ..federation import Body, Cohort, Combine, Federation, Flag, Index, Method, Replies, Share
from ..jaxprs import weakly

Scalar = Float[Array, ""]


class Relayed(Federation):
    """What an algorithm with numbers sees: each message is sent with them, and what is measured goes beside the first.

    Args:
        measure: what is done after the first exchange that is in no loop.

    Attributes:
        seen: what was measured; None as long as nothing was.
    """

    def __init__(
        self, fed: Federation, owner: Algorithm, numbers: Algorithm, steps: dict[str, Scalar], measure: Callable[[], PyTree]
    ):  # fmt: skip
        self.clients, self.cohort_size, self.weighted = fed.clients, fed.cohort_size, fed.weighted
        self._fed, self._owner, self._numbers, self._steps = fed, owner, numbers, steps
        self._measure: Callable[[], PyTree] | None = measure
        self._depth, self.seen = 0, None

    @property
    def share(self) -> float | Float[Array, ""]:
        if self._own_share is not None:
            return self._own_share
        return self._fed.share

    _own_share: Share = None  # of the exchange beside which there was another one

    def ask(
        self, method: Method, message: tuple, combine: Combine, replies: Replies, cohort: Cohort, beside: bool
    ) -> PyTree:
        path = path_of(getattr(method, "__self__", None), self._numbers)
        asked = method if path is None else MethodOf(self._owner, f"{path}{getattr(method, '__name__', '')}")
        message = message if path is None else (self._steps, *message)
        out = self._fed.ask(asked, message, combine, replies, cohort, beside)
        self._own_share, self._present = None, self._fed._present
        if self._measure is not None and self._depth == 0:
            self._own_share, measure, self._measure = self._fed._share, self._measure, None
            self.seen = measure()
        return out

    def _inside(self, body: Body) -> Body:
        def turn(t: Int[Array, ""], carry: PyTree) -> PyTree:
            self._depth += 1
            try:
                return body(t, carry)
            finally:
                self._depth -= 1

        return turn

    def repeat(self, times: Index, body: Body, carry: PyTree, most: int | None = None) -> PyTree:
        return self._fed.repeat(times, self._inside(body), carry, most)

    def rarely(self, times: Index, body: Body, carry: PyTree, most: int = 1) -> PyTree:
        return self._fed.rarely(times, self._inside(body), carry, most)

    def until(self, condition: Callable[[PyTree], Flag], body: Body, carry: PyTree, most: int) -> PyTree:
        return self._fed.until(condition, self._inside(body), carry, most)

    def randint(self, low: int, high: int) -> Int[Array, ""]:
        return self._fed.randint(low, high)

    def draw_cohort(self, size: int | None = None) -> Int[Array, " cohort"]:
        return self._fed.draw_cohort(size)


def with_steps(algorithm: Algorithm, steps: dict[str, Scalar]) -> Algorithm:
    """The algorithm with other steps, which are numbers to it as Python's are."""
    values = [weakly(jnp.asarray(value)) for value in steps.values()]
    return eqx.tree_at(lambda a: [getattr(a, name) for name in steps], algorithm, values)

"""Lower variables that are the clients' own, as an algorithm's `own_lower` finds them: every client's, and their mean.

Where the clients' states are in this process (Simulation, Loopback) both are known after every
iteration. Over a network they stay at the sites, and the mean is known only if the algorithm has the
clients share it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .algorithm import Algorithm
from .beginning import client_state
from .cohorts import mean_reply
from .component import title_of
from .engines.base import Carry, Execution
from .errors import InputError, check, warn
from .problem import describe


def own_lower(algorithm: Algorithm, state: PyTree) -> PyTree:
    """The lower variable of a client's own in the state that it keeps; None where one y is everybody's."""
    find = getattr(algorithm, "own_lower", None)
    return None if find is None else find(state)


def shares_lower(algorithm: Algorithm) -> bool:
    """Whether the state's y is known to the server: everybody's, or the mean of what is the clients' own."""
    return getattr(algorithm, "shares_lower", True)


class Lower:
    """Where a run's lower variable is: in the server's state, or with the clients.

    Args:
        state: the algorithm's first state, whose y is the template.
        rest: what of y is not trained, the same for all.

    Attributes:
        own: whether every client has one of its own.
    """

    def __init__(self, execution: Execution, algorithm: Algorithm, state: PyTree, rest: PyTree):
        self._execution, self._algorithm, self._rest = execution, algorithm, rest
        both = lambda: (own_lower(algorithm, client_state(algorithm, state)), state.y)
        one, like = eqx.filter_eval_shape(both)
        self.own = one is not None
        check(
            not self.own or describe(one) == describe(like),
            f"{title_of(algorithm)}.own_lower(state) returns a client's own y, like {describe(like)}; "
            f"it returned {describe(one)}.",
        )

    @property
    def away(self) -> bool:
        """Whether y is known to nobody here: it stays with the clients, and they do not share it."""
        return self.own and not self._execution.holds_clients and not shares_lower(self._algorithm)

    def everybody(self, carry: Carry) -> PyTree:
        """Each client's y, leaves (clients, ...); None where there is one for all, or they are not here."""
        arrays = self._stacked(carry)
        if arrays is None:
            return None
        many = len(jax.tree.leaves(arrays)[0])
        wide = lambda leaf: jnp.broadcast_to(leaf, (many, *leaf.shape)) if eqx.is_array(leaf) else leaf
        return eqx.combine(arrays, jax.tree.map(wide, self._rest))

    def one(self, carry: Carry) -> PyTree:
        """y: the server's, or the mean of the clients' own, by their weights p_i; None where it is `away`."""
        if self.away:
            return None
        arrays = self._stacked(carry)
        y = carry.state.y if arrays is None else mean_reply(arrays, self._execution.data.weights)
        return eqx.combine(y, self._rest)

    def tell(self) -> None:
        """Warn, where there will be no y."""
        if self.away:
            warn(
                f"{title_of(self._algorithm)} leaves every client's y at its site, so that result.y is None: "
                "each site keeps its own in its folder; share_lower=True has them send what their mean takes."
            )

    def _stacked(self, carry: Carry) -> PyTree:
        if not (self.own and self._execution.holds_clients):
            return None
        return self._execution.of_clients(lambda state: own_lower(self._algorithm, state), carry)


class Away:
    """What metrics are given for y where it stays with the clients: nothing can be made of it."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError("y stays at the sites")

    def number(self, name: str, metric: Callable, x: PyTree) -> float:
        """What a metric of x alone says.

        Raises:
            InputError: it needs y.
        """
        try:
            return float(metric(x, self))
        except Exception as error:  # whatever the user's metric raises
            raise InputError(
                f"the metric {name!r} cannot be taken, for y stays at the sites ({type(error).__name__}: {error}): "
                "leave it out, or let the algorithm share y (share_lower=True)."
            ) from error

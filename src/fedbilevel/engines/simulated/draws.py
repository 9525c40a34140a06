"""What the exchanges of an iteration draw, all of them at once.

Each exchange has a key, a cohort and keys of its clients. Drawn where they are needed, they are compiled anew for each
exchange; drawn side by side they are there once, and an exchange looks up its own. The numbers are the same.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32

from ...cohorts import client_key, exchange_key, sample_cohort
from ...data import entry

MOST = 2**16  # places of clients in all exchanges together, up to which they are drawn at once


class Draws(NamedTuple):
    """By the number of an exchange (or of a draw of the server).

    Attributes:
        keys: of the exchanges, as numbers.
        cohorts: who is asked; None where everybody is.
        clients: the keys of those, as numbers.
    """

    keys: UInt32[Array, "exchanges 2"]
    cohorts: Int[Array, "exchanges cohort"] | None
    clients: UInt32[Array, "exchanges cohort 2"]

    def key(self, number: Int[Array, ""]) -> Key[Array, ""]:
        """The key of an exchange."""
        return _wrapped(entry(self.keys, number))

    def cohort(self, number: Int[Array, ""]) -> Int[Array, " cohort"] | None:
        """Whom an exchange asks, unless the program says otherwise."""
        return None if self.cohorts is None else entry(self.cohorts, number)

    def client_keys(self, number: Int[Array, ""]) -> Key[Array, " cohort"]:
        """The keys of those."""
        return _wrapped(entry(self.clients, number))


def fits(exchanges: int, cohort: int) -> bool:
    """Whether so many exchanges are drawn at once."""
    return exchanges >= 1 and exchanges * cohort <= MOST


def draw(
    key: Key[Array, ""], exchanges: int, clients: int, size: int, weights: Float[Array, " clients"] | None
) -> Draws:
    """What up to so many exchanges of an iteration draw."""
    everyone = size == clients

    def one(number: Int[Array, ""]) -> Draws:
        own = exchange_key(key, number)
        cohort = sample_cohort(own, clients, size, weights)
        of_clients = jax.vmap(client_key, in_axes=(None, 0))(own, cohort)
        return Draws(jax.random.key_data(own), None if everyone else cohort, jax.random.key_data(of_clients))

    # a loop: side by side their small arrays are loops that LLVM unrolls, which takes long
    return jax.lax.map(one, jnp.arange(exchanges, dtype=jnp.int32))


def _wrapped(data: UInt32[Array, "*places 2"]) -> Key[Array, "*places"]:
    return jax.random.wrap_key_data(data, impl="threefry2x32")

"""What every engine does in the same way: keys, cohorts, who answers, and the mean and the maximum of replies."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from .data import random_below
from .errors import InputError, check
from .federation import Combine, Share, Way
from .given import Whole, as_whole

_COHORT = 2**32 - 1  # no client has this index: the cohort's key differs from every client's


def exchange_key(iteration_key: Key[Array, ""], counter: int | Int[Array, ""]) -> Key[Array, ""]:
    """The key of one exchange (or server draw) of an iteration."""
    return jax.random.fold_in(iteration_key, counter)


def client_key(key: Key[Array, ""], index: int | Int[Array, ""]) -> Key[Array, ""]:
    """The key of one client in one exchange."""
    return jax.random.fold_in(key, index)


@functools.partial(jax.jit, static_argnames=("clients", "size"))
def sample_cohort(
    key: Key[Array, ""], clients: int, size: int, weights: Float[Array, " m"] | None
) -> Int[Array, " size"]:
    """Client indices in ascending order: everyone, a uniform subset, or draws in proportion to the weights.

    The uniform subset is Floyd's: its cost depends on the cohort, not on how many clients there are. In proportion to
    weights, clients are drawn with replacement, so that the plain mean of replies is unbiased.
    """
    if size == clients:
        return jnp.arange(clients, dtype=jnp.int32)
    if weights is not None:
        key = jax.random.fold_in(key, _COHORT)
        return jnp.sort(jax.random.choice(key, clients, (size,), p=weights).astype(jnp.int32))
    tops = jnp.arange(clients - size, clients, dtype=jnp.int32)
    draws = random_below(key, 0, tops + 1)

    taken = lambda k, chosen: jnp.any(chosen == draws[k])
    place = lambda k, chosen: chosen.at[k].set(jnp.where(taken(k, chosen), tops[k], draws[k]))

    return jnp.sort(jax.lax.fori_loop(0, size, place, jnp.full((size,), -1, jnp.int32)))


def answered(
    weights: Float[Array, " m"] | None, cohort: Int[Array, " n"] | int, present: Bool[Array, " n"] | None, clients: int
) -> Share:
    """`Federation.share` of an exchange.

    Args:
        weights: the clients' p_i; None if they count alike.
        cohort: the clients asked, or if all of them answered how many they are.
        present: which of them answered; None: all.

    Returns:
        A float, or a () array of the widest float there is (a whole number through another would be 32 bits wide).
        None where it is not defined.
    """
    size = cohort if isinstance(cohort, int) else cohort.shape[0]
    if weights is not None and size < clients:
        return None
    if present is None:
        return size / clients
    if weights is None:
        return jnp.sum(present, dtype=jnp.result_type(float)) / clients
    return jnp.sum(jnp.where(present, weights[cohort], 0.0))


def stays(key: Key[Array, ""], cohort: Int[Array, " n"], dropout: float | Float[Array, ""]) -> Bool[Array, " n"]:
    """Which clients of a cohort answer an exchange when each drops out with probability `dropout`; one always stays.

    A client that was drawn twice answers for both or for neither, as it would over a network.
    """
    own = jax.vmap(lambda i: jax.random.fold_in(client_key(key, i), _COHORT))(cohort)
    luck = jax.vmap(lambda k: jax.random.uniform(k, (), jnp.float32))(own)
    return (luck >= dropout) | (luck == luck.max())


@jax.jit
def mean_reply(replies: PyTree, weights: Float[Array, " cohort"] | None) -> PyTree:
    """The mean over the leading axis, weighted if weights (summing to one) are given; of whole numbers a float."""
    inexact = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.inexact)
    replies = jax.tree.map(lambda leaf: leaf if inexact(leaf) else leaf.astype(jnp.result_type(float)), replies)
    if weights is None:
        return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), replies)
    return jax.tree.map(lambda leaf: jnp.tensordot(weights.astype(leaf.dtype), leaf, axes=1), replies)


def by_part(how: Combine, replies: PyTree, combined: Callable[[Way, PyTree], PyTree]) -> PyTree:
    """`combined(way, replies)`; of each part where `how` has a way for each part of the replies."""
    if not isinstance(how, tuple):
        return combined(how, replies)
    return tuple(combined(way, part) for way, part in zip(how, replies, strict=True))


def combine_replies(
    how: Combine,
    replies: PyTree,
    weights: Float[Array, " cohort"] | None,
    present: Bool[Array, " cohort"] | None = None,
) -> PyTree:
    """The mean of the replies over the leading axis, or the largest of them, number by number; of those present."""
    return by_part(how, replies, lambda way, part: _combined(way, part, weights, present))


def _combined(
    way: Way, replies: PyTree, weights: Float[Array, " cohort"] | None, present: Bool[Array, " cohort"] | None
) -> PyTree:
    if present is not None:  # what an absent client would have said counts for nothing, NaN neither
        here = lambda leaf: present.reshape(-1, *[1] * (leaf.ndim - 1))
        replies = jax.tree.map(lambda leaf: jnp.where(here(leaf), leaf, leaf[jnp.argmax(present)]), replies)
        weights = jnp.where(present, 1.0 if weights is None else weights, 0.0)
        weights = weights / weights.sum()
    if way == "mean":
        return mean_reply(replies, weights)
    return jax.tree.map(lambda leaf: jnp.max(leaf, axis=0), replies)


def full_weights(
    weights: Float[Array, " m"] | None, cohort: Int[Array, " n"], clients: int
) -> Float[Array, " n"] | None:
    """The weights of a mean over everyone; None for a cohort, which is drawn in proportion to them."""
    return None if weights is None or cohort.shape[0] < clients else weights[cohort]


def check_cohort(cohort: Whole | None, clients: int) -> int:
    """How many clients one exchange asks; None means all."""
    if cohort is None:
        return clients
    given = as_whole(cohort)
    if given is None:
        raise InputError(f"cohort= is how many clients one exchange asks, a whole number; got {cohort!r}.")
    cohort = given
    check(cohort >= 1, f"cohort= must be at least 1; got {cohort}.")
    check(cohort <= clients, f"a cohort of {cohort} cannot be drawn from {clients} clients: use at most {clients}.")
    return cohort


def check_dropout(dropout: float) -> None:
    """Refuse what is no probability below one."""
    number = isinstance(dropout, (int, float)) and not isinstance(dropout, bool)
    check(
        number and 0 <= dropout < 1,
        f"dropout= is the probability that a client does not answer, at least 0 and below 1; got {dropout!r}.",
    )

"""Random keys: what is taken for one, and what is drawn with it beside `jax.random`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, UInt32

from .errors import check
from .jaxprs import Tracer, threefry_2x32
from .problem import describe

KeyLike = Key[Array, ""] | UInt32[Array, "2"]  # a raw one too (`jax.random.PRNGKey`)


def as_key(key: KeyLike) -> Key[Array, ""]:
    """One jax key; a raw one (`jax.random.PRNGKey`) means the same as `jax.random.key`.

    Raises:
        InputError: it is no key, or several.
    """
    check(
        not isinstance(key, Tracer),
        "key= is a tracer: solve and its kin cannot be called within jax.jit, jax.grad or jax.vmap; call them outside.",
    )
    return one_key(key)


def one_key(key: KeyLike) -> Key[Array, ""]:
    """As `as_key`, for tracers too."""
    raw = isinstance(key, jax.Array) and key.dtype == np.uint32 and key.shape == (2,)
    if raw:
        return jax.random.wrap_key_data(key, impl="threefry2x32")
    good = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
    check(good, f"key= is a jax.random.key(seed), one key; got {'' if good else describe(key)}.")
    return key


def threefry(key: Key[Array, ""]) -> Key[Array, ""]:
    """The key itself, one of the kind whose numbers are the same on every engine.

    Raises:
        InputError: it is of another kind.
    """
    kind = jax.random.key_impl(key)
    check(kind == "threefry2x32", f"key= must be a threefry key, jax.random.key(seed); got {describe(key)} ({kind}).")
    return key


def random_below(key: Key[Array, ""], stream: Int[Array, ""] | int, bounds: Int[Array, " n"]) -> Int[Array, " n"]:
    """(n,) int32, each uniform in [0, bounds[j]); streams (below 2**31) are independent of each other and of `jax.random`.

    One call of the hash behind jax's keys, where `fold_in` and `randint` would make five: half the time to compile a
    program goes into these. A remainder maps its 32 bits, with a bias of bounds / 2**32, below any use.
    """
    n = bounds.shape[0]
    high = jnp.asarray(stream).astype(jnp.uint32) | jnp.uint32(
        2**31
    )  # `jax.random` counts with a high word of small numbers
    counters = jnp.concatenate([jnp.broadcast_to(high, (n,)), jnp.arange(n, dtype=jnp.uint32)])
    bits = threefry_2x32(jax.random.key_data(key), counters)[:n]
    return (bits % bounds.astype(jnp.uint32)).astype(jnp.int32)


def generator(key: KeyLike) -> np.random.Generator:
    """A numpy generator seeded by a jax key: for what is done once, on the host, over whole data sets."""
    return np.random.default_rng(np.asarray(jax.random.key_data(as_key(key))).astype(np.uint32))

"""What `jax.random` makes of a seed or a key, computed by numpy: the same keys, without a program to compile.

For what is done once, before a run: a compiled program for each small step would take longer than all the rest. Keys of
another kind, and settings under which JAX makes its keys in another way, are left to `jax.random` itself.
"""

from __future__ import annotations

import math

import jax
import numpy as np
from jaxtyping import Array, Key, UInt32

_TURNS = ((13, 15, 26, 6), (17, 29, 16, 24))


def new_key(seed: int) -> Key[Array, ""]:
    """`jax.random.key(seed)`."""
    plain = _setting("jax_default_prng_impl") == "threefry2x32" and not _setting("jax_random_seed_offset")
    if not (plain and type(seed) is int and -(2**63) <= seed < 2**63):
        return jax.random.key(seed)
    high = (seed >> 32) % 2**32 if _setting("jax_enable_x64") else 0
    return _key(np.array([high, seed % 2**32], np.uint32))


def split_key(key: Key[Array, ""], count: int) -> list[Key[Array, ""]]:
    """`jax.random.split(key, count)`, one by one."""
    if not (_plain(key) and _setting("jax_threefry_partitionable")):
        return list(jax.random.split(key, count))
    return [_key(words) for words in hashed(_words(key), np.arange(count, dtype=np.uint32))]


def folds(key: Key[Array, ""], count: int) -> UInt32[np.ndarray, "count words"]:
    """The numbers of `jax.random.fold_in(key, i)` for i = 0, ..., count - 1: two words each for jax's usual keys."""
    if _plain(key):
        return hashed(_words(key), np.arange(count, dtype=np.uint32))
    own = [jax.random.key_data(jax.random.fold_in(key, index)) for index in range(count)]
    return np.array(own, np.uint32).reshape(count, -1)


def fold_in(key: Key[Array, ""], index: int) -> Key[Array, ""]:
    """`jax.random.fold_in(key, index)`."""
    if not _plain(key):
        return jax.random.fold_in(key, index)
    return _key(hashed(_words(key), np.array([index], np.uint32))[0])


def uniform(key: Key[Array, ""], shape: tuple[int, ...], bound: float) -> np.ndarray:
    """`jax.random.uniform(key, shape, minval=-bound, maxval=bound)` in JAX's own float: 32 bits, or 64.

    The program that XLA makes of it for a processor multiplies and adds with one rounding. So does this: for bits u in
    [0, 1) both round 2 bound (u - 1/2), in which the difference is exact.
    """
    dtype = np.dtype(jax.dtypes.canonicalize_dtype(float))
    if not (_plain(key) and _setting("jax_threefry_partitionable")):
        return np.asarray(jax.random.uniform(key, shape, minval=-bound, maxval=bound))
    words = hashed(_words(key), np.arange(math.prod(shape), dtype=np.uint32))
    if dtype == np.float32:
        bits = (words[:, 0] ^ words[:, 1]) >> np.uint32(9)
    else:
        bits = ((words[:, 0].astype(np.uint64) << np.uint64(32)) | words[:, 1]) >> np.uint64(12)
    share = bits.astype(dtype) * dtype.type(np.finfo(dtype).eps)
    return (2 * dtype.type(bound) * (share - dtype.type(0.5))).reshape(shape)


def hashed(key: np.ndarray, low: np.ndarray) -> np.ndarray:
    """(n, 2) uint32: the hash threefry 2x32 with 20 rounds (Salmon et al., SC 2011) of the counters (0, low[i]).

    Args:
        key: (2,) uint32.
        low: (n,) uint32.
    """
    keys = [*key, key[0] ^ key[1] ^ np.uint32(0x1BD11BDA)]
    one, other = np.full_like(low, keys[0]), low + keys[1]
    for turn in range(5):
        for bits in _TURNS[turn % 2]:
            one = one + other
            other = one ^ ((other << np.uint32(bits)) | (other >> np.uint32(32 - bits)))
        one = one + keys[(turn + 1) % 3]
        other = other + _sum(keys[(turn + 2) % 3], turn + 1)
    return np.stack([one, other], axis=1)


def _sum(word: np.uint32, number: int) -> np.uint32:
    return np.uint32((int(word) + number) % 2**32)


def _setting(name: str) -> str | int | None:
    return getattr(jax.config, name)


def _plain(key: Key[Array, ""]) -> bool:
    return str(jax.random.key_impl(key)) == "threefry2x32"


def _words(key: Key[Array, ""]) -> np.ndarray:
    return np.asarray(jax.random.key_data(key))


def _key(words: np.ndarray) -> Key[Array, ""]:
    return jax.random.wrap_key_data(jax.device_put(words), impl="threefry2x32")

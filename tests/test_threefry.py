"""Keys made by numpy are those of jax.random, to the bit, and no program is compiled for them."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from fedbilevel.jaxprs import COMPILING
from fedbilevel.threefry import folds, new_key, split_key

SEEDS = [0, 1, 7, 2**31 - 1, 2**31, 2**32 - 1, 2**32 + 5, 2**62, -1, -(2**40)]
words = lambda key: np.asarray(jax.random.key_data(key)).tolist()


@pytest.mark.parametrize("wide", [False, True], ids=["32 bits", "64 bits"])
def test_keys_and_what_is_derived_from_them(wide):
    with jax.enable_x64(wide):
        for seed in SEEDS if wide else [seed for seed in SEEDS if -(2**31) <= seed < 2**31]:
            key = jax.random.key(seed)
            assert words(new_key(seed)) == words(key)
            assert words(new_key(seed).reshape(1)[0]) == words(key)  # a key like any other
            assert [words(own) for own in split_key(key, 5)] == words(jax.random.split(key, 5))
            expected = [words(jax.random.fold_in(key, index)) for index in range(3)]
            assert folds(key, 3).tolist() == expected


def test_keys_of_another_kind_are_left_to_jax():
    key = jax.random.key(3, impl="rbg")
    assert folds(key, 2).tolist() == [words(jax.random.fold_in(key, index)) for index in range(2)]
    assert [words(own) for own in split_key(key, 2)] == words(jax.random.split(key, 2))
    with jax.default_prng_impl("rbg"):
        assert words(new_key(3)) == words(jax.random.key(3))
    with jax.threefry_partitionable(False):
        key = jax.random.key(4)
        assert [words(own) for own in split_key(key, 3)] == words(jax.random.split(key, 3))


def test_nothing_is_compiled():
    seen = []
    listen = lambda event, seconds, **_: seen.append(event) if event.startswith(COMPILING) else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for key in split_key(new_key(123_457), 17):
            folds(key, 1_001)
        assert not seen
        jax.random.split(jax.random.key(0), 1_023)
        assert seen  # the listener does hear
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)

"""What exchanges draw at once is what each of them draws on its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedbilevel.cohorts import client_key, exchange_key, sample_cohort
from fedbilevel.engines.simulated.draws import MOST, draw, fits

KEY = jax.random.key(3)
HEAVY = jnp.asarray(np.arange(1.0, 8.0) / 28)


@pytest.mark.parametrize(("size", "weights"), [(3, None), (7, None), (3, HEAVY)], ids=["cohort", "all", "weighted"])
def test_each_draws_the_same_on_its_own(size, weights):
    both = jax.jit(lambda key: draw(key, 4, 7, size, weights))(KEY)
    for number in jnp.arange(4, dtype=jnp.int32):
        key = exchange_key(KEY, number)
        np.testing.assert_array_equal(jax.random.key_data(both.key(number)), jax.random.key_data(key))
        cohort = sample_cohort(key, 7, size, weights)
        if size == 7:
            assert both.cohort(number) is None
        else:
            np.testing.assert_array_equal(both.cohort(number), cohort)
        own = jnp.stack([jax.random.key_data(client_key(key, i)) for i in cohort])
        np.testing.assert_array_equal(jax.random.key_data(both.client_keys(number)), own)


def test_very_many_are_not_drawn_at_once():
    assert fits(2, MOST // 2)
    assert not fits(2, MOST)
    assert not fits(0, 1)

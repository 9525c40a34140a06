"""Tasks are built by numpy: the same numbers as jax.random's, and not one program is compiled."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from fedbilevel.jaxprs import COMPILING
from fedbilevel.tasks import TASKS
from fedbilevel.tasks.base import Options
from fedbilevel.tasks.network import layer
from helpers import hospitals


@pytest.mark.parametrize("name", TASKS)
def test_building_compiles_nothing(name, tmp_path):
    if TASKS[name].datasets == ("heart-disease",):
        options = [{"data_dir": hospitals.write(tmp_path, dict.fromkeys(hospitals.ROWS, 160))}]  # dealt to nobody else
    else:  # as many clients as no other test has, whose programs would not be new
        kinds = ["iid"] if TASKS[name].datasets[0] == "synthetic" else ["iid", "quantity"]
        options = [{"clients": 13, "partition": kind} for kind in kinds]
    seen = []
    listen = lambda event, seconds, **_: seen.append(event) if event.startswith(COMPILING) else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for wide in (False, True):
            with jax.enable_x64(wide):
                for given in options:
                    assert TASKS[name](seed=5, **given).data.clients == given.get("clients", 4)
        assert not seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_keys_are_those_of_jax():
    expected = jax.random.split(jax.random.key(9), 4)
    assert all((own == one).all() for own, one in zip(Options(seed=9).keys(), expected, strict=True))


@pytest.mark.parametrize("wide", [False, True], ids=["32 bits", "64 bits"])
def test_a_layer_has_the_numbers_of_jax(wide):
    with jax.enable_x64(wide):
        key, bound = jax.random.key(3), 10**-0.5
        own, parts = layer(key, 10, 300), jax.random.split(key)
        for name, part, shape in (("weight", parts[0], (10, 300)), ("bias", parts[1], (300,))):
            expected = jax.random.uniform(part, shape, minval=-bound, maxval=bound)
            assert own[name].dtype == expected.dtype and not own[name].weak_type
            # to the bit where the processor multiplies and adds with one rounding, which optimised programs do
            np.testing.assert_array_max_ulp(np.asarray(own[name] + 1), np.asarray(expected + 1), 1)

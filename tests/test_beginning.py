"""First states, computed as one program, are those computed operation by operation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel import beginning
from fedbilevel.beginning import as_leaves, first_client_state, first_state
from helpers.plain import plain

COMPILED = []


@jax.monitoring.register_event_duration_secs_listener
def _listen(event, seconds, **words):
    if event.endswith("backend_compile_duration"):
        COMPILED.append(words.get("fun_name"))


X, Y = {"w": jnp.arange(3.0)}, jnp.array([0.5, -2.0])


class Picky(fb.AggITD):
    """Its first state is decided by Python, from values."""

    def init(self, x, y):
        return super().init(x, -y if float(y[0]) > 0 else y)


@pytest.mark.parametrize("algorithm", [plain(fb.AggITD, hessian_lr="auto"), plain(fb.Lockstep), plain(fb.FedMSA)])
def test_they_are_the_same(algorithm):
    expected = algorithm.init(X, Y)
    found = first_state(algorithm, X, Y)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    kept = algorithm.client_init(X, Y)
    jax.tree.map(np.testing.assert_array_equal, first_client_state(algorithm, found), kept)


@pytest.mark.parametrize("algorithm", [plain(fb.Lockstep), plain(fb.FedMSA), plain(fb.FedNest)])
def test_what_is_only_filled_with_numbers_compiles_nothing(algorithm):
    x, y = {"w": jnp.arange(4.0)}, jnp.array([0.5, -2.0, 3.0])  # of shapes that no other test has
    COMPILED.clear()
    first_client_state(algorithm, first_state(algorithm, x, y))
    assert COMPILED == []
    jax.jit(lambda: jnp.ones(()) + 1)()  # the list sees a compilation
    assert COMPILED


def test_what_fails_while_it_runs_is_not_hidden(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setitem(beginning._FILLS, "broadcast_in_dim", broken)
    with pytest.raises(ZeroDivisionError):
        first_state(fb.algorithms.Lockstep(), {"w": jnp.arange(5.0)}, Y)


class Keyed(fb.algorithms.Lockstep):
    """Random keys among what it remembers."""

    def client_init(self, x, y):
        key = jax.random.key(7)
        return {"one": key, "two": jnp.broadcast_to(key, (2,)), "none": jnp.zeros(2)}


def test_keys_are_no_numbers():
    kept, expected = first_client_state(Keyed(), first_state(Keyed(), X, Y)), Keyed().client_init(X, Y)
    assert jax.tree.structure(kept) == jax.tree.structure(expected)
    for name in ("one", "two"):
        np.testing.assert_array_equal(jax.random.key_data(kept[name]), jax.random.key_data(expected[name]))


def test_python_may_decide():
    np.testing.assert_array_equal(Picky.init(Picky(), X, Y).y, -Y)
    np.testing.assert_array_equal(first_state(Picky(), X, Y).y, -Y)


def test_numbers_become_weakly_typed_arrays():
    leaf = as_leaves(fb.algorithms.Lockstep(outer_lr=0.25)).outer_lr
    assert (leaf.weak_type, leaf.dtype, float(leaf)) == (True, jnp.result_type(float), 0.25)

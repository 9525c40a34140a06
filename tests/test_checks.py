"""While tests run, what is annotated is checked: arguments, results and fields; but not where the library itself refuses."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

import fedbilevel as fb
from fedbilevel.keys import random_below
from helpers.checks import unchecked

CAUGHT = (TypeCheckError, BeartypeCallHintViolation)  # the former where shapes have names
KEY = jax.random.key(0)
ROWS = fb.FederatedData.stack([np.ones((3, 2))], [np.ones((2, 2))]).inner.client(0).all()


@pytest.mark.parametrize(
    "wrong",
    [
        (jnp.zeros(2), 0, jnp.ones(3, jnp.int32)),  # numbers, where a key is wanted
        (KEY, 0.5, jnp.ones(3, jnp.int32)),
        (KEY, 0, jnp.ones(3)),
        (KEY, 0, jnp.ones((3, 3), jnp.int32)),
    ],
)
def test_an_argument_is_checked(wrong):
    assert random_below(KEY, 0, jnp.full(3, 5, jnp.int32)).shape == (3,)
    with pytest.raises(CAUGHT, match="random_below"):
        random_below(*wrong)


def test_an_argument_within_a_program_that_is_traced_is_checked():
    with pytest.raises(CAUGHT, match="random_below"):
        jax.jit(lambda bounds: random_below(KEY, 0, bounds))(jnp.ones((3, 3), jnp.int32))


def test_a_result_is_checked():
    class Wrong(fb.Problem):
        def _mean(self, *args):
            return jnp.zeros(2)

    problem = Wrong(lambda x, y, e: 0.0, lambda x, y, e: 0.0)
    with pytest.raises(CAUGHT, match="inner_value"):
        problem.inner_value(jnp.ones(1), jnp.ones(1), ROWS)


@pytest.mark.parametrize(
    "wrong", [{"weights": jnp.ones((3, 1))}, {"weights": jnp.ones(2)}, {"count": 3}, {"examples": 1.0}]
)
def test_fields_are_checked_together(wrong):
    """Rows of three examples have three weights."""
    assert dataclasses.replace(ROWS, weights=jnp.ones(3)).weights.shape == (3,)
    with pytest.raises(CAUGHT, match=r"Rows.__init__"):
        dataclasses.replace(ROWS, **wrong)


def test_whole_numbers_do_for_numbers():
    assert fb.Lockstep(inner_lr=1).inner_lr == 1


def test_the_library_refuses_in_its_own_words():
    with pytest.raises(fb.InputError, match="key= is a jax"):
        fb.FederatedData.split([np.ones((3, 2))], 0.5, "a key")
    with pytest.raises(CAUGHT):  # the checks are on again
        random_below(KEY, 0, jnp.ones(3))


def test_a_refusal_that_does_not_come_leaves_the_checks_on():
    with pytest.raises(pytest.fail.Exception), pytest.raises(fb.InputError):
        fb.Lockstep()
    with pytest.raises(CAUGHT):
        random_below(KEY, 0, jnp.ones(3))


def test_without_checks_nothing_is_looked_at():
    with unchecked():
        assert random_below(KEY, 0, np.full(3, 5)).shape == (3,)

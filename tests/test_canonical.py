"""The form of a program: its numbers and operations count, the names in its text do not."""

from __future__ import annotations

import keyword

import jax
import jax.numpy as jnp
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Array, Float, jaxtyped

from fedbilevel.canonical import canonical, digest_of

names = st.text("abcdefgh_", min_size=1, max_size=6).filter(lambda name: not keyword.iskeyword(name))
three = st.lists(names, min_size=4, max_size=4, unique=True)
constants = st.integers(-50, 50).map(lambda n: n / 8)
TEXT = """
def {f}({x}, {y}):
    {z} = jnp.sin({x}) * {scale}
    return jnp.sum({z} + {y} {op} {scale})
"""


def digest(words, scale, op):
    f, x, y, z = words
    scope = {"jnp": jnp}
    exec(TEXT.format(f=f, x=x, y=y, z=z, scale=repr(scale), op=op), scope)
    return canonical([jax.make_jaxpr(scope[f])(jnp.ones(2), jnp.ones(2))]).digest


@given(three, three, constants, st.sampled_from("+-*"))
@settings(max_examples=25, deadline=None)
def test_other_names_are_the_same_program(words, others, scale, op):
    assert digest(words, scale, op) == digest(others, scale, op)


@given(three, constants, constants, st.sampled_from("+-*"), st.sampled_from("+-*"))
@settings(max_examples=25, deadline=None)
def test_another_number_or_operation_is_another_program(words, scale, other, op, instead):
    assert (digest(words, scale, op) == digest(words, other, instead)) == ((scale, op) == (other, instead))


values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-2, 2) | st.text(max_size=3),
    lambda each: st.lists(each, max_size=3).map(tuple) | st.dictionaries(st.text(max_size=2), each, max_size=2),
    max_leaves=6,
)


def plain(value):
    """As text, dictionaries in the order of their keys."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {plain(value[key])}" for key in sorted(value)) + "}"
    return f"({', '.join(map(plain, value))})" if isinstance(value, tuple) else repr(value)


@given(values, values)
@settings(max_examples=50, deadline=None)
def test_values_have_one_digest_exactly_if_they_are_equal_in_kind_and_number(one, other):
    assert digest_of(one) == digest_of(one)
    assert (digest_of(one) == digest_of(other)) == (plain(one) == plain(other))


def test_what_checks_a_function_is_no_part_of_it():
    def scaled(x: Float[Array, " n"]) -> Float[Array, " n"]:
        return 2 * x

    def other(x: Float[Array, " n"]) -> Float[Array, " n"]:
        return 3 * x

    with_checks = jaxtyped(typechecker=beartype)
    assert with_checks(scaled) is not scaled
    assert digest_of(with_checks(scaled)) == digest_of(scaled) != digest_of(with_checks(other))

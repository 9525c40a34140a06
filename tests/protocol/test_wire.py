"""Messages as bytes come back as they went, and nothing of another length is taken for one."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import fedbilevel as fb
from fedbilevel.federation import When
from fedbilevel.protocol.wire import conditional_parts, decode, encode, message_schema, rebuild_message

kinds = st.sampled_from([np.dtype(name) for name in ("float32", "float64", "int32", "uint8", "bool", "complex64")])
leaves = arrays.arrays(kinds, arrays.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3))
trees = st.recursive(
    leaves, lambda each: st.lists(each, max_size=3).map(tuple) | st.dictionaries(st.text(max_size=2), each, max_size=2)
)
messages = st.lists(st.tuples(trees, st.sampled_from([None, True, False])), max_size=4)


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.tobytes() == b.tobytes()  # NaN too


def of_shapes(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def parted(message):
    """(The message with `When` parts, the flags of these.)"""
    whole = tuple(tree if sent is None else When(np.asarray(sent), tree) for tree, sent in message)
    return whole, tuple(sent for _, sent in message if sent is not None)


@given(messages)
@settings(max_examples=50, deadline=None)
def test_a_message_comes_back_with_zeros_for_what_did_not_travel(message):
    whole, flags = parted(message)
    pieces, travels = message_schema(whole, flags)
    payload = encode(pieces, travels)
    assert len(payload) == sum(a.nbytes for tree, sent in message if sent is not False for a in jax.tree.leaves(tree))
    back = decode(of_shapes(pieces), payload, travels)
    expected = [tree if sent is not False else jax.tree.map(np.zeros_like, tree) for tree, sent in message]
    again = rebuild_message(whole, back, flags)
    assert conditional_parts(again) == len(flags)
    same([part.value if isinstance(part, When) else part for part in again], expected)


@given(messages.filter(len), st.integers(-3, 3).filter(bool))
@settings(max_examples=30, deadline=None)
def test_bytes_of_another_length_are_refused(message, more):
    whole, flags = parted(message)
    pieces, travels = message_schema(whole, flags)
    payload = encode(pieces, travels)
    changed = payload + b"0" * more if more > 0 else payload[:more]
    if len(changed) != len(payload):
        with pytest.raises(fb.RunError, match="bytes arrived"):
            decode(of_shapes(pieces), changed, travels)

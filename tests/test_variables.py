"""Leaves of x and y that JAX cannot hold as they are: refused in a sentence, or converted with the right values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from helpers.plain import plain
from helpers.quadratic import quadratic

Q = quadratic(seed=0, clients=2)
LOST = {
    "a large integer beside": (np.array([3, 5_000_000_001]), "5000000001, which does not fit into int32"),
    "one number": (np.int64(-5_000_000_001), "-5000000001, which does not fit into int32"),
    "without a sign": (np.array([2**40], np.uint64), "1099511627776, which does not fit into uint32"),
    "a large float": (np.array([1.0, 1e300]), "1e+300, which does not fit into float32"),
    "a Python float": (-1e300, "-1e+300, which does not fit into float32"),
}
NO_NUMBERS = {
    "masked": (np.ma.masked_array([1.0, 2.0], [False, True]), r"masked array.*filled"),
    "objects": (np.array([1.0, None], object), "array of object, which is no number"),
    "structured": (np.zeros(2, dtype=[("a", float)]), "which is no number"),
    "dates": (np.array(["2020-01-01"], "datetime64[D]"), "which is no number"),
}
SAME = {
    "the other byte order": np.array([0.5, -2.0], ">f8"),
    "long": np.array([0.5, -2.0], np.longdouble),
}
KEY = jax.random.key(0)


def takers(x, y):
    given = Q.problem, Q.data, plain(fb.Lockstep), x, y
    return {
        "solve": lambda: fb.solve(*given, iterations=1, key=KEY, check=False),
        "estimate": lambda: fb.estimate_hypergradient(*given, key=KEY),
        "protocol": lambda: fb.protocol(plain(fb.Lockstep), Q.problem, Q.data, x, y),
        "reference": lambda: fb.reference.inner_value(Q.problem, Q.data, x, y),
    }


def refused(leaf, sentence, variable, taker):
    x, y = (jax.tree.map(lambda own: np.asarray(own, np.float32), tree) for tree in (Q.x, Q.y))
    x, y = ({**tree, "more": leaf} if name == variable else tree for name, tree in (("x", x), ("y", y)))
    with pytest.raises(fb.InputError, match=rf"^{variable}\['more'\] .*{sentence}"):
        takers(x, y)[taker]()


@pytest.mark.parametrize("taker", ["solve", "estimate", "protocol", "reference"])
@pytest.mark.parametrize("variable", ["x", "y"])
@pytest.mark.parametrize("case", LOST)
def test_what_does_not_survive_in_32_bits_is_refused(case, variable, taker):
    leaf, sentence = LOST[case]
    with jax.enable_x64(False):
        refused(leaf, sentence.replace("+", r"\+"), variable, taker)


@pytest.mark.parametrize("case", LOST)
def test_64_bits_hold_them(case):
    variable, rest = fb.variables.trainable({"w": jnp.ones(1), "more": LOST[case][0]}, "x")
    held = variable["more"] if variable["more"] is not None else rest["more"]
    np.testing.assert_array_equal(held, LOST[case][0])


@pytest.mark.parametrize("variable", ["x", "y"])
@pytest.mark.parametrize("case", NO_NUMBERS)
def test_what_is_no_number_is_refused(case, variable):
    refused(*NO_NUMBERS[case], variable, "solve")


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("case", SAME)
def test_other_ways_to_write_a_float_are_the_same_numbers(case, bits):
    with jax.enable_x64(bits == 64):
        variable, rest = fb.variables.trainable(SAME[case], "y")
    assert rest is None and variable.dtype == f"float{bits}"
    np.testing.assert_array_equal(variable, [0.5, -2.0])

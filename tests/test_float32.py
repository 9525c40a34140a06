"""Every algorithm once as users run it: 32 bits, JAX's standard promotion of dtypes and ranks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.algorithms import ALGORITHMS
from helpers.quadratic import flat, inner, outer, quadratic
from helpers.users import as_users_do

FAST = ("fedbio",)  # the others take their time to compile
EACH = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in ALGORITHMS]
Q0 = quadratic(seed=3, clients=4)
SMALL = {"inner_lr": 0.02, "outer_lr": 0.01, "hessian_lr": 0.02, "inner_rounds": 2, "local_steps": 2, "neumann_terms": 2,
         "batch_size": 2, "outer_optimizer": "adam:0.01"}  # fmt: skip


def run(name: str, bits: int) -> fb.Result:
    kind = ALGORITHMS[name]
    fields = {field.name for field in dataclasses.fields(kind)}
    algorithm = kind(**{setting: value for setting, value in SMALL.items() if setting in fields})
    with as_users_do(bits):
        start = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), f"float{bits}"), (Q0.x, Q0.y))
        problem, data = fb.Problem(inner, outer), fb.FederatedData.stack(Q0.inner, Q0.outer)
        return fb.solve(
            problem, data, algorithm, *start, 2, key=jax.random.key(0), engine=fb.Simulation(cohort=3), check=False,
            metrics={"size": lambda x, y: jnp.sum(y["w"] ** 2)},
        )  # fmt: skip


@pytest.mark.parametrize("name", EACH)
def test_a_run_in_32_bits_is_near_the_one_in_64(name):
    """Minibatches, a cohort, and an outer optimiser where there is one."""
    short, long = run(name, 32), run(name, 64)
    leaves = jax.tree.leaves((short.x, short.y, short.state))
    floating = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in floating} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves((long.x, long.y))} == {jnp.dtype("float64")}
    ours, theirs = (np.concatenate([flat(r.x), flat(r.y)]) for r in (short, long))
    start = np.concatenate([flat(Q0.x), flat(Q0.y)])
    assert np.isfinite(ours).all() and np.abs(theirs - start).max() > 1e-3  # it moved
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    assert [row["rounds"] for row in short.history] == [row["rounds"] for row in long.history]
    assert np.isclose(short.history[-1]["size"], long.history[-1]["size"], rtol=1e-4)


def test_all_eighteen_are_here():
    assert len(ALGORITHMS) == 18

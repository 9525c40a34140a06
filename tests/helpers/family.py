"""The closed forms on which the family of algorithms is tested."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

import fedbilevel as fb
from fedbilevel_studies.theory import family as quadratics
from fedbilevel_studies.theory import problems, runner

power = np.linalg.matrix_power


@functools.cache
def ridge() -> runner.Setup:
    return problems.ridge()


@functools.cache
def quadratic() -> quadratics.Family:
    return quadratics.family(1.0)


def end(setup: runner.Setup, algorithm, iterations: int, **options):
    """x and y after so many iterations."""
    return fb.solve(
        setup.problem, setup.data, algorithm, setup.x, setup.y, iterations, key=jax.random.key(0),
        evaluate_every=iterations, **options,
    )  # fmt: skip


def on_quadratic(f: quadratics.Family) -> runner.Setup:
    return runner.Setup(quadratics.PROBLEM, f.data(), jnp.asarray(f.x), jnp.asarray(f.y))


L, L_UPPER = problems.ridge().curvatures
STEPS = {"inner_lr": 1 / L, "hessian_lr": 1 / L, "outer_lr": 0.25 / L_UPPER}

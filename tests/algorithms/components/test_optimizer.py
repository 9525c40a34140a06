"""`outer_optimizer=`: optax at the server, along x - mean x_i."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedbilevel as fb
from fedbilevel_studies.theory.family import PROBLEM, family

F = family(1.0)
DATA, X, Y = F.data(), jnp.asarray(F.x), jnp.asarray(F.y)
STEPS = {"inner_lr": 0.1, "outer_lr": 0.05}
SERIES = {**STEPS, "hessian_lr": 0.1, "inner_rounds": 3, "truncation": "full"}
ALGORITHMS = {
    "aggitd": fb.AggITD(**SERIES, outer_steps=3, warm_start_v=True),
    "fednest": fb.FedNest(**SERIES),
    "fednest-sgd": fb.FedNestSGD(**SERIES),
    "lfednest": fb.LFedNest(**SERIES, outer_steps=2),
    "lfednest-svrg": fb.LFedNestSVRG(**SERIES),
    "fedmbo": fb.FedMBO(**STEPS, hessian_lr=0.1, chains=2),
    "fedf2sa": fb.FedF2SA(**STEPS),
}


def solve(algorithm, iterations, x=X, y=Y, **options):
    return fb.solve(PROBLEM, DATA, algorithm, x, y, iterations, key=jax.random.key(0), **options)


def using(name, optimizer):
    return dataclasses.replace(ALGORITHMS[name], outer_optimizer=optimizer)


def test_all_that_move_x_to_a_mean_take_one():
    takers = {name for name, kind in fb.algorithms.ALGORITHMS.items() if "outer_optimizer" in kind.__dataclass_fields__}
    assert takers == set(ALGORITHMS)


@pytest.mark.parametrize(
    "name", ["aggitd", "lfednest", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fedmbo", "fedf2sa"))]
)
def test_descent_with_a_rate_of_one_is_the_mean(name):
    plain = solve(ALGORITHMS[name], 4)
    np.testing.assert_allclose(solve(using(name, "sgd:1.0"), 4).x, plain.x, rtol=0, atol=1e-14)
    np.testing.assert_allclose(solve(using(name, optax.sgd(1.0)), 4).x, plain.x, rtol=0, atol=1e-14)
    half = solve(using(name, "sgd:0.5"), 1).x
    np.testing.assert_allclose(half, X + 0.5 * (solve(ALGORITHMS[name], 1).x - X), rtol=0, atol=1e-14)


def test_adam_written_out():
    """Bias-corrected moments of x - mean x_i, the mean as the algorithm alone would take it from the same (x, y)."""
    algorithm = fb.AggITD(**SERIES, outer_steps=3)
    rate, one, two, eps = 0.03, 0.9, 0.999, 1e-8
    x, y, m, s = X, Y, 0.0, 0.0
    for k in range(1, 6):
        after = solve(algorithm, 1, x, y)
        d = np.asarray(x - after.x)
        m, s = one * m + (1 - one) * d, two * s + (1 - two) * d**2
        x = jnp.asarray(x - rate * (m / (1 - one**k)) / (np.sqrt(s / (1 - two**k)) + eps))
        y = after.y
    for optimizer in ("adam:0.03", optax.adam(0.03)):
        found = solve(dataclasses.replace(algorithm, outer_optimizer=optimizer), 5)
        np.testing.assert_allclose(found.x, x, rtol=0, atol=1e-12)


def test_its_state_is_part_of_a_checkpoint(tmp_path):
    algorithm = using("aggitd", "adam:0.05")
    whole = solve(algorithm, 8)
    solve(algorithm, 5, callbacks=[fb.callbacks.Checkpoint(tmp_path)])
    np.testing.assert_allclose(solve(algorithm, 8, resume=tmp_path).x, whole.x, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "wrong", ["adamm:0.1", "adam", "adam:0", "adam:-1", "adam:fast", ":0.1", 3, ["adam", 1], "getattr:1"]
)
@pytest.mark.parametrize("kind", [fb.AggITD, fb.LFedNest, fb.FedMBO, fb.FedF2SA])
def test_nonsense_is_refused(kind, wrong):
    with pytest.raises(fb.InputError, match=r"outer_optimizer=.*adam:0\.01"):
        kind(outer_optimizer=wrong)


def test_on_the_command_line(fedbilevel, tmp_path):
    words = ("quadratic", "--iterations", 3, "--set", "outer_optimizer=adam:0.01", "--out", tmp_path / "out")
    code, _, errors = fedbilevel("run", *words)
    assert code == 0, errors
    assert "adam:0.01" in (tmp_path / "out" / "config.json").read_text()
    code, _, errors = fedbilevel("run", "quadratic", "--set", "outer_optimizer=adamm:1", "--out", tmp_path / "other")
    assert code == 2 and "adamm:1" in errors

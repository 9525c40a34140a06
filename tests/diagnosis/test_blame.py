"""A run that blows up names the setting that made it, and that one alone: a table of every algorithm and each of its steps.

Each is a thousand times what the same run ends well with. What the lines are made of, and in which ways they may fail
otherwise (a derivative that is not finite, settings that are no steps), has tests of its own below.
"""

from __future__ import annotations

import dataclasses
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedbilevel as fb
from fedbilevel.algorithms import ALGORITHMS
from fedbilevel.engines.loopback import _Looped
from helpers import logistic
from helpers.plain import plain
from helpers.quadratic import flat, quadratic

KEY, FAR, ITERATIONS = jax.random.key(0), 1000, 100
Q0 = quadratic(seed=1)
PROBLEMS = {
    "quadratic": (Q0.problem, Q0.data, Q0.x, Q0.y),
    "logistic": (logistic.PROBLEM, logistic.CLIENTS.data, jnp.asarray(logistic.X), jnp.asarray(logistic.Y)),
}
STEPS = {
    "quadratic": {"inner_lr": 0.1, "hessian_lr": 0.1, "outer_lr": 0.05},
    "logistic": {"inner_lr": 0.2, "hessian_lr": 0.2, "outer_lr": 0.2},
}
SHAPE = {"inner_rounds": 2, "local_steps": 2, "neumann_terms": 3, "truncation": "full", "chains": 2}
FINITE = {  # of the table: those that do not blow up, in either precision
    ("quadratic", "adafbio", "inner_lr"),  # its steps on y are relative
    ("logistic", "fednest", "hessian_lr"),  # x ends where exp(x) is small and stays there
}


def build(name, problem, **settings):
    fields = ALGORITHMS[name].__dataclass_fields__
    chosen = {k: v for k, v in (SHAPE | STEPS[problem]).items() if k in fields}
    if name == "fedmbo":
        chosen["truncation"] = "uniform"
    return ALGORITHMS[name](**chosen, **settings)


def steps_of(name):
    return [field for field in ALGORITHMS[name].__dataclass_fields__ if field.endswith("_lr")]


def cast(tree, dtype):
    narrow = lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
    return jax.tree.map(narrow, tree)


def run(problem, algorithm, dtype=jnp.float64, iterations=ITERATIONS, **options):
    losses, data, x, y = PROBLEMS[problem]
    parts = (cast(part, dtype) for part in (data, x, y))
    return fb.solve(losses, *[next(parts)], algorithm, *parts, iterations, key=KEY, evaluate_every=50, **options)


def stationarity(problem, x):
    """|grad Phi|, exactly."""
    losses, data, _, y = PROBLEMS[problem]
    return np.linalg.norm(flat(fb.reference.hypergradient(losses, data, cast(x, jnp.float64), y)))


def named(text):
    """The settings that a message names: words that are fields of some algorithm."""
    fields = {field.name for kind in ALGORITHMS.values() for field in dataclasses.fields(kind)}
    return set(re.findall(r"\w+", text)) & fields


def blown_up(problem, algorithm, dtype=jnp.float64, **options):
    """The message, or None where the run stays finite."""
    try:
        run(problem, algorithm, dtype, **options)
    except fb.Diverged as failure:
        return str(failure)
    return None


def test_the_table_is_whole():
    lines = {(problem, name, field) for problem in PROBLEMS for name in ALGORITHMS for field in steps_of(name)}
    assert len(lines) == 112 and lines > FINITE and len(lines - FINITE) >= 80


FAST = [("quadratic", "aggitd")]


def lines_of(problem, name, dtype):
    good = build(name, problem)
    end = run(problem, good, dtype)
    assert flat(end.x).dtype == dtype and stationarity(problem, end.x) < 0.9 * stationarity(
        problem, PROBLEMS[problem][2]
    )
    for field in steps_of(name):
        value = FAR * getattr(good, field)
        text = blown_up(problem, dataclasses.replace(good, **{field: value}), dtype)
        if (problem, name, field) in FINITE:
            assert text is None
        else:
            assert text is not None and named(text) == {field}, (field, text)
            assert f"lower {field} (now {value:g})" in text and "kept" not in text


@pytest.mark.parametrize(("problem", "name"), FAST)
def test_the_step_alone_is_named(problem, name):
    lines_of(problem, name, jnp.float64)


@pytest.mark.slow
@pytest.mark.parametrize(("problem", "dtype"), [("quadratic", "float64"), ("logistic", "float32")])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_step_alone_is_named_by_every_algorithm(problem, name, dtype):
    lines_of(problem, name, jnp.dtype(dtype))


# Settings of the same kind ----------------------------------------------------------------------------------------------

OPTIMIZED = [name for name in ALGORITHMS if "outer_optimizer" in ALGORITHMS[name].__dataclass_fields__]
RATES = {
    "adam": ("adam:0.05", "adam:50"), "sgd": ("sgd:0.5", "sgd:500"), "object": (optax.adam(0.05), optax.adam(50.0))
}  # fmt: skip


def check_optimizer(name, problem, good, bad, dtype=jnp.float64):
    assert run(problem, build(name, problem, outer_optimizer=good), dtype).iteration == ITERATIONS
    text = blown_up(problem, build(name, problem, outer_optimizer=bad), dtype)
    assert text is not None and named(text) == {"outer_optimizer"} and "learning rate of outer_optimizer" in text, text
    assert not isinstance(bad, str) or f"now {bad!r}" in text


@pytest.mark.slow
def test_the_optimizers_rate_is_named():
    check_optimizer("aggitd", "quadratic", *RATES["adam"])


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZED)
@pytest.mark.parametrize(
    ("problem", "dtype", "rates"),
    [("quadratic", "float64", "adam"), ("logistic", "float32", "sgd"), ("quadratic", "float32", "object")],
)
def test_the_optimizers_rate_is_named_by_every_algorithm(name, problem, dtype, rates):
    check_optimizer(name, problem, *RATES[rates], jnp.dtype(dtype))


@pytest.mark.slow
def test_a_step_is_named_beside_an_optimizer_that_is_good():
    good = build("aggitd", "quadratic", outer_optimizer="adam:0.05")
    text = blown_up("quadratic", dataclasses.replace(good, inner_lr=100.0))
    assert text is not None and named(text) == {"inner_lr"}, text


WARM = {"truncation": "full", "inner_rounds": 2, "local_steps": 2, "warm_start_v": True}


@pytest.mark.slow
@pytest.mark.parametrize("field", ["inner_lr", "hessian_lr", "outer_lr"])
def test_a_vector_that_is_kept_is_looked_at_too(field):
    text = blown_up("quadratic", fb.AggITD(**WARM, **(STEPS["quadratic"] | {field: 100.0})))
    assert text is not None and named(text) == {field}, text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings", "field", "what"),
    [
        ("fedf2sa", {"penalty": 1e-4}, "penalty", "raise"),
        ("adafbio", {"keep": 1.5}, "keep", "lower"),
    ],
)
def test_a_setting_that_is_no_step_has_its_own_sentence(name, settings, field, what):
    algorithm = build(name, "quadratic", **settings)
    text = blown_up("quadratic", algorithm)
    default = ALGORITHMS[name].__dataclass_fields__[field].default
    assert text is not None and named(text) == {field}, text
    assert f"{what} {field} (now {settings[field]:g})" in text and f"{field} = {default:g}, its default" in text
    assert run("quadratic", build(name, "quadratic")).iteration == ITERATIONS


# Derivatives ------------------------------------------------------------------------------------------------------------

ROWS = [np.full((2, 2), 1.0 + i) for i in range(2)]
square = lambda x, y, e: jnp.sum((y - e * x) ** 2) + 0.1 * jnp.sum(x**2)


def steep(name):
    """(inner loss, outer loss) of which one has no finite derivative at zero."""
    return {
        "the inner loss in y": (lambda x, y, e: square(x, y, e) + jnp.sqrt(jnp.sum(y**2)), square),
        "the outer loss in x": (square, lambda x, y, e: square(x, y, e) + jnp.sqrt(jnp.sum(x**2))),
        "the outer loss in y": (square, lambda x, y, e: square(x, y, e) + jnp.sum(jnp.where(y == 0, 0.0, y**1.5 / y))),
        "the value of the inner loss": (lambda x, y, e: square(x, y, e) + jnp.sum(jnp.log(y)), square),
    }[name]


@pytest.mark.slow
@pytest.mark.parametrize("engine", [None, fb.Loopback()], ids=["simulation", "loopback"])
@pytest.mark.parametrize(
    "case", ["the inner loss in y", "the outer loss in x", "the outer loss in y", "the value of the inner loss"]
)
def test_a_derivative_that_is_not_finite_at_the_start_is_no_fault_of_a_step(case, engine):
    problem, data = fb.Problem(*steep(case)), fb.FederatedData.stack(ROWS, ROWS)
    zero = jnp.zeros(2)
    with pytest.raises(fb.Diverged, match="the derivative is not finite at the start") as failure:
        fb.solve(problem, data, plain(fb.Lockstep), zero, zero, 5, key=KEY, engine=engine, check=False)
    text = str(failure.value)
    assert not named(text) and f"of the {'inner' if 'inner' in case else 'outer'} loss" in text and "client 0" in text
    one = jnp.ones(2)
    assert (
        fb.solve(problem, data, fb.Lockstep(outer_lr=1e-3), one, one, 2, key=KEY, engine=engine, check=False).iteration
        == 2
    )


def test_an_estimate_says_so_too():
    problem, data = fb.Problem(*steep("the inner loss in y")), fb.FederatedData.stack(ROWS, ROWS)
    with pytest.raises(fb.Diverged, match=r"the derivative in y of the inner loss .*is not finite at the start"):
        fb.estimate_hypergradient(problem, data, plain(fb.AggITD), jnp.ones(2), jnp.zeros(2), key=KEY)


# A user's own, and a network's ------------------------------------------------------------------------------------------


class Own(fb.Algorithm):
    """Gradient steps on x and y, with names and parts of its own."""

    follows: ClassVar[dict[str, str]] = {"x": "pace", "y": "lower_pace"}
    pace: float = fb.rate(0.05)
    lower_pace: float = fb.rate(0.1)

    def step(self, fed, state):
        dx, dy = fed.average(self.directions, state.x, state.y)
        return fb.State(
            optax.tree.add_scale(state.x, -self.pace, dx), optax.tree.add_scale(state.y, -self.lower_pace, dy)
        ), {}

    def directions(self, client, x, y):
        return client.problem.outer_gradients(x, y, client.outer)[0], client.problem.inner_gradient(x, y, client.inner)


@pytest.mark.parametrize("field", ["pace", "lower_pace"])
def test_an_algorithm_of_ones_own_says_what_follows_what(field):
    assert run("quadratic", Own()).iteration == ITERATIONS
    text = blown_up("quadratic", Own(**{field: 100.0}))
    assert text is not None and f"lower {field} (now 100)" in text
    assert set(re.findall(r"\w*pace", text)) == {field}, text


@pytest.mark.slow
@pytest.mark.parametrize("field", ["inner_lr", "hessian_lr", "outer_lr"])
def test_what_was_seen_names_candidates_where_nothing_can_be_repeated(field, monkeypatch):
    monkeypatch.setattr(_Looped, "replays", False)
    small = fb.FederatedData.stack(Q0.inner[:1], Q0.outer[:1])
    monkeypatch.setitem(PROBLEMS, "small", (Q0.problem, small, Q0.x, Q0.y))
    algorithm = fb.Lockstep(local_steps=2, **(STEPS["quadratic"] | {field: 100.0}))
    text = blown_up("small", algorithm, engine=fb.Loopback())
    assert text is not None and field in named(text) and f"{field} (now 100)" in text and "a simulation says" in text, (
        text
    )

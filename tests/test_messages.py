"""What is no input is told in a sentence; what means the same as an input is taken for it."""

from __future__ import annotations

import csv

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedbilevel as fb
from fedbilevel.callbacks import CSV, Checkpoint
from helpers import apps
from helpers.quadratic import flat, quadratic

Q0 = quadratic(seed=1, clients=3)
STEP = {"inner_lr": 0.02, "hessian_lr": 0.02, "outer_lr": 0.01}
KEY = jax.random.key(0)


def solve(iterations=2, algorithm=None, **options):
    good = {"problem": Q0.problem, "data": Q0.data, "x": Q0.x, "y": Q0.y, "key": KEY, "check": False}
    return fb.solve(**{**good, "algorithm": algorithm or fb.Lockstep(**STEP), "iterations": iterations, **options})


# Rates and counts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [jnp.nan, -0.1, 0.0, jnp.inf])
@pytest.mark.parametrize("make", [float, np.float32, np.asarray, jnp.asarray, jnp.float32], ids=lambda m: m.__name__)
def test_a_rate_is_positive_whatever_it_is_made_of(make, bad):
    with pytest.raises(fb.InputError, match=r"Lockstep\(inner_lr=...\) is a step size, a positive number"):
        fb.Lockstep(**{**STEP, "inner_lr": make(bad)})


@pytest.mark.parametrize("bad", [True, jnp.asarray(3), "fast", jnp.asarray(True), [0.1]])
def test_a_rate_is_no_other_thing(bad):
    with pytest.raises(fb.InputError, match="is a step size"):
        fb.Lockstep(**{**STEP, "inner_lr": bad})


def test_a_grid_of_rates_is_one_vmap_still():
    made = jax.vmap(lambda lr: fb.Lockstep(**{**STEP, "inner_lr": lr}))(jnp.asarray([0.1, 0.2]))
    assert made.inner_lr.shape == (2,)
    assert fb.Lockstep(**{**STEP, "inner_lr": jnp.asarray([0.1, 0.2])}).inner_lr.shape == (2,)


whole_numbers = pytest.mark.parametrize("make", [np.int64, np.uint8, np.asarray, jnp.asarray], ids=lambda m: m.__name__)


@pytest.mark.slow
@whole_numbers
def test_whole_numbers_of_any_kind_are_counts(make):
    algorithm = fb.FedNest(inner_rounds=make(2), batch_size=make(2), neumann_terms=make(2), **STEP)
    assert algorithm == fb.FedNest(inner_rounds=2, batch_size=2, neumann_terms=2, **STEP)
    assert fb.Simulation(cohort=make(2), client_batch=make(1)).client_batch == 1
    assert fb.Faults(minimum=make(2), retries=make(0)) == fb.Faults(minimum=2, retries=0)
    run = solve(make(2), evaluate_every=make(2), engine=fb.Loopback(cohort=make(2)))
    assert run.iteration == 2 and [row["iteration"] for row in run.history] == [0, 2]


def app(**options):
    return fb.App(problem=Q0.problem, algorithm=fb.Lockstep(**STEP), start=lambda: (Q0.x, Q0.y), load=lambda site: site,
                  **{"iterations": 1, **options})  # fmt: skip


@pytest.mark.parametrize("bad", [True, np.True_, 1.0, "2", jnp.asarray(True), None])
def test_what_is_no_whole_number_is_refused_everywhere(bad):
    for make in (
        lambda: fb.FedNest(inner_rounds=bad, **STEP),
        lambda: fb.Faults(retries=bad),
        lambda: solve(bad),
        lambda: solve(evaluate_every=bad),
        *([] if bad is None else [lambda: fb.Simulation(cohort=bad), lambda: fb.Loopback(cohort=bad)]),
        *([] if bad is None else [lambda: fb.Simulation(client_batch=bad), lambda: app(cohort=bad)]),
        *([] if bad is None else [lambda: app(seed=bad)]),
    ):
        with pytest.raises(fb.InputError):
            make()


@pytest.mark.slow
def test_a_raw_key_means_the_same():
    np.testing.assert_array_equal(flat(solve(key=jax.random.PRNGKey(3)).x), flat(solve(key=jax.random.key(3)).x))
    for bad in (0, None, jax.random.split(KEY), np.zeros(2), "a"):
        with pytest.raises(fb.InputError, match=r"key= is a jax\.random\.key"):
            solve(key=bad)
    with pytest.raises(fb.InputError, match=r"threefry.*rbg"):
        solve(key=jax.random.key(0, impl="rbg"))


# Transformations around the library -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.sum(solve(x=x).y["w"]),
        lambda x: solve(y={**Q0.y, "w": x["u"][:3]}).x["k"],
        lambda x: fb.estimate_hypergradient(Q0.problem, Q0.data, fb.FedNest(**STEP), x, Q0.y, key=KEY)[1]["w"].sum(),
        lambda x: fb.reference.value(Q0.problem, Q0.data, x, Q0.y),
        lambda x: fb.reference.hypergradient(Q0.problem, Q0.data, x, Q0.y)["k"],
        lambda x: fb.reference.solution(Q0.problem, Q0.data, x, Q0.y)["w"].sum(),
        lambda x: fb.protocol(fb.Lockstep(**STEP), Q0.problem, Q0.data, x, Q0.y).rounds * x["k"],
    ],
)
@pytest.mark.parametrize("around", [jax.jit, jax.grad], ids=["jit", "grad"])
def test_transformations_around_it_are_told_in_a_sentence(function, around):
    with pytest.raises(fb.InputError, match=r"[xy] is a tracer: .* call them outside"):
        around(function)(Q0.x)


def test_a_traced_key_too():
    with pytest.raises(fb.InputError, match=r"is a tracer.*call them outside"):
        jax.jit(lambda key: solve(key=key).x["k"])(KEY)


@jax.custom_vjp
def halved(z):
    return 0.5 * z


halved.defvjp(lambda z: (halved(z), None), lambda _, d: (0.5 * d,))


@pytest.mark.slow
def test_a_reverse_rule_in_the_inner_loss_is_named():
    problem = fb.Problem(lambda x, y, e: halved(Q0.problem.inner(x, y, e)), Q0.problem.outer)
    for use in (
        lambda: solve(problem=problem),
        lambda: fb.estimate_hypergradient(problem, Q0.data, fb.AggITD(**STEP), Q0.x, Q0.y, key=KEY),
        lambda: fb.reference.hypergradient(problem, Q0.data, Q0.x, Q0.y),
        lambda: solve(problem=problem, engine=fb.Loopback()),
    ):
        with pytest.raises(fb.InputError, match=r"jax\.custom_vjp.*jax\.custom_jvp"):
            use()


# Outer optimisers -----------------------------------------------------------------------------------------------------

ASKS_MORE = {
    "lbfgs": lambda: optax.lbfgs(),
    "plateau": lambda: optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau()),
    "polyak": lambda: optax.polyak_sgd(),
    "line search": lambda: optax.chain(optax.sgd(0.1), optax.scale_by_backtracking_linesearch(5)),
}


@pytest.mark.parametrize("name", ASKS_MORE)
@pytest.mark.parametrize("kind", [fb.AggITD, fb.FedNest])
def test_an_optimiser_that_asks_for_the_loss_is_refused_when_it_is_given(name, kind):
    with pytest.raises(fb.InputError, match="needs more than the direction of its step"):
        kind(outer_optimizer=ASKS_MORE[name]())


@pytest.mark.parametrize("bad", [optax.adam, "adam", 0.1, object(), (lambda x: x, lambda u, s: (u, s))])
def test_what_is_no_transformation_is_refused(bad):
    with pytest.raises(fb.InputError, match="is an optax transformation"):
        fb.AggITD(outer_optimizer=bad)


def test_optimisers_that_need_the_parameters_or_their_names_are_fine():
    by_name = optax.multi_transform({"a": optax.sgd(0.1), "b": optax.adam(0.1)}, {"u": "a", "k": "b"})
    for good in (optax.adamw(0.01), optax.lamb(0.01), by_name):
        fb.AggITD(outer_optimizer=good)


# Metrics --------------------------------------------------------------------------------------------------------------


def fails(x, y):
    raise KeyError("gone")


BAD = {"none": lambda x, y: None, "text": lambda x, y: "0.5", "array": lambda x, y: y["w"], "complex": lambda x, y: 1j,
       "raises": fails, "list": lambda x, y: [1.0, 2.0]}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_metric_that_says_nothing_usable_is_named(name):
    with pytest.raises(fb.InputError, match=f"the metric '{name}' (must return a scalar|failed: KeyError)"):
        solve(metrics={name: BAD[name]})


@pytest.mark.parametrize("name", BAD)
def test_nothing_is_lost_when_one_fails_while_running(tmp_path, name):
    calls = []

    def late(x, y):
        calls.append(1)
        return 1.0 if len(calls) <= 2 else BAD[name](x, y)

    keep = [CSV(tmp_path / "h.csv"), Checkpoint(tmp_path)]
    with pytest.raises(fb.RunError, match="the metric 'late'") as failure:
        solve(5, metrics={"late": late, "size": lambda x, y: y["w"] @ y["w"]}, callbacks=keep)
    result, good = failure.value.result, solve(2)
    assert result.iteration == 2
    np.testing.assert_allclose(flat(result.y), flat(good.y), rtol=1e-12)
    assert np.isnan(result.history[2]["late"]) and result.history[2]["size"] > 0
    with (tmp_path / "h.csv").open(newline="") as text:
        assert [row["late"] for row in csv.DictReader(text)] == ["1.0", "1.0", ""]
    assert solve(5, resume=tmp_path).iteration == 5


def test_a_metric_that_is_not_a_number_goes_on():
    assert np.isnan(solve(metrics={"m": lambda x, y: jnp.nan}).history[-1]["m"])


NONSENSE = {
    "metrics": [["a"], 3, {"a": 3}, {3: min}],
    "callbacks": [3, None, CSV, [CSV], ["a"]],
    "engine": [fb.Simulation, "simulation", 3],
    "data": [[1, 2], None, {"a": np.ones(3)}],
    "problem": [None, lambda x, y, e: 0.0, fb.Problem],
    "algorithm": [fb.Lockstep, "lockstep"],
    "x": [None, "a", 3, jnp.arange(3), fb.Problem, {}],
    "y": [None, "a", True, [], np.array(["a"])],
}


@pytest.mark.parametrize(("name", "bad"), [(name, bad) for name, many in NONSENSE.items() for bad in many])
def test_nonsense_is_told_in_one_sentence(name, bad):
    with pytest.raises(fb.InputError) as refusal:
        solve(**{name: bad} if name != "algorithm" else {"algorithm": bad})
    assert 10 < len(str(refusal.value)) < 1000 and "\n" not in str(refusal.value)


@pytest.mark.slow
def test_an_app_s_own_folder_is_plotted(tmp_path, fedbilevel):
    file = apps.write(tmp_path, apps.CLOSED_FORM, f"iterations=2, metrics={{'m': lambda x, y: y @ y}}, {apps.LOCKSTEP}")
    assert fedbilevel("run", file, "--out", tmp_path / "mine")[0] == 0
    code, out, said = fedbilevel("plot", tmp_path / "mine")
    assert (code, said) == (0, "") and "mine" in out
    assert (tmp_path / "mine" / "m.png").is_file()

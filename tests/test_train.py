"""`train`: y reaches y*(x) on every engine, in whatever company; what it refuses."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from helpers.quadratic import flat, inner, outer, quadratic

Q = quadratic()
WEIGHTED = fb.FederatedData.stack(Q.inner, Q.outer, weights="rows")


def train(q=Q, rounds=40, data=None, **options):
    given = {"check": False, "key": jax.random.key(0)} | options
    return fb.train(q.problem, q.data if data is None else data, q.x, q.y, rounds=rounds, **given)


def off(result, data=Q.data):
    """How far y is from the closed form."""
    return np.abs(flat(result.y) - flat(fb.reference.solution(Q.problem, data, Q.x, Q.y))).max()


@pytest.mark.parametrize("name", ["quadratic", "ridge"])
def test_y_reaches_the_closed_form_of_a_task(name):
    task = fb.tasks.quadratic(clients=5) if name == "quadratic" else fb.tasks.ridge(dataset="diabetes", clients=4)
    given = task.problem, task.data, task.x, task.y
    with jax.numpy_dtype_promotion("standard"):  # the rows of a data set are 32 bits wide
        result = fb.train(*given, rounds=200, key=task.key, evaluate_every=200, metrics={"one": lambda x, y: 1.0})
        best = flat(fb.reference.solution(*given))
    assert np.abs(flat(result.y) - best).max() < 1e-10 * np.abs(best).max()
    np.testing.assert_array_equal(flat(result.x), flat(task.x))
    assert result.history[-1]["rounds"] == 200 and result.history[-1]["one"] == 1.0
    assert {"bytes_down", "bytes_up", "lower_gradient_norm", "inner_lr"} <= set(result.history.columns)


@pytest.mark.parametrize("local_steps", [1, 2, 20])
def test_any_number_of_local_steps(local_steps):
    result = train(rounds=700, local_steps=local_steps, evaluate_every=700)
    assert off(result) < 1e-10


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_weights_count_also_where_clients_drop_out(dropout):
    result = train(rounds=700, data=WEIGHTED, engine=fb.Simulation(dropout=dropout), evaluate_every=700)
    assert off(result, WEIGHTED) < 1e-10 < off(result)


COMPANY = {
    "everyone": {},
    "a cohort": {"engine": {"cohort": 2}},
    "minibatches": {"batch_size": 2, "local_steps": 3},
    "weights and dropouts": {"data": WEIGHTED, "engine": {"dropout": 0.3}},
}


@pytest.mark.parametrize("company", COMPANY.values(), ids=COMPANY)
def test_engines_agree(company):
    options = company.get("engine", {})
    one, other = (train(rounds=14, **company | {"engine": kind(**options)}) for kind in (fb.Simulation, fb.Loopback))
    np.testing.assert_allclose(flat(one.y), flat(other.y), rtol=0, atol=1e-10)
    assert np.abs(flat(one.y) - Q.z).max() > 0.1
    for column in ("rounds", "bytes_down", "bytes_up"):
        assert [row[column] for row in one.history] == [row[column] for row in other.history]


def test_it_goes_on_from_a_checkpoint(tmp_path):
    options = {"engine": fb.Simulation(cohort=2)}
    whole = train(rounds=30, **options)
    train(rounds=16, callbacks=[fb.callbacks.Checkpoint(tmp_path)], **options)
    resumed = train(rounds=30, resume=tmp_path, **options)
    np.testing.assert_array_equal(flat(resumed.y), flat(whole.y))
    names = [name for name in whole.history.columns if name not in ("seconds", "turn")]
    for name in names:
        np.testing.assert_array_equal(resumed.history.column(name), whole.history.column(name))
    with pytest.raises(fb.InputError, match="local_steps was '5' and is '4'"):
        train(rounds=30, resume=tmp_path, local_steps=4, **options)


def test_32_bits_as_users_have_them():
    promote = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
    with jax.enable_x64(False), promote[0], promote[1]:
        x, y = (jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), "float32"), each) for each in (Q.x, Q.y))
        problem, data = fb.Problem(inner, outer), fb.FederatedData.stack(Q.inner, Q.outer)
        result = fb.train(problem, data, x, y, rounds=300, key=jax.random.key(0), evaluate_every=300)
    assert {leaf.dtype for leaf in jax.tree.leaves((result.x, result.y))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(flat(result.y), Q.solution(Q.t), rtol=0, atol=1e-4)


def test_only_the_lower_level_is_asked_for():
    """An inner loss that depends on no x, and an outer one on no y, cannot be solved; y can be trained."""
    problem = fb.Problem(lambda x, y, e: 0.5 * (y - e) ** 2, lambda x, y, e: x**2)
    data = fb.FederatedData.stack([np.ones(2), 3 * np.ones(1)], [np.ones(1), np.ones(1)])
    with pytest.raises(fb.InputError, match="does not depend on"):
        fb.solve(problem, data, fb.Lockstep(), 0.0, 0.0, 1, key=jax.random.key(0))
    result = fb.train(problem, data, 0.0, 0.0, rounds=60, key=jax.random.key(0))
    np.testing.assert_allclose(result.y, 2.0, atol=1e-10)
    with pytest.raises(fb.InputError, match="inner loss does not depend on y"):
        fb.train(fb.Problem(lambda x, y, e: x**2, problem.outer), data, 0.0, 0.0, rounds=2, key=jax.random.key(0))


def test_few_rounds_measure_less():
    cohort = {"engine": fb.Simulation(cohort=1)}
    for rounds, iterations in ((2, 1), (4, 1)):
        result = train(rounds=rounds, **cohort)
        assert (result.history[-1]["rounds"], result.iteration) == (rounds, iterations)


def badly_scaled(seed, by):
    """A problem of `testing` whose rows' sizes are factors of 1e-3 to 1e3 apart: its curvatures are of 1e-6 to 1e6."""
    problem, data, x, y = fb.testing.heterogeneous(8, seed)
    counts, draw = np.asarray(data.inner.counts), np.random.default_rng(seed)
    many = {"row": counts.sum(), "client": len(counts), "problem": 1}[by]
    factors = 10 ** draw.uniform(-3, 3, many)
    each = factors if by == "row" else np.repeat(factors, counts if by == "client" else counts.sum())
    scale = lambda leaf: jnp.asarray(each.reshape(-1, *[1] * (leaf.ndim - 1)) * np.asarray(leaf))
    return problem, eqx.tree_at(lambda d: d.inner.rows, data, jax.tree.map(scale, data.inner.rows)), x, y


def value(problem, data, x, y):
    """g(x, y)."""
    return np.mean([float(problem.inner_value(x, y, data.inner.client(i).all())) for i in range(data.clients)])


@pytest.mark.slow
@pytest.mark.parametrize("by", ["row", "client", "problem"])
@pytest.mark.parametrize(
    "company",
    [{}, {"cohort": 3}, {"cohort": 1}, {"dropout": 0.4}, {"batch_size": 2}, {"local_steps": 1}],
    ids=lambda company: " ".join(map(str, company)) or "everyone",
)
def test_no_scale_of_rows_makes_it_blow_up(by, company):
    """Nor is y thrown away on the way: g ends below where it began, and is nowhere far above."""
    engine = fb.Simulation(**{name: company[name] for name in ("cohort", "dropout") if name in company})
    options = {name: company[name] for name in ("batch_size", "local_steps") if name in company}
    for seed in range(2 if company else 4):
        problem, data, x, y = badly_scaled(seed, by)
        given = {"rounds": 200, "key": jax.random.key(seed), "evaluate_every": 50, "check": False}
        metrics = {"value": lambda x, y, problem=problem, data=data: value(problem, data, x, y)}
        result = fb.train(problem, data, x, y, engine=engine, metrics=metrics, **given, **options)
        values = result.history.column("value")
        assert values[-1] < values[0] and values.max() < 10 * values[0], (seed, values)


REFUSED = [
    ({"rounds": 1}, "1 round is too few"),
    ({"rounds": 0}, "rounds= is a whole number of at least 1"),
    ({"inner_lr": float("nan")}, r"Training\(inner_lr=...\) is a step size"),
    ({"inner_lr": -0.1}, r"Training\(inner_lr=...\) is a step size"),
    ({"inner_lr": "fast"}, "or 'auto'; got 'fast'"),
    ({"local_steps": 0}, r"Training\(local_steps=...\) is a count"),
    ({"engine": fb.Simulation(cohort=9)}, "a cohort of 9 cannot be drawn from 5 clients"),
    ({"engine": "here"}, "engine is Simulation"),
    ({"data": [1, 2]}, "FederatedData"),
]


@pytest.mark.parametrize(("given", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_what_it_refuses_is_one_sentence(given, sentence):
    with pytest.raises(fb.InputError, match=sentence) as refused:
        train(**given)
    assert "\n" not in str(refused.value)


def test_a_step_that_is_too_large_is_named():
    with pytest.raises(fb.Diverged, match="lower inner_lr ") as failure:
        train(rounds=2_000, inner_lr=4.0)
    assert np.isfinite(flat(failure.value.result.y)).all()


def test_a_loss_without_a_minimum_ends_with_a_sentence():
    """However short the step, y runs away; what there is stays."""
    problem = fb.Problem(lambda x, y, e: -jnp.exp(0.1 * (y - e) ** 2) * (1 + x), lambda x, y, e: (y - e) ** 2)
    data = fb.FederatedData.stack([np.ones(2), 3 * np.ones(1)], [np.ones(1), np.ones(1)])
    with pytest.raises(fb.Diverged, match="The automatic inner_lr had been halved") as failure:
        fb.train(problem, data, 0.0, 20.0, rounds=2_000, key=jax.random.key(0), check=False)
    assert np.isfinite(failure.value.result.y)


def test_the_best_is_kept():
    result = train(rounds=20, keep="lower_gradient_norm:min")
    assert result.best().value == np.nanmin(result.history.column("lower_gradient_norm"))


def test_a_start_that_cannot_be_used():
    begin = lambda y: fb.train(Q.problem, Q.data, Q.x, y, rounds=2, key=jax.random.key(0))
    with pytest.raises(fb.InputError, match="holds NaN or infinite values"):
        begin(jax.tree.map(lambda leaf: leaf * np.nan, Q.y))
    with pytest.raises(fb.InputError, match="it has float32 and float64"):
        begin(dict(Q.y, w=Q.y["w"].astype("float32")))

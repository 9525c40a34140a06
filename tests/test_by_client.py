"""How each client fares, where its rows are: numbers of one client, their mean and the worst, on every engine."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fedbilevel as fb
from fedbilevel.callbacks import Checkpoint
from fedbilevel.threefry import new_key
from helpers.quadratic import flat, quadratic
from helpers.users import as_users_do

Q = quadratic(seed=3, clients=5)
WEIGHTED = fb.FederatedData.stack(Q.inner, Q.outer, "rows")  # clients count by their rows
OWN = fb.FederatedData.stack(Q.inner, Q.outer, [1, 2, 3, 4, 10], names=list("abcde"))
LOCKSTEP = fb.Lockstep(inner_lr=0.02, hessian_lr=0.02, outer_lr=0.02)
HIGH = 2.2
predicted = lambda y, row: row["a"] @ ravel_pytree(y)[0]


def low(x, y, row):
    return predicted(y, row) < row["b"]


def rate(x, y, row):
    """Of the rows with a high b, how many are low."""
    return low(x, y, row) & (row["b"] > HIGH), row["b"] > HIGH


METRICS = {"low": low, "rate": fb.ByClient(rate), "size": fb.ByClient(lambda x, y, row: row["b"] ** 2, worst="max")}


def by_hand(x, y, outer=Q.outer):
    """(clients, 3) the numbers, NaN where a ratio is one of nothing."""
    found = []
    for rows in outer:
        hits, high = rows["a"] @ flat(y) < rows["b"], rows["b"] > HIGH
        ratio = (hits & high).sum() / high.sum() if high.any() else np.nan
        found.append([hits.mean(), ratio, (rows["b"] ** 2).mean()])
    return np.array(found)


def solve(iterations=None, engine=None, data=Q.data, algorithm=LOCKSTEP, problem=Q.problem, **options):
    options = {"client_metrics": METRICS, "key": new_key(1), "check": False, **options}
    return fb.solve(problem, data, algorithm, Q.x, Q.y, iterations, engine=engine or fb.Simulation(), **options)


class Seen(fb.callbacks.Callback):
    """x and y at each row."""

    def __init__(self):
        self.rows = []

    def record(self, run, rows):
        self.rows.append((run.x, run.y))


def mean(weights, numbers):
    there = ~np.isnan(numbers)
    return (weights[:, None] * np.where(there, numbers, 0)).sum(0) / (weights[:, None] * there).sum(0)


WEIGHTS = {
    "alike": (Q.data, np.full(5, 0.2)),
    "rows": (WEIGHTED, np.array([len(rows["b"]) for rows in Q.outer]) / sum(len(rows["b"]) for rows in Q.outer)),
    "own": (OWN, np.array([1, 2, 3, 4, 10]) / 20),
}


@pytest.mark.parametrize("which", WEIGHTS)
@pytest.mark.parametrize(
    "engine", [fb.Simulation(), fb.Simulation(client_batch=2), fb.Loopback()], ids=["sim", "batch", "loop"]
)
def test_they_are_those_by_hand(which, engine):
    (data, weights), seen = WEIGHTS[which], Seen()
    result = solve(4, engine, data, callbacks=[seen], evaluate_every=2)
    assert len(seen.rows) == len(result.history) == 3
    for row, (x, y) in zip(result.history, seen.rows, strict=True):
        numbers = by_hand(x, y)
        expected = mean(weights, numbers)
        np.testing.assert_allclose([row[name] for name in METRICS], expected, rtol=1e-12)
        worst = [np.nanmin(numbers[:, 0]), np.nanmin(numbers[:, 1]), np.nanmax(numbers[:, 2])]
        np.testing.assert_allclose([row[f"{name}_worst"] for name in METRICS], worst, rtol=1e-12)
    found = result.clients
    np.testing.assert_allclose(np.stack(list(found.columns.values()), 1), numbers, rtol=1e-12)
    assert found.rows == tuple(data.count("outer")) and found.names == data.names
    assert list(found.mean.values()) == [result.history[-1][name] for name in METRICS]
    names = [name for name in result.history.columns if name.removesuffix("_worst") in METRICS]
    assert names == ["low", "low_worst", "rate", "rate_worst", "size", "size_worst"]


@pytest.mark.parametrize("engine", [fb.Simulation, fb.Loopback])
def test_with_a_cohort_everybody_is_asked_and_the_run_is_the_same(engine):
    how = {"engine": engine(cohort=2)}
    result, plain = solve(3, **how), solve(3, client_metrics=None, **how)
    np.testing.assert_array_equal(flat(result.x), flat(plain.x))
    np.testing.assert_allclose(result.history[-1]["low"], by_hand(result.x, result.y)[:, 0].mean(), rtol=1e-12)


@pytest.mark.parametrize("engine", [fb.Simulation, fb.Loopback])
@pytest.mark.parametrize(
    ("share", "loss", "up"),
    [
        ("mean", False, 3 * 24),
        ("mean", True, 8 + 3 * 24),
        (False, False, 1),
        (False, True, 8),
        (True, False, 72 + 5 * 3 * 9),
    ],
)
def test_an_evaluation_is_one_exchange_that_is_counted(engine, share, loss, up):
    metrics = {"validation_loss": fb.validation_loss} if loss else {}
    how = {"engine": engine(cohort=2), "evaluate_every": 2}
    result, plain = solve(5, share_metrics=share, metrics=metrics, **how), solve(5, client_metrics=None, **how)
    total = lambda run: np.array([[row[n] for n in ("rounds", "bytes_down", "bytes_up")] for row in run.history])
    size = 8 * (flat(Q.x).size + flat(Q.y).size)
    np.testing.assert_array_equal(total(result) - total(plain), np.outer([1, 2, 3, 4], [1, 5 * size, 5 * up]))
    (line,) = result.protocol.each_row
    assert line.name == "client_metrics (5 asked)" and (line.bytes_down, line.bytes_up) == (5 * size, 5 * up)
    assert result.clients is not None and "low_worst" in result.history[0]  # in this process all are known


def test_what_is_shared_changes_no_number():
    one, two, three = (solve(3, share_metrics=share, data=OWN) for share in (False, "mean", True))
    for other in (one, three):
        for name in METRICS:
            np.testing.assert_allclose(other.history.column(name), two.history.column(name), rtol=1e-13)
            np.testing.assert_array_equal(other.clients.columns[name], two.clients.columns[name])


def test_engines_agree_where_clients_drop_out_and_who_did_not_answer_is_said():
    one, other = (solve(6, kind(dropout=0.4), OWN) for kind in (fb.Simulation, fb.Loopback))
    for name in ("low", "rate", "size", "size_worst"):
        np.testing.assert_allclose(one.history.column(name), other.history.column(name), rtol=1e-12)
    numbers, found = by_hand(one.x, one.y), one.clients
    silent = np.isnan(found.columns["size"])
    assert 0 < silent.sum() < 5 and str(found) == str(other.clients)
    expected = mean(np.where(silent, 0, [1, 2, 3, 4, 10]), numbers)
    np.testing.assert_allclose(list(found.mean.values()), expected, rtol=1e-12)
    names = ", ".join(np.array(list("abcde"))[silent])
    assert f"{names} did not answer: left out." in found.notes


def test_a_budget_of_rounds_pays_for_it():
    result = solve(rounds=9, evaluate_every=2)
    assert result.history[-1]["rounds"] == 9 and result.iteration == 5 and len(result.history) == 4
    with pytest.raises(
        fb.InputError, match=r"2 rounds are too few: .* and the client metrics 1 at the start and the end"
    ):
        solve(rounds=2)


@pytest.mark.parametrize("at", [3, 4])
@pytest.mark.parametrize("share", [False, True])
def test_a_run_that_goes_on_has_the_same_rows(tmp_path, at, share):
    how = {"evaluate_every": 2, "data": WEIGHTED, "share_metrics": share}
    first = solve(at, callbacks=[Checkpoint(tmp_path)], **how)
    again, whole, resumed = solve(at, resume=tmp_path, **how), solve(8, **how), solve(8, resume=tmp_path, **how)
    assert [row["rounds"] for row in again.history] == [row["rounds"] for row in first.history]
    np.testing.assert_array_equal(again.clients.columns["low"], first.clients.columns["low"])
    for name in (*METRICS, "low_worst"):
        np.testing.assert_array_equal(resumed.history.column(name), whole.history.column(name))
    assert str(resumed.clients) == str(whole.clients)


@pytest.mark.parametrize("keep", ["size_worst:min", "low:max", "rate:min"])
def test_the_best_is_kept_by_them(keep):
    result, (name, way) = solve(5, keep=keep), keep.split(":")
    column = result.history.column(name)
    assert result.best().value == getattr(column, way)()


@pytest.mark.parametrize(
    "engine", [fb.Simulation(), fb.Simulation(client_batch=60), fb.Loopback()], ids=["sim", "batch", "loop"]
)
def test_clients_of_very_unequal_size_are_taken_block_by_block(engine):
    draw = np.random.default_rng(0)
    sizes = [400, *[1 + k % 7 for k in range(120)]]
    rows = [{"a": draw.normal(size=(n, 2)), "b": draw.normal(size=n) + k / 50} for k, n in enumerate(sizes)]
    data = fb.FederatedData.stack(rows, rows, "rows")
    assert data.outer.cut(121) is not None
    loss = lambda x, y, row: 0.5 * (row["a"] @ y - row["b"]) ** 2 + 0.5 * jnp.exp(x) * y @ y
    metrics = {
        "low": lambda x, y, row: row["a"] @ y < row["b"],
        "rate": lambda x, y, row: ((row["a"] @ y < row["b"]) & (row["b"] > 1), row["b"] > 1),
        "loss": fb.validation_loss,
    }
    x, y = jnp.zeros(()), jnp.ones(2)
    result = fb.solve(
        fb.Problem(loss, loss), data, LOCKSTEP, x, y, 1, key=new_key(0), engine=engine, client_metrics=metrics
    )
    x, y = float(result.x), np.asarray(result.y)
    hits = [each["a"] @ y < each["b"] for each in rows]
    columns = result.clients.columns
    np.testing.assert_allclose(columns["low"], [each.mean() for each in hits], rtol=1e-12)
    with np.errstate(invalid="ignore"):
        rates = [(h & (e["b"] > 1)).sum() / (e["b"] > 1).sum() for h, e in zip(hits, rows, strict=True)]
    assert np.isnan(rates).any()
    np.testing.assert_allclose(columns["rate"], rates, rtol=1e-12)
    losses = [(0.5 * (e["a"] @ y - e["b"]) ** 2).mean() + 0.5 * np.exp(x) * y @ y for e in rows]
    np.testing.assert_allclose(columns["loss"], losses, rtol=1e-11)
    np.testing.assert_allclose(result.clients.mean["low"], np.concatenate(hits).mean(), rtol=1e-12)


def test_of_a_batched_problem_they_are_of_batches():
    many = lambda loss: (
        lambda x, y, rows, w: jnp.sum(w * jax.vmap(lambda row: jnp.asarray(loss(x, y, row), float))(rows))
    )
    problem = fb.Problem(many(Q.problem.inner), many(Q.problem.outer), batched=True)
    pair = lambda x, y, rows, w: tuple(
        jnp.sum(w * each.astype(float)) for each in jax.vmap(lambda row: rate(x, y, row))(rows)
    )
    metrics = {"low": many(low), "rate": pair, "loss": fb.validation_loss}
    for engine in (fb.Simulation(), fb.Loopback()):
        result = solve(2, engine, WEIGHTED, problem=problem, client_metrics=metrics)
        numbers = by_hand(result.x, result.y)
        found = np.stack(list(result.clients.columns.values()), 1)
        np.testing.assert_allclose(found[:, :2], numbers[:, :2], rtol=1e-12)


def test_each_clients_outer_loss_has_the_mean_of_validation_loss():
    result = solve(3, data=WEIGHTED, client_metrics={"loss": fb.validation_loss}, keep="validation_loss:min")
    np.testing.assert_allclose(result.history.column("loss"), result.history.column("validation_loss"), rtol=1e-13)
    assert (result.history.column("loss_worst") > result.history.column("loss")).all()  # the highest


def test_modules_and_what_a_metric_reads_count_as_they_are_now():
    level = {"at": 0.0}
    metric = lambda x, y, row: jnp.where(row["b"] > level["at"], 1.0, 0.0)
    above = lambda: solve(1, client_metrics={"above": metric}).history[-1]["above"]
    share = lambda at: np.mean([(rows["b"] > at).mean() for rows in Q.outer])
    np.testing.assert_allclose(above(), share(0.0), rtol=1e-12)
    level["at"] = 2.0
    np.testing.assert_allclose(above(), share(2.0), rtol=1e-12)


def test_a_module_is_seen_whole():
    module = eqx.nn.MLP(4, 1, 3, 1, activation=jnp.tanh, key=new_key(0))
    loss = lambda x, y, row: (
        0.5 * (y(row["a"])[0] - row["b"]) ** 2
        + jnp.exp(x) * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(eqx.filter(y, eqx.is_array)))
    )
    metrics = {"size": lambda x, y, row: jnp.abs(y(row["a"])[0])}
    data = fb.FederatedData.stack(Q.outer, Q.outer, [1, 2, 3, 4, 10])
    given = fb.Problem(loss, loss), data, LOCKSTEP, jnp.zeros(()), module
    result = fb.solve(*given, 2, key=new_key(0), check=False, client_metrics=metrics)
    expected = [np.abs(jax.vmap(result.y)(jnp.asarray(rows["a"]))).mean() for rows in Q.outer]
    np.testing.assert_allclose(result.clients.columns["size"], expected, rtol=1e-12)
    np.testing.assert_allclose(result.evaluate(given[0], data, metrics).columns["size"], expected, rtol=1e-12)


def test_in_32_bits_as_users_run_it():
    with as_users_do():
        q = quadratic(seed=3, clients=5)
        given = q.problem, q.data, LOCKSTEP, q.x, q.y
        result = fb.solve(*given, 3, key=new_key(1), check=False, client_metrics=METRICS)
        numbers = by_hand(result.x, result.y, q.outer)
    np.testing.assert_allclose(np.stack(list(result.clients.columns.values()), 1), numbers, rtol=1e-6)
    assert result.protocol.each_row[0].bytes_up == 5 * 3 * 12


def test_states_of_clients_on_disk_change_nothing(tmp_path):
    one, other = (solve(3, fb.Simulation(client_state=where)) for where in ("memory", tmp_path))
    assert str(one.clients) == str(other.clients)
    np.testing.assert_array_equal(one.history.column("size"), other.history.column("size"))


def test_clients_with_lower_variables_of_their_own_have_the_mean_y_in_the_history():
    algorithm = fb.FedBiOAccLocal(inner_lr=0.02, hessian_lr=0.02, outer_lr=0.02)
    for engine in (fb.Simulation(), fb.Loopback()):
        result = solve(2, engine, algorithm=algorithm)
        found = np.stack(list(result.clients.columns.values()), 1)
        np.testing.assert_allclose(found, by_hand(result.x, result.y), rtol=1e-12)


@pytest.mark.slow
def test_train_and_tune_have_them():
    trained = fb.train(Q.problem, Q.data, Q.x, Q.y, rounds=8, key=new_key(0), check=False, client_metrics=METRICS)
    np.testing.assert_allclose(trained.clients.columns["low"], by_hand(Q.x, trained.y)[:, 0], rtol=1e-12)
    assert trained.history[-1]["rounds"] <= 8
    tuned = fb.tune(Q.problem, Q.data, Q.x, Q.y, rounds=40, key=new_key(0), check=False, client_metrics=METRICS)
    np.testing.assert_allclose(tuned.clients.columns["size"], by_hand(tuned.x, tuned.y)[:, 2], rtol=1e-12)


def test_a_description_and_an_app_have_them():
    described = fb.Description(
        problem=Q.problem, algorithm=LOCKSTEP, data=OWN, start=(Q.x, Q.y), key=new_key(1), iterations=3, check=False,
        client_metrics=METRICS, share_metrics=False,
    )  # fmt: skip
    (line,) = described.protocol().each_row
    assert line.bytes_up == 5 and "client_metrics" in str(described.protocol())
    np.testing.assert_array_equal(described.run().history.column("low"), solve(3, data=OWN).history.column("low"))
    app = fb.App(
        problem=Q.problem, algorithm=LOCKSTEP, start=lambda: (Q.x, Q.y), iterations=3, client_metrics=METRICS,
        load=lambda site: (Q.inner[int(site)], Q.outer[int(site)]), check=False, share_metrics=True, seed=1, precision=64,
    )  # fmt: skip
    data = app.data(list("01234"))
    own, task = app.describe(data, fb.Simulation()).run(), app.task(data)
    assert own.clients.names == tuple("01234") and task.describe(LOCKSTEP, iterations=3).share_metrics is True
    assert own.protocol.each_row[0].bytes_up == 5 * (72 + 5 * 3 * 9)


NAN = lambda x, y, row: jnp.where(row["b"] > 5, jnp.nan, 1.0)
BAD = {
    "what maps": ({"client_metrics": [low]}, "client_metrics= maps names to functions"),
    "no name": ({"client_metrics": {"": low}}, "a client metric's name is a text, not empty"),
    "no function": ({"client_metrics": {"a": 3}}, "the client metric 'a' is a function of .* got 3"),
    "arity": (
        {"client_metrics": {"a": lambda x, y: 1.0}},
        r"the client metric 'a' is called as fn\(x, y, row\), and it takes",
    ),
    "vector": (
        {"client_metrics": {"a": lambda x, y, r: r["a"]}},
        r"'a' must return one real number .*; it returned .*.*\[4\]",
    ),
    "triple": (
        {"client_metrics": {"a": lambda x, y, r: (1.0, 1.0, 1.0)}},
        "'a' must return one real number for one row, or a pair",
    ),
    "complex": (
        {"client_metrics": {"a": lambda x, y, r: jax.lax.complex(r["b"], r["b"])}},
        "'a' must return one real number",
    ),
    "text": ({"client_metrics": {"a": lambda x, y, r: "much"}}, "'a' must return one real number"),
    "fails": ({"client_metrics": {"a": lambda x, y, r: r["z"]}}, "the client metric 'a' failed on .*KeyError: 'z'"),
    "nan": ({"client_metrics": {"a": NAN}}, "'a' is not a finite number at client 4, at the start"),
    "taken": (
        {"client_metrics": {"rounds": low}},
        "a client metric cannot be named 'rounds', for the history has a column",
    ),
    "a metric": (
        {"client_metrics": {"a": low}, "metrics": {"a_worst": lambda x, y: 1.0}},
        "cannot be named 'a', .* 'a_worst'",
    ),
    "its own": ({"client_metrics": {"a": low, "a_worst": low}}, "cannot be named 'a', .* 'a_worst'"),
    "diagnostic": ({"client_metrics": {"vector_growth": low}}, "cannot be named 'vector_growth'"),
    "share": ({"share_metrics": "all"}, "share_metrics= is False, 'mean' or True: .* got 'all'"),
    "share too": ({"share_metrics": 1}, "share_metrics= is False, 'mean' or True: .* got 1"),
    "keep": ({"keep": "lows:max"}, "there is no metric 'lows': did you mean 'low'"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_meant_is_refused_in_a_sentence(what):
    given, sentence = BAD[what]
    with pytest.raises(fb.InputError, match=sentence) as told:
        solve(2, **given)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("given", "sentence"), [((3,), "is a function"), ((low, "least"), "worst=...")])
def test_by_client_is_checked(given, sentence):
    with pytest.raises(fb.InputError, match=sentence):
        fb.ByClient(*given)


def test_a_number_that_is_not_finite_later_is_said_and_ends_nothing():
    first = float(flat(Q.x)[0])
    odd = lambda x, y, row: jnp.where((ravel_pytree(x)[0][0] == first) | (row["b"] < 5), 1.0, jnp.inf)
    with pytest.warns(
        UserWarning, match="'odd' is not a finite number at client 4 after 1 iterations: .* has no odd there"
    ) as told:
        result = solve(3, client_metrics={"odd": odd, "low": low})
    assert len([each for each in told if "odd" in str(each.message)]) == 1
    np.testing.assert_array_equal(result.history.column("odd"), [1, np.nan, np.nan, np.nan])
    assert np.isnan(result.history[-1]["odd_worst"]) and np.isfinite(result.history[-1]["low_worst"])
    assert result.clients.notes == ("odd: client 4 has no finite number; so there is no mean and no worst.",)


def test_a_column_cannot_be_called():
    column = dataclasses.replace(fb.by_client.Column("low", True))
    with pytest.raises(fb.InputError, match=r"measured by the run.*result.evaluate\(problem, data\)"):
        column(Q.x, Q.y)

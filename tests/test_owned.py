"""Leaves of x and y that belong to clients: against the dense form, a run by hand, and between engines."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel import owned
from fedbilevel.algorithms import ALGORITHMS
from fedbilevel.cohorts import exchange_key, sample_cohort, stays
from fedbilevel.engines.messaging.transport import Request
from fedbilevel.owned import PerClient
from helpers.blocks import OWN, STEPS, WIDE, M, inner, outer
from helpers.places import ROOT, TESTS


def dense(loss: Callable) -> Callable:
    """The same loss of arrays that all clients have in common, of which each indexes its row."""

    def of_row(x, y, row):
        i = row["i"]
        return loss({"own": x["own"][i], "all": x["all"]}, {"head": y["head"][i], "body": y["body"]}, row)

    return of_row


def rows(weights=None, seed: int = 0) -> fb.FederatedData:
    draw = np.random.default_rng(seed)

    def client(i: int, count: int):
        return {
            "a": draw.normal(size=(count, WIDE)) + 0.3 * i,
            "b": draw.normal(size=count) + i,
            "i": np.full(count, i),
        }

    return fb.FederatedData.stack(
        [client(i, 4 + 3 * i) for i in range(M)], [client(i, 3 + i) for i in range(M)], weights
    )


BLOCKS, DENSE = fb.Problem(inner, outer), fb.Problem(dense(inner), dense(outer))


def start(marked: bool = True):
    draw = np.random.default_rng(1)
    x, y = (
        {"own": draw.normal(size=(M, OWN)), "all": np.asarray(0.3)},
        {"head": draw.normal(size=(M, OWN)), "body": draw.normal(size=WIDE)},
    )
    if marked:
        x["own"], y["head"] = fb.per_client(x["own"]), fb.per_client(y["head"])
    return x, y


def apart(one, other) -> float:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


def solved(algorithm, iterations: int, weights=None, **options) -> fb.Result:
    engine = options.pop("engine", fb.Simulation())
    key, data = jax.random.key(3), rows(weights)
    return fb.solve(BLOCKS, data, algorithm, *start(), iterations, key=key, engine=engine, check=False, **options)


# The dense form -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, "rows", [0.1, 0.2, 0.3, 0.4]])
def test_references_are_those_of_the_dense_form(weights):
    data = rows(weights)
    for of in ("inner_value", "outer_value", "value", "solution", "hypergradient", "hessian", "stationarity"):
        one, other = (getattr(fb.reference, of)(p, data, *start(m)) for p, m in ((BLOCKS, True), (DENSE, False)))
        assert apart(one, other) < 1e-10, of


@pytest.mark.parametrize("weights", [None, pytest.param("rows", marks=pytest.mark.slow)])
@pytest.mark.parametrize("algorithm", [fb.Lockstep(**STEPS), fb.AggITD(**STEPS, truncation="full", warm_start_v=True)])
def test_the_fixed_point_is_that_of_the_dense_form(algorithm, weights):
    result = solved(algorithm, 4000 if isinstance(algorithm, fb.Lockstep) else 2500, weights)
    data = rows(weights)
    x, y = owned.unmarked((result.x, result.y))
    gradient = fb.reference.hypergradient(DENSE, data, x, y)
    assert apart(gradient, jax.tree.map(jnp.zeros_like, gradient)) < 1e-10
    assert apart(y, fb.reference.solution(DENSE, data, x, y)) < 1e-10
    matrix = fb.reference.hessian(DENSE, data, x, y)
    ravel = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    pull = jax.grad(lambda y: fb_outer(data, x, y))(y)
    assert apart(np.linalg.solve(matrix, ravel(pull)), ravel(result.state.v)) < 1e-9


def fb_outer(data: fb.FederatedData, x, y):
    """f of the dense form, differentiable."""
    p = np.full(M, 1 / M) if data.weights is None else np.asarray(data.weights)
    rows = lambda i: data.outer.alone(i).all()
    return sum(p[i] * DENSE.outer_value(x, y, rows(i)) for i in range(M))


# By hand ------------------------------------------------------------------------------------------------------------------


class Hand:
    """Lockstep in numpy, under the rules for leaves that belong to clients."""

    def __init__(self, data: fb.FederatedData, local_steps: int):
        self.steps, self.p = local_steps, np.full(M, 1 / M) if data.weights is None else np.asarray(data.weights)
        of = lambda level, i: jax.tree.map(np.asarray, level.alone(i).rows)
        self.inner = [of(data.inner, i) for i in range(M)]
        self.outer, self.scale = [of(data.outer, i) for i in range(M)], np.asarray(data.outer.scale)
        x, y = start(False)
        self.x, self.y, self.v = x, y, {name: np.zeros_like(leaf) for name, leaf in y.items()}
        shared = lambda: {"all": 0.0, "body": np.zeros(WIDE), "v": np.zeros(WIDE)}
        self.c, self.own = shared(), [shared() for _ in range(M)]

    def directions(self, i: int, x, y, v):
        """D_i: of x (all, own), of y (body, head), of v (body, head)."""
        a, b = self.inner[i]["a"], self.inner[i]["b"]
        c, d = self.outer[i]["a"], self.outer[i]["b"]
        wide, n, k = lambda rows: np.hstack([rows, rows[:, :OWN]]), len(a), len(c)
        z, w = np.concatenate([y["body"], y["head"]]), np.concatenate([v["body"], v["head"]])
        pulled = np.concatenate([np.full(WIDE, x["all"]), x["own"]])
        lower = wide(a).T @ (wide(a) @ z - b) / n + z - pulled
        product = wide(a).T @ (wide(a) @ w) / n + w
        pull = self.scale[i] * wide(c).T @ (wide(c) @ z - d) / k
        # d_x f - d2_xy g v, where d2_xy g v = -v (summed over `body` for x["all"])
        along = self.scale[i] * 0.2 * x["all"] + w[:WIDE].sum(), self.scale[i] * 0.2 * x["own"] + w[WIDE:]
        adjoint = product - pull
        return along, (lower[:WIDE], lower[WIDE:]), (adjoint[:WIDE], adjoint[WIDE:])

    def step(self, cohort: np.ndarray, there: np.ndarray) -> None:
        lr = STEPS["inner_lr"]
        here = [int(i) for i, is_there in zip(cohort, there, strict=True) if is_there]
        moved, change = [], []
        x, y, v = ({name: leaf.copy() for name, leaf in part.items()} for part in (self.x, self.y, self.v))
        for i in here:
            own = lambda part, name, i=i: {**part, name: part[name][i]}
            xi, yi, vi = own(self.x, "own"), own(self.y, "head"), own(self.v, "head")
            (a_all, a_own), (a_body, a_head), (a_v, a_vown) = self.directions(i, xi, yi, vi)
            lag = {name: self.c[name] - self.own[i][name] for name in self.c}
            at = dict(yi)
            for s in range(self.steps):
                (body, head) = (a_body, a_head) if s == 0 else self.directions(i, xi, at, vi)[1]
                at = {"body": at["body"] - lr * (body + lag["body"]), "head": at["head"] - lr * head}
            # blocks: their owner's own steps, uncorrected
            x["own"][i] = xi["own"] - STEPS["outer_lr"] * a_own
            y["head"][i], v["head"][i] = at["head"], vi["head"] - STEPS["hessian_lr"] * a_vown
            along = -STEPS["outer_lr"] * (a_all + lag["all"]), at["body"] - yi["body"]
            moved.append((*along, -STEPS["hessian_lr"] * (a_v + lag["v"])))
            new = {"all": a_all, "body": a_body, "v": a_v}
            change.append({name: new[name] - self.own[i][name] for name in new})
            self.own[i] = new
        p = self.p[here] / self.p[here].sum() if len(cohort) == M else np.full(len(here), 1 / len(here))
        share = self.p[here].sum() if len(cohort) == M else len(here) / M
        mean = lambda parts: sum(w * part for w, part in zip(p, parts, strict=True))
        x["all"], y["body"], v["body"] = (
            old + mean([m[k] for m in moved]) for k, old in enumerate((x["all"], y["body"], v["body"]))
        )
        self.c = {name: self.c[name] + share * mean([each[name] for each in change]) for name in self.c}
        self.x, self.y, self.v = x, y, v


@pytest.mark.parametrize(
    ("weights", "cohort", "dropout"),
    [(None, None, 0.0), ("rows", None, 0.0), (None, 2, 0.0), ("rows", None, 0.4), (None, 3, 0.4)],
)
def test_lockstep_is_what_the_rules_say(weights, cohort, dropout):
    data, hand = rows(weights), Hand(rows(weights), 3)
    iterations, key = 6, jax.random.key(3)
    algorithm = fb.Lockstep(**STEPS, local_steps=3)
    result = solved(algorithm, iterations, weights, engine=fb.Simulation(cohort=cohort, dropout=dropout))
    for k in range(iterations):
        secret = exchange_key(jax.random.fold_in(key, k), 0)
        asked = sample_cohort(secret, M, cohort or M, None)
        hand.step(
            np.asarray(asked), np.asarray(stays(secret, asked, dropout)) if dropout else np.ones(len(asked), bool)
        )
    mine = owned.unmarked((result.x, result.y, result.state.v))
    assert apart(mine, (hand.x, hand.y, hand.v)) < 1e-12
    assert data.clients == M


def test_aggitd_with_one_step_each_is_gradient_descent_on_own_blocks():
    """Everyone, all rows, N = 1, "full": y <- y - inner_lr d_y g; z of one Horner turn; x along its own hypergradient."""
    result = solved(fb.AggITD(**STEPS, inner_rounds=1, local_steps=1, truncation="full"), 1)
    hand, eta, lam = Hand(rows(), 1), STEPS["inner_lr"], STEPS["hessian_lr"]
    own = lambda part, name, i: {**part, name: part[name][i]}
    zero = {"body": np.zeros(WIDE), "head": np.zeros(OWN)}
    each = lambda x, y, v: [hand.directions(i, own(x, "own", i), own(y, "head", i), v[i]) for i in range(M)]
    zeros = [zero] * M
    before = each(hand.x, hand.y, zeros)
    mean = lambda parts: sum(parts) / M
    # turn 0: r^0 = lam d_y f at y^0; then y^1; the vector: (I - lam H) r^0 + lam d_y f at y^1
    r = [{"body": -lam * mean([d[2][0] for d in before]), "head": -lam * before[i][2][1]} for i in range(M)]
    y = {
        "body": hand.y["body"] - eta * mean([d[1][0] for d in before]),
        "head": hand.y["head"] - eta * np.stack([d[1][1] for d in before]),
    }
    after = each(hand.x, y, r)
    body = r[0]["body"] - lam * mean([d[2][0] for d in after])
    v = [{"body": body, "head": r[i]["head"] - lam * after[i][2][1]} for i in range(M)]
    along = each(hand.x, y, v)
    x = {
        "all": hand.x["all"] - STEPS["outer_lr"] * mean([d[0][0] for d in along]),
        "own": hand.x["own"] - STEPS["outer_lr"] * np.stack([d[0][1] for d in along]),
    }
    assert apart(owned.unmarked((result.x, result.y)), (x, y)) < 1e-12


# Engines ------------------------------------------------------------------------------------------------------------------

SETTINGS = [({}, {}), ({"cohort": 2}, {}), ({"dropout": 0.4}, {}), ({"cohort": 3}, {"batch_size": 2})]


def made(name: str, more: dict) -> fb.Algorithm:
    kind = ALGORITHMS[name]
    fields = {field.name for field in dataclasses.fields(kind)}
    return kind(**{key: value for key, value in (STEPS | more).items() if key in fields})


SOON = ("lockstep",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in SOON)) for n in ALGORITHMS])
def test_engines_agree_or_the_algorithm_says_why_not(name):
    why = ALGORITHMS[name].about.no_blocks
    if why:
        with pytest.raises(fb.InputError, match=re.escape(why)):
            solved(made(name, {}), 1)
        return
    for engine, more in SETTINGS:
        one, other = (solved(made(name, more), 3, engine=kind(**engine)) for kind in (fb.Simulation, fb.Loopback))
        assert apart(one.state, other.state) < 1e-12
        assert [one.history[-1][c] for c in ("rounds", "bytes_down", "bytes_up")] == [
            other.history[-1][c] for c in ("rounds", "bytes_down", "bytes_up")
        ]


@pytest.mark.parametrize("algorithm", [fb.Lockstep(**STEPS), fb.AggITD(**STEPS, one_round=True)])
def test_cohorts_in_parts_and_on_disk_and_resumed_are_the_same(algorithm, tmp_path):
    whole = solved(algorithm, 6, engine=fb.Simulation(cohort=3))
    parts = solved(algorithm, 6, engine=fb.Simulation(cohort=3, client_batch=2))
    filed = solved(algorithm, 6, engine=fb.Simulation(cohort=3, client_state=tmp_path))
    assert apart(whole.state, parts.state) < 1e-12
    assert apart(whole.state, filed.state) < 1e-12
    keeping = lambda: [fb.callbacks.Checkpoint(tmp_path / "run")]
    solved(algorithm, 3, engine=fb.Simulation(cohort=3), callbacks=keeping())
    on = solved(algorithm, 6, engine=fb.Simulation(cohort=3), callbacks=keeping(), resume=tmp_path / "run")
    assert apart(whole.state, on.state) == 0
    assert on.history.column("bytes_up").tolist() == whole.history.column("bytes_up").tolist()


MESH = """
    import jax
    jax.config.update("jax_enable_x64", True)
    import fedbilevel as fb
    import test_owned as here

    mesh = jax.make_mesh((2,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,))
    for kind in (fb.Lockstep, fb.AggITD):
        for engine in ({}, {"cohort": 3}, {"dropout": 0.4}):
            runs = (fb.Simulation(mesh=on, **engine) for on in (None, mesh))
            one, two = (here.solved(kind(**here.STEPS), 3, engine=engine) for engine in runs)
            assert here.apart(one.state, two.state) < 1e-12, (kind, engine)
            assert one.history[-1]["bytes_up"] == two.history[-1]["bytes_up"]
    print(len(jax.devices()), "devices")
"""


@pytest.mark.slow
def test_two_devices_are_one():
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    path = os.pathsep.join(map(str, (ROOT / "src", TESTS)))
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    words = [sys.executable, "-c", textwrap.dedent(MESH)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "2 devices\n"


@pytest.mark.parametrize(
    ("algorithm", "exchanges"),
    [
        (fb.Lockstep(**STEPS), 1),
        (fb.SimFBO(**STEPS), 1),
        (fb.FedNest(**STEPS), 2),
        (fb.AggITD(**STEPS, outer_optimizer="adam:0.1"), 2),
    ],
)
def test_a_block_of_x_moves_where_its_owner_is_asked_alone(algorithm, exchanges):
    """At most as many blocks as there are exchanges that ask one client for x, whatever momentum an optimizer has."""
    for k in (1, 2):
        one, other = (solved(algorithm, n, engine=fb.Simulation(cohort=1)).x["own"] for n in (k, k + 1))
        moved = np.any(np.asarray(other) != np.asarray(one), axis=1)
        assert 1 <= moved.sum() <= exchanges


# What travels -------------------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_own_blocks():
    """Lockstep sends and gets 2 dx + 4 dy floats a client (`lockstep.py`)."""
    protocol = fb.protocol(fb.Lockstep(**STEPS), BLOCKS, rows(), *start())
    floats = 2 * (OWN + 1) + 4 * (OWN + WIDE)
    assert protocol.bytes_down == protocol.bytes_up == M * floats * 8
    result = solved(fb.Lockstep(**STEPS), 2, engine=fb.Loopback(cohort=3))
    assert result.history[-1]["bytes_down"] == 2 * 3 * floats * 8


def test_no_message_holds_another_clients_numbers(monkeypatch):
    sent: list[tuple[int, bytes]] = []
    kind = fb.engines.loopback.InProcess
    asked = kind.ask

    def ask(self, requests: dict[int, Request], deadline):
        sent.extend((client, request.payload) for client, request in requests.items())
        return asked(self, requests, deadline)

    monkeypatch.setattr(kind, "ask", ask)
    blocks: list[np.ndarray] = []
    look = lambda x, y: blocks.extend([np.asarray(x["own"]), np.asarray(y["head"])]) or 0.0
    solved(fb.AggITD(**STEPS, truncation="full"), 3, engine=fb.Loopback(), metrics={"looked": look})
    assert len(sent) == 3 * M * 13
    for client, payload in sent:
        numbers = set(np.frombuffer(payload, np.float64).tolist())
        for block in blocks:
            others = np.delete(block, client, axis=0)
            assert not numbers & set(others.ravel().tolist())


# As users have it ---------------------------------------------------------------------------------------------------------


def test_no_step_is_needed():
    result = solved(fb.Lockstep(), 400)
    data = rows()
    before = fb.reference.value(BLOCKS, data, *start())
    exact = fb.reference.value(BLOCKS, data, *both(solved(fb.Lockstep(**STEPS), 4000)))
    assert fb.reference.value(BLOCKS, data, *both(result)) - exact < 0.02 * (before - exact)


def both(result: fb.Result):
    return result.x, result.y


@pytest.mark.slow
def test_training_checks_metrics_and_estimates_take_blocks():
    data, (x, y) = rows(), start()
    trained = fb.train(BLOCKS, data, x, y, rounds=400, key=jax.random.key(0), inner_lr=0.05)
    assert apart(trained.y, fb.reference.solution(BLOCKS, data, x, y)) < 1e-8
    found = fb.train(BLOCKS, data, x, y, rounds=200, key=jax.random.key(0))  # with a step that is found
    assert apart(found.y, trained.y) < 1e-4
    fb.testing.check_problem(BLOCKS, data, x, y)
    result = fb.solve(BLOCKS, data, fb.Lockstep(**STEPS), x, y, 3, key=jax.random.key(0), keep="validation_loss:min")
    loss = fb.reference.outer_value(BLOCKS, data, result.x, result.y)
    assert abs(result.history[-1]["validation_loss"] - float(loss)) < 1e-12
    assert isinstance(result.best().x["own"], PerClient)
    many = fb.FedNest(**STEPS, inner_rounds=400, neumann_terms=800, truncation="full")
    h = fb.estimate_hypergradient(BLOCKS, data, many, x, y, key=jax.random.key(0))
    exact = fb.reference.hypergradient(BLOCKS, data, x, y)
    assert apart(h[0]["all"], exact["all"]) < 1e-8
    assert apart(h[0]["own"], M * np.asarray(exact["own"])) < 1e-8  # a block's own gradient is that times 1 / p_i


def test_how_each_client_fares_is_measured_with_its_own_blocks():
    data, metrics = rows(), {"miss": lambda x, y, row: outer(x, y, row)}
    for engine in (fb.Simulation(cohort=2), fb.Loopback()):
        result = solved(fb.Lockstep(**STEPS), 2, engine=engine, client_metrics=metrics)
        x, y = owned.unmarked((result.x, result.y))
        own = [({**x, "own": x["own"][i]}, {**y, "head": y["head"][i]}) for i in range(M)]
        of = lambda at, rows: np.mean(jax.vmap(lambda row: outer(*at, row))(rows))
        each = [of(own[i], data.outer.alone(i).rows) for i in range(M)]
        assert apart(result.clients.columns["miss"], np.stack(each)) < 1e-12
        found = result.evaluate(BLOCKS, data, metrics)
        assert apart(found.columns["miss"], np.stack(each)) < 1e-12
        alone = data.outer.alone(2).rows
        said = result.predict(lambda x, y, row: row["a"][:OWN] @ y["head"] + x["all"], alone, client=2)
        assert apart(said, np.asarray(alone["a"])[:, :OWN] @ np.asarray(y["head"][2]) + np.asarray(x["all"])) < 1e-12
        with pytest.raises(fb.InputError, match="name it, client=0 to 3"):
            result.predict(lambda x, y, row: x["all"], alone)
        with pytest.raises(fb.InputError, match="from 0 to 3; got 4"):
            result.predict(lambda x, y, row: x["all"], alone, client=4)


def test_blocks_of_unlike_lengths():
    """One weight a training row: client i's rows index its own."""
    draw = np.random.default_rng(5)
    counts = [3, 5, 2]
    client = lambda n: {"a": draw.normal(size=(n, WIDE)), "b": draw.normal(size=n), "place": np.arange(n)}
    data = fb.FederatedData.stack([client(n) for n in counts], [client(4) for _ in counts])
    loss = lambda y, row: 0.5 * (row["a"] @ y - row["b"]) ** 2
    weighted = lambda x, y, row: jax.nn.sigmoid(x[row["place"]]) * loss(y, row) + 0.5 * jnp.sum(y**2)
    problem = fb.Problem(weighted, lambda x, y, row: loss(y, row))
    x = fb.per_client([np.zeros(n) for n in counts])
    result = fb.solve(problem, data, fb.Lockstep(**STEPS), x, np.zeros(WIDE), 50, key=jax.random.key(0))
    assert [len(block) for block in result.x.blocks] == counts
    assert all(np.any(np.asarray(block) != 0) for block in result.x.blocks)
    filled = np.asarray(result.x)
    assert not filled[0, 3:].any() and not filled[2, 2:].any()  # what no row reads stays


def test_a_block_that_is_too_short_for_its_rows_is_told():
    draw = np.random.default_rng(5)
    client = lambda n: {"a": draw.normal(size=(n, WIDE)), "b": draw.normal(size=n), "place": np.arange(n)}
    data = fb.FederatedData.stack([client(3), client(5)], [client(4), client(4)], names=["north", "south"])
    loss = lambda y, row: 0.5 * (row["a"] @ y - row["b"]) ** 2
    weighted = lambda x, y, row: jax.nn.sigmoid(x["w"][row["place"]]) * loss(y, row) + 0.5 * jnp.sum(y**2)
    problem, x = fb.Problem(weighted, lambda x, y, row: loss(y, row)), {"w": fb.per_client([np.zeros(2), np.zeros(5)])}
    with pytest.warns(
        fb.errors.FedbilevelWarning, match=r"loss of north reads its block of x\['w'\] beyond the 2 entries"
    ):
        fb.solve(problem, data, fb.Lockstep(**STEPS), x, np.zeros(WIDE), 5, key=jax.random.key(0), check=False)


@pytest.mark.parametrize(
    ("blocks", "sentence"),
    [
        (3, "got int64"),
        (np.zeros(()), "first axis is the clients; got a number"),
        (np.zeros((M, 2), int), "floating-point numbers, which are optimised; got int64"),
        ([], "takes one array a client; got none"),
        ({"north": np.zeros(2)}, "in the order of data.names; got a mapping"),
        ([np.zeros(2), np.zeros((2, 2))], "client 1's is float64[2, 2] and client 0's float64[2]"),
        ([np.zeros(2), np.zeros(2, int)], "of client 1 takes floating-point numbers"),
    ],
)
def test_what_cannot_be_blocks_is_refused(blocks, sentence):
    with pytest.raises(fb.InputError, match=re.escape(sentence)):
        fb.per_client(blocks)


def test_blocks_of_other_clients_are_refused():
    x, y = start()
    x["own"] = fb.per_client(np.zeros((M + 3, OWN)))
    with pytest.raises(fb.InputError, match=r"x\['own'\] has blocks of 7 clients, and the data has 4 clients"):
        fb.solve(BLOCKS, rows(), fb.Lockstep(**STEPS), x, y, 1, key=jax.random.key(0))
    with pytest.raises(fb.InputError, match=r"x\['own'\] has blocks of 7 clients"):
        fb.reference.value(BLOCKS, rows(), x, y)

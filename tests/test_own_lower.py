"""FedBiOAccLocal's result: every client's own lower variable, and their mean; where they stay at the sites, no y at all."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.app import load_app
from fedbilevel.engines.loopback import _Looped
from fedbilevel.engines.messaging.transport import Answers as InTransit
from fedbilevel.pace.curvature import remembered
from helpers import apps
from helpers.plain import plain
from helpers.quadratic import flat, quadratic

pytest.importorskip("nvflare")
from fedbilevel.engines.nvflare import server
from fedbilevel.engines.nvflare.agreement import placeholder_data
from fedbilevel.engines.nvflare.server import AtTheEnd, Collab
from fedbilevel.engines.nvflare.site import _setup
from fedbilevel.engines.nvflare.worker import _Inside

Q = quadratic()
WEIGHTS = [1, 2, 0.5, 3, 1]
P = np.asarray(WEIGHTS) / sum(WEIGHTS)
WEIGHTED = fb.FederatedData.stack(Q.inner, Q.outer, WEIGHTS)
STEPS = {"inner_lr": 0.05, "hessian_lr": 0.05, "local_steps": 2, "slow_after": 1e9}
MOVING = fb.FedBiOAccLocal(**STEPS, outer_lr=0.02)
HELD = fb.FedBiOAccLocal(**STEPS, outer_lr=1e-14)  # x stays, so that every client solves a quadratic of its own


def run(algorithm, iterations, engine=None, data=Q.data, problem=Q.problem, y=Q.y, **options):
    return fb.solve(problem, data, algorithm, Q.x, y, iterations, key=jax.random.key(0), engine=engine, **options)


def each(result) -> np.ndarray:
    """(clients, numbers of y)"""
    return np.asarray(jax.vmap(lambda y: jax.flatten_util.ravel_pytree(y)[0])(result.clients_y))


OWN = np.stack([np.linalg.solve(H, k) for H, k in zip(Q.hessians(Q.t), Q.targets(Q.t), strict=True)])  # y_i*(x)


@pytest.mark.parametrize(
    ("engine", "data", "p"),
    [
        (fb.Simulation(cohort=2, dropout=0.4), Q.data, np.full(5, 0.2)),
        (fb.Simulation(dropout=0.4), WEIGHTED, P),
        pytest.param(fb.Simulation(), Q.data, np.full(5, 0.2), marks=pytest.mark.slow),
        pytest.param(fb.Simulation(cohort=3), WEIGHTED, P, marks=pytest.mark.slow),
    ],
    ids=["cohort-dropout", "weighted-dropout", "everybody", "weighted-cohort"],
)
def test_every_client_has_its_own_solution_and_y_is_their_mean(engine, data, p):
    assert np.abs(OWN - flat(Q.y)).min(axis=1).max() > 0.1  # the start is none of them
    result = run(HELD, 3000, engine, data)
    np.testing.assert_allclose(each(result), OWN, rtol=0, atol=1e-8)
    np.testing.assert_allclose(flat(result.y), p @ OWN, rtol=0, atol=1e-8)
    assert jax.tree.structure(result.clients_y) == jax.tree.structure(Q.y)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [fb.Simulation(cohort=2), fb.Loopback(cohort=2)])
def test_a_client_that_was_never_asked_has_the_start(engine):
    own = each(run(MOVING, 1, engine))
    moved = np.abs(own - flat(Q.y)).max(axis=1)
    assert (moved == 0).sum() == 3 and (moved > 1e-3).sum() == 2


def test_metrics_see_the_mean_at_every_row():
    seen = lambda x, y: float(np.sum(flat(y) ** 2))
    history = run(MOVING, 6, metrics={"size": seen}, evaluate_every=2).history
    assert [row["iteration"] for row in history] == [0, 2, 4, 6]
    expected = [seen(None, Q.y), *(seen(None, run(MOVING, k).y) for k in (2, 4, 6))]
    np.testing.assert_allclose(history.column("size"), expected, rtol=1e-13)
    assert len({round(value, 6) for value in expected}) == 4


@pytest.mark.parametrize("engine", [fb.Simulation(), pytest.param(fb.Loopback(), marks=pytest.mark.slow)])
def test_a_run_that_blows_up_keeps_what_was_last_finite(engine):
    wild = fb.FedBiOAccLocal(**STEPS | {"inner_lr": 5.0}, outer_lr=0.02)
    with pytest.raises(fb.Diverged) as failure:
        run(wild, 200, engine)
    kept = failure.value.result
    again = run(wild, kept.iteration, engine)
    assert np.isfinite(each(kept)).all()
    np.testing.assert_allclose(each(kept), each(again), rtol=1e-9)
    np.testing.assert_allclose(flat(kept.y), each(again).mean(0), rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [fb.Simulation, pytest.param(fb.Loopback, marks=pytest.mark.slow)])
def test_a_resumed_run_has_the_same(kind, tmp_path):
    engine = kind(cohort=3)
    run(MOVING, 4, engine, callbacks=[fb.callbacks.Checkpoint(tmp_path)])
    np.testing.assert_allclose(each(run(MOVING, 9, engine, resume=tmp_path)), each(run(MOVING, 9, engine)), atol=1e-13)


def test_what_is_not_trained_is_as_in_the_start():
    y = {**Q.y, "name": "mine", "turns": jnp.arange(3), "apply": jnp.tanh, "size": 7}
    bare = lambda y: {name: y[name] for name in Q.y}
    problem = fb.Problem(
        *(lambda x, y, e, loss=loss: loss(x, bare(y), e) for loss in (Q.problem.inner, Q.problem.outer))
    )
    result = run(MOVING, 2, problem=problem, y=y)
    for found in (result.clients_y, result.y):
        assert (found["name"], found["apply"], found["size"]) == ("mine", jnp.tanh, 7)
    assert result.clients_y["w"].shape == (5, 3) and result.y["w"].shape == (3,)
    np.testing.assert_array_equal(result.clients_y["turns"], np.tile(np.arange(3), (5, 1)))
    np.testing.assert_allclose(flat(bare(result.y)), flat(run(MOVING, 2).y), rtol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "other", "data"),
    [
        (fb.Loopback(dropout=0.4), fb.Simulation(dropout=0.4), WEIGHTED),
        (fb.Simulation(cohort=2, dropout=0.3), fb.Loopback(cohort=2, dropout=0.3), Q.data),
    ],
)
def test_shared_moves_add_up_to_the_mean_over_all_on_each_engine(engine, other, data):
    """What a network's server has, that sees no client's own, is the result of a simulation."""
    result = run(dataclasses.replace(MOVING, share_lower=True), 12, engine, data)
    np.testing.assert_allclose(flat(result.state.y), flat(result.y), rtol=1e-12)
    alone = run(MOVING, 12, other, data)
    np.testing.assert_array_equal(flat(alone.state.y), flat(Q.y))
    np.testing.assert_allclose(flat(alone.y), flat(result.y), rtol=1e-12)
    np.testing.assert_allclose(each(alone), each(result), rtol=1e-12, atol=1e-12)


def test_moves_of_a_cohort_drawn_by_weight_do_not_add_up_and_are_refused():
    with pytest.raises(fb.InputError, match=r"share_lower=True\) cannot follow the mean"):
        run(dataclasses.replace(MOVING, share_lower=True), 1, fb.Simulation(cohort=2), WEIGHTED)


@pytest.mark.slow
def test_the_automatic_step_is_that_of_the_clients_own_places():
    """y^4 / 4 + y^2 / 2 - c y has a curvature of 1 at the start and of 3 y_i^2 + 1 where y_i^3 + y_i = c."""
    c = np.array([1.0, 10.0, 30.0])
    data = fb.FederatedData.stack(*2 * [[{"c": np.full((1,), each)} for each in c]])
    inner = lambda x, y, e: y**4 / 4 + y**2 / 2 - (e["c"] + x) * y
    outer = lambda x, y, e: 0.5 * (y - 1.0) ** 2 + 0.5 * x**2
    algorithm = fb.FedBiOAccLocal(inner_lr=0.02, outer_lr=1e-14, hessian_lr="auto", slow_after=1e9)
    result = fb.solve(
        fb.Problem(inner, outer), data, algorithm, jnp.zeros(()), jnp.zeros(()), 121, key=jax.random.key(0)
    )
    roots = [float(np.roots([1, 0, 1, -each]).real[np.isreal(np.roots([1, 0, 1, -each]))][0]) for each in c]
    np.testing.assert_allclose(result.clients_y, roots, rtol=1e-6)
    assert 3 * max(roots) ** 2 + 1 > 25
    np.testing.assert_allclose(remembered(result.state).largest, 3 * max(roots) ** 2 + 1, rtol=1e-6)


def test_they_are_saved_by_name(tmp_path):
    result = run(MOVING, 2)
    result.save(tmp_path)
    with np.load(tmp_path / "variables.npz") as kept:
        np.testing.assert_array_equal(kept["clients_y['deep']['s']"], result.clients_y["deep"]["s"])
        np.testing.assert_array_equal(kept["y['w']"], result.y["w"])


def test_other_algorithms_have_one_for_all():
    assert run(plain(fb.FedBiOAcc, **STEPS, outer_lr=0.02), 2).clients_y is None


def test_an_own_lower_variable_unlike_y_is_refused():
    class Odd(fb.FedBiOAccLocal):
        def own_lower(self, state):
            return {"w": state.lower[0]["w"]}

    with pytest.raises(fb.InputError, match=r"Odd.own_lower\(state\) returns a client's own y"):
        run(Odd(), 1)


# Where the clients are elsewhere ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Elsewhere(fb.Loopback):
    """Loopback, whose clients nobody can look into."""

    def bind(self, *args, **options):
        execution = super().bind(*args, **options)
        assert isinstance(execution, _Looped)
        execution.holds_clients = False
        return execution


@pytest.mark.slow
def test_there_is_no_y_but_a_warning_where_it_stays_with_the_clients(tmp_path):
    with pytest.warns(fb.errors.FedbilevelWarning, match="share_lower=True") as told:
        result = run(MOVING, 3, Elsewhere(), metrics={"size_of_x": lambda x, y: flat(x).sum()})
    assert result.y is None and result.clients_y is None and len(told) == 1
    assert result.history.column("size_of_x").shape == (4,)
    result.save(tmp_path)
    with np.load(tmp_path / "variables.npz") as kept:
        assert sorted(kept.files) == ["x['k']", "x['u']"]


@pytest.mark.filterwarnings("ignore::fedbilevel.errors.FedbilevelWarning")
@pytest.mark.parametrize(
    "metric", [lambda x, y: flat(y).sum(), lambda x, y: y["w"][0], lambda x, y: y.w, lambda x, y: jnp.sum(y)]
)
def test_a_metric_of_y_is_refused_there(metric):
    with pytest.raises(fb.InputError, match="'of_y' cannot be taken, for y stays at the sites"):
        run(MOVING, 3, Elsewhere(), metrics={"of_y": metric})


def test_shared_it_is_their_mean_there_too():
    shared = dataclasses.replace(MOVING, share_lower=True)
    one, other = (
        run(shared, 3, Elsewhere(cohort=2), metrics={"y0": lambda x, y: y["w"][0]}),
        run(MOVING, 3, fb.Simulation(cohort=2)),
    )
    np.testing.assert_allclose(flat(one.y), flat(other.y), rtol=1e-12)
    assert one.history[-1]["y0"] == one.y["w"][0] and one.clients_y is None
    assert one.history[-1]["bytes_up"] > other.history[-1]["bytes_up"]


# At the sites -------------------------------------------------------------------------------------------------------------

LOCAL = "fb.FedBiOAccLocal(inner_lr=0.02, hessian_lr=0.02, outer_lr=0.02, local_steps=2, share_lower=SHARE)"


class Answers(dict):
    """Pairs of name and answer as nvflare has them."""

    failures: ClassVar[dict] = {}

    def __iter__(self):
        return iter(self.items())


class Sites:
    """Three sites' workers in this process, as the server reaches them over a network."""

    def __init__(self, file, folder, silent=()):
        self.folder, self.names, self.silent = folder, [f"site-{k}" for k in (1, 2, 3)], silent
        self.inside = {name: _Inside(str(file), name, folder / name) for name in self.names}

    def every(self, what, headers):
        return Answers({name: each.do(what, b"", headers(name))[0] for name, each in self.inside.items()})

    def hello(self):
        return Answers({name: {**said, "worker": 1} for name, said in self.every("load", lambda name: {})})

    def prepare(self, setup):
        return self.every("prepare", lambda name: _setup(setup, name))

    def finish(self, states, iterations):
        return self.every("finish", lambda name: {"counted": states[name], "iterations": iterations})

    def ask(self, requests, deadline):
        answers = InTransit()
        for client, one in requests.items():
            header = {"place": one.place, "tag": list(one.tag), "sent": list(one.sent), "wanted": list(one.wanted)}
            header |= {"counted": list(one.counted), "kept": list(one.kept)}
            answers.replies[client] = self.inside[self.names[client]].do("answer", one.payload, header)[1]
            if (one.tag[0] + client) in self.silent:  # it has moved, and its answer is lost
                answers.failures[client] = ConnectionError(answers.replies.pop(client)[:0].decode())
        return answers

    def solve(self, app, **options):
        engine = Collab(self.names, fb.Faults(minimum=1), self.folder / "rounds.csv", False, app.cohort)
        engine.transport.ask = self.ask
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server, "sites", lambda names, seconds: self)
            try:
                weights = engine.meet(app)
                data = placeholder_data(engine.schemas, 3, weights)
                return fb.solve(
                    app.problem, data, app.algorithm, *app.begin(), app.iterations, key=app.key, engine=engine,
                    metrics=app.metrics, callbacks=[AtTheEnd(engine)], check=False, **options,
                )  # fmt: skip
            finally:
                engine.ledger.close()

    def own(self):
        """What they wrote down."""
        found = [np.load(self.folder / name / "lower.npz") for name in self.names]
        return np.stack([one["y"] for one in found])


@pytest.fixture
def app(tmp_path):
    def write(share, more="iterations=8"):
        return apps.write(tmp_path, apps.CLOSED_FORM, f"{more}, algorithm={LOCAL.replace('SHARE', str(share))}")

    return write


@pytest.mark.slow
def test_each_site_writes_down_its_own_and_the_server_has_none(app, tmp_path):
    file = app(share=False, more='iterations=8, metrics={"x": lambda x, y: x[0]}')
    sites, loaded = Sites(file, tmp_path), load_app(file)
    with pytest.warns(fb.errors.FedbilevelWarning, match="each site keeps its own"):
        result = sites.solve(loaded)
    simulated = fb.solve(loaded.problem, loaded.data(sites.names), loaded.algorithm, *loaded.begin(), 8, key=loaded.key)
    assert result.y is None and result.clients_y is None
    np.testing.assert_allclose(result.x, simulated.x, rtol=1e-12)
    np.testing.assert_allclose(sites.own(), simulated.clients_y, rtol=1e-12)
    assert np.abs(sites.own()).min(axis=1).max() > 1e-2


@pytest.mark.slow
def test_what_counts_is_what_they_write_down_also_where_answers_were_lost(app, tmp_path):
    file = app(share=True, more="iterations=8, weights='rows'")
    sites = Sites(file, tmp_path, silent=(2, 8, 9))  # the last but one of site-2 and site-3, the last of them too
    result = sites.solve(load_app(file))
    counts = np.array([6, 7, 8])
    np.testing.assert_allclose(result.y, counts / counts.sum() @ sites.own(), rtol=1e-12)
    assert result.clients_y is None


# Names of metrics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["iteration", "rounds", "bytes_down", "bytes_up", "seconds", "hypergradient_norm", "vector_growth", "algorithm", "seed",
     "halvings"],
)  # fmt: skip
def test_a_metric_named_like_another_column_is_refused(name):
    metrics = {name: lambda x, y: 0.0}
    with pytest.raises(fb.InputError, match=f"cannot be named '{name}'"):
        run(plain(fb.Lockstep), 1, metrics=metrics)
    with pytest.raises(fb.InputError, match=f"cannot be named '{name}'"):
        fb.App(Q.problem, fb.Lockstep(), lambda: (Q.x, Q.y), lambda site: (), iterations=1, metrics=metrics)


class Talking(fb.FedBiO):
    def step(self, fed, state):
        state, info = super().step(fed, state)
        return state, {"loudness": info.hypergradient_norm}


@pytest.mark.parametrize(
    ("metrics", "sentence"),
    [
        ({"loudness": lambda x, y: 0.0}, "cannot be named 'loudness'"),
        ({3: lambda x, y: 0.0}, "a metric's name is a text, not empty; got 3"),
        ({"": lambda x, y: 0.0}, "a metric's name is a text, not empty; got ''"),
        ({"accuracy": 0.5}, "the metric 'accuracy' is a function of"),
        ([lambda x, y: 0.0], "metrics= maps names to functions"),
    ],
)
def test_metrics_that_cannot_be_columns(metrics, sentence):
    with pytest.raises(fb.InputError, match=sentence):
        run(Talking(), 1, metrics=metrics)


@pytest.mark.parametrize("name", ["rounds", "seconds", "seed", "turn"])
def test_diagnostics_and_constants_take_no_column_s_place_either(name, tmp_path):
    class Loud(fb.FedBiO):
        def step(self, fed, state):
            state, info = super().step(fed, state)
            return state, {name: info.hypergradient_norm}

    with pytest.raises(fb.InputError, match=f"Loud.step tells of '{name}'"):
        run(Loud(), 1)
    if name in ("rounds", "seconds"):
        with pytest.raises(fb.InputError, match=rf"CSV\(extra=...\) cannot have {name}"):
            run(plain(fb.FedBiO), 1, callbacks=[fb.callbacks.CSV(tmp_path / "history.csv", {name: 3})])

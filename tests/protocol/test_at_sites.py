"""Blocks that are kept at the sites: the iterates of those that the server holds, and nothing of them travels."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.algorithm import State
from fedbilevel.algorithms import ALGORITHMS
from fedbilevel.engines.faults import StateLost
from fedbilevel.engines.loopback import InProcess
from fedbilevel.owned import KeptAtSites, away
from helpers.blocks import OWN, STEPS, WIDE, M, inner, outer

PROBLEM = fb.Problem(inner, outer)


def rows(weights=None) -> fb.FederatedData:
    draw = np.random.default_rng(0)
    client = lambda i, n: {"a": draw.normal(size=(n, WIDE)) + 0.3 * i, "b": draw.normal(size=n) + i}
    return fb.FederatedData.stack(
        [client(i, 4 + 3 * i) for i in range(M)], [client(i, 3 + i) for i in range(M)], weights
    )


def start(where):
    draw = np.random.default_rng(1)
    x = {"own": fb.per_client(draw.normal(size=(M, OWN)), keep=where), "all": np.asarray(0.3)}
    return x, {"head": fb.per_client(draw.normal(size=(M, OWN)), keep=where), "body": draw.normal(size=WIDE)}


def solved(algorithm, engine, iterations=3, where="site", weights=None, **options) -> fb.Result:
    key = jax.random.key(3)
    given = PROBLEM, rows(weights), algorithm, *start(where), iterations
    return fb.solve(*given, key=key, engine=engine, check=False, **options)


def apart(one, other) -> float:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


def books(result) -> list:
    return [[row[name] for name in ("rounds", "bytes_down", "bytes_up")] for row in result.history]


def steps_of(name: str) -> fb.Algorithm:
    kind = ALGORITHMS[name]
    return kind(**{field: step for field, step in STEPS.items() if hasattr(kind, field)})


FULL = {"truncation": "full", "inner_rounds": 2}


@pytest.mark.parametrize(
    ("algorithm", "engine", "weights"),
    [
        (fb.Lockstep(**STEPS), {}, "rows"),
        (fb.Lockstep(**STEPS, batch_size=2), {"cohort": 3, "dropout": 0.4}, None),
        (fb.AggITD(**STEPS, inner_rounds=2), {"cohort": 2}, None),
        (fb.AggITD(**STEPS, **FULL, batch_size=2), {"dropout": 0.4}, "rows"),
        (
            fb.AggITD(**STEPS, **FULL, outer_optimizer="adam:0.1", skip_idle_rounds=True, local_steps=1),
            {"cohort": 2},
            None,
        ),
        pytest.param(
            fb.AggITD(**STEPS, **FULL, one_round=True, warm_start_v=True),
            {"dropout": 0.4},
            None,
            marks=pytest.mark.slow,
        ),
        pytest.param(fb.FedNest(**STEPS, inner_rounds=2), {"cohort": 2}, None, marks=pytest.mark.slow),
    ],
)
def test_iterates_are_those_of_blocks_at_the_server(algorithm, engine, weights):
    at_server = solved(algorithm, fb.Simulation(**engine), 4, "server", weights)
    simulated = solved(algorithm, fb.Simulation(**engine), 4, "site", weights)
    real = solved(algorithm, fb.Loopback(**engine), 4, "site", weights)
    assert apart((at_server.x, at_server.y), (simulated.x, simulated.y)) < 1e-12
    assert apart(simulated.state, real.state) < 1e-12
    assert apart((simulated.x, simulated.y), (real.x, real.y)) < 1e-12
    assert books(simulated) == books(real)
    assert [row[0] for row in books(real)] == [row[0] for row in books(at_server)]
    assert books(real)[-1][1] < books(at_server)[-1][1]
    assert (
        apart(simulated.history.column("hypergradient_norm")[1:], real.history.column("hypergradient_norm")[1:]) < 1e-12
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, kind in ALGORITHMS.items() if not kind.about.no_blocks])
def test_every_algorithm_keeps_them_or_says_why_not(name):
    if name == "shrofbo":  # it clips by the length of what all blocks are part of
        with pytest.raises(fb.InputError, match="ShroFBO, as it is set, cannot keep leaves at the sites"):
            solved(steps_of(name), fb.Simulation(cohort=3))
        return
    simulated, real = (solved(steps_of(name), kind(cohort=3)) for kind in (fb.Simulation, fb.Loopback))
    assert apart(simulated.state, real.state) < 1e-12
    assert books(simulated) == books(real)


def test_they_count_nothing():
    """Lockstep sends and gets 2 dx + 4 dy floats a client (`lockstep.py`), of common leaves alone."""
    protocol = fb.protocol(fb.Lockstep(**STEPS), PROBLEM, rows(), *start("site"))
    floats = 2 * 1 + 4 * WIDE
    assert protocol.bytes_down == protocol.bytes_up == M * floats * 8
    result = solved(fb.Lockstep(**STEPS), fb.Loopback(cohort=3), 2)
    assert books(result)[-1] == [2, 2 * 3 * floats * 8, 2 * 3 * floats * 8]


def test_no_message_holds_any_of_their_numbers(monkeypatch):
    travelled: list[bytes] = []
    asked = InProcess.ask

    def ask(self, requests, deadline):
        answers = asked(self, requests, deadline)
        travelled.extend(request.payload for request in requests.values())
        travelled.extend(answers.replies.values())
        return answers

    monkeypatch.setattr(InProcess, "ask", ask)
    blocks: set[float] = set()
    look = lambda x, y: blocks.update(np.ravel([x["own"], y["head"]]).tolist()) or 0.0
    solved(fb.AggITD(**STEPS, **FULL), fb.Loopback(), metrics={"looked": look})
    assert len(travelled) == 2 * 3 * M * 7
    assert len(blocks) == 4 * 2 * M * OWN
    for payload in travelled:
        assert not blocks & set(np.frombuffer(payload, np.float64).tolist())


@pytest.mark.parametrize("kind", [fb.Simulation, fb.Loopback])
def test_a_resumed_run_is_the_uninterrupted_one(kind, tmp_path):
    algorithm, keeping = fb.AggITD(**STEPS, **FULL), lambda: [fb.callbacks.Checkpoint(tmp_path)]
    whole = solved(algorithm, kind(cohort=2), 5)
    solved(algorithm, kind(cohort=2), 2, callbacks=keeping())
    on = solved(algorithm, kind(cohort=2), 5, callbacks=keeping(), resume=tmp_path)
    assert apart(whole.state, on.state) == 0
    assert books(whole) == books(on)


def test_how_clients_fare_is_measured_with_them():
    metrics = {"miss": lambda x, y, row: outer(x, y, row)}
    options = {"client_metrics": metrics, "keep": "validation_loss:min"}
    one, other = (solved(fb.Lockstep(**STEPS), kind(cohort=3), 2, **options) for kind in (fb.Simulation, fb.Loopback))
    for found in (one, other):
        assert apart(found.clients.columns["miss"], found.evaluate(PROBLEM, rows(), metrics).columns["miss"]) < 1e-12
        exact = fb.reference.outer_value(PROBLEM, rows(), found.x, found.y)
        assert abs(found.history[-1]["validation_loss"] - float(exact)) < 1e-12
    assert books(one) == books(other)


def test_outer_losses_of_means_go_with_them():
    problem = fb.Problem(inner, outer_means=outer, outer_of=lambda mean: mean**2)
    options = {"key": jax.random.key(3), "check": False}
    given = problem, rows(), fb.Lockstep(**STEPS), *start("site"), 3
    one, other = (fb.solve(*given, engine=kind(cohort=3), **options) for kind in (fb.Simulation, fb.Loopback))
    assert apart(one.state, other.state) < 1e-12


# Refused ----------------------------------------------------------------------------------------------------------------


class Tells(fb.Algorithm):
    """Its server tells everybody how long all blocks are, or moves blocks by what others have sent."""

    blames: bool = fb.option(False)

    def step(self, fed, state):
        size = jnp.sum(state.x["own"].value)
        along = fed.average(self.gradient, state.x, state.y, size if self.blames else size * 0 + 1.0)
        scale = 1.0 if self.blames else along["all"]
        x = jax.tree.map(lambda leaf, moved: leaf - scale * moved, state.x, along)
        return State(x, state.y), {"told": jnp.sum(along["all"])}

    def gradient(self, client, x, y, size):
        return jax.tree.map(lambda leaf: size * leaf, client.problem.outer_gradients(x, y, client.outer)[0])


@pytest.mark.parametrize(
    ("algorithm", "sentence"),
    [
        (fb.Lockstep(), "give them as numbers (inner_lr=, hessian_lr=, outer_lr=), or leave keep= out"),
        (fb.Lockstep(**STEPS, anderson=3), "Lockstep, as it is set, cannot keep leaves at the sites"),
        (Tells(), "what its server does with a block depends on what others send"),
        (Tells(blames=True), "what its server sends to all depends on the blocks"),
    ],
)
def test_what_no_site_can_do_alone_is_refused(algorithm, sentence):
    for engine in (fb.Simulation(), fb.Loopback()):
        with pytest.raises(fb.InputError, match=re.escape(sentence)):
            solved(algorithm, engine)


def test_another_place_is_refused():
    with pytest.raises(fb.InputError, match=re.escape("per_client(keep=...) is 'server' or 'site'")):
        fb.per_client(np.zeros((M, 2)), keep="client")


def test_a_site_that_has_lost_its_blocks_ends_the_run(monkeypatch):
    from fedbilevel.engines.messaging.client_side import ClientSide

    def lost(self, request):
        raise StateLost("client 2 has no state of exchange (0, 0, 0).")

    monkeypatch.setattr(ClientSide, "_state", lost)
    faults = fb.Faults(lost_state="rebuild")
    with pytest.raises(fb.RunError, match=r"kept there alone .* gone with it"):
        solved(fb.Lockstep(**STEPS), fb.Loopback(faults=faults))


def test_what_is_elsewhere_says_so():
    (there,) = jax.tree.leaves(away({"own": fb.per_client(np.zeros((M, OWN)), keep="site")}))
    assert isinstance(there, KeptAtSites)
    assert repr(there) == "<kept at the sites: 4 clients' blocks of float64[2]>"
    for read in (np.asarray, len, lambda it: it[0], lambda it: it.value, lambda it: it.blocks, list):
        with pytest.raises(fb.InputError, match=r"kept at the sites .* nobody here knows them"):
            read(there)

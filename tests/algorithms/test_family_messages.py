"""Rounds and bytes of the methods beyond FedNest's family: the docstrings' formulas, the protocol, both engines' ledgers."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.algorithms.about import about
from helpers.plain import plain
from helpers.small_task import CLIENTS, COHORT, COLUMNS, DX, DY, ledger, task

Z, WHOLE = DX + 2 * DY, 4  # numbers of (x, y, v); bytes of a whole number
ENGINES = (fb.Simulation(cohort=COHORT), fb.Loopback(cohort=COHORT))


def over_cohort(rounds, down, up, whole=0):
    """(rounds, bytes down, bytes up) where all exchanges ask the cohort; floats, and whole numbers down."""
    return np.array([rounds, COHORT * (8 * down + WHOLE * whole), COHORT * 8 * up])


T = 3
COUNTS = {
    plain(fb.SimFBO): over_cohort(1, Z, Z),
    plain(fb.SimFBO, client_steps=(1, 2, 3, 4)): over_cohort(1, Z, Z),
    plain(fb.ShroFBO): over_cohort(1, Z, Z + 1),
    plain(fb.MemFBO): over_cohort(1, Z, Z),
    plain(fb.FedBiO): over_cohort(1, Z, Z),
    plain(fb.FedBiOAcc): over_cohort(1, 2 * Z, 2 * Z, whole=1),
    plain(fb.FedBiOAccLocal): over_cohort(1, 2 * DX, 2 * DX, whole=1),
    plain(fb.FedBiOAccLocal, share_lower=True): over_cohort(1, 2 * DX, 2 * DX + DY, whole=1),
    plain(fb.LocalBSGM): over_cohort(1, 2 * DX + 2 * DY, 2 * DX + 2 * DY, whole=1),
    plain(fb.LocalBSGVRM, truncation="full"): over_cohort(1, 2 * DX + 2 * DY, 2 * DX + 2 * DY, whole=1),
    plain(fb.AdaFBiO): over_cohort(1, 3 * DX + 2 * DY + 1, 2 * DX + 2 * DY, whole=1),
    plain(fb.FedF2SA, inner_rounds=T): over_cohort(T + 1, T * (DX + 4 * DY + 1) + DX + 2 * DY + 1, 4 * T * DY + DX),
    # the first round asks all clients
    plain(fb.FedMSA): over_cohort(1, 2 * Z, Z) + np.array([1, CLIENTS * 8 * (3 * Z + 1), CLIENTS * 8 * Z]),
}


@pytest.mark.parametrize("algorithm", COUNTS, ids=lambda algorithm: type(algorithm).__name__)
def test_messages_are_the_formula(algorithm):
    expected = COUNTS[algorithm]
    protocol = fb.protocol(algorithm, *task(), engine=ENGINES[0])
    assert protocol.kind == "exact"
    assert [getattr(protocol, name) for name in COLUMNS] == expected.tolist()
    for engine in ENGINES:
        np.testing.assert_array_equal(ledger(algorithm, engine, 2), [expected, expected])


def fedmbo(cuts, rounds_on_y):
    """What an iteration of FedMBO costs when its chains end at `cuts`: the chains ask one client in each exchange."""
    n, factors = len(cuts), sum(cuts)
    down = n * (DX + DY) + factors * (DX + 2 * DY) + n * (DX + 2 * DY)
    up = n * DY + factors * DY + n * DX
    lower = rounds_on_y * COHORT * 8 * np.array([DX + DY, DY])
    return np.array([rounds_on_y + max(cuts) + 2, *(lower + 8 * np.array([down, up]))])


def test_chains_share_their_rounds_and_ask_one_client_each():
    N, chains = 3, 2
    algorithm = plain(fb.FedMBO, inner_rounds=T, neumann_terms=N, chains=chains)
    protocol = fb.protocol(algorithm, *task(), engine=ENGINES[0])
    each = np.array([fedmbo(cuts, T) for cuts in itertools.product(range(N), repeat=chains)])
    np.testing.assert_allclose([getattr(protocol, name) for name in COLUMNS], each.mean(0), rtol=1e-12)
    assert [getattr(protocol, f"{name}_most") for name in COLUMNS] == each.max(0).tolist()
    assert "1 asked" in str(protocol)
    for cut, engine in itertools.product(range(N), ENGINES):
        fixed = plain(fb.FedMBO, inner_rounds=T, neumann_terms=N, chains=chains, truncation=cut)
        np.testing.assert_array_equal(ledger(fixed, engine, 1)[0], fedmbo([cut] * chains, T))
    simulated, looped = (ledger(algorithm, engine, 20) for engine in ENGINES)
    np.testing.assert_array_equal(simulated, looped)
    assert {tuple(row) for row in simulated} <= {tuple(row) for row in each.astype(int)}


class Sizes(fb.Algorithm):
    """Asks everybody, one client, and the usual cohort; keeps what share each was."""

    def step(self, fed, state):
        asked = [
            (fed.average(self.index, state.x, cohort=None if size == 0 else fed.draw_cohort(size)), fed.share)
            for size in (fed.clients, 1, 0)
        ]
        y = jax.tree.map(jax.numpy.zeros_like, state.y)
        return fb.State(state.x, y), {
            f"{place}{what}": value for place, pair in enumerate(asked) for what, value in enumerate(pair)
        }

    def index(self, client, x):
        return client.index


def test_an_exchange_may_ask_fewer_or_more_than_usual():
    problem, data, x, y = task()
    rows = []
    for engine in ENGINES:
        result = fb.solve(problem, data, Sizes(), x, y, 30, key=jax.random.key(0), engine=engine)
        columns = [result.history.column(f"{place}{what}")[1:] for place in range(3) for what in range(2)]
        rows.append(np.array(columns, float))
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-12)
    everyone, _, one, share, some, usual = rows[0]
    assert (everyone == (CLIENTS - 1) / 2).all() and set(one) == set(range(CLIENTS))  # the clients' own numbers
    assert (share == 1 / CLIENTS).all() and (usual == COHORT / CLIENTS).all() and (rows[0][1] == 1).all()
    assert len(set(some)) > 1
    with pytest.raises(fb.InputError, match="cannot be drawn from"):
        fb.solve(problem, data, TooMany(), x, y, 1, key=jax.random.key(0))


class TooMany(fb.Algorithm):
    def step(self, fed, state):
        fed.average(self.index, state.x, cohort=fed.draw_cohort(fed.clients + 1))
        return state, {}

    def index(self, client, x):
        return client.index


@pytest.mark.parametrize("name", fb.algorithms.ALGORITHMS)
def test_what_the_list_says_of_rounds_and_needs_is_so(name):
    line, kind = about(name), fb.algorithms.ALGORITHMS[name]
    fields = kind.__dataclass_fields__
    N, terms = 3, 5
    settings = {"inner_rounds": N, "neumann_terms": terms, "truncation": "full"}
    if kind is fb.FedMBO:
        settings["truncation"] = "uniform"
    algorithm = kind(**{field: value for field, value in settings.items() if field in fields})
    known = {"N": N if kind is fb.AggITD else terms, "T": N}
    said = eval(line.rounds.replace("2N", "2*N").replace("2T", "2*T"), {}, known)
    protocol = fb.protocol(algorithm, *task(), engine=ENGINES[0])
    assert protocol.rounds_most == said
    asked = {site.cohort for site in protocol.sites.values()}
    assert (CLIENTS in asked) == (line.asks == "all")
    _, _, x, y = task()
    state = algorithm.init(x, y)
    assert line.state == (
        algorithm.client_init(state.x, state.y) is not None or kind is fb.AggITD
    )  # one of its options

"""`same_cohort`: one cohort for a group of exchanges; the same rounds and bytes, on every engine; everyone is no cohort."""

from __future__ import annotations

from typing import ClassVar

import jax
import numpy as np
import pytest

import fedbilevel as fb
from helpers.cases import problem
from helpers.plain import plain
from helpers.quadratic import flat

KINDS = [fb.AggITD, fb.FedNest, fb.FedNestSGD]


class Asked(fb.engines.messaging.server_side.MessageFederation):
    """Loopback that remembers which clients each exchange asked."""

    log: ClassVar[list] = []

    def ask(self, method, message, combine, replies, cohort, beside):
        index = self._sample(fb.cohorts.exchange_key(self._key, self._counter)) if cohort is None else cohort
        self.log.append((method.__name__, tuple(np.asarray(index).tolist())))
        return super().ask(method, message, combine, replies, cohort, beside)


def run(algorithm, engine, iterations=2):
    """(all numbers of x and y, cumulative rounds and bytes)."""
    q = problem()
    result = fb.solve(q.problem, q.data, algorithm, q.x, q.y, iterations, key=jax.random.key(0), engine=engine)
    ledger = [[row[column] for column in ("rounds", "bytes_down", "bytes_up")] for row in result.history]
    return flat((result.x, result.y)), np.array(ledger)


def algorithm(kind, same=True, **settings):
    # "full": the number drawn for "uniform" would differ, for a cohort is a draw too
    return plain(kind, inner_rounds=2, local_steps=2, truncation="full", batch_size=2, same_cohort=same, **settings)


@pytest.mark.parametrize("kind", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_engines_agree_and_nothing_more_is_sent(kind):
    one, other = run(algorithm(kind), fb.Simulation(cohort=3)), run(algorithm(kind), fb.Loopback(cohort=3, shuffle=2))
    np.testing.assert_allclose(one[0], other[0], rtol=0, atol=1e-12 * np.maximum(1, np.abs(other[0])).max())
    fresh = run(algorithm(kind, same=False), fb.Simulation(cohort=3))
    np.testing.assert_array_equal(one[1], other[1])
    np.testing.assert_array_equal(one[1], fresh[1])
    assert np.abs(one[0] - fresh[0]).max() > 1e-6  # other clients were asked


@pytest.mark.parametrize("kind", KINDS)
def test_with_everyone_it_changes_nothing(kind):
    one, other = (run(algorithm(kind, same), fb.Simulation()) for same in (True, False))
    np.testing.assert_array_equal(one[0], other[0])


@pytest.mark.parametrize(("kind", "groups"), [(fb.AggITD, 1), (fb.FedNest, 3)])
def test_who_is_asked(kind, groups, monkeypatch):
    """AggITD: one cohort; FedNest: one for each of its two lower turns, and one for the upper level."""
    monkeypatch.setattr(fb.engines.messaging.server_side, "MessageFederation", Asked)
    seen = {}
    for same in (True, False):
        monkeypatch.setattr(Asked, "log", [])
        run(algorithm(kind, same), fb.Loopback(cohort=3), iterations=1)
        seen[same] = Asked.log
    assert [name for name, _ in seen[True]] == [name for name, _ in seen[False]]
    assert len({cohort for _, cohort in seen[True]}) == groups < len({cohort for _, cohort in seen[False]})
    if kind is fb.FedNest:
        cohorts = [cohort for _, cohort in seen[True]]
        assert cohorts[0] == cohorts[1] and cohorts[2] == cohorts[3] and len(set(cohorts[4:])) == 1


def test_two_cohorts_cannot_be_one():
    with pytest.raises(fb.InputError, match="same_cohort"):
        fb.AggITD(same_cohort=True, independent_cohorts=True)


def test_all_rows_of_a_draw_have_its_key():
    """A loss that is random itself needs a key in a full batch, too: one for each draw, none outside an exchange."""
    data = fb.FederatedData.stack([np.zeros((3, 1))], [np.zeros((2, 1))])
    rows = data.inner.client(0), data.outer.client(0)
    client = fb.Client(problem().problem, rows, None, jax.random.key(0), (True,))
    draws = [client.batch("inner"), client.batch("inner", draw=1), client.batch("outer"), client.batch("inner", 3)]
    keys = [tuple(jax.random.key_data(drawn.key).tolist()) for drawn in draws]
    assert len(set(keys[:3])) == 3 and keys[3] == keys[0] and client.inner.key is None

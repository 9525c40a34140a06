"""`hessian_lr="auto"` where several factors of one client's own act between two averages: its curvature sets the step.

H_i = 6 e_i e_i' + I/20: the mean has the largest curvature 1.05, every client has 6.05. Everyone is asked, with all rows.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.pace.curvature import remembered
from helpers.plain import plain

KEY = jax.random.key(0)
DIM = 6
GOAL = np.arange(1.0, DIM + 1)
HESSIANS = 6 * np.einsum("ij,ik->ijk", np.eye(DIM), np.eye(DIM)) + 0.05 * np.eye(DIM)
MEAN, SINGLE = 1.05, 6.05
PROBLEM = fb.Problem(
    lambda x, y, e: 0.5 * (y - x) @ e["H"] @ (y - x),
    lambda x, y, e: 0.5 * jnp.sum((y - GOAL) ** 2),
)
ROWS = [{"H": H[None]} for H in HESSIANS]
DATA = fb.FederatedData.stack(ROWS, ROWS)
STEPS = {"inner_lr": 0.05, "outer_lr": 0.002, "local_steps": 5}
LOCAL: dict[str, Any] = {
    "simfbo": fb.SimFBO, "shrofbo": fb.ShroFBO, "memfbo": fb.MemFBO, "fedbio": fb.FedBiO, "fedbioacc": fb.FedBiOAcc,
    "fedbioacc-local": fb.FedBiOAccLocal, "fedmsa": fb.FedMSA,
}  # fmt: skip


def start():
    return jnp.zeros(DIM), jnp.full(DIM, 0.1)


def solve(algorithm, iterations, engine=None):
    return fb.solve(PROBLEM, DATA, algorithm, *start(), iterations, key=KEY, engine=engine, evaluate_every=iterations)


def largest(algorithm):
    """The curvature that is measured."""
    return float(remembered(solve(algorithm, 1).state).largest)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOCAL)
def test_local_steps_on_the_vector_take_single_clients_curvature(name):
    end = solve(LOCAL[name](hessian_lr="auto", **STEPS), 60)
    assert np.linalg.norm(end.x - GOAL) < 0.95 * np.linalg.norm(GOAL)  # on its way, slowly
    assert float(remembered(end.state).largest) == pytest.approx(SINGLE)

    with pytest.raises(fb.Diverged):  # as it was: the mean Hessian's step
        solve(LOCAL[name](hessian_lr=1 / (1.2 * MEAN), **STEPS), 60)


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        (plain(fb.SimFBO, hessian_lr="auto", local_steps=1), MEAN),
        (plain(fb.SimFBO, hessian_lr="auto", client_steps=(1,) * DIM), MEAN),
        (plain(fb.SimFBO, hessian_lr="auto", local_steps=1, client_steps=(1, 1, 1, 1, 1, 2)), SINGLE),
        (plain(fb.FedMSA, hessian_lr="auto", local_steps=1), MEAN),
        (plain(fb.FedBiOAcc, hessian_lr="auto", local_steps=1), MEAN),
        (plain(fb.FedMBO, hessian_lr="auto"), SINGLE),
        (plain(fb.LFedNest, hessian_lr="auto"), SINGLE),
        (plain(fb.LocalBSGVRM, hessian_lr="auto"), SINGLE),
        (plain(fb.Lockstep, hessian_lr="auto"), MEAN),  # one factor of each client's, then the average
        (plain(fb.AggITD, hessian_lr="auto"), MEAN),
        (plain(fb.FedNest, hessian_lr="auto"), MEAN),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, fb.Algorithm) else "",
)
def test_whose_curvature_counts(algorithm, expected):
    """Of clients whose curvatures differ: the mean of them, or the largest; shorter where v takes local steps."""
    rows = [{"H": (1 + k) * H[None]} for k, H in enumerate(HESSIANS)]
    data = fb.FederatedData.stack(rows, rows)
    end = fb.solve(PROBLEM, data, algorithm, *start(), 1, key=KEY)
    step, largest = end.history[-1]["hessian_lr"], SINGLE * np.arange(1, 1 + DIM)
    keeps_v = hasattr(end.state, "kept") and end.state.kept.get("v") is not None
    if expected == MEAN:
        assert step == pytest.approx((1.6 / 1.1 if keeps_v else 1 / 1.2) / largest.mean())
        return
    several = max(getattr(algorithm, "client_steps", None) or (algorithm.local_steps,)) > 1
    assert 0 < step <= 1 / (1.2 * largest.max()) * (1 + 1e-12)
    assert (keeps_v and several) or step == pytest.approx(1 / (1.2 * largest.max()))


def test_clients_with_a_y_of_their_own_are_asked_for_their_own_curvature():
    """That algorithm asks by itself: its clients' own v tell when the step is too large."""
    protocol = fb.protocol(plain(fb.FedBiOAccLocal, hessian_lr="auto", local_steps=1), PROBLEM, DATA, *start())
    assert "hessian.largest_curvature" in {site.name for site in protocol.sites.values()}


@pytest.mark.slow
def test_the_chains_of_fedmbo_do_not_stretch():
    """Four terms, all at one client each: the deviation of an estimate is what a chain's factors make of d_y f."""

    def deviation(lam):
        algorithm = fb.FedMBO(hessian_lr=lam, neumann_terms=5, inner_rounds=1, truncation=4)
        estimate = lambda seed: fb.estimate_hypergradient(PROBLEM, DATA, algorithm, *start(), key=jax.random.key(seed))[
            0
        ]
        return np.std([estimate(seed) for seed in range(5)], axis=0).mean()

    auto, single, mean = map(deviation, ("auto", 1 / (1.2 * SINGLE), 1 / (1.2 * MEAN)))
    assert auto < 2 * single < 0.05 * mean

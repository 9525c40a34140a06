"""What engines/test_engines.py runs on every engine, also in a process of its own: all algorithms, one with client state.

`python -m helpers.cases FILE` runs all of them on a mesh of all devices and writes the results to FILE.
"""

from __future__ import annotations

import sys
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax.tree

import fedbilevel as fb
from fedbilevel.algorithms import ALGORITHMS, checked
from helpers.parts import Parts
from helpers.quadratic import Quadratic, flat, quadratic


class Controlled(fb.State):
    """x, y, and the server's control variate."""

    c: Any


class OneRound(fb.Algorithm):
    """Lower rounds with control variates on the clients (algorithms.md 2, extension 3); x stays.

    y* exactly, also with a sampled cohort. `stalling`: c = mean over the cohort instead, which is wrong.
    """

    inner_lr: Any = fb.rate(0.05)
    local_steps: int = fb.count(2)
    batch_size: int | None = fb.count(None)
    stalling: bool = fb.option(False)

    def init(self, x, y):
        return Controlled(x, y, optax.tree.zeros_like(y))

    def client_init(self, x, y):
        return optax.tree.zeros_like(y)

    def step(self, fed, state):
        moved, news, own = fed.average(self.turn, state.x, state.y, state.c)
        c = own if self.stalling else optax.tree.add_scale(state.c, fed.share, news)
        return Controlled(state.x, optax.tree.add(state.y, moved), c), {"moved": optax.tree.norm(moved)}

    def turn(self, client, x, y, c):
        """(y_i - y, a_i - c_i, a_i), where a_i = d_y g_i at y becomes the client's new c_i."""
        gradient = lambda z, s: client.problem.inner_gradient(x, z, client.batch("inner", self.batch_size, s))
        a, correction = gradient(y, 0), optax.tree.sub(c, client.state)

        def step(s, z):
            return optax.tree.add_scale(z, -self.inner_lr, optax.tree.add(gradient(z, s + 1), correction))

        end = jax.lax.fori_loop(0, self.local_steps, step, y)
        return fb.Reply((optax.tree.sub(end, y), optax.tree.sub(a, client.state), a), a)


CASES = {name: checked(name)[0] for name in ALGORITHMS}
CASES["one-round"] = OneRound(batch_size=2)
CASES["parts"] = Parts(batch_size=2)
ON_DEVICES = {  # names and cohorts; a cohort of five fills no whole number of four devices
    "first": [("aggitd", 4), ("lockstep", 4), ("fedbioacc-local", 4), ("one-round", 5), ("parts", 5)],
    "others": [("fednest", 4), ("lfednest", 4), ("fedmsa", 4), ("one-round", 4), ("parts", 4)],
}


CLIENTS = {"parts": 5}  # else 8, which fill four devices


def problem(clients: int = 8) -> Quadratic:
    """Ragged clients of two sizes (every size is compiled anew by Loopback)."""
    return quadratic(seed=1, clients=clients, sizes=((5, 3), (2, 4)))


def run(name: str, engine: fb.engines.Engine, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(all numbers of the last state, cumulative rounds and bytes of every row)."""
    q = problem(CLIENTS.get(name, 8))
    result = fb.solve(q.problem, q.data, CASES[name], q.x, q.y, iterations=3, key=jax.random.key(seed), engine=engine)
    ledger = [[row[column] for column in ("rounds", "bytes_down", "bytes_up")] for row in result.history]
    return flat(eqx.filter(result.state, eqx.is_inexact_array)), np.array(ledger)


def on_all_devices(path: str, group: str) -> None:
    """Every case of the group on a mesh; one array of numbers and one of ledgers per case."""
    import conftest  # noqa: F401  the settings of the tests

    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((len(jax.devices()),), ("clients",), axis_types=auto)
    out = {"devices": np.array(len(jax.devices()))}
    for name, cohort in ON_DEVICES[group]:
        out[f"{name}/{cohort}/numbers"], out[f"{name}/{cohort}/ledger"] = run(name, fb.Simulation(cohort, mesh=mesh))
    np.savez(path, **out)


if __name__ == "__main__":
    on_all_devices(*sys.argv[1:])

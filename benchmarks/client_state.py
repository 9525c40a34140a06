"""Clients' states in memory and on disk: time of an iteration, and the most memory that a process takes.

    python benchmarks/client_state.py [--quick] [--folder DIR]

Lockstep keeps as much as x and twice y for each client. Every line is a process of its own, whose peak is its resident
memory as the system counts it (`ru_maxrss`): pages of files that the system keeps in memory while nobody needs it are not
in it, for a file is read and written, not mapped. Where memory does not suffice, the sentence stands in place of figures.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np

import fedbilevel as fb

LINES = [  # clients, numbers in x and in y, cohort, iterations, where
    (100_000, 300, 300, 100, 1000, "memory"),
    (100_000, 300, 300, 100, 1000, "disk"),
    (1_000_000, 300, 300, 1000, 1000, "disk"),
    (1_000_000, 1000, 1000, 100, 1000, "memory"),
    (1_000_000, 1000, 1000, 100, 1000, "disk"),
    (1_000_000, 1000, 1000, 1000, 1000, "disk"),
]
QUICK = [(1000, 20, 20, 10, 20, "memory"), (1000, 20, 20, 10, 20, "disk")]


def inner(x, y, row):
    return 0.5 * jnp.sum((y - jnp.sum(row["c"]) * x[: y.shape[0]]) ** 2)


def outer(x, y, row):
    return 0.5 * jnp.sum((y - row["c"][0]) ** 2) + 0.5 * jnp.sum(x**2)


def run(clients: int, width: int, depth: int, cohort: int, iterations: int, where: str) -> dict:
    """One line, in this process."""
    draw = np.random.default_rng(0).normal(size=(clients, 1, 2)).astype("f")
    rows = [{"c": own} for own in draw]
    data = fb.FederatedData.stack(rows, rows)
    del rows, draw
    before = _peak()
    algorithm = fb.Lockstep(inner_lr=0.1, hessian_lr=0.1, outer_lr=0.01, local_steps=1)
    engine = fb.Simulation(cohort=cohort, client_state=where, compile="full")
    x, y = jnp.full(width, 0.1), jnp.zeros(depth)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fb.errors.FedbilevelWarning)
            found = fb.solve(
                fb.Problem(inner, outer), data, algorithm, x, y, iterations, key=jax.random.key(0), engine=engine
            )
    except fb.InputError as error:
        return {"refused": str(error)}
    milliseconds = 1e3 * found.history[-1]["seconds"] / iterations
    return {"ms": milliseconds, "before": before, "peak": _peak(), "x": float(np.sum(np.asarray(found.x, np.float64)))}


def _peak() -> float:
    """GB of resident memory, the most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a thousand clients: to see that it works")
    parser.add_argument("--folder", help="where files of clients' states lie; that of temporary files")
    parser.add_argument("--line", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.line:
        return print(json.dumps(run(*json.loads(given.line))))
    print(f"Lockstep, one row a client, JAX {jax.__version__} on {jax.devices()[0].platform}")
    heads = f"{'iteration, ms':>13} {'peak, GB':>9} {'of it data':>10}  sum of x"
    print(f"{'clients':>9} {'cohort':>6} {'states, GB':>10} {'where':8}{heads}")
    for line in QUICK if given.quick else LINES:
        *numbers, where = line
        clients, width, depth, cohort, _ = numbers
        place = given.folder if where == "disk" and given.folder else where
        words = [sys.executable, __file__, "--line", json.dumps([*numbers, place])]
        found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
        head = f"{clients:>9,} {cohort:>6,} {clients * (width + 2 * depth) * 4 / 1e9:>10.3f} {where:8}"
        if "refused" in found:
            print(f"{head}{found['refused']}", flush=True)
        else:
            print(
                f"{head}{found['ms']:13.2f} {found['peak']:9.3f} {found['before']:10.3f}  {found['x']:.9g}", flush=True
            )


if __name__ == "__main__":
    main()

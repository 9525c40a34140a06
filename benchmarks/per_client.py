"""What leaves per client cost: 10,000 clients with 100 row weights each in x, cohorts of 100; and without such leaves.

    python benchmarks/per_client.py [--quick]

Without them x is 100 weights that all clients have in common, so that clients compute and send the same. An iteration's
time is that of the run's own clock, which leaves out compilation; both are measured in turns, thrice, and the least counts.
"""

from __future__ import annotations

import argparse
import resource

import jax
import jax.numpy as jnp
import numpy as np

import fedbilevel as fb

ROWS, COLUMNS, COHORT = 100, 20, 100
STEPS = {"inner_lr": 0.05, "hessian_lr": 0.05, "outer_lr": 0.5}


def inner(x, y, row):
    """A weight for each training row of a client."""
    weight = jax.nn.sigmoid(x[row["place"]])
    return weight * 0.5 * (row["a"] @ y - row["b"]) ** 2 + 0.05 * jnp.sum(y**2)


def outer(x, y, row):
    return 0.5 * (row["a"] @ y - row["b"]) ** 2


def rows(count: int) -> fb.FederatedData:
    draw = np.random.default_rng(0)
    a = draw.standard_normal((count, ROWS, COLUMNS), np.float32)
    b = a @ draw.standard_normal(COLUMNS, np.float32) + draw.standard_normal((count, ROWS), np.float32)
    place = np.broadcast_to(np.arange(ROWS, dtype=np.int32), (count, ROWS))
    clients = range(count)
    training = [{"a": a[i], "b": b[i], "place": place[i]} for i in clients]
    return fb.FederatedData.stack(training, [{"a": a[i, :10], "b": b[i, :10]} for i in clients])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="200 clients, a few iterations")
    quick = parser.parse_args().quick
    clients, iterations, turns = (200, 5, 1) if quick else (10_000, 200, 3)
    data, problem, y = rows(clients), fb.Problem(inner, outer), np.zeros(COLUMNS, np.float32)
    variables = {
        "common": np.zeros(ROWS, np.float32),
        "per client": fb.per_client(np.zeros((clients, ROWS), np.float32)),
    }
    for name, algorithm in (("Lockstep", fb.Lockstep(**STEPS)), ("AggITD", fb.AggITD(**STEPS))):
        best = dict.fromkeys(variables, float("inf"))
        for _ in range(turns):
            for kind, x in variables.items():
                engine = fb.Simulation(cohort=COHORT, compile="full")
                result = fb.solve(
                    problem, data, algorithm, x, y, iterations,
                    key=jax.random.key(0), engine=engine, check=False, evaluate_every=iterations,
                )  # fmt: skip
                best[kind] = min(best[kind], result.seconds / iterations)
        common, blocks = (1e3 * each for each in best.values())
        print(f"{name}: {common:.2f} ms an iteration, {blocks:.2f} with blocks: {blocks / common:.2f} times")
        if name == "Lockstep":
            floats = 2 * ROWS + 4 * COLUMNS
            sent = result.history[-1]["bytes_down"] / iterations
            print(f"bytes an iteration down: {sent:,.0f}; by hand {COHORT} x {floats} x 4 = {COHORT * floats * 4:,}")
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MB")


if __name__ == "__main__":
    main()

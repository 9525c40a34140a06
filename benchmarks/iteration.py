"""What the library costs on top of the mathematics: a whole AggITD iteration against its oracle calls alone.

    python benchmarks/iteration.py [--quick]

The rival is one jitted program with the same oracle calls on rows that are already gathered: no federation, no cohort or
minibatch draws, no ledger, no checks. Both compute the same numbers (asserted). Timed in turn, in one process; the ratio
of medians is what counts.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import fedbilevel as fb
from fedbilevel.algorithms.components.directions import hessian_factor, hypergradient
from fedbilevel.algorithms.components.steps import fedsvrg
from fedbilevel.cohorts import client_key, exchange_key, sample_cohort
from fedbilevel.federation import Client
from fedbilevel.tasks.hyper_representation import InnerLoss, features, outer_loss
from fedbilevel.tasks.network import layer

CLIENTS, COHORT, ROWS, INPUTS, HIDDEN, CLASSES = 100, 10, 300, 784, 200, 10
QUICK = {"CLIENTS": 4, "COHORT": 2, "ROWS": 8, "INPUTS": 6, "HIDDEN": 4, "CLASSES": 3}
LOSS = InnerLoss()
# without `features`, which the program of oracle calls could not use: benchmarks/features.py measures those
PROBLEM = fb.Problem(lambda x, y, row: LOSS(x, y, row, features(x, row)), outer_loss)


def setup():
    draw = np.random.default_rng(0)
    rows = lambda n: {
        "a": draw.normal(size=(n, INPUTS)).astype("f"),
        "label": draw.integers(0, CLASSES, n).astype("i4"),
    }
    data = fb.FederatedData.stack([rows(ROWS) for _ in range(CLIENTS)], [rows(ROWS) for _ in range(CLIENTS)])
    return data, layer(jax.random.key(1), INPUTS, HIDDEN), layer(jax.random.key(2), HIDDEN, CLASSES)


def gathered(alg, data, key):
    """Q, and for every exchange of one iteration the cohort's rows that it will use."""
    base = jax.random.fold_in(key, 0)
    Q = int(jax.random.randint(exchange_key(base, 0), (), 0, alg.inner_rounds + 1, dtype=jnp.int32))

    def rows(counter, level, draw):
        exchange = exchange_key(base, counter)
        cohort = sample_cohort(exchange, CLIENTS, COHORT, None)

        def one(i):
            client = Client(PROBLEM, (data.inner.client(i), data.outer.client(i)), None, client_key(exchange, i), ())
            return client.batch(level, alg.batch_size, draw)

        return jax.vmap(one)(cohort)

    stack = lambda parts: jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    N, tau = alg.inner_rounds, alg.local_steps
    # a full batch is the same for every draw of an exchange: gathered once
    draws = (
        (lambda c, level, numbers: rows(c, level, 0))
        if alg.batch_size is None
        else (lambda c, level, numbers: stack([rows(c, level, d) for d in numbers]))
    )
    turns = []
    for t in range(N):
        a, b = 1 + 2 * t, 2 + 2 * t
        turns.append((rows(a, "inner", 0), rows(a, "inner", 1), rows(a, "outer", 0), draws(b, "inner", range(tau))))
    last = 1 + 2 * N
    final = (rows(last, "inner", 1), rows(last, "outer", 0), rows(last + 1, "inner", 0), rows(last + 1, "outer", 0),
             draws(last + 2, "inner", range(alg.outer_steps)), draws(last + 2, "outer", range(alg.outer_steps)))  # fmt: skip
    return jnp.asarray(Q, jnp.int32), stack(turns), final


def bare(alg, x, y, Q, turns, final):
    """One AggITD iteration as a program of oracle calls."""
    N, lam, full = alg.inner_rounds, alg.hessian_lr, alg.batch_size is None
    mean = lambda tree: jax.tree.map(lambda a: jnp.mean(a, axis=0), tree)
    at = lambda rows, s: rows if full else jax.tree.map(lambda a: a[s], rows)
    over = lambda f, *rows: mean(jax.vmap(f)(*rows))
    swap = lambda rows: rows if full else jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), rows)

    def vector(t, y, r, inner, outer):
        factor = lambda: over(lambda rows: hessian_factor(PROBLEM, x, y, r, lam, rows), inner)
        start = lambda: over(lambda rows: PROBLEM.outer_gradients(x, y, rows)[1], outer)
        return jax.lax.cond(t > Q, factor, lambda: jax.lax.cond(t == Q, start, lambda: r))

    def turn(t, loop):
        y, r = loop
        q_rows, r_rows, outer, steps = jax.tree.map(lambda a: a[t], turns)
        q = over(lambda rows: PROBLEM.inner_gradient(x, y, rows), q_rows)
        r = vector(t, y, r, r_rows, outer)
        local = lambda rows: fedsvrg(
            lambda s: lambda z: PROBLEM.inner_gradient(x, z, at(rows, s)), y, q, alg.inner_lr, alg.local_steps
        )
        return over(local, swap(steps)), r

    y, r = jax.lax.fori_loop(0, N, turn, (y, jax.tree.map(jnp.zeros_like, y)))
    inner, outer, h_inner, h_outer, u_inner, u_outer = final
    v = jax.tree.map(lambda a: lam * (N + 1) * a, vector(N, y, r, inner, outer))
    h = over(lambda i, o: hypergradient(PROBLEM, x, y, v, i, o), h_inner, h_outer)

    def move(inner, outer):
        on_rows = lambda s: lambda z: hypergradient(PROBLEM, z, y, v, at(inner, s), at(outer, s))
        return fedsvrg(on_rows, x, h, alg.outer_lr, alg.outer_steps)

    return over(move, swap(u_inner), swap(u_outer)), y


def compare(name: str, alg, runs: int) -> None:
    data, x, y = setup()
    key = jax.random.key(0)
    state = alg.init(x, y)
    execution = fb.Simulation(cohort=COHORT).bind(PROBLEM, data, alg, state, key)
    carry = execution.start(alg, state)
    rows = gathered(alg, data, key)
    program = jax.jit(bare)
    ours = lambda: execution.advance(alg, carry, 1, 1e10)
    theirs = lambda: jax.block_until_ready(program(alg_arrays(alg), x, y, *rows))
    (after, _), other = ours(), theirs()
    gap = max(
        float(jnp.max(jnp.abs(a - b)))
        for a, b in zip(jax.tree.leaves((after.state.x, after.state.y)), jax.tree.leaves(other), strict=True)
    )
    assert gap < 1e-4, f"not the same computation: {gap}"
    times = {"ours": [], "bare": []}
    for _ in range(runs):
        for label, run in (("ours", ours), ("bare", theirs)):
            begin = time.perf_counter()
            run()
            times[label].append(time.perf_counter() - begin)
    ours_ms, bare_ms = (1e3 * statistics.median(times[k]) for k in ("ours", "bare"))
    ratios = sorted(a / b for a, b in zip(times["ours"], times["bare"], strict=True))
    print(
        f"{name:48} {ours_ms:9.2f} {bare_ms:9.2f} {ours_ms / bare_ms:7.3f}   "
        f"{ratios[len(ratios) // 4]:.3f} - {ratios[-len(ratios) // 4]:.3f}   {gap:.0e}",
        flush=True,
    )


def alg_arrays(alg):
    """The algorithm as `jax.jit` takes it."""
    return jax.tree.map(jnp.asarray, alg)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="a small network, two runs: to see that it works")
    given = parser.parse_args()
    runs = 2 if given.quick else given.runs
    if given.quick:
        globals().update(QUICK)
    print(
        f"AggITD, N = 5, {COHORT} of {CLIENTS} clients, network {INPUTS}-{HIDDEN}-{CLASSES}, "
        f"{runs} runs each, JAX {jax.__version__} on {jax.devices()[0].platform}"
    )
    print(f"{'':48} {'ours, ms':>9} {'bare, ms':>9} {'ratio':>7}   middle half of ratios   difference")
    common = {"inner_rounds": 5, "inner_lr": 0.01, "hessian_lr": 0.01, "outer_lr": 0.01}
    if given.quick:
        return compare("minibatches, 1 local step", fb.AggITD(local_steps=1, batch_size=4, **common), runs)
    compare("full batches of 300 rows, 5 local steps", fb.AggITD(local_steps=5, outer_steps=1, **common), runs)
    compare(
        "minibatches of 64 rows, 5 local steps", fb.AggITD(local_steps=5, outer_steps=5, batch_size=64, **common), runs
    )
    compare(
        "minibatches of 64 rows, 1 local step", fb.AggITD(local_steps=1, outer_steps=1, batch_size=64, **common), runs
    )


if __name__ == "__main__":
    main()

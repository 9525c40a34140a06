"""What the library costs on top of the mathematics: whole iterations against their oracle calls alone.

    python benchmarks/iteration.py [--quick]

The rival is one jitted program with the same oracle calls on rows that are already gathered: no federation, no cohort or
minibatch draws, no ledger, no checks, no state of other clients. Both compute the same numbers (asserted). Cpu time of 16
iterations in one go as in a run (80 of the short ones), against as many calls; in turn, in one process; the ratio of
medians is what counts. AggITD has a fixed Q, so that every iteration has the same exchanges.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax.tree

import fedbilevel as fb
from fedbilevel.algorithms.components.directions import direction, hessian_factor, hypergradient, inner_gradient
from fedbilevel.algorithms.components.steps import controlled_descent, descend, fedsvrg, local_descent
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


def drawn(alg, data, exchange, level, draw):
    """The rows of one draw of an exchange, of all clients of its cohort."""
    cohort = sample_cohort(exchange, CLIENTS, COHORT, None)

    def one(i):
        client = Client(PROBLEM, (data.inner.client(i), data.outer.client(i)), None, client_key(exchange, i), ())
        return client.batch(level, alg.batch_size, draw)

    return jax.vmap(one)(cohort)


def stack(parts):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)


def several(alg, data, exchange, level, numbers):
    """Those of several draws, (draws, cohort, ...); a full batch is the same for every draw: gathered once."""
    if alg.batch_size is None:
        return drawn(alg, data, exchange, level, 0)
    return stack([drawn(alg, data, exchange, level, d) for d in numbers])


def mean(tree):
    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), tree)


def at(alg, rows, s):
    """Of one client's rows of several draws, those of draw s."""
    return rows if alg.batch_size is None else jax.tree.map(lambda leaf: leaf[s], rows)


def by_client(alg, rows):
    """Rows of several draws, clients first."""
    return rows if alg.batch_size is None else jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), rows)


# AggITD -----------------------------------------------------------------------------------------------------------------


def aggitd_rows(alg, data, key):
    """Q, and for every exchange of one iteration the cohort's rows that it will use."""
    base = jax.random.fold_in(key, 0)
    Q = alg.truncation.value
    rows = lambda counter, *what: drawn(alg, data, exchange_key(base, counter), *what)
    draws = lambda counter, *what: by_client(alg, several(alg, data, exchange_key(base, counter), *what))
    N, tau = alg.inner_rounds, alg.local_steps
    turns = []
    for t in range(N):
        a, b = 2 * t, 2 * t + 1
        turns.append((rows(a, "inner", 0), rows(a, "inner", 1), rows(a, "outer", 0), draws(b, "inner", range(tau))))
    last = 2 * N
    final = (rows(last, "inner", 1), rows(last, "outer", 0), rows(last + 1, "inner", 0), rows(last + 1, "outer", 0),
             draws(last + 2, "inner", range(alg.outer_steps)), draws(last + 2, "outer", range(alg.outer_steps)))  # fmt: skip
    return jnp.asarray(Q, jnp.int32), turns, final


def aggitd(alg, state, Q, turns, final):
    """One AggITD iteration as a program of oracle calls."""
    x, y = state.x, state.y
    N, lam = alg.inner_rounds, alg.hessian_lr
    over = lambda f, *rows: mean(jax.vmap(f)(*rows))

    def vector(t, y, r, inner, outer):
        factor = lambda: over(lambda rows: hessian_factor(PROBLEM, x, y, r, lam, rows), inner)
        start = lambda: over(lambda rows: PROBLEM.outer_gradients(x, y, rows)[1], outer)
        return jax.lax.cond(t > Q, factor, lambda: jax.lax.cond(t == Q, start, lambda: r))

    def turn(t, y, r):
        q_rows, r_rows, outer, steps = turns[t]
        q = over(lambda rows: PROBLEM.inner_gradient(x, y, rows), q_rows)
        r = vector(t, y, r, r_rows, outer)
        local = lambda rows: fedsvrg(
            lambda s: lambda z: PROBLEM.inner_gradient(x, z, at(alg, rows, s)), y, q, alg.inner_lr, alg.local_steps
        )
        return over(local, steps), r

    r = jax.tree.map(jnp.zeros_like, y)
    for t in range(N):  # in Python: nothing is cut out of a stack of all turns' rows
        y, r = turn(t, y, r)
    inner, outer, h_inner, h_outer, u_inner, u_outer = final
    v = jax.tree.map(lambda a: lam * (N + 1) * a, vector(N, y, r, inner, outer))
    h = over(lambda i, o: hypergradient(PROBLEM, x, y, v, i, o), h_inner, h_outer)

    def move(inner, outer):
        on_rows = lambda s: lambda z: hypergradient(PROBLEM, z, y, v, at(alg, inner, s), at(alg, outer, s))
        return fedsvrg(on_rows, x, h, alg.outer_lr, alg.outer_steps)

    return (over(move, u_inner, u_outer), y), None


# Lockstep and SimFBO ----------------------------------------------------------------------------------------------------


def lockstep_rows(alg, data, key):
    """The cohort's rows of all draws, and its control variates, which are zero at the start."""
    exchange = exchange_key(jax.random.fold_in(key, 0), 0)
    T, many = alg.local_steps, alg.outer_steps
    draws = lambda *what: by_client(alg, several(alg, data, exchange, *what))
    _, x, y = setup()
    kept = jax.tree.map(lambda leaf: jnp.zeros((COHORT, *leaf.shape)), (x, y, y))
    return draws("inner", range(T + 1 + many)), draws("outer", range(many + 1)), kept


def lockstep(alg, state, inner, outer, kept):
    """One Lockstep iteration as a program of oracle calls."""
    x, y, v = state.x, state.y, state.v
    T, many = alg.local_steps, alg.outer_steps

    def moves(inner, outer, own):
        c = optax.tree.sub(state.control, own)
        along_y = lambda s: inner_gradient(PROBLEM, x, at(alg, inner, s))
        along_x = lambda s: lambda x: hypergradient(PROBLEM, x, y, v, at(alg, inner, T + 1 + s), at(alg, outer, s))
        pull = PROBLEM.outer_gradients(x, y, at(alg, outer, many))[1]
        adjoint = optax.tree.sub(PROBLEM.hessian_vector(x, y, v, at(alg, inner, T)), pull)
        a = along_x(0)(x), along_y(0)(y), adjoint
        ends = (
            controlled_descent(along_x, x, a[0], c[0], alg.outer_lr, many),
            controlled_descent(along_y, y, a[1], c[1], alg.inner_lr, T),
            descend(v, alg.hessian_lr, optax.tree.add(adjoint, c[2])),
        )
        return (optax.tree.sub(ends, (x, y, v)), optax.tree.sub(a, own)), a

    (moved, change), kept = jax.vmap(moves)(inner, outer, kept)
    control = jax.tree.map(lambda c, d: c + d * (COHORT / CLIENTS), state.control, mean(change))
    return optax.tree.add((x, y, v), mean(moved)), control, kept


def simfbo_rows(alg, data, key):
    exchange = exchange_key(jax.random.fold_in(key, 0), 0)
    return [by_client(alg, several(alg, data, exchange, level, range(alg.local_steps))) for level in ("inner", "outer")]


def simfbo(alg, state, inner, outer):
    """One SimFBO iteration as a program of oracle calls."""
    z = state.x, state.y, state.v
    steps = alg.outer_lr, alg.inner_lr, alg.hessian_lr

    def moves(inner, outer):
        along = lambda s: lambda z: direction(PROBLEM, z, at(alg, inner, s), at(alg, outer, s))
        return optax.tree.sub(local_descent(along, z, steps, alg.local_steps), z)

    return optax.tree.add(z, mean(jax.vmap(moves)(inner, outer))), None


# ------------------------------------------------------------------------------------------------------------------------

PROGRAMS = {fb.AggITD: (aggitd_rows, aggitd), fb.Lockstep: (lockstep_rows, lockstep), fb.SimFBO: (simfbo_rows, simfbo)}


def compare(alg, what: str, runs: int, iterations: int) -> None:
    data, x, y = setup()
    key = jax.random.key(0)
    state = alg.init(x, y)
    if state.v is not None:
        state = dataclasses.replace(state, v=jax.tree.map(lambda leaf: 0.1 * leaf, y))
    execution = fb.Simulation(cohort=COHORT, compile="full").bind(PROBLEM, data, alg, state, key)
    carry = execution.start(alg, state)
    gather, bare = PROGRAMS[type(alg)]
    rows = gather(alg, data, key)
    program = jax.jit(bare)
    given = alg_arrays(alg)
    bare_one = lambda: jax.block_until_ready(program(given, state, *rows))
    ours = lambda: execution.advance(alg, carry, iterations, 1e10)
    theirs = lambda: [bare_one() for _ in range(iterations)]
    (after, _), other = execution.advance(alg, carry, 1, 1e10), bare_one()
    gap = max(
        float(jnp.max(jnp.abs(a - b)))
        for a, b in zip(jax.tree.leaves((after.state.x, after.state.y)), jax.tree.leaves(other[0])[:4], strict=True)
    )
    assert gap < 1e-4, f"not the same computation: {gap}"
    times = {"ours": [], "bare": []}
    for _ in range(runs):
        for label, run in (("ours", ours), ("bare", theirs)):
            begin = time.process_time()
            run()
            times[label].append((time.process_time() - begin) / iterations)
    ours_ms, bare_ms = (1e3 * statistics.median(times[k]) for k in ("ours", "bare"))
    ratios = sorted(a / b for a, b in zip(times["ours"], times["bare"], strict=True))
    print(
        f"{type(alg).__name__ + ', ' + what:52} {ours_ms:9.2f} {bare_ms:9.2f} {ours_ms / bare_ms:7.3f}   "
        f"{ratios[len(ratios) // 4]:.3f} - {ratios[-len(ratios) // 4]:.3f}   {gap:.0e}",
        flush=True,
    )


def alg_arrays(alg):
    """The algorithm as `jax.jit` takes it."""
    return jax.tree.map(jnp.asarray, alg)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small network, two runs: to see that it works")
    given = parser.parse_args()
    runs = 2 if given.quick else given.runs
    if given.quick:
        globals().update(QUICK)
    print(
        f"{COHORT} of {CLIENTS} clients, network {INPUTS}-{HIDDEN}-{CLASSES}, {runs} runs each, "
        f"JAX {jax.__version__} on {jax.devices()[0].platform}"
    )
    print(f"{'':52} {'ours, ms':>9} {'bare, ms':>9} {'ratio':>7}   middle half of ratios   difference")
    steps = {"inner_lr": 0.01, "hessian_lr": 0.01, "outer_lr": 0.01}
    if given.quick:
        compare(fb.AggITD(inner_rounds=5, truncation=2, local_steps=1, batch_size=4, **steps), "minibatches", runs, 4)
        compare(fb.Lockstep(local_steps=2, outer_steps=2, batch_size=4, **steps), "minibatches", runs, 4)
        return compare(fb.SimFBO(local_steps=2, **steps), "full batches", runs, 4)
    for local, size in ((5, None), (5, 64), (1, 64)):
        what = f"{'full batches of 300' if size is None else 'minibatches of 64'} rows, {local} local steps"
        many = 80 // local
        outer = {"outer_steps": local if size else 1}
        common = {"local_steps": local, "batch_size": size, **steps}
        compare(fb.AggITD(inner_rounds=5, truncation=2, **common, **outer), what, runs, many)
        compare(fb.Lockstep(**common, **outer), what, runs, many)
        compare(fb.SimFBO(**common), what, runs, many)


if __name__ == "__main__":
    main()

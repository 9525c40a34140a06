#!/usr/bin/env bash
# jax 0.10.2 (CPU). A compiled loop over iterations holds an inner `jax.lax.fori_loop(0, n, body, carry)`. n is known at
# run time alone, and zero in most iterations: something costly that is done now and then.
#
# Expected: where n is zero the inner loop costs next to nothing.
# Seen:     it costs what one turn costs, where the body's work depends on nothing that the inner loop changes. XLA moves
#           such work out of the loop, before it, whatever n is: 1.25 ms an iteration without a turn, 1.26 with one, on
#           the machine where this was seen. The same loop under `jax.lax.cond(n > 0, ...)` takes less than .001 ms.
#
# Why it matters here: the curvature of g is measured in every tenth iteration, by products with the clients' Hessians at a
# point that the loop of the measurement does not change: all iterations paid for two measurements, and took 2.7 times
# as long as with steps given. So `fed.rarely` is a loop under a condition (fedbilevel.protocol.traced).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "jax==0.10.2" "numpy>=2"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import time

import jax
import jax.numpy as jnp

SIZE, ITERATIONS = 256, 300


def costly(y):
    a = jnp.outer(y, y) + jnp.eye(SIZE)
    for _ in range(4):
        a = jnp.tanh(a @ a / SIZE)
    return a.sum()


def program(rarely):
    """n: how many turns the inner loop has in each iteration."""

    def iteration(k, carry, n):
        y, measured = carry
        measured = rarely(n, lambda t, _: costly(y), measured)
        return y * 0.999 + 0.001 * jnp.cos(y), measured

    return jax.jit(lambda y, n: jax.lax.fori_loop(0, ITERATIONS, lambda k, c: iteration(k, c, n), (y, jnp.zeros(()))))


def loop(n, body, carry):
    return jax.lax.fori_loop(0, n, body, carry)


def guarded(n, body, carry):
    return jax.lax.cond(n > 0, lambda c: jax.lax.fori_loop(0, n, body, c), lambda c: c, carry)


def seconds(run, n):
    y = jnp.linspace(0.0, 1.0, SIZE)
    jax.block_until_ready(run(y, n))
    spent = []
    for _ in range(3):
        begin = time.process_time()
        jax.block_until_ready(run(y, n))
        spent.append(time.process_time() - begin)
    return min(spent)


found = {}
for name, rarely in (("a loop", loop), ("a loop under a condition", guarded)):
    run = program(rarely)
    found[name] = [1e3 * seconds(run, n) / ITERATIONS for n in (0, 1)]
    print(f"{name:26s} ms of an iteration: {found[name][0]:.3f} without a turn, {found[name][1]:.3f} with one")
(bare, _), (kept, once) = found.values()
assert bare > 0.5 * once, "a loop without a turn does not pay for its body any more"
assert kept < 0.2 * once, "a condition does not keep the work within the loop any more"
PYTHON

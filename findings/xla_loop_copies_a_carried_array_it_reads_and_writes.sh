#!/usr/bin/env bash
# jax 0.10.2 (CPU). A loop carries an array, reads some of its rows, and writes other values there.
#
# Expected: the write is in place, so that a turn costs what the rows cost, however long the array is.
# Seen:     only if what is written is computed from what was read. If it is not, XLA does not know
#           that the rows are read first, and copies the WHOLE array (twice) in every turn: 82 ms a turn
#           against 2 ms for 2,000,000 rows of 16 on the machine where this was seen.
#           jax.lax.optimization_barrier around the read rows and the array does not help (it is gone
#           before copies are inserted). A `where` between the new and the old rows does, on a
#           condition that is always true and that the compiler cannot know.
#
# Why it matters here: clients keep states (control variates) of which an iteration reads and writes
# a cohort's. With a million clients an iteration took 34 ms, of which 0.1 ms was work.
# So `fedbilevel.engines.simulated.federation` ties the new states to the old ones.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "jax==0.10.2" "numpy>=2"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import time

import jax
import jax.numpy as jnp

ROWS = 2_000_000


def loop(tied):
    def turn(k, carry):
        rows, total, flag = carry
        index = (k * 7919 + jnp.arange(100) * 104729) % ROWS
        old, new = rows[index], jnp.full((100, 16), 1.0 * k)
        if tied:
            new = jnp.where(flag < 2, new, old)
        return rows.at[index].set(new), total + old.sum(), flag

    return jax.jit(lambda rows, flag: jax.lax.fori_loop(0, 100, turn, (rows, jnp.zeros(()), flag)))


for tied in (False, True):
    run, rows, flag = loop(tied), jnp.zeros((ROWS, 16)), jnp.zeros(())
    loops, _ = run.lower(rows, flag).compile().as_text().split("\nENTRY ")
    jax.block_until_ready(run(rows, flag))
    begin = time.perf_counter()
    jax.block_until_ready(run(rows, flag))
    spent = 10 * (time.perf_counter() - begin)
    copies = loops.count(f"f32[{ROWS},16]{{1,0}} copy(")
    print(f"tied: {tied}; copies of all rows in the loop: {copies}; {spent:.2f} ms a turn")
PYTHON

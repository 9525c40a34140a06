#!/usr/bin/env bash
# jax 0.10.2 (CPU). A function under `jax.jit` reads a numpy array that is no argument. It has been called, and the array
# is changed in place afterwards.
#
# Expected: the number counts as it was when the function was traced, wherever it is called from then on at these shapes:
#           in the program that was compiled, and within another `jax.jit`, which takes the function from JAX's cache of
#           traces and does not run its Python again.
# Seen:     called by itself it keeps the old number. Within a new program it has the new one, though its Python is not
#           run again: the trace holds the array itself, and reads it anew whenever a program with it is lowered. One
#           function gives two values in one process. The same for an array of no dimension, which looks like a number in
#           the trace; a `jax.Array` made by `jnp.array` beforehand, which copies, keeps its value.
#
# Why it matters here: losses may read numpy arrays (class weights, penalties), what they read counts as it is at the call,
# and parts of programs are traced once for all problems that compute the same. A part traced for one problem would give
# another one, equal to it then, what that array held later. So parts are not shared where losses hold arrays
# (fedbilevel.compiled.sharable, tests/test_compiled.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "jax==0.10.2" "numpy>=2"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np

X = jnp.ones(2)


def seen(held, change):
    """(By itself before and after the change, within a new program after it, how often its Python ran)."""
    runs = []

    def scaled(x):
        runs.append(1)
        return (x * held).sum() / 2

    function = jax.jit(scaled)
    before = float(function(X))
    change(held)
    return before, float(function(X)), float(jax.jit(lambda x: function(x) + 0.0)(X)), len(runs)


def to_seven(array):
    array[...] = 7.0


rows = {
    "numpy array (2,)": seen(np.full(2, 3.0, np.float32), to_seven),
    "numpy array ()": seen(np.array(3.0, np.float32), to_seven),
}
ours = np.full(2, 3.0, np.float32)
rows["jnp.array of it"] = seen(jnp.array(ours), lambda _: to_seven(ours))
print("jax", jax.__version__)
print(f"{'what it reads':18} {'before':>7} {'after':>7} {'within a new program':>21} {'traced':>7}")
for name, (before, after, within, runs) in rows.items():
    print(f"{name:18} {before:7.1f} {after:7.1f} {within:21.1f} {runs:7}")
assert rows["numpy array (2,)"] == rows["numpy array ()"] == (3.0, 3.0, 7.0, 1), "this has changed"
assert rows["jnp.array of it"] == (3.0, 3.0, 3.0, 1), "this has changed"
PYTHON

#!/usr/bin/env bash
# jax 0.10.2 (CPU). jax.experimental.checkify.index_checks is documented to find indices that lie
# outside an array, also in scatters, and checkify composes with vmap.
#
# Expected: a batched scatter `vmap(lambda i: x.at[i].set(1.0))` whose index lies outside gives an
#           error value that names the index, as the same scatter without vmap does.
# Seen:     without vmap the index is named. Under vmap, checkify itself ends with
#           "IndexError: tuple index out of range" while tracing, whether the indices are valid or not.
#
# Why it matters here: rows that hold ids index into x or y (x[row["id"]], one row's ids under vmap),
# and XLA clamps or drops what lies outside without a word. So check_problem runs the traced
# program itself instead of leaning on index_checks.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "jax==0.10.2" "numpy>=2"
"$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
from jax.experimental import checkify

x = jnp.zeros(3)
put = lambda i: x.at[i].set(1.0)
checked = lambda f: checkify.checkify(f, errors=checkify.index_checks)

error, _ = checked(put)(7)
print("one scatter, index 7 of 3:", (error.get() or "no error").splitlines()[0])
assert error.get() is not None and "7" in error.get()

for name, indices in (("valid", jnp.asarray([0, 2])), ("outside", jnp.asarray([0, 7]))):
    try:
        error, _ = checked(jax.vmap(put))(indices)
    except IndexError as failure:
        print(f"batched scatter, {name} indices: IndexError: {failure}")
        assert "tuple index out of range" in str(failure)
    else:
        raise SystemExit(f"changed: batched scatter, {name} indices: {error.get()}")
PYTHON

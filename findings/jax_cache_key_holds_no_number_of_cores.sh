#!/usr/bin/env bash
# jax 0.10.2 (CPU, Linux). XLA:CPU splits loops among the cores that the process may use when it
# compiles; the compiled program names the parts ("outer_dimension_partitions").
#
# Expected: the persistent compilation cache has another key for another number of cores.
# Seen:     the number is not in it, so that a process with two cores takes the program that one with a
#           single core compiled, which uses one core only (and the other way round).
#
# Why it matters here: compiled programs are kept in the user's cache folder, which containers with
# other limits share. So they lie by the number of cores too (fedbilevel.machine).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "jax==0.10.2" "numpy>=2"
cat > "$folder/compile.py" <<'PYTHON'
import os
import re
import sys

import jax
import jax.numpy as jnp

cores, folder = int(sys.argv[1]), sys.argv[2]
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
jax.config.update("jax_compilation_cache_dir", folder)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
a = jnp.ones((1000, 1000))
program = jax.jit(lambda a, b: jnp.tanh(a @ b) + jnp.sin(a)).lower(a, a).compile()
parts = re.findall(r'"outer_dimension_partitions":\["?(\d+)"?\]', program.as_text())
print(f"{cores} cores: loops in {sorted(set(parts)) or 'one'} parts")
PYTHON
export JAX_PLATFORMS=cpu
run() { "$folder/venv/bin/python" "$folder/compile.py" "$@"; }
run 1 "$folder/one"
run 2 "$folder/two"
echo "2 cores, after 1 in the same folder:"
run 2 "$folder/one"

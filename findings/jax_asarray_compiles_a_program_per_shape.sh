#!/usr/bin/env bash
# jax 0.10.2 (CPU, 64 bits on). jnp.asarray turns a numpy array into a jax array, for which nothing
# has to be computed.
#
# Expected: no compilation, or one for all; jnp.asarray(a), jnp.asarray(a, a.dtype) and
#           jax.device_put(a) differ in nothing.
# Seen:     jnp.asarray(a), called with the array alone, compiles one XLA program for every new shape
#           (an identity, named "stage"); with the array's own dtype as second argument, and through
#           device_put, nothing is compiled. The results are equal.
#
# Why it matters here: clients' data sets have ragged shapes, so that a federation of m clients pays
# for up to m small programs before its first round (8 ms each on the machine where this was seen).
# So rows and messages are moved with their dtype (fedbilevel.arrays.on_device).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "jax==0.10.2" "numpy>=2"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_enable_x64", True)
compiled = []


def note(event, seconds, **more):
    if event == "/jax/core/compile/backend_compile_duration":
        compiled.append(str(more.get("fun_name")))


jax.monitoring.register_event_duration_secs_listener(note)
clients = [np.arange(float(n)) for n in range(1, 41)]  # 40 ragged clients
ways = {
    "jnp.asarray(a)": jnp.asarray,
    "jnp.asarray(a, a.dtype)": lambda a: jnp.asarray(a, a.dtype),
    "jax.device_put(a)": jax.device_put,
}
found = {}
for name, way in ways.items():
    compiled.clear()
    arrays = [way(a) for a in clients]
    found[name] = len(compiled)
    print(f"{name:26s} {len(compiled):3d} programs compiled for {len(clients)} shapes {sorted(set(compiled))}")
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(arrays, clients, strict=True))
assert found == {"jnp.asarray(a)": 40, "jnp.asarray(a, a.dtype)": 0, "jax.device_put(a)": 0}, found
PYTHON

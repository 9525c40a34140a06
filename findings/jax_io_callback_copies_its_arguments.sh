#!/usr/bin/env bash
# jax 0.10.2 (CPU). jax.experimental.io_callback in a compiled loop, with a few megabytes as its
# argument, against the same call without the copy that io_callback makes of it.
#
# Expected: a call costs what Python takes, some microseconds, whatever the size: on a CPU numpy can
#           look at the buffer.
# Seen:     io_callback hands every argument to jax.device_put first and calls with jax arrays, so
#           that a call with 8 MB takes several times as long, on threads of the pool that the
#           program itself may be waiting in. The lowering below it calls with numpy's arrays.
#
# Why it matters here: clients' states on disk are read and written from within the program of a run
# (fedbilevel.jaxprs.on_host). A program with such calls is also never kept in the persistent
# compilation cache.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "jax==0.10.2" "numpy>=2"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.callback import emit_python_callback
from jax.core import ShapedArray
from jax.experimental import io_callback
from jax.extend.core import Primitive
from jax.interpreters import mlir

CALLS = 200
count = lambda number, numbers: np.asarray(number) + np.int32(np.asarray(numbers)[0] > 0)
direct = Primitive("direct")
direct.def_abstract_eval(lambda *_: ShapedArray((), np.int32))
mlir.register_lowering(
    direct,
    lambda context, *args: emit_python_callback(
        context, lambda *given: (count(*given),), None, list(args), context.avals_in, context.avals_out,
        has_side_effect=True, returns_token=False,
    )[0],
    cacheable=False,
)
ways = {
    "io_callback": lambda k, a: io_callback(count, jax.ShapeDtypeStruct((), jnp.int32), k, a),
    "without a copy": lambda k, a: direct.bind(k, a),
}
for size in (10, 2_000_000):
    for name, call in ways.items():
        loop = lambda a: jax.lax.fori_loop(0, CALLS, lambda _, k: call(k, a), jnp.int32(0))
        program, a = jax.jit(loop), jnp.ones(size, jnp.float32)
        assert program(a) == CALLS
        begin = time.perf_counter()
        jax.block_until_ready(program(a))
        print(f"{4 * size:9,} bytes, {name:15s} {1e3 * (time.perf_counter() - begin) / CALLS:8.3f} ms a call")
PYTHON

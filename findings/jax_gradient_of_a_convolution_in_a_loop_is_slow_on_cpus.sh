#!/usr/bin/env bash
# jax 0.10.2 (CPU). Ten steps of gradient descent on the weights of a small convolutional network, channels last, once written
# as `jax.lax.fori_loop` and once written out ten times; compiled, timed after a first call, in processor time.
#
# Expected: about the same. It is known that a convolution with channels FIRST is slow within a loop (jax-ml/jax issue 12868),
#           and that channels last are not concerned: forward, they are as fast in a loop as outside.
# Seen:     the gradient is about ten times as slow within the loop, with channels last as with channels first: the gradient by
#           the weights is a convolution in which rows and channels have changed places, and within loops XLA has no fast
#           one for it.
#
# Why it matters here: whatever iterates is a loop, and a run of an algorithm is little else than gradients. Convolutions in
# losses are replaced by patches times weights (fedbilevel.convolutions, tests/test_convolutions.py, benchmarks/convolutions.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "jax==0.10.2" "numpy>=2"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import time

import jax
import jax.numpy as jnp

keys = jax.random.split(jax.random.key(0), 3)
rows = jax.random.normal(keys[0], (32, 28, 28, 1))
weights = {"one": jax.random.normal(keys[1], (3, 3, 1, 16)), "two": jax.random.normal(keys[2], (3, 3, 16, 32)) / 12}
LAST = ("NHWC", "HWIO", "NHWC")


def forward(weights):
    hidden = rows
    for name in weights:
        convolved = jax.lax.conv_general_dilated(hidden, weights[name], (2, 2), "VALID", dimension_numbers=LAST)
        hidden = jnp.tanh(convolved)
    return jnp.mean(hidden**2)


def moved(direction):
    return lambda _, weights: jax.tree.map(lambda w, d: w - 0.01 * d, weights, direction(weights))


def seconds(step):
    looped = jax.jit(lambda weights: jax.lax.fori_loop(0, 10, step, weights))

    @jax.jit
    def written_out(weights):
        for turn in range(10):
            weights = step(turn, weights)
        return weights

    def measured(run):
        jax.block_until_ready(run(weights))
        begin = time.process_time()
        for _ in range(10):
            jax.block_until_ready(run(weights))
        return time.process_time() - begin

    return measured(looped), measured(written_out)


value = lambda weights: jax.tree.map(lambda w: w * forward(weights), weights)
ratios = {}
for name, direction in (("forward", value), ("gradient", jax.grad(forward))):
    loop, outside = seconds(moved(direction))
    ratios[name] = loop / outside
    print(f"{name}: a step takes {10 * loop:.2f} ms within the loop, {10 * outside:.2f} ms written out: {loop / outside:.1f} times")
print("jax", jax.__version__)
raise SystemExit("this has changed" if ratios["gradient"] < 4 or ratios["forward"] > 3 else 0)
PYTHON

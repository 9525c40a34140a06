"""A run with a convolutional network, its convolutions as products of matrices and as XLA has them.

    python benchmarks/convolutions.py [--quick]

Lockstep with numbers for its steps on a network of two convolutions with 16 and 32 channels, 20 clients, cohort 5,
minibatches of 32, 32 bits. Cpu time: to compile and run one iteration, of an iteration, and of the
look at the problem before a run. `fedbilevel.convolutions` says why convolutions are replaced.
"""

from __future__ import annotations

import argparse
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedbilevel as fb
from fedbilevel import convolutions, memory

WAYS = {"as products": None, "as XLA has them": lambda program: False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny images, one more iteration")
    quick = parser.parse_args().quick
    print(f"{'images':>7}  {'convolutions':14}  {'first, s':>8}  {'iteration, ms':>13}  {'look, s':>7}", flush=True)
    for size, more in ((8, 1),) if quick else ((14, 10), (28, 5)):
        for name, replaced in WAYS.items():
            with mock.patch("fedbilevel.program.convolves", replaced or convolutions.convolves):
                first, each, look = measured(size, more)
            print(f"{size:>2} x {size:<2}  {name:14}  {first:8.1f}  {1e3 * each:13.1f}  {look:7.1f}", flush=True)


def measured(size: int, more: int) -> tuple[float, float, float]:
    """Cpu seconds: (of a first iteration, of each further one, of the look at the problem)."""
    memory.release(0)
    draw, keys = np.random.default_rng(0), jax.random.split(jax.random.key(0), 3)
    rows = lambda n: {
        "image": draw.standard_normal((n, 1, size, size), np.float32),
        "label": draw.integers(0, 10, n),
    }
    data = fb.FederatedData.stack([rows(60) for _ in range(20)], [rows(40) for _ in range(20)])
    left = ((size - 3) // 2 + 1 - 3) // 2 + 1  # places along an axis after both convolutions
    y = {
        "one": jax.random.normal(keys[0], (16, 1, 3, 3)) / 3,
        "two": jax.random.normal(keys[1], (32, 16, 3, 3)) / 12,
        "head": jax.random.normal(keys[2], (32 * left**2, 10)) / 20,
    }

    def logits(y: dict, image: jax.Array) -> jax.Array:
        hidden = jnp.tanh(jax.lax.conv_general_dilated(image[None], y["one"], (2, 2), "VALID"))
        hidden = jnp.tanh(jax.lax.conv_general_dilated(hidden, y["two"], (2, 2), "VALID"))
        return hidden.ravel() @ y["head"]

    def outer(x: jax.Array, y: dict, row: dict) -> jax.Array:
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits(y, row["image"]), row["label"])

    def inner(x: jax.Array, y: dict, row: dict) -> jax.Array:
        return outer(x, y, row) + jnp.exp(x) * sum(jnp.sum(leaf**2) for leaf in y.values())

    algorithm = fb.Lockstep(inner_lr=0.1, hessian_lr=0.1, outer_lr=0.1, batch_size=32)
    engine, x = fb.Simulation(cohort=5, compile="full"), jnp.array(-7.0)

    def seconds(iterations: int, check: bool = False) -> float:
        begin = time.process_time()
        problem = fb.Problem(inner, outer)
        fb.solve(problem, data, algorithm, x, y, iterations, key=jax.random.key(0), engine=engine, check=check)
        return time.process_time() - begin

    first = seconds(1)
    seconds(1 + more)
    return first, (seconds(1 + more) - seconds(1)) / more, seconds(1, check=True) - seconds(1)


if __name__ == "__main__":
    main()

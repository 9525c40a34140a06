"""An app with a module of equinox or flax, and dropout, over nvflare is its simulation."""

from __future__ import annotations

import pytest

from helpers.network import call, close, same_books

pytest.importorskip("nvflare")

APP = """
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import fedbilevel as fb


class Equinox(eqx.Module):
    body: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    dropout: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self):
        one, two = jax.random.split(jax.random.key(0))
        self.body, self.norm = eqx.nn.Linear(6, 4, key=one), eqx.nn.LayerNorm(4)
        self.dropout, self.head = eqx.nn.Dropout(0.3), eqx.nn.Linear(4, 3, key=two)

    def __call__(self, row, key=None):
        hidden = jnp.tanh(self.norm(self.body(row)))
        return self.head(self.dropout(hidden, key=key, inference=key is None))


class Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.body, self.norm = nnx.Linear(6, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)
        self.dropout, self.head = nnx.Dropout(0.3), nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, row, key=None):
        hidden = jnp.tanh(self.norm(self.body(row)))
        return self.head(self.dropout(hidden, deterministic=key is None, rngs=key))


cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels


def inner(x, y, row, key):
    size = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(eqx.filter(y, eqx.is_inexact_array)))
    return jnp.exp(x["weights"])[row["label"]] * cross_entropy(y(row["a"], key), row["label"]) + jnp.exp(x["decay"]) * size


def outer(x, y, row):
    return cross_entropy(y(row["a"]), row["label"])


def load(site):
    draw = np.random.default_rng(sum(map(ord, site)))
    rows = lambda n: {"a": draw.standard_normal((n, 6), np.float32), "label": draw.integers(0, 3, n)}
    count = 6 + int(site[-1])
    return rows(count), rows(count + 2)


app = fb.App(
    problem=fb.Problem(inner, outer, random=True), load=load, algorithm=fb.Lockstep(batch_size=4), iterations=4, cohort=2,
    start=lambda: ({"weights": jnp.zeros(3), "decay": jnp.array(-3.0)}, MODULE()),
)
"""


@pytest.mark.network
@pytest.mark.parametrize(("module", "how"), [("Equinox", ["--poc"]), ("Nnx", [])], ids=["provisioned", "simulator"])
def test_a_module_that_draws_is_its_simulation(module, how, tmp_path):
    file = tmp_path / "app.py"
    file.write_text(APP.replace("MODULE", module))
    out, simulated = tmp_path / "network", tmp_path / "simulated"
    call("run", file, "--engine", "nvflare", "--clients", 3, "--out", out, *how)
    call("run", file, "--clients", 3, "--out", simulated)
    close(out, simulated, 1e-5)
    same_books(out, simulated)

"""Tables are rows of a problem in PyTorch as of one in JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

import fedbilevel as fb
import fedbilevel.torch as ft
from helpers.users import as_users_do


def table(rows=120):
    draw = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "bank": draw.choice(["north", "east", "south"], rows),
            "age": draw.normal(40, 10, rows),
            "job": draw.choice(["clerk", "boss", None], rows),
            "default": draw.integers(0, 2, rows),
        }
    )
    frame.loc[::9, "age"] = np.nan
    return frame


def outer(x, y, batch, weights):
    logit, label = batch["a"] @ y, batch["b"]
    return (weights * torch.where(label == 1, F.softplus(-logit), F.softplus(logit))).sum()


def row_loss(x, y, row):
    logit = row["a"] @ y
    return jnp.where(row["b"] == 1, jax.nn.softplus(-logit), jax.nn.softplus(logit))


def test_tables_in_torch_are_those_in_jax():
    with as_users_do():
        data = fb.FederatedData.from_table(table(), client="bank", label="default", stratify=True)
        columns = len(data.prepared.columns)
        assert columns == 4
        one = ft.Problem(lambda x, y, b, w: outer(x, y, b, w) + 0.5 * (torch.exp(x) * y**2).sum(), outer)
        other = fb.Problem(lambda x, y, row: row_loss(x, y, row) + 0.5 * jnp.sum(jnp.exp(x) * y**2), row_loss)
        starts = (torch.full((columns,), -3.0), torch.zeros(columns)), (jnp.full(columns, -3.0), jnp.zeros(columns))
        found, expected = (
            fb.solve(problem, data, fb.Lockstep(), *start, 5, key=jax.random.key(0))
            for problem, start in zip((one, other), starts, strict=True)
        )
    for mine, theirs in ((found.x, expected.x), (found.y, expected.y)):
        np.testing.assert_allclose(np.asarray(mine), np.asarray(theirs), rtol=1e-4, atol=1e-6)

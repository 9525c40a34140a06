"""Small problems written twice, in PyTorch and in JAX, on ragged rows of four clients.

`mlp` has x inside the loss (a label smoothing and class weights), `cnn` inside the model (a body with GroupNorm, of which
y is the head).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import fedbilevel as fb
import fedbilevel.torch as ft

COUNTS, CLASSES = (7, 4, 9, 6), 3
WEIGHTS = (3.0, 1.0, 2.0, 4.0)


@dataclasses.dataclass(frozen=True)
class Twin:
    """A problem and its data in one of the two."""

    problem: fb.Problem
    data: fb.FederatedData
    x: dict
    y: dict


def twins(name: str, bits: int, weights=None) -> tuple[Twin, Twin]:
    """(In torch, in JAX)."""
    return {"mlp": _mlp, "cnn": _cnn}[name](bits, weights)


def rows(shape: tuple[int, ...], bits: int, extra: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    draw = np.random.default_rng(extra)
    labelled = lambda n: (draw.standard_normal((n, *shape)).astype(f"float{bits}"), draw.integers(0, CLASSES, n))
    return [labelled(n + extra) for n in COUNTS]


def both(module, inner, outer, other_inner, other_outer, x, y, shape, bits, weights) -> tuple[Twin, Twin]:
    inside, outside = rows(shape, bits), rows(shape, bits, 2)
    tensors = lambda sets: [TensorDataset(*map(torch.from_numpy, one)) for one in sets]
    torch_data = fb.FederatedData.stack(tensors(inside), tensors(outside), weights)
    data = fb.FederatedData.stack(inside, outside, weights)
    theirs = lambda tree: {name: jnp.asarray(leaf.numpy()) for name, leaf in tree.items()}
    return (
        Twin(ft.Problem(inner, outer), torch_data, x, y),
        Twin(fb.Problem(other_inner, other_outer), data, theirs(x), theirs(y)),
    )


def _mlp(bits: int, weights):
    torch.manual_seed(1)
    kind = getattr(torch, f"float{bits}")
    model = ft.Model(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES)).to(kind))
    x = {"smoothing": torch.tensor(-2.0, dtype=kind), "weights": torch.linspace(-0.5, 0.5, CLASSES, dtype=kind)}

    def inner(x, y, batch, weights):
        inputs, label = batch
        logp = F.log_softmax(model(y, inputs), dim=1)
        smooth = torch.sigmoid(x["smoothing"])
        own = logp.gather(1, label[:, None])[:, 0]
        each = -(1 - smooth) * own - smooth * logp.mean(dim=1)
        decay = sum((leaf**2).sum() for leaf in y.values())
        return (weights * torch.exp(x["weights"])[label] * each).sum() + 0.05 * decay

    def outer(x, y, batch, weights):
        inputs, label = batch
        return (weights * F.cross_entropy(model(y, inputs), label, reduction="none")).sum()

    def logits(y, a):
        return y["2.weight"] @ jnp.tanh(y["0.weight"] @ a + y["0.bias"]) + y["2.bias"]

    def other_inner(x, y, row):
        logp = jax.nn.log_softmax(logits(y, row[0]))
        smooth = jax.nn.sigmoid(x["smoothing"])
        each = -(1 - smooth) * logp[row[1]] - smooth * jnp.mean(logp)
        decay = sum(jnp.sum(leaf**2) for leaf in y.values())
        return jnp.exp(x["weights"])[row[1]] * each + 0.05 * decay

    def other_outer(x, y, row):
        return -jax.nn.log_softmax(logits(y, row[0]))[row[1]]

    return both(model, inner, outer, other_inner, other_outer, x, model.parameters(), (5,), bits, weights)


def _cnn(bits: int, weights):
    torch.manual_seed(2)
    kind = getattr(torch, f"float{bits}")
    body = ft.Model(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()).to(kind)
    )
    head = ft.Model(nn.Linear(16, CLASSES).to(kind))

    def loss(x, y, batch, weights):
        image, label = batch
        return (weights * F.cross_entropy(head(y, body(x, image)), label, reduction="none")).sum()

    def inner(x, y, batch, weights):
        return loss(x, y, batch, weights) + 0.1 * sum((leaf**2).sum() for leaf in y.values())

    def logits(x, y, image):
        z = jax.lax.conv(image[None], x["0.weight"], (1, 1), "VALID")[0] + x["0.bias"][:, None, None]
        grouped = z.reshape(2, -1)
        mean, spread = grouped.mean(axis=1, keepdims=True), grouped.var(axis=1, keepdims=True)
        z = ((grouped - mean) / jnp.sqrt(spread + 1e-5)).reshape(z.shape)
        z = jax.nn.relu(z * x["1.weight"][:, None, None] + x["1.bias"][:, None, None])
        z = z.reshape(4, 2, 2, 2, 2).mean(axis=(2, 4)).reshape(-1)
        return y["weight"] @ z + y["bias"]

    def other_outer(x, y, row):
        return -jax.nn.log_softmax(logits(x, y, row[0]))[row[1]]

    def other_inner(x, y, row):
        return other_outer(x, y, row) + 0.1 * sum(jnp.sum(leaf**2) for leaf in y.values())

    return both(
        body, inner, loss, other_inner, other_outer, body.parameters(), head.parameters(), (1, 6, 6), bits, weights
    )

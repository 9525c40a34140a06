"""What a loss in torch computes, in a digest: whatever it may call or read counts, wherever it stands."""

from __future__ import annotations

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest
import torch
from torch import nn

import fedbilevel as fb
import fedbilevel.torch as ft
from fedbilevel.torch.digest import digest


class Called:
    def __init__(self, factor: float):
        self.factor = factor

    def __call__(self, y: dict) -> torch.Tensor:
        return self.factor * y["w"].sum()


@dataclasses.dataclass
class Record:
    factor: float


def frozen(seed: int, *layers: nn.Module) -> ft.Model:
    torch.manual_seed(seed)
    body = nn.Linear(3, 3)
    body.weight.requires_grad_(False)
    return ft.Model(nn.Sequential(body, *layers))


THING = None  # a global, as in a notebook


def reads(x: dict, y: dict, batch: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return THING(y, batch)


def holding(thing: object):
    return lambda x, y, batch, weights: thing(y, batch)


KINDS = {
    "frozen weights": lambda k: frozen(k),
    "layers": lambda k: frozen(0, [nn.ReLU(), nn.Tanh()][k]),
    "a mode": lambda k: ft.Model(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train(k == 0)),
    "a partial function": lambda k: functools.partial(torch.add, alpha=k),
    "an object that is called": lambda k: Called(float(k)),
    "a record": lambda k: Record(float(k)),
    "a namespace": lambda k: types.SimpleNamespace(factor=k),
    "a number": lambda k: float(k),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_what_a_global_or_a_closure_holds_counts(make, monkeypatch):
    found = []
    for k in (0, 1, 0):
        monkeypatch.setitem(globals(), "THING", make(k))
        found.append((digest(reads), digest(holding(make(k)))))
    assert found[0] == found[2]
    assert all(one != other for one, other in zip(found[0], found[1], strict=True))


def test_another_model_of_the_same_name_is_looked_at_anew(monkeypatch):
    """In a notebook the model is a global, and made again with dropout; shapes are the same."""
    data = fb.FederatedData.stack([np.ones((4, 3), np.float32)] * 2, [np.ones((4, 3), np.float32)] * 2)
    inner = lambda x, y, b, w: (
        (w * (THING(y, b) ** 2).sum(1)).sum() + torch.exp(x) * sum((v**2).sum() for v in y.values())
    )
    problem = ft.Problem(inner, lambda x, y, b, w: (w * ((THING(y, b) - 1) ** 2).sum(1)).sum())
    make = lambda *layers: ft.Model(nn.Sequential(nn.Linear(3, 2), *layers))
    steps = fb.SimFBO(inner_lr=0.01, hessian_lr=0.01, outer_lr=0.01)
    run = lambda: fb.solve(problem, data, steps, torch.tensor(0.0), THING.parameters(), 1, key=jax.random.key(0))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        monkeypatch.setitem(globals(), "THING", make(nn.Identity()))
        run()
        monkeypatch.setitem(globals(), "THING", make(nn.Dropout(0.5)))
        with pytest.raises(fb.InputError, match="Dropout"):
            run()

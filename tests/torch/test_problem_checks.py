"""`check_problem` of a problem in PyTorch: second derivatives that are wrong are found before a run."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

import fedbilevel as fb
import fedbilevel.torch as ft

GROUPS = (
    "hessian_vector",
    "hessian is symmetric",
    "hessian_vector in each way, at the start",
    "hessian_vector in each way, beside it",
)


def report(inner, y, rows=None):
    draw = np.random.default_rng(0)
    rows = rows or (lambda n: {"a": draw.normal(size=(n, 3)), "b": draw.normal(size=n)})
    data = fb.FederatedData.stack(*([rows(n) for n in level] for level in ((5, 3), (4, 6))))
    outer = lambda x, y, batch, weights: sum(((leaf - 1) ** 2).sum() for leaf in y.values())
    problem, x = ft.Problem(inner, outer), {"decay": torch.tensor(-1.0, dtype=torch.float64)}
    try:
        lines = fb.testing.check_problem(problem, data, x, y).lines
    except fb.testing.CheckFailed as error:
        lines = error.report.lines
    return {
        what.removeprefix("client 0: "): (good, detail) for what, good, detail in lines if what.startswith("client 0")
    }


def line(x, y, batch, weights):
    return (weights * (batch["a"] @ y["w"] - batch["b"]) ** 2).sum()


def y(size=3):
    return {"w": torch.zeros(size, dtype=torch.float64)}


def test_a_problem_that_is_right_passes_with_both_ways_told():
    found = report(lambda x, y, *rows: line(x, y, *rows) + torch.exp(x["decay"]) * (y["w"] ** 2).sum(), y())
    assert all(good for good, _ in found.values()), found
    for name in GROUPS[2:]:
        assert "double backward" in found[name][1] and "forward over reverse" in found[name][1]


def test_a_squared_norm_at_zero_is_found_at_the_start_alone():
    found = report(lambda x, y, *rows: line(x, y, *rows) + torch.exp(x["decay"]) * y["w"].norm() ** 2, y())
    assert not found[GROUPS[2]][0] and "nan" in found[GROUPS[2]][1]
    assert all(good for name, (good, _) in found.items() if name != GROUPS[2] and "curves" not in name)


def test_an_embedding_that_hides_a_row_is_found():
    draw = np.random.default_rng(0)
    rows = lambda n: {"word": draw.integers(0, 4, (n, 2)), "b": draw.normal(size=n)}

    def inner(x, y, batch, weights):
        seen = F.embedding(batch["word"], y["w"].reshape(4, 2), padding_idx=0)
        return (weights * ((seen[:, 0] * seen[:, 1]).sum(1) - batch["b"]) ** 2).sum() + torch.exp(x["decay"]) * (
            y["w"] ** 2
        ).sum()

    found = report(inner, y(8), rows)
    assert not found[GROUPS[3]][0]
    assert not (found["hessian_vector"][0] and found["hessian is symmetric"][0])


def test_where_there_is_one_way_it_is_told_alone():
    inner = lambda x, y, batch, w: (
        (w * F.huber_loss(batch["a"] @ y["w"], batch["b"], reduction="none")).sum()
        + torch.exp(x["decay"]) * (y["w"] ** 2).sum()
    )
    found = report(inner, y())
    assert all(good for good, _ in found.values()), found
    assert "forward" not in found[GROUPS[2]][1]

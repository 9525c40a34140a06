"""Tensors and data sets of PyTorch as rows."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import fedbilevel as fb
import fedbilevel.torch


class Squares(Dataset):
    def __init__(self, count: int):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, k):
        return {"a": torch.tensor([k, k**2], dtype=torch.float32), "b": k}


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(2)


TENSORS = torch.arange(12.0).reshape(6, 2), torch.arange(6)
WHOLE = TensorDataset(*TENSORS)


@pytest.mark.parametrize(
    "rows",
    [WHOLE, TENSORS, DataLoader(WHOLE, batch_size=4, shuffle=True), Subset(WHOLE, range(6))],
    ids=["TensorDataset", "tuple", "DataLoader", "Subset"],
)  # fmt: skip
def test_rows_in_order(rows):
    data = fb.FederatedData.stack([rows, rows], [rows, rows])
    found = data.inner.rows
    np.testing.assert_array_equal(found[0], np.tile(TENSORS[0].numpy(), (2, 1)))
    np.testing.assert_array_equal(found[1], np.tile(TENSORS[1].numpy(), 2))


def test_data_sets_of_a_user_s_own_by_name():
    data = fb.FederatedData.split({"here": Squares(5), "there": Squares(2000)}, outer=0.5, key=jax.random.key(0))
    assert data.names == ("here", "there") and data.count("inner").sum() + data.count("outer").sum() == 2005
    assert data.inner.rows["a"].shape[1:] == (2,)


def test_rows_are_the_library_s_own():
    mine = torch.ones(4, 2)
    data = fb.FederatedData.stack([TensorDataset(mine)], [TensorDataset(mine)])
    mine.zero_()
    assert float(data.inner.rows[0].sum()) == 8.0


def test_what_is_no_data_set():
    with pytest.raises(fb.InputError, match="Stream has no length"):
        fb.FederatedData.stack([Stream()], [Stream()])
    with pytest.raises(fb.InputError, match="one TensorDataset: pass a list"):
        fb.FederatedData.stack(TensorDataset(*TENSORS), TensorDataset(*TENSORS))
    with pytest.raises(fb.InputError, match="Squares has no rows"):
        fb.FederatedData.stack([Squares(0)], [Squares(0)])


def test_saved_results_come_back_as_tensors(tmp_path):
    module = torch.nn.Linear(2, 1)
    y = fedbilevel.torch.parameters(module)

    def loss(x, y, batch, weights):
        a, b = batch
        return (weights * (torch.func.functional_call(module, y, (a,))[:, 0] - b) ** 2).sum()

    problem = fedbilevel.torch.Problem(
        lambda x, y, b, w: loss(x, y, b, w) + x.exp() * sum((v**2).sum() for v in y.values()), loss
    )
    data = fb.FederatedData.split([(TENSORS[0], TENSORS[1].float())] * 2, 0.5, jax.random.key(0))
    x = torch.tensor(-3.0)
    result = fb.solve(problem, data, fb.Lockstep(), x, y, 2, key=jax.random.key(0))
    result.save(tmp_path)
    back = fb.load_result(tmp_path, like=(x, y))
    assert torch.equal(back.x, result.x) and back.y.keys() == y.keys()
    assert all(isinstance(back.y[name], torch.Tensor) and torch.equal(back.y[name], result.y[name]) for name in y)
    module.load_state_dict(back.y)
    assert set(fb.load_result(tmp_path).y) == {"weight", "bias"}

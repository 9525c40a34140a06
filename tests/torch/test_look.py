"""What would make a run mean something else is refused, by its name; and a look leaves nothing behind."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import fedbilevel as fb
import fedbilevel.torch as ft

KIND = torch.float64
X = {"penalty": torch.tensor(-3.0, dtype=KIND)}
WAYS = {"iterations": 2, "key": jax.random.key(0)}


@pytest.fixture(scope="module")
def data():
    draw = np.random.default_rng(0)
    rows = lambda n: TensorDataset(*map(torch.from_numpy, (draw.standard_normal((n, 6)), draw.integers(0, 3, n))))
    return fb.FederatedData.stack([rows(5), rows(8)], [rows(4), rows(3)])


def losses(model):
    def outer(x, y, batch, weights):
        return (weights * F.cross_entropy(model(y, batch[0]), batch[1], reduction="none")).sum()

    def inner(x, y, batch, weights):
        return outer(x, y, batch, weights) + torch.exp(x["penalty"]) * sum((leaf**2).sum() for leaf in y.values())

    return inner, outer


def run(data, module=None, inner=None, x=X, y=None, algorithm=None):
    torch.manual_seed(0)
    model = ft.Model((nn.Linear(6, 3) if module is None else module).to(KIND))
    ours, outer = losses(model)
    problem = ft.Problem(ours if inner is None else inner, outer)
    return fb.solve(problem, data, algorithm or fb.Lockstep(), x, model.parameters() if y is None else y, **WAYS)


MODULES = {
    "dropout": (lambda: nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.Linear(4, 3)), "draws random .* Dropout"),
    "norm": (lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), "running_mean .* BatchNorm1d"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_modules_that_draw_or_keep_statistics(name, data):
    make, words = MODULES[name]
    module = make().to(KIND)  # called as it is, not by a copy of its own
    inner, _ = losses(lambda y, inputs: torch.func.functional_call(module, y, inputs))
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with pytest.raises(fb.InputError, match=words):
        run(data, module, inner=inner, y=ft.parameters(module))
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)  # `run` sets the same seed, and nothing is drawn after it
    assert run(data, make().eval()).iteration == 2


def of(model, other):
    """A loss like the inner one, but that `other(logits, x, y, batch, weights)` makes of the logits."""
    return lambda x, y, batch, weights: other(model(y, batch[0]), x, y, batch, weights)


def test_losses_that_cannot_mean_what_they_say(data):
    torch.manual_seed(0)
    net = nn.Linear(6, 3).to(KIND)
    model = ft.Model(net)
    inner, _ = losses(model)
    each = lambda x, y, batch, weights: F.cross_entropy(model(y, batch[0]), batch[1], reduction="none")
    wrong = {
        "in neither x nor y": lambda x, y, b, w: inner(x, y, b, w) + net(b[0]).sum(),
        r"returned float64\[4\]": each,
        "does not depend on x": lambda x, y, b, w: (w * each(x, y, b, w)).sum() + 0.1 * (y["bias"] ** 2).sum(),
        "does not depend on y": lambda x, y, b, w: x["penalty"] ** 2,
        "in place": lambda x, y, b, w: inner(x, y, (b[0].mul_(2), b[1]), w),
        "gives .* and then": lambda x, y, b, w: inner(x, y, b, w) * np.random.default_rng().random(),
        "failed on .*mat1 and mat2": lambda x, y, b, w: inner(x, y, (b[0][:, :2], b[1]), w),
    }
    for words, loss in wrong.items():
        with pytest.raises(fb.InputError, match=words):
            run(data, inner=loss, y=model.parameters())
    assert run(data, inner=inner, y=model.parameters()).iteration == 2


def test_variables_that_cannot_be_optimised(data):
    for x, words in (
        ({"penalty": torch.tensor(3)}, r"x\['penalty'\] is int64"),
        ({**X, "name": "relu"}, r"x\['name'\] is 'relu'"),
        ({"penalty": torch.tensor(float("nan"), dtype=KIND)}, "NaN"),
    ):
        with pytest.raises(fb.InputError, match=words):
            run(data, x=x)
    with jax.enable_x64(False), pytest.raises(fb.InputError, match=r"x\['penalty'\] is float64"):
        run(data)


def test_a_wrapped_module_is_unwrapped_or_refused(data):
    torch.manual_seed(0)
    net = nn.Linear(6, 3).to(KIND)
    wrapped = nn.DataParallel(net)
    assert list(ft.parameters(wrapped)) == ["weight", "bias"]
    inner, _ = losses(
        lambda y, inputs: torch.func.functional_call(wrapped, {f"module.{n}": v for n, v in y.items()}, inputs)
    )
    with pytest.raises(fb.InputError, match="DataParallel"):
        run(data, inner=inner, y=ft.parameters(net))
    assert run(data, wrapped).iteration == 2


def test_an_operation_without_second_derivatives_is_named_and_first_order_methods_run(data):
    bag = lambda: nn.EmbeddingBag(3, 3)
    model = ft.Model(bag().to(KIND))

    def inner(x, y, batch, weights):
        out = model(y, batch[1][:, None])
        return (weights * (out**2 + out).sum(1)).sum() + torch.exp(x["penalty"]) * (y["weight"] ** 2).sum()

    outer = lambda x, y, batch, weights: (weights * ((model(y, batch[1][:, None]) - 1) ** 2).sum(1)).sum()
    problem, y = ft.Problem(inner, outer), model.parameters()
    with pytest.raises(fb.InputError, match=r"no second derivatives.*_embedding_bag_backward"):
        fb.solve(problem, data, fb.Lockstep(), X, y, **WAYS)
    steps = {"inner_lr": 0.05, "outer_lr": 0.05}
    for algorithm in (fb.MemFBO(hessian_lr=0.05, **steps), fb.FedF2SA(**steps)):
        moved = fb.solve(problem, data, algorithm, X, y, **WAYS)
        assert float(moved.x["penalty"]) != -3.0


def test_attention_has_second_derivatives_here(data):
    """PyTorch's own attention has none on processors, but for the kernel "math"."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0)
    module = nn.Sequential(nn.Unflatten(1, (1, 6)), layer, nn.Flatten(), nn.Linear(6, 3))
    assert run(data, module).iteration == 2


def test_what_a_loss_raises_while_a_run_is_on(data):
    model = ft.Model(nn.Linear(6, 3).to(KIND))
    inner, _ = losses(model)

    def late(x, y, batch, weights):
        if len(weights) > 6:
            raise ValueError("too many rows")
        return inner(x, y, batch, weights)

    with pytest.raises(fb.RunError, match="a loss failed in torch: ValueError: too many rows"):
        run(data, inner=late, y=model.parameters())


def test_nothing_is_shared_with_the_user_s_memory(data):
    torch.manual_seed(0)
    net = nn.Linear(6, 3).to(KIND)
    y, model = ft.parameters(net), ft.Model(net)
    with torch.no_grad():
        net.weight.zero_()  # an optimiser's step
    assert y["weight"].abs().max() > 0 and model.parameters()["weight"].abs().max() > 0
    held = y["weight"].clone()
    result = run(data, inner=losses(model)[0], y=y)
    result.y["weight"].zero_()
    assert torch.equal(y["weight"], held)


def test_tied_and_frozen_weights_stay_so(data):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False), nn.Linear(6, 3)).to(KIND)
    net[2].weight = net[0].weight
    net[3].bias.requires_grad_(False)
    assert list(ft.parameters(net)) == ["0.weight", "3.weight"]
    model, inputs = ft.Model(net), torch.ones(2, 6, dtype=KIND)
    doubled = {name: 2 * one for name, one in model.parameters().items()}
    own = torch.tanh(inputs @ doubled["0.weight"].T) @ doubled["0.weight"].T @ doubled["3.weight"].T + net[3].bias
    torch.testing.assert_close(model(doubled, inputs), own)

"""The models, losses and rows."""

from __future__ import annotations

import numpy as np

CLIENTS, ROWS, COHORT, BATCH, STEPS, TURNS = 20, 200, 5, 32, 5, 5
LR, OUTER_LR, LAM = 1e-2, 1e-2, 1e-2


def problem(model: str):
    """(inner, outer, x, y, rows of each client at each level)."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    torch.manual_seed(0)
    norm = lambda channels: [nn.GroupNorm(4, channels), nn.ReLU(), nn.MaxPool2d(2)]
    module = {
        "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10)),
        "cnn": lambda: nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), *norm(16), nn.Conv2d(16, 32, 3, padding=1), *norm(32), nn.Flatten(),
            nn.Linear(32 * 49, 10),
        ),
    }[model]()  # fmt: skip
    y = {name: one.detach().clone() for name, one in module.named_parameters()}
    x = {"weights": torch.zeros(10), "penalty": torch.tensor(-6.0)}

    def inner(x, y, batch, weights):
        image, label = batch
        each = F.cross_entropy(torch.func.functional_call(module, y, (image,)), label, reduction="none")
        decay = sum((leaf**2).sum() for leaf in y.values())
        return (weights * torch.exp(x["weights"])[label] * each).sum() + torch.exp(x["penalty"]) * decay

    def outer(x, y, batch, weights):
        image, label = batch
        each = F.cross_entropy(torch.func.functional_call(module, y, (image,)), label, reduction="none")
        return (weights * each).sum()

    draw = np.random.default_rng(0)
    client = lambda: (draw.standard_normal((ROWS, 1, 28, 28), np.float32), draw.integers(0, 10, ROWS))
    levels = [[client() for _ in range(CLIENTS)] for _ in range(2)]
    return inner, outer, x, y, levels

"""The task `quadratic` in PyTorch is the one in JAX."""

from __future__ import annotations

import numpy as np

import fedbilevel as fb
from fedbilevel.torch.quadratic import made


def test_it_is_the_task():
    task = fb.tasks.quadratic(clients=3, seed=1)
    problem, (x, y) = made(task.x, task.y)
    for part in (fb.reference.value, fb.reference.hypergradient, fb.reference.solution):
        found, expected = part(problem, task.data, x, y), part(task.problem, task.data, task.x, task.y)
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-8)

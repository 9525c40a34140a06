"""How good an x is: Phi(x) = f(x, y*(x)), and the test loss there; no budget pays for it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import PyTree

import fedbilevel as fb
from fedbilevel.tasks import Task

from ..kinds import DataDir
from .grounds import Ground

RETRAIN = 100  # rounds of training, everyone and all rows, where y* has no reference
Judge = Callable[[PyTree], tuple[float, float]]  # x -> (Phi, test loss)


def judge(ground: Ground, seed: int, data_dir: DataDir) -> Judge:
    """What judges x: the reference in 64 bits where g is strongly convex, else training.

    What cannot be judged (a reference that is refused, a training that blows up) is infinite.
    """
    if not ground.convex:
        task = ground.build(seed, data_dir)
        return lambda x: _safely(lambda: _trained(task, ground.test, x))
    with jax.enable_x64(True):
        task = ground.build(seed, data_dir)

    def exact(x: PyTree) -> tuple[float, float]:
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda leaf: jax.numpy.asarray(np.asarray(leaf, float)), x)
            y = fb.reference.solution(task.problem, task.data, wide, task.y)
            return _both(task, ground.test, wide, y)

    return lambda x: _safely(lambda: exact(x))


def _trained(task: Task, test: str, x: PyTree) -> tuple[float, float]:
    given = task.problem, task.data, x, task.y
    run = fb.train(*given, rounds=RETRAIN, key=task.key, evaluate_every=RETRAIN, check=False)
    return _both(task, test, x, run.y)


def _both(task: Task, test: str, x: PyTree, y: PyTree) -> tuple[float, float]:
    value = fb.reference.outer_value(task.problem, task.data, x, y)
    return float(value), float(np.asarray(task.metrics[test](x, y)))


def _safely(measure: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    try:
        return measure()
    except (fb.InputError, fb.RunError):
        return np.inf, np.inf

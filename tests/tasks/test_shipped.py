"""What the store holds for a task makes the task's metrics better, in 32 bits and at the rounds of the command line."""

from __future__ import annotations

import jax
import pytest

import fedbilevel as fb
from fedbilevel import reference
from fedbilevel.cli.plans import DEFAULT_ROUNDS
from fedbilevel.settings import chosen
from fedbilevel.tasks import TASKS
from helpers.places import DATA

# What Phi loses at least: the loss with x at its start and y trained, less that with the run's x and y trained.
GAINS = {
    ("bank", "lockstep"): 0.6, ("bank", "aggitd"): 0.6,
    ("scaled", "lockstep"): 0.05, ("scaled", "aggitd"): 0.005,
    ("hearts", "lockstep"): 0.04, ("hearts", "aggitd"): 0.03,
}  # fmt: skip
JUDGED = {"bank": "test_loss", "scaled": "test_error", "hearts": "test_loss"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "algorithm"), GAINS, ids=map("-".join, GAINS))
def test_stored_steps_improve_the_task(name, algorithm):
    if name == "hearts" and not (DATA / "heart-disease").is_dir():
        pytest.skip("no folder with the hospitals' files")
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        task = TASKS[name](seed=7, data_dir=DATA if name == "hearts" else None)
        choice = chosen(algorithm, (name, task.dataset), {})
        assert choice.steps == "stored"
        score = JUDGED[name]
        result = fb.solve(
            task.problem, task.data, choice.algorithm, task.x, task.y, rounds=DEFAULT_ROUNDS, key=task.key,
            metrics={score: task.metrics[score]}, evaluate_every=10**6,
        )  # fmt: skip
        phi = lambda x: float(reference.value(task.problem, task.data, x, task.y))
        assert phi(task.x) - phi(result.x) > GAINS[name, algorithm]
        untuned = reference.solution(task.problem, task.data, task.x, task.y)
        assert result.history[-1][score] < float(task.metrics[score](task.x, untuned))

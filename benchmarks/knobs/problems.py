"""The eight problems, how they are run, and L, the largest curvature of a client at the start."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

import fedbilevel as fb
from fedbilevel.reference.linear import lanczos
from knobs.dense_cleaning import dense_cleaning


@dataclasses.dataclass(frozen=True)
class Case:
    """A task and how it is run: `cohort` and `batch` None for everyone and all rows."""

    name: str
    dataset: str | None = None
    cohort: int | None = None
    batch: int | None = None
    heavy: bool = False  # a later seed tries only points with .9 of the first seed's best gain

    def task(self, seed: int) -> fb.tasks.Task:
        kind = dense_cleaning if self.name == "cleaning" else fb.tasks.TASKS[self.name]
        return kind(dataset=self.dataset, seed=seed)

    @property
    def engine(self) -> fb.Simulation:
        return fb.Simulation(cohort=self.cohort)


CASES = {
    case.name: case
    for case in (
        Case("quadratic"),
        Case("ridge", "diabetes"),
        Case("scaled"),
        Case("bank"),
        Case("regularisation", "digits", heavy=True),
        Case("cleaning", "digits", heavy=True),
        Case("loss-tuning", "digits", heavy=True),
        Case("hyper-representation", "digits", cohort=5, batch=32, heavy=True),
    )
}


@dataclasses.dataclass(frozen=True)
class Contestant:
    """An algorithm at its counts, the rounds of its iteration, its budget, and how often it is looked at."""

    name: str
    kind: type[fb.Algorithm]
    counts: dict[str, object]
    budget: int
    every: int  # iterations: five rounds, or one iteration where that is more

    def __call__(self, batch: int | None, **steps: object) -> fb.Algorithm:
        return self.kind(batch_size=batch, **self.counts, **steps)

    @property
    def has_optimizer(self) -> bool:
        return "outer_optimizer" in {field.name for field in dataclasses.fields(self.kind)}


CONTESTANTS = {
    one.name: one
    for one in (
        Contestant("lockstep", fb.Lockstep, {"local_steps": 5}, 300, 5),
        Contestant("aggitd", fb.AggITD, {"local_steps": 5, "inner_rounds": 5, "truncation": "full"}, 1300, 1),
        Contestant(
            "fednest",
            fb.FedNest,
            {"local_steps": 5, "inner_rounds": 5, "neumann_terms": 5, "truncation": "full"},
            1300,
            1,
        ),
        Contestant("simfbo", fb.SimFBO, {"local_steps": 5}, 300, 5),
    )
}


def largest_curvature(task: fb.tasks.Task) -> float:
    """L = max_i lambda_max(H_i) at the start, over clients of all their rows, by Lanczos' method."""
    flat, back = ravel_pytree(task.y)

    @jax.jit
    def of(i):
        rows = task.data.inner.client(i).all()
        product = lambda v: ravel_pytree(task.problem.hessian_vector(task.x, task.y, back(v), rows))[0]
        return lanczos(product, flat.size, flat.dtype)[1]

    return float(np.max([of(np.int32(i)) for i in range(task.data.clients)]))

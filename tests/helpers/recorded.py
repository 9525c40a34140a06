"""Runs of every algorithm, and what they gave when they were recorded: iterates in 64 bits, rounds and bytes.

A net under the closed-form tests while the library is rebuilt: no step of that may change a number. It
says nothing about what is right. `cd tests; python -m helpers.recorded` records anew, where numbers change on purpose.
All of it, in two minutes: make test ARGS='-m "slow or not slow" -k recorded'
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import fedbilevel as fb
from fedbilevel.algorithms import ALGORITHMS
from fedbilevel.watch import parts
from helpers.logistic import CLIENTS, PROBLEM, X, Y
from helpers.quadratic import flat, quadratic

FILE = Path(__file__).with_name("recorded.json")
ITERATIONS = 3
SETTINGS: dict[str, dict[str, Any]] = {  # how clients take part
    "everyone": {},
    "weights, dropout": {"weights": True, "dropout": 0.4},
    "cohort, minibatches": {"cohort": 2, "batch_size": 2},
    "weights, cohort": {"weights": True, "cohort": 2},
}
STEPS = {
    "inner_lr": 0.03, "hessian_lr": 0.05, "outer_lr": 0.02, "inner_rounds": 2, "local_steps": 2, "neumann_terms": 3,
    "server_lr": 0.8,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {  # options, each for the algorithms that have it
    "full": {"truncation": "full"},
    "fixed": {"truncation": 1},
    "auto": {"hessian_lr": "auto"},
    "adam": {"outer_optimizer": "adam:0.02"},
    "two outer steps": {"outer_steps": 2},
    "idle rounds left out": {"skip_idle_rounds": True, "local_steps": 1},
    "one cohort": {"same_cohort": True},
    "warm": {"warm_start_v": True, "truncation": "full"},
    "one round": {"one_round": True, "truncation": "full"},
    "one round, apart": {"one_round": True, "truncation": "full", "independent_cohorts": True, "warm_start_v": True},
    "two chains": {"chains": 2},
    "clipped": {"radius": 0.5},
    "unequal steps": {"client_steps": (1, 2, 3)},
    "far differences": {"distance": 0.1},
    "shared": {"share_lower": True},
    "forgetful": {"forget": 0.9},
    "slowing": {"slow_after": 2.0},
    "kept": {"keep": 0.5, "damping": 1.0},
    "growing penalty": {"penalty": 2.0, "penalty_growth": 0.5},
    "mixing": {"anderson": 2},
}
BUSY = {"one cohort": "weights, cohort", "two chains": "weights, cohort", "mixing": "everyone"}


NONE = {("fedmbo", "full")}  # its chains end at random
EVERYONE = {"lockstep", "fedf2sa"}  # refuse cohorts of weighted clients


@dataclasses.dataclass(frozen=True)
class Case:
    """One run: everything by name."""

    problem: str
    algorithm: str
    variant: str
    setting: str

    def __str__(self):
        return f"{self.problem} / {self.algorithm} / {self.variant} / {self.setting}"


def network():
    """A body x with features, and a head y; three ragged clients."""
    draw = np.random.default_rng(5)
    body = lambda x, row: jnp.tanh(row["a"] @ x["w"] + x["b"])

    def scores(phi, y, row):
        return -jax.nn.log_softmax(phi @ y["head"])[row["class"]]

    problem = fb.Problem(
        lambda x, y, row, phi: scores(phi, y, row) + 0.1 * jnp.sum(y["head"] ** 2),
        lambda x, y, row: scores(body(x, row), y, row),
        features=body,
    )
    level = lambda sizes: [{"a": draw.normal(size=(n, 3)), "class": draw.integers(0, 2, n)} for n in sizes]
    x = {"w": jnp.asarray(draw.normal(size=(3, 4))), "b": jnp.zeros(4)}
    return problem, level((4, 6, 3)), level((3, 2, 5)), x, {"head": jnp.asarray(draw.normal(size=(4, 2)))}


def problem(name: str) -> tuple:
    """(problem, rows of the inner and of the outer level, x, y)."""
    if name == "quadratic":
        q = quadratic(
            seed=2, clients=3, sizes=((4, 5),)
        )  # alike: Loopback compiles once for all; the others are ragged
        return q.problem, q.inner, q.outer, q.x, q.y
    if name == "logistic":
        return PROBLEM, CLIENTS.inner, CLIENTS.outer, jnp.asarray(X), jnp.asarray(Y)
    return network()


def algorithm(case: Case) -> fb.Algorithm:
    """The algorithm of a case; settings that it does not have are left out."""
    kind: Any = ALGORITHMS[case.algorithm]
    chosen = STEPS | {"batch_size": SETTINGS[case.setting].get("batch_size")} | VARIANTS.get(case.variant, {})
    return kind(**{name: value for name, value in chosen.items() if name in kind.__dataclass_fields__})


def cases() -> Iterator[Case]:
    """Every algorithm in every setting on the quadratic, in fewer on the others; every option in one setting."""
    for name, kind in ALGORITHMS.items():
        for setting in [*SETTINGS][: 3 if name in EVERYONE else 4]:
            yield Case("quadratic", name, "plain", setting)
        yield Case("logistic", name, "plain", "everyone")
        yield Case("logistic", name, "plain", "cohort, minibatches")
        yield Case("network", name, "plain", "cohort, minibatches")
        fields = kind.__dataclass_fields__
        for variant, changes in VARIANTS.items():
            if all(field in fields for field in changes) and (name, variant) not in NONE:
                yield Case("quadratic", name, variant, BUSY.get(variant, "weights, dropout"))


def run(case: Case, engine: type) -> dict[str, Any]:
    """The numbers of a case on an engine, `fb.Simulation` or `fb.Loopback`."""
    task, inner, outer, x, y = problem(case.problem)
    how = dict(SETTINGS[case.setting])
    weights = [1.0, 2.5, 0.5] if how.pop("weights", False) else None
    how.pop("batch_size", None)
    end = fb.solve(
        task, fb.FederatedData.stack(inner, outer, weights), algorithm(case), x, y, ITERATIONS, key=jax.random.key(4),
        engine=engine(**how), check=False,
    )  # fmt: skip
    state = {name: flat(eqx.filter(part, eqx.is_inexact_array)).tolist() for name, part in parts(end.state).items()}
    books = [[row[name] for name in ("rounds", "bytes_down", "bytes_up")] for row in end.history]
    return {"x": flat(end.x).tolist(), "y": flat(end.y).tolist(), "state": state, "books": books}


def recorded() -> dict[str, Any]:
    """What the cases gave, by their names."""
    return json.loads(FILE.read_text())


if __name__ == "__main__":
    import conftest  # noqa: F401  the settings of the tests

    found = {str(each): run(each, fb.Simulation) for each in cases()}
    lines = (f"{json.dumps(name)}: {json.dumps(said)}" for name, said in found.items())
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")

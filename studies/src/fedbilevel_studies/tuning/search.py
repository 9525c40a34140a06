"""Searches that train anew at every x: at random, and by Optuna's TPE."""

from __future__ import annotations

import contextlib
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .grounds import Ground
from .purse import Purse, Spent

INSTALL = (
    "Optuna is not installed, so TPE is left out: pip install './studies[tuning]' in a clone (or "
    "'fedbilevel-studies[tuning]'), and run the study again."
)


def draw(ground: Ground, x: PyTree, rng: np.random.Generator) -> PyTree:
    """An x, uniform in the ground's ranges."""
    low, high = ground.box(x)
    one = lambda a, b: jnp.asarray(rng.uniform(np.asarray(a), np.asarray(b)), a.dtype)
    return jax.tree.map(one, low, high)


def at_random(purse: Purse, rounds: int, seed: int) -> None:
    """Federated random search: x at random, a run, a round to judge it; until all is spent."""
    rng = np.random.default_rng(seed)
    with contextlib.suppress(Spent):
        while True:
            purse.trial(draw(purse.ground, purse.task.x, rng), rounds)


def has_optuna() -> bool:
    """Whether TPE can take part."""
    return importlib.util.find_spec("optuna") is not None


def tpe(purse: Purse, rounds: int, seed: int) -> None:
    """Optuna's TPE with its own defaults: a trial is a whole run and the round that judges it."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    low, high = (jax.tree.leaves(end) for end in purse.ground.box(purse.task.x))
    treedef = jax.tree.structure(purse.task.x)

    def asked(trial: optuna.Trial) -> PyTree:
        leaves = []
        for i, (a, b) in enumerate(zip(low, high, strict=True)):
            ends = zip(np.ravel(a).tolist(), np.ravel(b).tolist(), strict=True)
            numbers = [trial.suggest_float(f"{i}.{j}", *end) for j, end in enumerate(ends)]
            leaves.append(jnp.asarray(np.reshape(numbers, a.shape), a.dtype))
        return jax.tree.unflatten(treedef, leaves)

    with contextlib.suppress(Spent):
        while True:
            trial = study.ask()
            value = purse.trial(asked(trial), rounds)
            failed = None if np.isfinite(value) else optuna.trial.TrialState.FAIL
            study.tell(trial, value if failed is None else None, state=failed)

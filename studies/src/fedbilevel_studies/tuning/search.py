"""Searches that train anew at every x: at random, and by Optuna's TPE."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

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


def candidates(ground: Ground, x: PyTree, seed: int) -> Iterator[PyTree]:
    """x as it is, which every search tries first; then others, uniform in the ground's ranges."""
    rng = np.random.default_rng(seed)
    low, high = ground.box(x)
    one = lambda a, b: jnp.asarray(rng.uniform(np.asarray(a), np.asarray(b)), a.dtype)
    yield x
    while True:
        yield jax.tree.map(one, low, high)


def at_random(purse: Purse, rounds: int, seed: int) -> None:
    """Federated random search: x at random, a run, a round to judge it; until all is spent."""
    with contextlib.suppress(Spent):
        for x in candidates(purse.ground, purse.task.x, seed):
            purse.trial(x, rounds)


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

    first = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(purse.task.x)]).tolist()
    places = [f"{i}.{j}" for i, leaf in enumerate(low) for j in range(leaf.size)]
    study.enqueue_trial(dict(zip(places, first, strict=True)))

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

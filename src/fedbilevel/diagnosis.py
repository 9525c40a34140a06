"""Which step to lower after a run blew up: found by repeating the last stretch with x held fixed."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import numpy as np

from .engines.base import Carry, Execution

_MOST = 200  # iterations repeated at most
_STRETCHED = 1.05  # a Hessian factor with a usable step never stretches; the margin is for rounding and minibatches


def rates(algorithm: Any) -> dict[str, float]:
    """The algorithm's step sizes by name."""
    fields = [f for f in dataclasses.fields(algorithm) if f.metadata.get("role") == "rate"]
    return {f.name: float(getattr(algorithm, f.name)) for f in fields}


def largest(tree: Any) -> float:
    """The largest absolute value in a pytree; NaN if one is NaN."""
    values = [
        np.max(np.abs(np.asarray(leaf)), initial=0.0) for leaf in jax.tree.leaves(tree) if eqx.is_inexact_array(leaf)
    ]
    return float(np.max(values, initial=0.0)) if values else 0.0


def diagnose(execution: Execution, algorithm: Any, healthy: Carry, failed: Carry, limit: float) -> str:
    """What blew up, when, and which step to lower.

    Args:
        healthy: where the iterates were last of ordinary size.
        failed: the state that is out of range, after the failing iteration.
    """
    name, steps = type(algorithm).__name__, rates(algorithm)
    parts = {f.name: largest(getattr(failed.state, f.name)) for f in dataclasses.fields(failed.state)}
    worst = [part for part, value in parts.items() if not value <= limit] or ["the diagnostics"]
    what = f"{name} blew up in iteration {failed.iteration}: {' and '.join(worst)} left the finite range"
    if "outer_lr" not in steps:
        return f"{what}; lower its step sizes ({', '.join(f'{k} = {v:g}' for k, v in steps.items())})."
    frozen = eqx.tree_at(lambda a: a.outer_lr, algorithm, 0.0)
    length = min(max(failed.iteration - healthy.iteration, 20), _MOST)
    after, record = execution.advance(frozen, healthy, length, limit)
    before, now = largest(healthy.state.y), largest(after.state.y)
    advice = lambda step: f"lower {step} (now {steps[step]:g})"
    if not now <= 1e3 * (1 + before):
        others = ["inner_lr"] if "inner_lr" in steps else [name for name in steps if name != "outer_lr"]
        return f"{what}; with x held fixed the lower rounds alone blow up: {' or '.join(map(advice, others))}."
    stretch = float(np.max(np.asarray(getattr(record.info, "vector_growth", 0.0)), initial=0.0))
    if "hessian_lr" in steps and not stretch <= _STRETCHED:
        return (
            f"{what}; the Hessian factors (I - hessian_lr H) stretch their vector {stretch:.3g}-fold: "
            f"{advice('hessian_lr')} below 2 / (largest curvature of the inner loss)."
        )
    return f"{what}; with x held fixed everything stays finite: {advice('outer_lr')}."

"""Which step to lower after a run blew up: found by repeating the last stretch with x held fixed."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax.tree

from .engines.base import Carry, Execution

LEAST, _MOST = 50, 200  # iterations repeated
_UNSETTLED = 10.0  # how much the steps of y grow, at least, where the lower rounds diverge (noise keeps them alike)
_STRETCHED = 1.05  # a Hessian factor with a usable step never stretches; the margin is for rounding and minibatches


def rates(algorithm: Any) -> dict[str, float]:
    """The algorithm's step sizes by name."""
    fields = [f for f in dataclasses.fields(algorithm) if f.metadata.get("role") == "rate"]
    values = {f.name: getattr(algorithm, f.name) for f in fields}
    return {name: float(value) for name, value in values.items() if not (value is None or isinstance(value, str))}


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
    if "outer_lr" not in steps or not execution.replays:
        more = "" if execution.replays else " (a simulation says which)"
        return f"{what}; lower its step sizes{more}: {', '.join(f'{k} = {v:g}' for k, v in steps.items())}."
    length = min(max(failed.iteration - healthy.iteration, LEAST), _MOST)
    frozen = _with(
        algorithm, "outer_lr", 1e-30
    )  # x stays where it is, and what is measured relative to the step is finite
    advice = lambda step: f"lower {step} (now {steps[step]:g})"
    settles, stretch = _with_x_fixed(execution, frozen, healthy, length, limit)
    if not settles:
        others = ["inner_lr"] if "inner_lr" in steps else [name for name in steps if name != "outer_lr"]
        return f"{what}; with x held fixed the lower rounds alone blow up: {' or '.join(map(advice, others))}."
    bound = "below 2 / (largest curvature of the inner loss)"
    if "hessian_lr" in steps and stretch > _STRETCHED:
        return (
            f"{what}; the Hessian factors (I - hessian_lr H) stretch their vector {stretch:.3g}-fold: "
            f"{advice('hessian_lr')} {bound}."
        )
    if stretch == 0:  # not measured: see which step, ten times lower, helps
        helps = lambda step: (
            execution.advance(_with(algorithm, step, steps[step] / 10), healthy, length, limit)[1].finite
        )
        cure = next((step for step in ("hessian_lr", "inner_lr") if step in steps and helps(step)), None)
        if cure is not None and not helps("outer_lr"):
            until = f" {bound}" if cure == "hessian_lr" else ""
            reason = f"ten times lower, {cure} keeps everything finite and outer_lr does not"
            return f"{what}; {reason}: {advice(cure)}{until}."
    return f"{what}; with x held fixed everything stays finite: {advice('outer_lr')}."


def _with(algorithm: Any, name: str, value: float) -> Any:
    return eqx.tree_at(lambda a: getattr(a, name), algorithm, value)


def _with_x_fixed(execution: Execution, frozen: Any, start: Carry, length: int, limit: float) -> tuple[bool, float]:
    """(whether y settles: its steps do not grow; how much the Hessian factors stretch, zero where not measured)."""
    first, one = execution.advance(frozen, start, 1, limit)
    later, rest = execution.advance(frozen, first, length - 2, limit)
    last, end = execution.advance(frozen, later, 1, limit)
    moved = lambda a, b: largest(optax.tree.sub(a.state.y, b.state.y))
    grown = np.divide(moved(last, later), moved(first, start) or 1.0)
    finite = all(np.isfinite(largest(carry.state.y)) for carry in (first, later, last))
    measured = [getattr(record.info, "vector_growth", None) for record in (one, rest, end)]
    stretch = max((float(np.max(m)) for m in measured if m is not None and np.size(m)), default=0.0)
    return bool(finite and largest(last.state.y) <= limit and grown <= _UNSETTLED), stretch

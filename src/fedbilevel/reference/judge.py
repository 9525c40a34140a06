"""Whether a result is right, and if not, the sentence that says why and what to do."""

from __future__ import annotations

import math
from typing import TypedDict

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from ..errors import RunError, warn

Scalar = Float[Array, ""]
LARGEST_CONDITION = 1e5  # of H in 32 bits: beyond, rounding errors are one per cent of y* and v
_WIDER = 'use 64 bits (jax.config.update("jax_enable_x64", True) before arrays are made, and x, y and rows in float64)'


class Evidence(TypedDict):
    """What tells whether a hypergradient is right: see `check_hypergradient`."""

    residual: Scalar
    corrected: Scalar
    error: Scalar
    step: Scalar | None
    smallest: Scalar
    largest: Scalar


def check_solved(reached: Bool[Array, ""], gradient: Scalar, smallest: Scalar, largest: Scalar) -> None:
    """Raise `RunError` unless the search ended at a strict minimum whose curvatures the precision can carry."""
    eps = float(jnp.finfo(smallest.dtype).eps)
    low, high = float(smallest), float(largest)
    least = max(10 * eps, 0 if eps < 1e-10 else 1 / LARGEST_CONDITION) * high
    if reached and high > 0 and low > least:
        return
    where = f"the search ended where |d_y g| = {float(gradient):.2g} and {_range(low, high)}"
    if narrow(eps, low, high):
        raise RunError(
            f"the lower-level problem was not solved: {where}, a condition number beyond the 1e5 that 32 bits "
            f"can carry: {_WIDER}, or add a regulariser such as 1e-3 * |y|^2 to the inner loss."
        )
    raise RunError(
        f"the lower-level problem was not solved: {where}; g must be bounded below and strongly convex in y, so add a "
        f"regulariser such as 1e-3 * |y|^2 to the inner loss, or start from another y."
    )


def check_hypergradient(method: str, evidence: Evidence, terms: int | None) -> None:
    """Raise `RunError` unless the linear system was solved, so well that the result has no more than rounding errors.

    With terms= given a truncated sum is what was asked for: it must only not diverge.

    Args:
        evidence: of the result: `residual` |b - H v| / |b|; `error`, of J v relative to the two parts of the
            hypergradient, and the residual of the `corrected` v that it was measured with; the `step` of a series or
            None; `smallest` and `largest` eigenvalue of H.
    """
    names = ("residual", "corrected", "error", "smallest", "largest")
    residual, corrected, error, smallest, largest = (float(evidence[name]) for name in names)
    eps, step = float(jnp.finfo(evidence["residual"].dtype).eps), evidence["step"]
    tolerated = eps ** (0.6 if narrow(eps, smallest, largest) else 0.4)
    if terms:
        right = math.isfinite(residual) and (method == "unrolled" or residual <= 1.01)  # a nonconvex start may grow
    else:
        right = corrected <= eps**0.25 and error <= tolerated
    if right and (step is None or step > 0):
        return
    failed = f"{method!r} did not converge (relative residual {residual:.2g} in H v = d_y f"
    failed += ")" if terms else f", error of the result about {error:.2g})"
    if terms is None and smallest < -noise(eps, largest):
        remedy = f": {_range(smallest, largest)}, so y is no minimum of it"
    elif terms is None and (narrow(eps, smallest, largest) or (error > tolerated and step is None and eps > 1e-10)):
        remedy = f": {_range(smallest, largest)}, and 32 bits cannot carry that: {_WIDER}"
    elif step is not None:
        remedy = f" at step {float(step):.3g}: keep step= below 2 / L, give terms=, or use 'cg'"
    elif smallest > noise(eps, largest):
        other = "use 'exact', or " if method == "cg" else ""
        remedy = f": {_range(smallest, largest)}, too far apart; {other}add a regulariser to the inner loss"
    else:
        remedy = ": is H singular?"
    raise RunError(f"{failed}{remedy}.")


def _range(smallest: float, largest: float) -> str:
    return f"the curvature of g goes from {smallest:.2g} to {largest:.2g}"


def warn_if_indefinite(smallest: Scalar, largest: Scalar) -> None:
    """Warn of a formula that is evaluated where g has no minimum."""
    eps = float(jnp.finfo(smallest.dtype).eps)
    if float(smallest) < -noise(eps, float(largest)):
        warn(
            f"at the given y {_range(float(smallest), float(largest))}: it is no minimum of g, and what is returned "
            f"there no hypergradient; start nearer to y*, or let it be solved for (solve_inner=True)."
        )


def narrow(eps: float, smallest: float, largest: float) -> bool:
    """Whether the curvatures are positive as far as 32 bits can tell, and too far apart for them."""
    return eps > 1e-10 and -noise(eps, largest) <= smallest < largest / LARGEST_CONDITION


def noise(eps: float, largest: float) -> float:
    """How far rounding errors can move an eigenvalue."""
    return 100 * eps * abs(largest)


def narrowed(tree: PyTree, like: PyTree, what: str) -> PyTree:
    """A result in the dtypes that its variable came in.

    Raises:
        RunError: a number that is finite in 32 bits is not in those.
    """

    def one(leaf: Float[Array, " ..."], own: PyTree) -> Float[Array, " ..."]:
        out = jnp.asarray(leaf, own.dtype)
        if out.dtype != leaf.dtype and not bool(jnp.all(jnp.isfinite(out) | ~jnp.isfinite(leaf))):
            raise RunError(
                f"{what} does not fit {out.dtype}: it reaches {float(jnp.max(jnp.abs(leaf))):.3g}; use float32."
            )
        return out

    return jax.tree.map(one, tree, like)

"""Local steps and the estimates they go along, as mathematics on pytrees: each exists here once.

plain        z <- z - lr d(z)
corrected    FedSVRG: z <- z - lr [d(z) - d(anchor) + mean d(anchor)]
                 with control variates: z <- z - lr [d(z) - c_i + c]
tracked      z' = z - lr e,  then the estimate e is renewed on rows of its own: by STORM, or SARAH (STORM that forgets
             nothing), or momentum
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax.tree
from jaxtyping import Array, Float, Int, PyTree

from ... import owned

Rate = float | Float[Array, "..."]  # a step size, or a grid of them
Number = int | Int[Array, ""]
Gradient = Callable[
    [Number], Callable[[PyTree], PyTree]
]  # draw number -> (point -> gradient there, on that draw's rows)


def norm(tree: PyTree) -> Float[Array, ""]:
    """Euclidean norm of a pytree, without what is kept at the sites: the server does not know it."""
    return optax.tree.norm(owned.measured(tree) if owned.kept(tree) else tree)


def descend(point: PyTree, lr: Rate | tuple[Rate, ...], gradient: PyTree) -> PyTree:
    """point - lr gradient; with a tuple of steps, one for each part of the point."""
    if isinstance(lr, tuple):
        return tuple(descend(*part) for part in zip(point, lr, gradient, strict=True))
    return optax.tree.add_scale(point, -lr, gradient)


def local_descent(gradient: Gradient, start: PyTree, lr: Rate | tuple[Rate, ...], steps: Number) -> PyTree:
    """`steps` plain steps z <- z - lr gradient(z; fresh rows)."""
    return jax.lax.fori_loop(0, steps, lambda s, z: descend(z, lr, gradient(s)(z)), start)


def fedsvrg(gradient: Gradient, anchor: PyTree, mean_gradient: PyTree, lr: Rate, steps: int) -> PyTree:
    """`steps` corrected steps z <- z - lr [gradient(z; rows) - gradient(anchor; same rows) + mean_gradient].

    The correction removes the clients' drift: the fixed point is the global one for any number of steps. At the
    first step z is the anchor and the two local gradients cancel, so it is taken without evaluating them.
    Leaves that belong to the client have no drift: they go along their own gradient.
    """
    own = bool(owned.nodes(anchor))

    def corrected(s, z):
        on_rows = gradient(s)
        here = on_rows(z)
        drift = optax.tree.sub(here, on_rows(anchor))
        towards = optax.tree.add(drift, mean_gradient)
        return descend(z, lr, owned.put(towards, here) if own else towards)

    first = owned.put(mean_gradient, gradient(0)(anchor)) if own else mean_gradient
    return jax.lax.fori_loop(1, steps, corrected, descend(anchor, lr, first))


def drift(mean: PyTree, own: PyTree) -> PyTree:
    """c - c_i, what control variates add to a client's gradient; zero in leaves that belong to it."""
    return owned.with_zeros(optax.tree.sub(mean, own))


def controlled_descent(
    gradient: Gradient, start: PyTree, first: PyTree, correction: PyTree, lr: Rate, steps: int
) -> PyTree:
    """`steps` steps z <- z - lr [gradient(z; fresh rows) + correction]; `first` is gradient(0)(start), known already."""
    step = lambda s, z: descend(z, lr, optax.tree.add(gradient(s)(z), correction))
    return jax.lax.fori_loop(1, steps, step, descend(start, lr, optax.tree.add(first, correction)))


def storm(gradient: Callable, before: PyTree, after: PyTree, estimate: PyTree, forget: Rate) -> PyTree:
    """gradient(after) + (1 - forget) [estimate - gradient(before)], on the same rows: STORM (Cutkosky & Orabona, 2019).

    With forget = 0 it is SARAH (Nguyen et al., 2017); with forget = 1 the gradient alone.
    """
    error = optax.tree.sub(estimate, gradient(before))
    return optax.tree.add_scale(gradient(after), 1 - forget, error)


def momentum(gradient: Callable, before: PyTree, after: PyTree, estimate: PyTree, forget: Rate) -> PyTree:
    """(1 - forget) estimate + forget gradient(after)."""
    return optax.tree.add_scale(estimate, forget, optax.tree.sub(gradient(after), estimate))


def tracked_descent(
    start: PyTree, estimate: PyTree, move: Callable, renew: Callable, steps: int
) -> tuple[PyTree, PyTree]:
    """`steps` times  z' = move(s, z, e),  e' = renew(s, z, z', e): (z, e) at the end."""

    def turn(s, loop):
        z, e = loop
        after = move(s, z, e)
        return after, renew(s, z, after, e)

    return jax.lax.fori_loop(0, steps, turn, (start, estimate))


def moved_mean(mean: PyTree, share: Rate, change: PyTree) -> PyTree:
    """The mean over all clients of what each keeps, when a share of them changed it by `change` on average.

    `share` is `Federation.share`: by weight. Of leaves that belong to clients nothing is kept.
    """
    moved = jax.tree.map(lambda c, d: c + jnp.asarray(share, d.dtype) * d, mean, change)
    return owned.put(moved, mean)


def growth(last: Float[Array, ""], first: Float[Array, ""]) -> Float[Array, ""]:
    """last / first, zero where first is."""
    return jnp.where(first > 0, last / jnp.where(first > 0, first, 1), jnp.zeros_like(last))

"""Anderson mixing at the server: the next point from several earlier ones, where everybody's moves are exact.

An iteration moves z = (x, y, v) by r(z), each part in proportion to its step: r = steps d(z). It stops where d(z) = 0. Of
the last m + 1 points that combination (weights that sum to one) is sought whose d is the shortest; the next point is the
combination of the points and their moves:

    gamma = argmin | W (d - E gamma) |          Z, E: the last m differences of points and of d, as columns
    z    <- z + steps d - (Z + steps E) gamma

(Anderson, J. ACM 12, 1965; "type II" of Fang & Saad, Numer. Linear Algebra Appl. 16, 2009). Where d is linear it does what
GMRES does. Nothing but z is mixed, so what clients keep, and its mean at the server, are what they would be anyway.

W divides each part of d by its largest norm of these m + 1 moves: parts have different units, and the longest would drown
the others (log penalties have gradients of 1e-4 where those of y are of order one). So nothing depends on the units of x,
y and the losses.

Where each part of d has come down to `QUIET` units in the last place of its largest norm so far, differences are rounding,
and so would be what is made of them: the move is plain and the memory is emptied.

The merit of a point is |W d|. A mixed point whose merit is more than `WORSE` times that of the best one is given up: the
run goes on from the best one with its plain move, and the memory is emptied. A round in which not everybody answered is a
plain one too and empties the memory, for its mean is another.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import optax.tree
from jaxtyping import Array, Bool, Float, Int, PyTree

from ...algorithm import Component, count
from .steps import Rate

Scalar = Float[Array, ""]
Parts = tuple[PyTree, ...]  # z and its like: one pytree for each step size

WORSE = 5.0  # times the merit of the best point
QUIET = 10.0  # units in the last place


class Past(eqx.Module):
    """What is remembered, p parts of z; all of it zeros, and `filled` -1, where there is nothing.

    Attributes:
        points, slopes: pytrees like z with a leading axis of m: differences of points and of d, in a ring.
        sizes: (m, p) norms of the parts of d, in a ring.
        point, slope: the last ones, like z.
        best: the point of the least merit after its plain move.
        least: (p,) norms of the parts of d there.
        largest: (p,) the largest norms of the parts of d so far; it is never emptied.
        filled: how many differences there were since the memory was emptied; -1: not even a last point.
    """

    points: Parts
    slopes: Parts
    sizes: Float[Array, "m p"]
    point: Parts
    slope: Parts
    best: Parts
    least: Float[Array, " p"]
    largest: Float[Array, " p"]
    filled: Int[Array, ""]


class Anderson(Component):
    """The server's next point, given how far everybody's mean move goes from this one.

    Args:
        most: m, differences that are remembered: (2 m + 3) times the floats of z, at the server alone.
    """

    most: int = count(20)

    def begin(self, z: Parts) -> Past:
        """What is remembered at the start."""
        ring = jax.tree.map(lambda leaf: jnp.zeros((self.most, *leaf.shape), leaf.dtype), z)
        like, parts = optax.tree.zeros_like(z), len(z)
        sizes = jnp.zeros((self.most + 1, parts), _wide(z))
        return Past(ring, ring, sizes[1:], like, like, like, sizes[0], sizes[0], jnp.asarray(-1, jnp.int32))

    def step(
        self, past: Past, z: Parts, move: Parts, steps: Sequence[Rate], whole: Bool[Array, ""]
    ) -> tuple[Parts, Past, Scalar]:
        """(The next point, what is remembered, one if it was mixed, else zero).

        Args:
            z, move: the point, and the mean of the moves from there.
            steps: for each part the step that its move is proportional to.
            whole: whether everybody answered.
        """
        slope = _scaled(move, [1 / step for step in steps])
        sizes = jnp.stack([_size(part) for part in slope]).astype(past.least.dtype)
        unit = jnp.maximum(sizes, jnp.max(past.sizes, axis=0))
        unit = jnp.where(unit > 0, unit, jnp.ones_like(unit))
        merit = lambda norms: jnp.linalg.norm(norms / unit)
        plain = optax.tree.add(z, move)
        better = (past.filled < 0) | (merit(sizes) <= merit(past.least))
        worse = (past.filled >= 1) & ~(merit(sizes) <= WORSE * merit(past.least))  # of a mixed point
        kept = self._with(past, z, slope, sizes)
        kept = eqx.tree_at(
            lambda p: (p.best, p.least),
            kept,
            (_chosen(better, plain, past.best), jnp.where(better, sizes, past.least)),
        )
        mixed = optax.tree.sub(plain, _correction(kept, slope, steps, unit))
        largest = jnp.maximum(past.largest, sizes)
        quiet = jnp.all(sizes <= QUIET * float(jnp.finfo(sizes.dtype).eps) * largest)
        good = whole & ~worse & ~quiet
        instead = _chosen(whole & worse, past.best, plain)
        used = jnp.where(good & (kept.filled >= 1), jnp.ones_like(unit[0]), jnp.zeros_like(unit[0]))
        after = eqx.tree_at(lambda p: p.largest, _chosen(good, kept, self.begin(z)), largest)
        return _chosen(good, mixed, instead), after, used

    def _with(self, past: Past, z: Parts, slope: Parts, sizes: Float[Array, " p"]) -> Past:
        """The memory with the differences to this point."""
        place = jnp.maximum(past.filled, 0) % self.most
        known = past.filled >= 0
        put = lambda ring, new, old: ring.at[place].set(jnp.where(known, new - old, ring[place]))
        points = jax.tree.map(put, past.points, z, past.point)
        slopes = jax.tree.map(put, past.slopes, slope, past.slope)
        ring = past.sizes.at[(past.filled + 1) % self.most].set(sizes)
        return Past(points, slopes, ring, z, slope, past.best, past.least, past.largest, past.filled + 1)


def _correction(past: Past, slope: Parts, steps: Sequence[Rate], unit: Float[Array, " p"]) -> Parts:
    """(Z + steps E) gamma."""
    inner = jax.vmap(functools.partial(_dot, unit=unit), (0, None))  # of each row of a ring with one vector
    gram = jax.vmap(inner, (None, 0))(past.slopes, past.slopes)
    gamma = _shortest(gram, inner(past.slopes, slope))
    taken = lambda ring: jnp.tensordot(gamma.astype(ring.dtype), ring, 1, precision="highest")
    return optax.tree.add(jax.tree.map(taken, past.points), _scaled(jax.tree.map(taken, past.slopes), steps))


def _shortest(gram: Float[Array, "m m"], against: Float[Array, " m"]) -> Float[Array, " m"]:
    """gamma by the normal equations of columns of length one, without directions that are lost in rounding."""
    squares, known = jnp.diagonal(gram), jnp.finfo(gram.dtype)
    scale = jnp.where(squares > known.tiny / known.eps, jax.lax.rsqrt(squares), jnp.zeros_like(squares))
    values, vectors = jnp.linalg.eigh(gram * scale[:, None] * scale[None])
    seen = values > 10 * len(gram) * known.eps
    inverse = jnp.where(seen, 1 / jnp.where(seen, values, 1), 0)
    return scale * (vectors @ (inverse * (vectors.T @ (scale * against))))


def _dot(one: Parts, other: Parts, unit: Float[Array, " p"]) -> Scalar:
    """The inner product of W one and W other, in the dtype of `unit`."""
    inner = lambda a, b: jnp.vdot(a, b, precision="highest").real.astype(unit.dtype)
    parts = [sum(jax.tree.leaves(jax.tree.map(inner, *pair))) for pair in zip(one, other, strict=True)]
    return jnp.sum(jnp.stack(parts) / unit**2)


def _size(part: PyTree) -> Scalar:
    return optax.tree.norm(part)


def _scaled(parts: Parts, factors: Sequence[Rate]) -> Parts:
    """Each part times its number, in its own dtype."""
    times = lambda factor: lambda leaf: jnp.asarray(factor, leaf.dtype) * leaf
    return tuple(jax.tree.map(times(factor), part) for part, factor in zip(parts, factors, strict=True))


def _wide(z: PyTree) -> jnp.dtype:
    """The widest real dtype of its leaves."""
    return max((leaf.real.dtype for leaf in jax.tree.leaves(z)), key=lambda dtype: dtype.itemsize)


def _chosen(flag: Bool[Array, ""], yes: PyTree, no: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), yes, no)

"""`outer_lr="auto"`: a pace of x that y and v can follow, with no scale of its own.

Ours; the step is that of DoG (Ivgi, Hinder & Carmon, ICML 2023, arXiv 2302.12022), by the norm. With h the direction in
which an iteration moves x, in iterations k = 0, 1, ...:

    gate       t = t_v or t_y, the smaller of the two;   t_y = clip(1 - |d| / (0.2 d_0), 0, 1)
               t_v = clip(1 - |e| / (0.2 (1 + q / 100) |d_y f|), 0, 1);   q <- q + 1 - t_v, first 0
               e = H v - d_y f
               d = how far y moved, over its steps: about d_y g;   d_0 = the longest d until x has moved ten times, at least
               .01 L |y|
    distance   r = max |x_j - x_0| over j <= k, at least r_0;
               r_0 |h| = min( max(.01 |f|, .0003 |v| |d_y f|), .03 |v| |d_y f| ) where x moves first
    step       eta = r / sqrt(sum of t_j |h_j|^2 over j <= k), no longer than 1.5 times the last one in eta |h|
               x <- x - t eta s min(1, M_0 / M)^2 h
    damping    m <- .7 m + (the step of x);   s <- s / 2 where <h, m> > 0, else min(1, 1.1 s);   1e-4 <= s <= 1

What v lacks is what the hypergradient is wrong by, so x waits while v is far; v cannot settle before y does, but where y is
slow v follows it at once and tells nothing: so x waits for y too. Where H is flat e never falls, and h need not know: the
longer x waited for v, q, the more of e is let pass. Where x went too far h turns, and s falls (not where clients or rows are
sampled, or the server draws where a series is cut: there h turns by noise too, and s would only fall). M is the largest
curvature of g at a client (M_0: where x moved first): where it grew, y is slower. x moves from k = 3 on.

Where clients or rows are sampled, |e| and |d| are those of running means, less what noise is left in these; x moves from
k = 10 on, and eta |h| grows by no more than 1.3. With u = e or d, w, m and p the running means (of 0.7) of 1, u and |u|^2:

    sqrt( |m/w|^2 - (1 - .7) / (1 + .7) (p/w - |m/w|^2) )

Algorithms that make v anew in each iteration have no gate of v. For these that of y shuts at 0.5, r_0 = .1 |f| / |h|, and x
moves from the start. Where the server draws where a series is cut, most draws make h far too short: there x moves from
k = 10 on, and |h|^2 in r_0 is the mean until then.

All of it is free of scale: with x -> s x, y -> s y, f and g -> s f the path is the same.

An algorithm moves x by itself, with a step of its own making: `probe`. From where x was and where it is, h is known, and x
is put where the step above says. The probe follows that step, since some clients move y and v along a path of x.
"""

from __future__ import annotations

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import optax.tree
from jaxtyping import Array, Bool, Float, Int, PyTree

_BEGIN = 0.01  # of |f| / |h|: about the first distance, where v is kept
_PROBED = 0.01  # of a step: what x is moved by while it is to stay
_OPEN = 0.1  # of the step: the least probe
_KEPT = 0.7  # of e and d, in their running means
_TRAINED = 0.01  # of L |y|: how long d_y g is at least taken to have been
_WAITED = 100.0  # iterations that x waited for v, until which twice as much of e is let pass
_SETTLING = 10  # moves of x, until which d_0 is looked for
_OF_PULL = 0.0003, 0.03  # of |v| |d_y f| / |h|: between these lies the first distance
_MEMORY = 0.7  # of the steps of x
_BACK, _ON, _LEAST = 0.5, 1.1, 1e-4  # of the damping: where x went too far, else, and at least
_FAR = 60.0  # the largest logarithm of a ratio of sizes: beyond, numbers leave the range of 32 bits

Scalar = Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class Rule:
    """What depends on the algorithm and on what is sampled.

    Attributes:
        first: the iteration in which x begins to move.
        shut_v, shut_y: where the gates shut, that of v at first.
        begin: of |f| / |h|: the first distance.
        growth: how much longer a move may be than the last one.
        sampled: whether clients or rows are.
        random: whether the server draws where a series is cut. Then h is noise for the most part: a turn of it does not say
            that x went too far, and a short one not how long it is.
    """

    first: int
    shut_v: float
    shut_y: float
    begin: float
    growth: float
    sampled: bool
    random: bool


def rule(keeps_v: bool, sampled: bool, random: bool) -> Rule:
    """The rule for an algorithm.

    Args:
        keeps_v: whether v goes on from iteration to iteration.
        sampled: whether clients or rows are.
        random: whether the server draws where a series is cut.
    """
    first = 10 if sampled or random else 3 if keeps_v else 0
    y, begin = (0.2, _BEGIN) if keeps_v else (0.5, 10 * _BEGIN)
    return Rule(first, 0.2, y, begin, 1.3 if sampled else 1.5, sampled, random)


class Pace(eqx.Module):
    """What is remembered of x.

    Sizes are logarithms, or relative to others: their scales are the user's, and none is out of range.

    Attributes:
        start: x at first.
        radius: the largest distance from there, relative to the first one; zero before x moves.
        squares: the sum of t |h|^2, relative to the first |h|^2.
        log_first: log of the first |h|.
        log_distance: log of the first distance.
        log_probe: log of the step that the algorithm takes next.
        residual, slope: the running means of e, like v, and of d, like y; None where there is none.
        waited: q.
        log_slope: log of d_0.
        log_move: log of eta |h|, when x moved last.
        moves: how often it did.
        momentum: m, like x.
        damping: s.
        log_curvature: log M_0, once x moved.
        log_pull: log |d_y f| as it was measured last.
        log_loss: log |f| as it was measured last.
    """

    start: PyTree
    radius: Scalar
    squares: Scalar
    log_first: Scalar
    log_distance: Scalar
    log_probe: Scalar
    residual: Mean | None
    slope: Mean
    waited: Scalar
    log_slope: Scalar
    log_move: Scalar
    moves: Int[Array, ""]
    momentum: PyTree
    damping: Scalar
    log_curvature: Scalar
    log_pull: Scalar
    log_loss: Scalar


class Mean(eqx.Module):
    """Running means of vectors that an iteration tells of.

    Attributes:
        vector: of the vector, relative to `log_scale`.
        square: of its square, relative to that too.
        log_scale: log of the length of the first one.
    """

    vector: PyTree
    square: Scalar
    log_scale: Scalar

    @classmethod
    def none(cls, like: PyTree) -> Mean:
        """Of no vectors."""
        zero = jnp.zeros_like(optax.tree.norm(like))
        return cls(optax.tree.zeros_like(like), zero, zero)

    def renewed(self, direction: PyTree, log_length: Scalar, k: Int[Array, ""]) -> tuple[Mean, Scalar]:
        """(With another vector, log of the length of what is no noise).

        Args:
            direction: along the vector, of whatever length.
            log_length: log of the vector's.
        """
        kind = self.square.dtype
        scale = jnp.where(k > 0, self.log_scale, log_length)
        size = jnp.exp(jnp.clip(log_length - scale, -_FAR, _FAR))
        length = optax.tree.norm(direction).astype(kind)
        share = (1 - _KEPT) * size / jnp.where(length > 0, length, 1)
        vector = jax.tree.map(lambda a, b: _KEPT * a + share.astype(a.dtype) * b, self.vector, direction)
        square = _KEPT * self.square + (1 - _KEPT) * size**2
        whole = 1 - _KEPT ** (k + 1).astype(kind)
        mean, every = optax.tree.norm(vector).astype(kind) / whole, square / whole
        signal = mean**2 - (1 - _KEPT) / (1 + _KEPT) * jnp.maximum(every - mean**2, 0)
        return Mean(vector, square, scale), 0.5 * log(jnp.maximum(signal, 0)) + scale


class Moved(eqx.Module):
    """What an iteration did.

    Attributes:
        x: where x is put.
        step: t eta, the step it took.
        length: |h|.
    """

    x: PyTree
    step: Scalar
    length: Scalar


def begin(x: PyTree, y: PyTree, v: PyTree) -> Pace:
    """At the start. `v` is None where an algorithm keeps none."""
    zero, none = jnp.zeros_like(optax.tree.norm(x)), optax.tree.zeros_like
    residual = None if v is None else Mean.none(v)
    return Pace(
        start=x, radius=zero, squares=zero, log_first=zero, log_distance=zero, log_probe=zero, residual=residual,
        slope=Mean.none(y), waited=zero, log_slope=zero, log_move=zero, moves=jnp.zeros((), jnp.int32),
        momentum=none(x), damping=zero + 1, log_curvature=zero, log_pull=zero, log_loss=zero,
    )  # fmt: skip


def log(size: Scalar) -> Scalar:
    """The logarithm of a size; of none that of the smallest number."""
    least = float(jnp.finfo(size.dtype).tiny)
    return jnp.log(jnp.maximum(size, least))


def measured(pace: Pace, pull: PyTree, loss: Scalar) -> Pace:
    """With |d_y f| and |f| as they were measured; an f of zero says nothing."""
    kind = pace.log_pull.dtype
    loss = jnp.abs(loss).astype(kind)
    log_loss = jnp.where(loss > 0, log(loss), pace.log_loss)
    return dataclasses.replace(pace, log_pull=log(optax.tree.norm(pull).astype(kind)), log_loss=log_loss)


def probed(pace: Pace, loss: Scalar, steepest: Scalar, x: PyTree) -> Pace:
    """Once f and about how long h will be are measured at the start.

    Where f is zero, x's own size stands for a distance, and where that is zero too, one.
    """
    kind = pace.log_probe.dtype
    loss, steepest, own = (size.astype(kind) for size in (jnp.abs(loss), steepest, optax.tree.norm(x)))
    own = jnp.where(own > 0, own, 1)
    known = (loss > 0) & (steepest > 0)
    log_loss = jnp.where(known, log(loss), log(own) + log(jnp.where(steepest > 0, steepest, 1)))
    log_probe = jnp.where(steepest > 0, _first_probe(log_loss, log(steepest), x), 0)
    return dataclasses.replace(pace, log_loss=log_loss, log_probe=log_probe)


def _first_probe(log_loss: Scalar, log_length: Scalar, x: PyTree) -> Scalar:
    """The probe's logarithm while x stays: a share of what its first step will be."""
    share = math.log(_BEGIN * _PROBED) + log_loss - 2 * log_length
    return jnp.clip(jnp.maximum(share, _finest(x, log_length)), -_FAR, _FAR)


def _finest(x: PyTree, log_length: Scalar) -> Scalar:
    """The least probe's logarithm, so that h is not lost in the rounding of x."""
    finest = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(x))
    return 0.5 * math.log(finest) + log(optax.tree.norm(x).astype(log_length.dtype)) - log_length


def gate(pace: Pace, residual: PyTree, size: Scalar, k: Int[Array, ""], rule: Rule) -> tuple[Scalar, Pace]:
    """(How far v lets x move, in [0, 1]; what is remembered).

    Args:
        residual: what v moved by, against e.
        size: |e|.
    """
    assert pace.residual is not None
    length = log(size.astype(pace.log_pull.dtype))
    kept = pace.residual
    if rule.sampled:
        kept, length = kept.renewed(residual, length, k)
    t = _open(length - pace.log_pull, rule.shut_v * (1 + pace.waited / _WAITED))
    return t, dataclasses.replace(pace, residual=kept, waited=pace.waited + 1 - t)


def gate_of_y(
    pace: Pace, moved: PyTree, steps: Scalar, scale: Scalar, k: Int[Array, ""], rule: Rule
) -> tuple[Scalar, Pace]:
    """(How far y lets x move, in [0, 1]; what is remembered).

    Args:
        moved: what y moved by, against d.
        steps: the steps that it took together.
        scale: L |y|.
    """
    kind = pace.log_slope.dtype
    length, kept = log(optax.tree.norm(moved).astype(kind)) - log(steps.astype(kind)), pace.slope
    if rule.sampled:
        kept, length = kept.renewed(moved, length, k)
    settling = pace.moves < _SETTLING
    longest = jnp.where(k > 0, jnp.where(settling, jnp.maximum(pace.log_slope, length), pace.log_slope), length)
    reference = jnp.maximum(longest, math.log(_TRAINED) + log(scale.astype(kind)))
    return _open(length - reference, rule.shut_y), dataclasses.replace(pace, slope=kept, log_slope=longest)


def _open(log_ratio: Scalar, shut: float | Scalar) -> Scalar:
    return jnp.clip(1 - jnp.exp(jnp.minimum(log_ratio, _FAR)) / shut, 0, 1)


def move(
    pace: Pace, before: PyTree, after: PyTree, v: PyTree, t: Scalar, k: Int[Array, ""], curvature: Scalar,
    halvings: Int[Array, ""], rule: Rule, tempo: float | Scalar = 1.0,
) -> tuple[Moved, Pace]:  # fmt: skip
    """(Where x is put, what is remembered), of an iteration that took x from `before` to `after` with the probe's step.

    Args:
        v: after the iteration; None where none is kept.
        t: how far the gate is open, in [0, 1].
        curvature: M.
        halvings: how often the run went back.
        tempo: how many times as long a step is.
    """
    kind = pace.radius.dtype
    towards = optax.tree.sub(after, before)
    length = optax.tree.norm(towards).astype(kind)
    log_length = log(length) - pace.log_probe
    first = (k >= rule.first) & (pace.radius == 0) & (length > 0) & (t > 0)
    moving = first | (pace.radius > 0)
    seen = log_length
    if rule.random:  # the root of the mean square of those so far, along none of which x has moved
        share = 1 / (k + 1).astype(kind)
        parts = jnp.stack([2 * pace.log_first + log(1 - share), 2 * log_length + log(share)])
        seen = jnp.where(pace.radius == 0, 0.5 * jax.nn.logsumexp(parts), log_length)
    began = jnp.where(first, _first_distance(pace, v, rule) - seen, pace.log_distance)
    log_first = jnp.where(first | (pace.radius == 0), seen, pace.log_first)
    away = log(optax.tree.norm(optax.tree.sub(before, pace.start)).astype(kind)) - began
    radius = jnp.where(moving, jnp.maximum(jnp.maximum(pace.radius, 1), jnp.exp(jnp.minimum(away, _FAR))), 0)
    squares = pace.squares + jnp.where(moving, t * jnp.exp(2 * jnp.clip(log_length - log_first, -_FAR, _FAR / 2)), 0)
    log_step = began + log(radius) - log_first - 0.5 * log(jnp.where(squares > 0, squares, 1))
    longest = jnp.where(first, began, math.log(rule.growth) + pace.log_move)
    log_step = jnp.minimum(log_step, longest - log_length)
    curved = log(curvature.astype(kind))
    log_curvature = jnp.where(first, curved, pace.log_curvature)
    damping, slowed = _damped(pace, towards, t, moving, rule), curved - log_curvature
    taken = jnp.where(
        moving, jnp.ldexp(tempo * t * damping * jnp.exp(-2 * jnp.clip(slowed, 0, _FAR / 2)), -halvings), 0
    )
    share = taken * jnp.exp(jnp.clip(log_step - pace.log_probe, -_FAR, _FAR))
    x = jax.tree.map(lambda old, new: old + share.astype(new.dtype) * new, before, towards)
    went = moving & (t > 0)
    waiting = jnp.where(length > 0, _first_probe(pace.log_loss, log_length, before), pace.log_probe)
    ahead = jnp.maximum(log_step + log(jnp.maximum(taken, _OPEN)), _finest(before, log_length))
    now = dataclasses.replace(
        pace, radius=radius, squares=squares, log_first=log_first, log_distance=began, damping=damping,
        log_curvature=log_curvature, log_probe=jnp.where(moving & (length > 0), jnp.clip(ahead, -_FAR, _FAR), waiting),
        moves=pace.moves + went.astype(jnp.int32),
        log_move=jnp.where(went, log_step + log_length, pace.log_move),
        momentum=jax.tree.map(lambda m, new: _MEMORY * m + share.astype(new.dtype) * new, pace.momentum, towards),
    )  # fmt: skip
    return Moved(x, share * jnp.exp(pace.log_probe), jnp.exp(log_length)), now


def _first_distance(pace: Pace, v: PyTree, rule: Rule) -> Scalar:
    """log of the first distance times |h|."""
    of_loss = math.log(rule.begin) + pace.log_loss
    if v is None:
        return of_loss
    low, high = (math.log(share) + pace.log_pull + log(optax.tree.norm(v).astype(of_loss.dtype)) for share in _OF_PULL)
    return jnp.minimum(jnp.maximum(of_loss, low), high)


def _damped(pace: Pace, towards: PyTree, t: Scalar, moving: Bool[Array, ""], rule: Rule) -> Scalar:
    if rule.random or rule.sampled:
        return pace.damping
    overshot = jnp.real(jnp.asarray(optax.tree.vdot(towards, pace.momentum))) < 0  # <h, m> > 0
    renewed = jnp.where(overshot, jnp.maximum(_BACK * pace.damping, _LEAST), jnp.minimum(_ON * pace.damping, 1))
    return jnp.where(moving & (t > 0), renewed, pace.damping)

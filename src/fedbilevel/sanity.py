"""Problems that cannot mean what they say, found before the first iteration.

Two looks at the losses at the start point. Their traced programs say whether a variable that a loss
needs has any influence on it. And one compiled call on the rows at hand measures the curvature of the
inner loss, averaged over clients, along a few fixed directions v: v'Hv. Of a small y all V'HV is looked
at, whose eigenvalues (relative to V'V) lie between those of H, and are H's own with as many directions
as y has numbers. Whatever looks wrong on a part of the rows is looked at again on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from . import owned
from .compiled import CHEAPLY, Kept, run
from .data import FederatedData, Level, entry
from .errors import check, warn
from .given import Received
from .influence import compared, influence
from .oracles import losses_traced_once
from .problem import Problem, Rows, own_oracles
from .program import compiled_as

DIRECTIONS = 8  # the most directions tried
ROWS = 512  # rows of all clients together that are looked at first
_BLOCK, _TOGETHER = 64, 8  # rows of one client in a block, and blocks at a time: they bound the memory
_PADDED = 8  # rows of a batch in which padding is looked for, half of them padding
_NUMBERS = 2**23  # the most numbers in all directions together
_SMALL = 64  # up to so many numbers in y, mixed signs are looked for in the plane of all directions

_SHOWN = 3  # means that a message names

NO_CHECK = "(check=False, or --no-check, goes on without asking)"
_NEEDS = {
    ("inner", "y"): "the inner loss does not depend on y, the variable that it is to be minimised over",
    ("inner", "x"): "the inner loss does not depend on x, so that no x changes what the lower level learns",
    ("outer", "y"): "the outer loss does not depend on y, so that what the lower level learns does not matter to it",
}

Numbers = np.ndarray | Array  # traced within the compiled call, numpy outside


class Figures(NamedTuple):
    """What one compiled call measures.

    Attributes:
        curvature: (k, k) V'HV of the inner loss in y, for k directions.
        inner, outer: (k,) V'd_y of the inner and the outer loss: zero where the gradient is.
    """

    curvature: Numbers
    inner: Numbers
    outer: Numbers


# The whole check --------------------------------------------------------------------------------------------------------


def check_sane(problem: Problem, data: FederatedData, x: PyTree, y: PyTree, upper: bool = True) -> None:
    """Refuse a problem that cannot mean what it says, and warn of what may go wrong.

    Args:
        problem: over the floating-point arrays of x and y alone (`bind`).
        x, y: pytrees of floating-point arrays, the start.
        upper: whether the upper level counts; False where x stays, so that only g in y matters.

    Raises:
        InputError: a loss on which a variable it needs has no influence, one of a batch in which padding counts, or an
            inner loss that curves downwards in every direction tried.
    """
    check_influence(
        problem,
        x,
        y,
        *jax.eval_shape(lambda: [level.client(0).all() for level in (data.inner, data.outer)]),
        upper=upper,
    )
    check_padding(problem, x, y, data)
    v, few = directions(y), _selected(data, ROWS)
    if upper:
        check_means(problem, x, y, data)
    figures = measure(problem, x, y, v, data, few)
    if _suspicious(figures, v, y):
        if sum(map(_count, few)) < data.count("inner").sum() + data.count("outer").sum():
            figures = measure(problem, x, y, v, data, _selected(data, None))
        judge(figures, v, y, upper)


def check_influence(problem: Problem, x: PyTree, y: PyTree, inner: Rows, outer: Rows, upper: bool = True) -> None:
    """Refuse losses on which a variable that they need has no influence at all, by their traced programs.

    Raises:
        InputError: with the loss and the variable.
    """
    for level, variable, read in _without(problem, x, y, inner, outer):
        if not upper and (level, variable) != ("inner", "y"):
            continue
        what = _NEEDS[level, variable]
        if read:
            warn(
                f"the {level} loss reads {variable} in comparisons or as whole numbers alone, so that its derivative in "
                f"{variable} is zero: no hypergradient sees it."
            )
            continue
        check(False, f"{what}: is it {level}(x, y, example), x the upper variable and y the lower one? {NO_CHECK}")


def check_means(problem: Problem, x: PyTree, y: PyTree, data: FederatedData) -> None:
    """Refuse an outer loss of means that has no value at the start, where a group has no rows, say.

    Raises:
        InputError: with the means that it has none of.
    """
    if problem.outer_means is None:
        return
    for rows in (ROWS, None):  # what is missing in some of the rows may be there in all
        found = run(_means, problem, None, x, y, data.outer.rows, _selected(data, rows)[1], options=CHEAPLY)
        means, value, slope = jax.tree.map(np.asarray, found)
        if np.isfinite([value, *map(np.sum, jax.tree.leaves(slope))]).all():
            return
    zero = [
        f"means{jax.tree_util.keystr(path)}{'' if leaf.ndim == 0 else str([int(k) for k in place])}"
        for path, leaf in jax.tree_util.tree_flatten_with_path(means)[0]
        for place in np.argwhere(leaf == 0)
    ]
    why = (
        f": {', '.join(zero[:_SHOWN])} {'is' if len(zero) == 1 else 'are'} zero over all clients' outer rows"
        if zero
        else ""
    )
    check(
        False,
        f"outer_of has no finite value or derivative at the start{why}. Give each group that it divides by rows at some "
        f"client, or leave a group without rows out. {NO_CHECK}",
    )


def _means(
    problem: Problem, _: None, x: PyTree, y: PyTree, rows: PyTree, blocks: Blocks
) -> tuple[PyTree, Float[Array, ""], PyTree]:
    """(The means over some rows, F of them, F' of them)."""
    means = _mean(lambda block, client: problem.means(owned.own(x, client), owned.own(y, client), block), rows, blocks)
    return means, *jax.value_and_grad(problem.value_of)(means)


def check_padding(problem: Problem, x: PyTree, y: PyTree, data: FederatedData) -> None:
    """Refuse losses of a batch in which rows of weight zero count, where clients differ in size and so are padded.

    Raises:
        InputError: with the level, and the loss with two kinds of padding.
    """
    if not problem.batched or own_oracles(type(problem)):
        return
    for level in ("inner", "outer"):
        rows, counts = getattr(data, level), data.count(level)
        if counts.min() == counts.max():
            continue
        real = min(_PADDED // 2, int(counts.sum()) - 1)
        weights = np.repeat([1 / real, 0.0], [real, _PADDED - real])
        places = [np.resize(np.arange(real), _PADDED), np.minimum(np.arange(_PADDED), int(counts.sum()) - 1)]
        index = np.stack(places).astype(np.int32)
        one, other = np.asarray(run(_padded, problem, level, x, y, rows.rows, index, weights, options=CHEAPLY))
        close = float(jnp.finfo(one.dtype).eps) ** 0.5 * max(1.0, abs(one))
        check(
            not np.isfinite([one, other]).all() or abs(one - other) <= close,
            f"rows of weight zero count in the {level} loss of a batch: {real} rows give {one:.6g} with some padding behind "
            f"them, and {other:.6g} with other padding. Take the weighted mean over rows, with no statistics of the batch "
            f"(as in batch normalisation). {NO_CHECK}",
        )


def _padded(
    problem: Problem, level: str, x: PyTree, y: PyTree, rows: PyTree, index: Numbers, weights: Numbers
) -> Float[Array, " 2"]:
    """The loss of the same rows with two kinds of padding."""
    weights = jnp.asarray(weights).astype(jnp.result_type(float))
    count = jnp.sum(weights > 0, dtype=jnp.int32)

    def value(index: Array) -> Float[Array, ""]:
        examples = jax.tree.map(lambda leaf: entry(leaf, index), rows)
        given, (own_x, own_y) = Rows(examples, weights, count), owned.own((x, y), 0)
        if level == "outer" and problem.outer_means is not None:  # F of so few rows may have no value
            parts = [
                jnp.sum(leaf).astype(weights.dtype) for leaf in jax.tree.leaves(problem.means(own_x, own_y, given))
            ]
            return sum(parts[1:], parts[0])
        return getattr(problem, f"{level}_value")(own_x, own_y, given)

    return jax.lax.map(value, jnp.asarray(index))


def measure(
    problem: Problem, x: PyTree, y: PyTree, v: PyTree, data: FederatedData, blocks: tuple[Blocks, Blocks]
) -> Figures:
    """The figures of some blocks of rows, in one compiled call."""
    rows = data.inner.rows, data.outer.rows
    found = run(_figures, problem, None, x, y, v, rows, blocks, options=CHEAPLY)
    return jax.tree.map(np.asarray, found)


def judge(figures: Figures, v: PyTree, y: PyTree, upper: bool = True) -> None:
    """Refuse or warn by the figures of all clients.

    Raises:
        InputError: the inner loss curves downwards along every direction tried.
    """
    bounds = _bounds(figures, v, y)
    if bounds is None:
        return
    low, high, noise, mixed = bounds
    tried = jax.tree.leaves(v)[0].shape[0]
    check(
        high > noise or low >= -noise,
        f"the inner loss curves downwards in y along every one of the {tried} directions tried at the start (curvature "
        f"from {low:.3g} to {high:.3g}), so that it has no minimum there: is its sign right? {NO_CHECK}",
    )
    if not np.any(figures.inner) and low <= noise:  # where it curves upwards, y may well be the solution
        warn(
            "the gradient of the inner loss in y is exactly zero at the start, which is no strict minimum: a saddle point "
            "(a product of weights that are all zero), or flat. Start y from small random numbers."
        )
    elif mixed:
        warn(
            f"the inner loss curves downwards in y along some directions at the start, upwards along others (curvature "
            f"from {low:.3g} to {high:.3g}): a hypergradient means something only where the lower level has a strict "
            "minimum, so look at what it reaches, or add a regulariser."
        )
    elif low == high == 0:
        warn(
            "the inner loss has no curvature in y at the start along any direction tried: it has no strict minimum in y "
            "if it is linear there, so add a regulariser such as 1e-3 * |y|^2."
        )
    if upper and not np.any(figures.outer):
        warn(
            "the gradient of the outer loss in y is exactly zero at the start, so that the first hypergradient sees "
            "nothing of the lower level: start y from small random numbers, or look whether the outer loss is flat in y."
        )


class _Bounds(NamedTuple):
    """The least and the largest curvature, what of it is rounding, and whether its signs are worth a word."""

    low: float
    high: float
    noise: float
    mixed: bool


def _suspicious(figures: Figures, v: PyTree, y: PyTree) -> bool:
    bounds = _bounds(figures, v, y)
    if bounds is None:
        return False
    downwards = bounds.mixed or bounds.high <= bounds.noise
    return downwards or not (np.any(figures.inner) and np.any(figures.outer))


def _bounds(figures: Figures, v: PyTree, y: PyTree) -> _Bounds | None:
    """None where the numbers are not finite.

    A network's loss curves downwards along some directions at nearly every start; that is worth a
    word where it does along half of those tried.
    """
    curvature = np.asarray(figures.curvature, float)
    if not all(np.isfinite(part).all() for part in figures):
        return None  # it blows up at once, and is told so then
    gram, small = _gram(v), sum(leaf.size for leaf in jax.tree.leaves(y)) <= _SMALL
    if small:
        whitened = np.linalg.inv(np.linalg.cholesky(gram))
        values = np.linalg.eigvalsh(whitened @ (curvature + curvature.T) @ whitened.T / 2)
    else:
        values = np.diag(curvature) / np.diag(gram)
    coarse = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(y))
    noise = coarse**0.5 * float(np.abs(values).max())
    down = (values < -noise).sum()
    mixed = bool(down and values.max() > noise and (small or down >= len(values) / 2))
    return _Bounds(float(values.min()), float(values.max()), noise, mixed)


# Which variables a loss depends on --------------------------------------------------------------------------------------

_KNOWN = Kept(64)  # what was found, by program


def _without(problem: Problem, x: PyTree, y: PyTree, inner: Rows, outer: Rows) -> list[tuple[str, str, bool]]:
    """What is needed and has no influence: (level, variable, whether it is read all the same).

    Remembered for programs met before.
    """
    rows = {"inner": inner, "outer": outer}

    def look() -> list[tuple[str, str, bool]]:
        influenced = lambda level, variable: jax.tree.leaves(influence(problem, level, variable, x, y, rows[level]))
        read = lambda level, variable: compared(problem, level, variable, x, y, rows[level])
        return [(*pair, read(*pair)) for pair in _NEEDS if not any(influenced(*pair))]

    key = compiled_as(problem), _shapes((x, y, inner, outer))
    try:
        hash(key)
    except TypeError:  # a problem that is not frozen, of functions that are no keys
        return look()
    return _KNOWN.get(key, look)


def _shapes(tree: PyTree) -> Hashable:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)


# Curvature and gradients ------------------------------------------------------------------------------------------------


def directions(y: PyTree) -> PyTree:
    """Fixed directions, leaves (k, ...): every coordinate of a small y, else random ones, the same at every site."""
    leaves, structure = jax.tree.flatten(y)
    sizes = [leaf.size for leaf in leaves]
    total = sum(sizes)
    k = min(total, DIRECTIONS, max(2, _NUMBERS // total))
    draw = np.random.default_rng(0)
    flat = np.eye(total) if total <= k else draw.standard_normal((k, total), np.float32)
    parts = np.split(flat, np.cumsum(sizes)[:-1], axis=1)
    shaped = [
        part.reshape(k, *leaf.shape).astype(np.dtype(leaf.dtype)) for part, leaf in zip(parts, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, shaped)


def _gram(v: PyTree) -> np.ndarray:
    """V'V, (k, k)."""
    flat = [np.asarray(leaf, np.float64).reshape(len(leaf), -1) for leaf in jax.tree.leaves(v)]
    return sum((part @ part.T for part in flat[1:]), flat[0] @ flat[0].T)


class Blocks(NamedTuple):
    """Some rows of a level, each block one client's.

    Attributes:
        index: (blocks, rows) where they lie in the flat arrays; padding repeats one.
        weights: (blocks, rows) summing to one in a block, zero on padding.
        share: (blocks,) the blocks' shares of the mean over all clients.
        count: (blocks,) int32, how many of the rows are no padding.
        client: (blocks,) int32, whose they are.
    """

    index: Numbers
    weights: Numbers
    share: Numbers
    count: Numbers
    client: Numbers


def _count(blocks: Blocks) -> int:
    return int(blocks.count.sum())


def _selected(data: FederatedData, rows: int | None) -> tuple[Blocks, Blocks]:
    """Blocks of both levels: about so many rows, evenly among clients and within them, or all."""
    m = data.clients
    p = np.full(m, 1 / m) if data.weights is None else np.asarray(data.weights, float)
    return _blocks(data.inner, p, rows), _blocks(data.outer, p * np.asarray(data.outer.scale, float), rows)


def _blocks(level: Level, p: np.ndarray, rows: int | None) -> Blocks:
    counts, offsets = np.asarray(level.counts), np.asarray(level.offsets)
    m = len(counts)
    clients = np.arange(m) if rows is None or m <= rows else np.arange(rows) * m // rows
    most = counts.max() if rows is None else max(1, rows // len(clients))
    size = int(min(_BLOCK, most, counts.max()))
    chosen = []  # (rows of a block, share, whose)
    for i in clients:
        n = min(int(counts[i]), int(most))
        places = offsets[i] + np.arange(n) * int(counts[i]) // n
        chosen += [(places[s : s + size], p[i] * min(size, n - s) / n, int(i)) for s in range(0, n, size)]
    chosen += [(chosen[0][0], 0.0, chosen[0][2])] * (-len(chosen) % _TOGETHER)
    lengths = np.array([len(places) for places, *_ in chosen], np.int32)
    index = np.stack([np.resize(places, size) for places, *_ in chosen]).astype(np.int32)
    real = np.arange(size) < lengths[:, None]
    share = np.array([part for _, part, _ in chosen])
    whose = np.array([client for *_, client in chosen], np.int32)
    return Blocks(index, real / lengths[:, None], share / share.sum(), lengths, whose)


def _figures(
    problem: Problem,
    _: None,
    x: PyTree,
    y: PyTree,
    v: PyTree,
    rows: tuple[PyTree, PyTree],
    blocks: tuple[Blocks, Blocks],
) -> Figures:
    v, problem = jax.tree.map(jnp.asarray, v), losses_traced_once(problem)

    def of(client: Array) -> tuple[PyTree, PyTree, PyTree]:
        """x, y and the directions as a client has them."""
        return *owned.own((x, y), client), jax.vmap(lambda d: owned.own(d, client))(v)

    def lower(block: Rows, client: Array) -> tuple[Float[Array, "k k"], Float[Array, " k"]]:
        x, y, v = of(client)
        gradient, product = _derivatives(problem, x, y, v, block)
        return _products(v, product), _along(v, gradient)

    of_means = problem.outer_means is not None
    means = lambda block, client: problem.means(owned.own(x, client), owned.own(y, client), block)
    at = problem.at_means(_mean(means, rows[1], blocks[1])) if of_means else problem

    def upper(block: Rows, client: Array) -> Float[Array, " k"]:
        x, y, v = of(client)
        return _along(v, at.outer_gradients(x, y, block)[1])

    curvature, inner = _mean(lower, rows[0], blocks[0])
    outer = _mean(upper, rows[1], blocks[1])
    if of_means:  # where a group is missing in these rows nothing is known, and least of all that it is zero
        outer = jnp.where(jnp.isfinite(outer), outer, 1)
    return Figures(curvature, inner, outer)


def _derivatives(problem: Problem, x: PyTree, y: PyTree, v: PyTree, rows: Rows) -> tuple[PyTree, PyTree]:
    """(d_y g, H v with the directions first), in one pass where the problem brings no product of its own."""
    gradient = lambda y: problem.inner_gradient(x, y, rows)
    if type(problem).hessian_vector is Problem.hessian_vector:
        return jax.vmap(lambda d: jax.jvp(gradient, (y,), (d,)), out_axes=(None, 0))(v)
    try:
        return gradient(y), jax.vmap(lambda d: problem.hessian_vector(x, y, d, rows))(v)
    except Exception:  # it has first derivatives only, as some algorithms need no others
        return gradient(y), jax.vmap(lambda d: _difference(gradient, y, d))(v)


def _difference(gradient: Callable[[PyTree], PyTree], y: PyTree, d: PyTree) -> PyTree:
    """H d by central differences of the gradient: exact enough for a sign."""
    square = lambda tree: sum(jnp.sum(leaf.astype(jnp.result_type(float)) ** 2) for leaf in jax.tree.leaves(tree))
    coarse = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(y))
    reach = coarse ** (1 / 3) * (1 + jnp.sqrt(square(y))) / jnp.sqrt(square(d))
    beside = lambda sign: jax.tree.map(lambda a, b: a + sign * reach.astype(a.dtype) * b, y, d)
    return jax.tree.map(lambda a, b: (a - b) / (2 * reach.astype(a.dtype)), gradient(beside(1)), gradient(beside(-1)))


def _mean(oracle: Callable[[Rows, Array], PyTree], rows: PyTree, blocks: Blocks) -> PyTree:
    """The mean over all blocks of what an oracle says of each, a few at a time."""
    real = jnp.result_type(float)
    blocks = Blocks(*map(jnp.asarray, blocks))
    blocks = blocks._replace(weights=blocks.weights.astype(real), share=blocks.share.astype(real))

    def one(block: Blocks) -> PyTree:
        index, weights, _, count, client = map(jnp.asarray, block)
        examples = jax.tree.map(lambda leaf: entry(leaf, index), rows)
        return oracle(Rows(examples, weights, count), client)

    every = jax.lax.map(one, blocks, batch_size=_TOGETHER)
    return jax.tree.map(lambda leaf: jnp.tensordot(blocks.share, leaf, axes=1), every)


def _products(v: PyTree, w: PyTree) -> Float[Array, "k l"]:
    """V'W, (k, k)."""
    real = jnp.result_type(float)
    flat = lambda leaf: leaf.reshape(leaf.shape[0], -1).astype(real)
    parts = [flat(a) @ flat(b).T for a, b in zip(jax.tree.leaves(v), jax.tree.leaves(w), strict=True)]
    return jnp.sum(jnp.stack(parts), axis=0)


def _along(v: PyTree, gradient: PyTree) -> Float[Array, " k"]:
    """V'gradient, (k,)."""
    return _products(v, jax.tree.map(lambda leaf: leaf[None], gradient))[:, 0]


# Over the network: each site's figures, and their mean --------------------------------------------------------------------


def told(
    problem: Problem, own: FederatedData, x: PyTree, y: PyTree, rows: int = 4096, client: int = 0
) -> list[list[float]]:
    """A site's figures as numbers, from its own rows.

    Args:
        client: which of all clients it is: whose blocks of x and y are its own.
    """
    whose = [each._replace(client=np.full_like(each.client, client)) for each in _selected(own, rows)]
    figures = measure(problem, x, y, directions(y), own, (whose[0], whose[1]))
    return [np.ravel(part).astype(float).tolist() for part in figures]


def judge_all(said: Sequence[Received], weights: Sequence[float] | None, y: PyTree) -> None:
    """Judge by the mean of what the sites told.

    Raises:
        InputError: as `judge`; or what a site told cannot be read.
    """
    v = directions(y)
    k = jax.tree.leaves(v)[0].shape[0]
    sites = [site for site in said if isinstance(site, list) and [np.size(part) for part in site] == [k * k, k, k]]
    check(len(sites) == len(said), "a site told figures of the inner loss's curvature that cannot be read.")
    p = np.full(len(said), 1 / len(said)) if weights is None else np.asarray(weights)
    mean = lambda place: sum((s * np.asarray(site[place]) for s, site in zip(p, sites, strict=True)), np.zeros(()))
    judge(Figures(np.reshape(mean(0), (k, k)), mean(1), mean(2)), v, y)

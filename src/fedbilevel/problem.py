"""The bilevel problem of one client, seen through its oracles.

    outer:  min_x  f(x, y*(x))         inner:  y*(x) = argmin_y g(x, y)

x is the upper (outer) variable, y the lower (inner) one, everywhere in this library. A `Problem` holds the two losses;
its oracles are the only way in which an algorithm reaches them. A user may subclass `Problem` and override the
oracles (a model in another framework, finite differences, clipped gradients) without the algorithms noticing.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import ClassVar, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from .blocks import Window, summed
from .errors import check
from .foreign import without_marks
from .owned import bare, unmarked

_MANY, _LONG = 64, 1000  # arrays and characters that a message spells out

Loss = Callable[..., Float[Array, ""]]


class Rows(eqx.Module):
    """Rows of one client at one level, as an oracle takes them.

    Attributes:
        examples: pytree of arrays, each (rows, ...).
        weights: (rows,) the weight of each row; they sum to one (times the client's outer weight, where that is not
            its inner one), and are zero on padding.
        count: () int32, how many of the rows are real.
        key: the random key of this draw, minibatch or all rows, for a loss that is random itself (dropout): see
            `Problem(random=True)`; oracles of its own may use it. None for rows that no exchange drew.
        features, at: `Problem.features` of each row and the x they were computed at, or None where they were not.
        place: (rows,) int32, which of the draw's rows these are; None: all of them, in order.
    """

    examples: PyTree[Shaped[Array, "rows ..."]]
    weights: Float[Array, " rows"]
    count: Int[Array, ""]
    key: Key[Array, ""] | None = None
    features: PyTree = None
    at: PyTree = None
    place: Int[Array, " rows"] | None = None

    def keys(self) -> Key[Array, " rows"] | None:
        """A random key of each row, `fold_in(key, its place in the draw)`; None where no exchange drew them."""
        if self.key is None:
            return None
        place = jnp.arange(self.weights.shape[0], dtype=jnp.int32) if self.place is None else self.place
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(self.key, place)

    def computed_at(self, x: PyTree) -> bool:
        """Whether `features` are those at x: the very same arrays, so that a derivative in x never takes them for constants.

        A transformation hands its own tracers to the function it differentiates; they are other objects than `at`.
        """
        if self.features is None:
            return False
        ours, theirs = jax.tree.leaves(self.at), jax.tree.leaves(x)
        return len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs, strict=True))


Oracle = TypeVar("Oracle", bound=Callable[..., PyTree])

ORACLES = {
    "inner_value": 0,
    "inner_gradient": 0,
    "inner_gradient_x": 0,
    "hessian_vector": 1,
    "cross_vector": 1,
    "outer_value": 0,
    "outer_gradients": 0,
}  # and how many vectors they take


def in_blocks(rows: Rows, window: Window) -> Rows:
    """The same full batch, which oracles take block by block.

    It is these very rows that are known to be all of a client's: what is made of them by `dataclasses.replace` or by
    `jax.tree.map` is taken as it is.
    """
    object.__setattr__(rows, "_window", window)
    return rows


def blocks_of(rows: PyTree) -> Window | None:
    """The window of a full batch that is taken block by block; None for anything else."""
    return rows.__dict__.get("_window") if isinstance(rows, Rows) else None


def _by_blocks(oracle: Oracle) -> Oracle:
    """The oracle; of a full batch `in_blocks` the sum over its blocks."""
    signature = inspect.signature(oracle)

    @functools.wraps(oracle)
    def whole(*args: PyTree, **named: PyTree) -> PyTree:
        problem, *at, rows = signature.bind(*args, **named).arguments.values()
        window = blocks_of(rows)
        if window is None or own_oracles(type(problem)):
            return oracle(*args, **named)
        return _summed(oracle, problem, tuple(at), rows, window)

    return whole  # type: ignore[return-value]


def _summed(oracle: Callable, problem: Problem, at: tuple[PyTree, ...], rows: Rows, window: Window) -> PyTree:
    arrays, rest = eqx.partition(problem, eqx.is_array)
    known = rows.computed_at(at[0])
    # a key as numbers: what is made of several clients' blocks takes arrays alone
    secret = None if rows.key is None or not problem.random else jax.random.key_data(rows.key)
    keyed = lambda secret: None if secret is None else jax.random.wrap_key_data(secret, impl="threefry2x32")
    padded = Rows(rows.examples, rows.weights, rows.count, keyed(secret))
    window = window if known else dataclasses.replace(window, features=None, base=None)

    def part(
        given: PyTree, examples: PyTree, weights: Float[Array, " rows"], features: PyTree, place: Int[Array, " rows"]
    ) -> PyTree:
        arrays, at, secret = given
        count = jnp.asarray(weights.shape[0], jnp.int32)
        block = Rows(examples, weights, count, keyed(secret), features, at[0] if known else None, place)
        return oracle(eqx.combine(arrays, rest), *at, block)

    # a derivative of the sum is that of the oracle on padded rows: of the loop there is none in reverse
    @jax.custom_jvp
    def over_blocks(arrays: PyTree, at: PyTree, window: Window, padded: Rows, secret: PyTree) -> PyTree:
        return summed(part, (arrays, at, secret), window)

    @over_blocks.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple[PyTree, PyTree]:
        plain = lambda arrays, at, _, padded, __: oracle(eqx.combine(arrays, rest), *at, padded)
        return jax.jvp(plain, primals, tangents)

    return over_blocks(arrays, at, window, padded, secret)


class Problem(eqx.Module):
    """The two losses, and the oracles derived from them by automatic differentiation.

    Args:
        inner: g(x, y, example) -> scalar, the lower-level loss of one example; `example` is one row of the client's data.
        outer: f(x, y, example) -> scalar, the upper-level loss of one example. Or instead of it
        outer_means: m(x, y, example) -> pytree of numbers, or of short arrays: what one example adds to each mean, and
        outer_of: F(means) -> scalar, of the means over rows and clients of what `outer_means` returns (see below).
        batched: the losses take `(x, y, examples, weights)` instead, where leaves of `examples` are (rows, ...) and
            `weights` (rows,) sum to one, and return the weighted mean. Rows of weight zero are padding and must not count.
        features: phi(x, example) -> pytree of arrays, a step that does not depend on y (a network's frozen body). The
            inner loss is then g(x, y, example, phi(x, example)), or batched g(x, y, examples, weights, features) with
            features = phi(x, examples), rows first. Local steps on y compute phi once per row instead of at every step;
            derivatives in x go through it. The outer loss stays f(x, y, example).
        random: the inner loss is random (dropout), and takes a key after everything else: g(x, y, example, key), or of a
            batch g(x, y, examples, weights, keys) with one key a row. The key is fold_in(the draw's key, the row's place in
            the draw): one draw, one mask, whatever is computed of it, and the same on every engine. It is None where the
            loss is to be deterministic: in `reference`, in scores, and where the problem is looked at. The outer loss
            judges, and draws nothing.

    With `outer_means` and `outer_of` the upper level is f(x, y) = F(M(x, y)), M the mean that f itself would be: over each
    client's rows, then over clients by their weights. So what is no mean of rows (a gap between two groups' error rates,
    an F1 score, a ratio) is made of means of numerators and of denominators, and never of clients' own ratios: return
    `{"errors": group * error, "rows": group}`, and divide in `outer_of`. A mean loss may be one of the means. With
    batched=True it is m(x, y, examples, weights), and returns the weighted means. What `outer_means` returns are real
    numbers; of booleans and whole numbers the share and the mean are taken.

    x, y and an example are pytrees of arrays (equinox modules too). The library takes the weighted means over rows
    and clients, so clients of different sizes are exact. Every oracle takes `rows: Rows` and returns a pytree like x or
    like y (values: a scalar). The lower-level loss should be strongly convex in y for the hypergradient to exist.
    """

    on_host: ClassVar[bool] = False  # whether its oracles are Python's, called by compiled programs

    inner: Loss
    outer: Loss | None = None
    batched: bool = eqx.field(static=True, default=False)
    features: Callable[..., PyTree] | None = None
    random: bool = eqx.field(static=True, default=False)
    outer_means: Callable[..., PyTree] | None = None
    outer_of: Callable[[PyTree], Float[Array, ""]] | None = None
    around: PyTree = eqx.field(init=False, default=None)  # the means at which F is taken linearly, where they are known

    def __check_init__(self):
        later = {"random": False, "outer_means": None, "outer_of": None, "around": None}
        for name, value in later.items():
            if (
                name not in self.__dict__
            ):  # a subclass with an `__init__` of its own, from before there was such a field
                object.__setattr__(self, name, value)
        for level in ("inner", "outer") if self.outer_means is None and self.outer_of is None else ("inner",):
            loss = getattr(self, level)
            check(callable(loss), f"Problem({level}=...) takes a function (x, y, example) -> scalar, not {loss!r}.")
        self._check_means()
        phi = self.features
        check(phi is None or callable(phi), f"Problem(features=...) takes a function (x, example), not {phi!r}.")

    def _check_means(self):
        means, of = self.outer_means, self.outer_of
        if means is None and of is None:
            return
        check(
            callable(means) and callable(of),
            "an outer loss of means needs both outer_means= (x, y, example) -> pytree of numbers, and outer_of= (their "
            f"means) -> scalar; got {means!r} and {of!r}.",
        )
        check(
            self.outer is None,
            "Problem takes outer=, or outer_means= and outer_of=, one of the two: let a mean loss be one of the means.",
        )
        check(
            not own_oracles(type(self)),
            f"{type(self).__name__} brings oracles of its own, and outer_means= needs those that are derived: leave it out.",
        )

    # What a problem of another framework does in its own way -------------------------------------------------------

    def over(self, x_rest: PyTree, y_rest: PyTree) -> Problem:
        """The same problem over the trainable parts of x and y alone, given the rest of them."""
        return dataclasses.replace(
            self,
            inner=_Completed(self.inner, x_rest, y_rest),
            outer=None if self.outer is None else _Completed(self.outer, x_rest, y_rest),
            outer_means=None if self.outer_means is None else _Completed(self.outer_means, x_rest, y_rest),
            features=None if self.features is None else _CompletedFeatures(self.features, x_rest),
        )

    def holding(self, data: PyTree) -> tuple[Problem, PyTree]:
        """(The same problem, data) as an engine runs them: its oracles may hold the rows, and data stand for them."""
        return self, data

    def settled(self, x: PyTree, y: PyTree, data: PyTree) -> Problem:
        """The same problem, which knows what its losses compute now.

        Raises:
            InputError: they cannot be used.
        """
        return self

    def depends(self, level: str, variable: str) -> list[bool] | None:
        """Of each leaf of x (or y), whether a loss depends on it; None where traced programs say so."""
        return None

    def ways(self, x: PyTree, y: PyTree, v: PyTree, rows: Rows) -> dict[str, PyTree]:
        """d2_yy g v in each of several ways to take it, by name, for a look at whether they agree; {}: there is one."""
        return {}

    def measuring(self, function: Callable, x: PyTree, y: PyTree, data: PyTree) -> Callable[..., tuple] | None:
        """A metric of rows, as programs ask for it, (problem, x, y, rows) -> its weighted means; None: they trace it.

        Raises:
            InputError: it returns no number and no pair of them.
        """
        return None

    def serving(self, program: Callable[[], PyTree]) -> PyTree:
        """What a compiled program returns, while its oracles are answered: for a problem that is `on_host`."""
        return program()

    def told(self) -> Exception | None:
        """What an oracle raised while a compiled program ran."""
        return None

    # The oracles ----------------------------------------------------------------------------------------------------

    @_by_blocks
    def inner_value(self, x: PyTree, y: PyTree, rows: Rows) -> Float[Array, ""]:
        """g(x, y): the weighted mean of the inner loss over the rows."""
        more = ()
        if self.features is not None:
            more = (rows.features if rows.computed_at(x) else self.row_features(x, rows.examples),)
        if self.random:
            more = (*more, rows.keys())
        return self._mean(self.inner, x, y, rows, *more)

    def row_features(self, x: PyTree, examples: PyTree) -> PyTree:
        """phi(x, example) of each row, leaves (rows, ...); None for a problem without features."""
        phi, x = self.features, bare(x)
        if phi is None:
            return None
        return phi(x, examples) if self.batched else jax.vmap(lambda example: phi(x, example))(examples)

    def outer_value(self, x: PyTree, y: PyTree, rows: Rows) -> Float[Array, ""]:
        """f(x, y): the weighted mean of the outer loss over the rows.

        Of means it is F of the means over these very rows; or, where `around` says which means all clients have, the
        tangent of F there: F(A) + <F'(A), M - A>, of which the clients' mean is F(A) where A is the mean of their M.
        """
        if self.outer_means is None or self.around is not None:
            return self._outer_value(x, y, rows)
        total = jnp.sum(rows.weights)
        means = self.means(x, y, rows)
        value = self.value_of(jax.tree.map(lambda leaf: leaf / total.astype(leaf.dtype), means))
        return total.astype(value.dtype) * value

    @_by_blocks
    def means(self, x: PyTree, y: PyTree, rows: Rows) -> PyTree:
        """M(x, y): the weighted means of `outer_means` over the rows, like what it returns, in floating point."""
        assert self.outer_means is not None
        x, y = bare(x), bare(y)
        if self.batched:
            return self.outer_means(x, y, rows.examples, rows.weights)
        own = jax.vmap(lambda example: jax.tree.map(jnp.asarray, self.outer_means(x, y, example)))  # pyright: ignore[reportOptionalCall]
        mean = lambda leaf: jnp.tensordot(rows.weights.astype(leaf.dtype), leaf, axes=1)
        real = lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf.astype(rows.weights.dtype)
        return jax.tree.map(lambda leaf: mean(real(leaf)), own(rows.examples))

    def value_of(self, means: PyTree) -> Float[Array, ""]:
        """F of means over all clients."""
        assert self.outer_of is not None
        return self.outer_of(means)

    def at_means(self, means: PyTree) -> Problem:
        """The same problem, with F taken linearly around these means over all clients."""
        other = copy.copy(self)
        object.__setattr__(other, "around", means)
        return other

    @_by_blocks
    def _outer_value(self, x: PyTree, y: PyTree, rows: Rows) -> Float[Array, ""]:
        if self.outer_means is None:
            assert self.outer is not None
            return self._mean(self.outer, x, y, rows)
        value, slope = jax.value_and_grad(self.value_of)(self.around)
        total = jnp.sum(rows.weights).astype(value.dtype)
        away = lambda mean, at, along: jnp.sum((mean - total.astype(mean.dtype) * at) * along).astype(value.dtype)
        parts = jax.tree.leaves(jax.tree.map(away, self.means(x, y, rows), self.around, slope))
        return total * value + sum(parts[1:], parts[0])

    @_by_blocks
    def inner_gradient(self, x: PyTree, y: PyTree, rows: Rows) -> PyTree:
        """d_y g(x, y), like y."""
        return jax.grad(lambda y: self.inner_value(x, y, rows))(y)

    @_by_blocks
    def inner_gradient_x(self, x: PyTree, y: PyTree, rows: Rows) -> PyTree:
        """d_x g(x, y), like x."""
        return jax.grad(lambda x: self.inner_value(x, y, rows))(x)

    @_by_blocks
    def hessian_vector(self, x: PyTree, y: PyTree, v: PyTree, rows: Rows) -> PyTree:
        """d2_yy g(x, y) v, like y; forward over reverse."""
        with told_of_reverse_rules():
            return jax.jvp(lambda y: self.inner_gradient(x, y, rows), (y,), (v,))[1]

    @_by_blocks
    def cross_vector(self, x: PyTree, y: PyTree, v: PyTree, rows: Rows) -> PyTree:
        """d2_xy g(x, y) v = d_x <d_y g(x, y), v>, like x; reverse over forward."""

        directional = lambda x: jax.jvp(lambda y: self.inner_value(x, y, rows), (y,), (v,))[1]

        with told_of_reverse_rules():
            return jax.grad(directional)(x)

    def outer_gradients(self, x: PyTree, y: PyTree, rows: Rows) -> tuple[PyTree, PyTree]:
        """(d_x f, d_y f) at (x, y), like x and like y: those of `outer_value`."""
        if self.outer_means is None or self.around is not None:
            return self._outer_gradients(x, y, rows)
        total = jnp.sum(rows.weights)
        own = jax.tree.map(lambda leaf: leaf / total.astype(leaf.dtype), self.means(x, y, rows))
        return self.at_means(own)._outer_gradients(x, y, rows)

    @_by_blocks
    def _outer_gradients(self, x: PyTree, y: PyTree, rows: Rows) -> tuple[PyTree, PyTree]:
        return jax.grad(self.outer_value, argnums=(0, 1))(x, y, rows)

    def _mean(self, loss: Loss, x: PyTree, y: PyTree, rows: Rows, *more: PyTree) -> Float[Array, ""]:
        x, y = bare(x), bare(y)
        if self.batched:
            return loss(x, y, rows.examples, rows.weights, *more)
        losses = jax.vmap(lambda example, *own: loss(x, y, example, *own))(rows.examples, *more)
        return jnp.sum(rows.weights.astype(losses.dtype) * losses)


def own_oracles(kind: type[Problem]) -> bool:
    """Whether a class of problems brings oracles of its own."""
    return any(getattr(kind, name) is not getattr(Problem, name) for name in (*ORACLES, "row_features", "_mean"))


@contextlib.contextmanager
def told_of_reverse_rules() -> Iterator[None]:
    """Refuse a part of the inner loss that has a reverse derivative of its own, and so no second ones.

    Raises:
        InputError: it is there.
    """
    try:
        yield
    except (TypeError, NotImplementedError) as error:
        theirs = any(word in str(error) for word in ("custom_vjp", "custom_lin"))
        check(
            not theirs,
            "the inner loss uses jax.custom_vjp, which has no derivative along a direction, and second derivatives of "
            "the inner loss are made of these: write that part with jax.custom_jvp.",
        )
        raise


class _Completed(eqx.Module):
    """A loss over the trainable arrays of x and y, given the rest of them (activation functions, counters, ...)."""

    loss: Loss
    x_rest: PyTree
    y_rest: PyTree

    def __call__(self, x: PyTree, y: PyTree, *args: PyTree) -> Float[Array, ""]:
        return self.loss(eqx.combine(x, self.x_rest), eqx.combine(y, self.y_rest), *args)


class _CompletedFeatures(eqx.Module):
    """Features over the trainable arrays of x, given the rest of it."""

    features: Callable[..., PyTree]
    x_rest: PyTree

    def __call__(self, x: PyTree, examples: PyTree) -> PyTree:
        return self.features(eqx.combine(x, self.x_rest), examples)


def strong(tree: PyTree) -> PyTree:
    """The arrays of a pytree without weak types: else the first iteration changes the types, and compiles twice."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype) if eqx.is_array(leaf) else leaf, tree)


def is_complex(leaf: PyTree) -> bool:
    """Whether a leaf is a complex number or array."""
    return isinstance(leaf, complex) or jnp.issubdtype(getattr(leaf, "dtype", bool), jnp.complexfloating)


def bind(problem: Problem, x_rest: PyTree, y_rest: PyTree) -> Problem:
    """The same problem over the trainable parts of x and y alone."""
    x_rest, y_rest = (unmarked(without_marks(rest)) for rest in (x_rest, y_rest))
    return problem.over(x_rest, y_rest) if jax.tree.leaves((x_rest, y_rest)) else problem


@contextlib.contextmanager
def told_by(problem: Problem) -> Iterator[None]:
    """Within it, what an oracle raises in a compiled program is raised as it was, not as XLA tells it."""
    try:
        yield
    except Exception:
        error = problem.told()
        if error is None:
            raise
        raise error from error.__cause__


def describe(tree: PyTree) -> str:
    """The shapes of a pytree in one line: `{'w': float32[3], 'b': float32[]}`; of a large one its first array only."""
    leaves = jax.tree.leaves(tree)
    if len(leaves) > _MANY:
        return f"a {type(tree).__name__} of {len(leaves)} arrays, the first {describe(leaves[0])}"
    text = eqx.tree_pformat(tree, short_arrays=True, struct_as_array=True, width=10_000).replace("\n", " ")
    return text if len(text) <= _LONG else text[:_LONG] + "..."

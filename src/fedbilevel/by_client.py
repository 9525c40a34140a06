"""Metrics by client: functions of a row, whose means over one client's outer rows say how that client fares.

They are taken where the rows are. A client's number is a mean over its rows, or a ratio of two such means, with the rows'
weights, so that padding and blocks of rows do not count.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree

from . import norms
from .blocks import summed
from .data import FederatedData
from .errors import InputError, check
from .federation import Index
from .foreign import without_marks
from .metrics import Metric, validation_loss
from .problem import Problem, Rows, blocks_of, describe, own_oracles
from .program import Settled, settled

WORST = {"min": np.min, "max": np.max}
SUFFIX = "_worst"  # of the column of the worst client
SHARES = (False, "mean", True)  # what `share_metrics=` may say

NONE, GIVEN, EMPTY, BAD = 0, 1, 2, 3  # no answer; a number; a ratio of nothing; not finite

RowMetric: TypeAlias = Callable[..., PyTree]  # (x, y, row), or of a batched problem (x, y, examples, weights)
Share: TypeAlias = Literal["mean"] | bool


@dataclasses.dataclass(frozen=True)
class ByClient:
    """A metric by client, and which client is the worst.

    Args:
        function: (x, y, row) -> a real number, or a pair of them. `row` is one of the client's outer rows, as the outer loss
            sees it; the client's number is the mean over its rows. Of a pair (numerator, denominator) it is the ratio of the
            two means: `(hit, positive)`, each 0 or 1, for a true-positive rate. Of a batched problem, or one in PyTorch, it
            is a function of (x, y, examples, weights), as the losses are, which returns the weighted mean or a pair of
            such. It may be `fb.validation_loss`: the client's outer loss.
        worst: "min", where high is good, as with an accuracy, or "max", where low is good, as with a loss. None: "max" for
            `fb.validation_loss`, "min" for all else.
    """

    function: RowMetric
    worst: str | None = None

    def __post_init__(self):
        check(
            callable(self.function) and not isinstance(self.function, ByClient),
            f"ByClient(function) is a function (x, y, row) -> a number; got {self.function!r}.",
        )
        check(
            self.worst in (None, *WORST),
            f"ByClient(worst=...) is 'min', where high is good, or 'max', where low is good; got {self.worst!r}.",
        )

    @property
    def way(self) -> str:
        """Which is the worst client's number: "min" or "max"."""
        return self.worst or ("max" if self.function is validation_loss else "min")


ClientMetrics: TypeAlias = Mapping[str, ByClient | RowMetric]


def checked(metrics: ClientMetrics | None) -> dict[str, ByClient]:
    """The metrics by name.

    Raises:
        InputError: one is no function, or has no name.
    """
    if metrics is None:
        return {}
    check(isinstance(metrics, Mapping), f"client_metrics= maps names to functions of (x, y, row); got {metrics!r}.")
    for name, metric in metrics.items():
        check(isinstance(name, str) and name, f"a client metric's name is a text, not empty; got {name!r}.")
        check(callable(metric) or isinstance(metric, ByClient), _no_function(name, metric))
    return {name: each if isinstance(each, ByClient) else ByClient(each) for name, each in metrics.items()}


def _no_function(name: str, metric: object) -> str:
    return f"the client metric {name!r} is a function of (x, y, row), or fb.ByClient(...); got {metric!r}."


def checked_share(share: object) -> None:
    """Refuse what `share_metrics=` does not know."""
    check(
        isinstance(share, bool) or share == "mean",
        f"share_metrics= is False, 'mean' or True: what of clients' numbers leaves them; got {share!r}.",
    )


@dataclasses.dataclass(frozen=True)
class Column:
    """Stands among a run's metrics for a column that its clients fill.

    Attributes:
        metric: the client metric's name.
        worst: whether it is the worst client's number; else the mean over the clients.
    """

    metric: str
    worst: bool

    def __call__(self, x: PyTree, y: PyTree) -> ArrayLike:
        """Refused: no clients are at hand here."""
        raise InputError(
            f"the client metric {self.metric!r} is measured by the run, which asks the clients: it cannot be called. "
            "Where the data is at hand, result.evaluate(problem, data) computes it."
        )


def columns(metrics: Iterable[str], mean: bool, worst: bool) -> dict[str, Metric]:
    """What the history has of client metrics.

    Args:
        mean, worst: whether the mean over the clients, and the worst client's number, are known where the run is.
    """
    found: dict[str, Metric] = {}
    for name in metrics:
        found |= ({name: Column(name, False)} if mean else {}) | ({name + SUFFIX: Column(name, True)} if worst else {})
    return found


def check_names(metrics: Iterable[str], taken: Iterable[str]) -> None:
    """Refuse names whose columns there are already.

    Args:
        taken: the history's other columns.
    """
    metrics, taken = list(metrics), set(taken)
    for name in metrics:
        for column in (name, name + SUFFIX):
            own = column != name and column in metrics
            check(
                column not in taken and not own,
                f"a client metric cannot be named {name!r}, for the history has a column {column!r} already: name it "
                "otherwise.",
            )


# Ready for a program ----------------------------------------------------------------------------------------------------


class Sums(eqx.Module):
    """What a client has of a metric, with the weights of its rows.

    Attributes:
        numerator, denominator: whose ratio is the client's number.
        weight: what the rows' weights sum to: beside p_i, what the client counts in means over clients.
    """

    numerator: Float[Array, ""]
    denominator: Float[Array, ""]
    weight: Float[Array, ""]


class Kept(eqx.Module):
    """A client's numbers, one for each metric: what it keeps of an evaluation. Or all clients', side by side.

    Attributes:
        value: the number; zero where there is none.
        weight: what the client counts in means over clients, beside p_i.
        status: whether there is a number, and why not.
    """

    value: Float[Array | np.ndarray, "*clients metrics"]
    weight: Float[Array | np.ndarray, "*clients metrics"]
    status: Int[Array | np.ndarray, "*clients metrics"]

    @classmethod
    def nothing(cls, many: int) -> Kept:
        """Of a client that was not asked yet."""
        real = jnp.zeros(many, jnp.result_type(float))
        return cls(real, real, jnp.zeros(many, jnp.int8))


@dataclasses.dataclass(frozen=True)
class Measure:
    """A metric of one client, equal to others that compute the same.

    Attributes:
        name, worst: as the user has them.
        level: whose rows it is taken on.
        function: None: the level's loss, or what is `asked` of a problem of another framework.
    """

    name: str
    worst: str
    level: Literal["inner", "outer"] = "outer"
    function: Settled | None = None
    batched: bool = False
    asked: Callable[..., tuple] | None = None

    def sums(self, problem: Problem, x: PyTree, y: PyTree, rows: Rows) -> Sums:
        """Over a client's rows."""
        real = jnp.result_type(float)
        weight = jnp.sum(rows.weights).astype(real)
        if self.asked is not None:
            found = tuple(each.astype(real) for each in self.asked(problem, x, y, rows))
            return Sums(found[0], found[1] if len(found) > 1 else weight, weight)
        if self.function is None:
            value = (problem.inner_value if self.level == "inner" else problem.outer_value)(x, y, rows)
            return Sums(value.astype(real), weight, weight)
        window = None if own_oracles(type(problem)) else blocks_of(rows)
        if window is None:
            found = self._means(x, y, rows.examples, rows.weights)
        else:
            part = lambda at, examples, weights, *_: self._means(at[0], at[1], examples, weights)
            found = summed(part, (x, y), dataclasses.replace(window, features=None, base=None))
        return Sums(found[0], found[1] if len(found) > 1 else weight, weight)

    def _means(self, x: PyTree, y: PyTree, examples: PyTree, weights: Float[Array, " rows"]) -> tuple[Array, ...]:
        """(The weighted mean), or those of a pair."""
        assert self.function is not None
        real = jnp.result_type(float)
        if self.batched:
            return tuple(jnp.asarray(each).astype(real) for each in _pair(self.function(x, y, examples, weights)))
        function = self.function
        values = _pair(jax.vmap(lambda row: jax.tree.map(jnp.asarray, function(x, y, row)))(examples))
        return tuple(jnp.sum(weights.astype(real) * each.astype(real)) for each in values)


def _pair(value: PyTree) -> tuple:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def numbers(sums: Sequence[Sums]) -> Kept:
    """A client's numbers."""
    each = lambda leaf: jnp.stack([getattr(one, leaf) for one in sums])
    over, under, weight = each("numerator"), each("denominator"), each("weight")
    there = under != 0  # so is what is not a number
    ratio = over / jnp.where(there, under, 1)
    status = jnp.where(there, jnp.where(jnp.isfinite(ratio), GIVEN, BAD), EMPTY).astype(jnp.int8)
    given = status == GIVEN
    return Kept(jnp.where(given, ratio, 0), jnp.where(given, weight, 0), status)


def measures(
    metrics: Mapping[str, ByClient],
    problem: Problem,
    variables: tuple[PyTree, PyTree],
    rests: tuple[PyTree, PyTree],
    data: FederatedData,
) -> tuple[Measure, ...]:
    """Metrics, ready for a program: each is traced once, on one row.

    Args:
        problem: over the trainable parts of x and y alone, or not.
        variables: those parts, (x, y); rests: what else x and y have.

    Raises:
        InputError: a metric takes other arguments, fails, or returns no number.
    """
    return tuple(_measure(name, each, problem, variables, rests, data) for name, each in metrics.items())


def _measure(
    name: str,
    metric: ByClient,
    problem: Problem,
    variables: tuple[PyTree, PyTree],
    rests: tuple[PyTree, PyTree],
    data: FederatedData,
) -> Measure:
    if metric.function is validation_loss:
        return Measure(name, metric.way)
    if problem.on_host:
        return _asked(name, metric, problem, variables, data)
    x_rest, y_rest = map(without_marks, rests)
    given, batched = metric.function, problem.batched
    whole = lambda x, y, *rows: given(eqx.combine(x, x_rest), eqx.combine(y, y_rest), *rows)
    _check_taken(name, given, batched)
    rows = jax.eval_shape(lambda level: level.client(0).all(), data.outer)
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), rows.examples)
    args = (rows.examples, rows.weights) if batched else (one,)
    try:
        with norms.refused():
            function, out = settled(whole, *variables, *args)
    except InputError:
        raise
    except Exception as error:  # whatever the user's function raises
        what = describe(args[0])
        raise InputError(f"the client metric {name!r} failed on {what}: {norms.explained(error)}") from error
    kinds = [jnp.result_type(each) for each in _pair(out) if _is_scalar(each)]
    takes = "a batch" if batched else "one row"
    check(
        len(kinds) == len(_pair(out)) in (1, 2) and not any(jnp.issubdtype(k, jnp.complexfloating) for k in kinds),
        lambda: (
            f"the client metric {name!r} must return one real number for {takes}, or a pair of them (numerator, "
            f"denominator); it returned {describe(out)}."
        ),
    )
    return Measure(name, metric.way, "outer", function, batched)


def _asked(
    name: str, metric: ByClient, problem: Problem, variables: tuple[PyTree, PyTree], data: FederatedData
) -> Measure:
    """Of a problem of another framework: it is called once, on some rows."""
    _check_taken(name, metric.function, True)
    try:
        asked = problem.measuring(metric.function, *variables, data)
    except InputError as error:
        raise InputError(
            f"the client metric {name!r} must return one real number for a batch, or a pair of them (numerator, "
            f"denominator); {error}."
        ) from error.__cause__
    except Exception as error:  # whatever the user's function raises
        raise InputError(f"the client metric {name!r} failed: {norms.explained(error)}") from error
    return Measure(name, metric.way, asked=asked)


def _is_scalar(value: PyTree) -> bool:
    if isinstance(value, jax.ShapeDtypeStruct):
        return value.shape == () and not jnp.issubdtype(value.dtype, jax.dtypes.extended)
    return isinstance(value, bool | int | float)


def _check_taken(name: str, function: RowMetric, batched: bool) -> None:
    rows = ("examples", "weights") if batched else ("row",)
    try:
        inspect.signature(function).bind(None, None, *rows)
    except TypeError:
        called = ", ".join(("x", "y", *rows))
        raise InputError(
            f"the client metric {name!r} is called as fn({called}), and it takes other arguments: "
            f"{inspect.signature(function)}."
        ) from None
    except ValueError:  # a function without a signature
        return


# What was found ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Found:
    """What an evaluation has found, as far as it is known here.

    Attributes:
        mean: (metrics,) over the clients that have a number, by their weights; NaN where none has. None: not known.
        bad: (metrics,) whether some client's is not finite, where the mean is known.
        each: every client's, leaves (clients, metrics). None: not known.
    """

    mean: np.ndarray | None = None
    bad: np.ndarray | None = None
    each: Kept | None = None

    @classmethod
    def of(cls, sums: PyTree, each: Kept | None, weights: np.ndarray | None) -> Found:
        """From what came back.

        Args:
            sums: (metrics, 3) the means of `shared`; None where that did not travel: it then follows from `each`.
            each: every client's numbers, where they are known.
            weights: the clients' p_i; None if they count alike.
        """
        if each is not None:
            each = jax.tree.map(np.asarray, each)
        if each is not None and sums is None:
            p = np.full(len(each.status), 1.0) if weights is None else np.asarray(weights, float)
            share = p[:, None] * each.weight
            sums = np.stack([(share * each.value).sum(0), share.sum(0), (each.status == BAD).sum(0)], axis=1)
        if sums is None:
            return cls()
        over, under, bad = np.asarray(sums, float).T
        mean = np.divide(over, under, out=np.full(len(over), np.nan), where=under > 0)
        return cls(np.where(bad > 0, np.nan, mean), bad > 0, each)


def shared(kept: Kept) -> Float[Array, "metrics 3"]:
    """What a client sends for the mean: its weighted number, its weight, and whether it is not finite."""
    bad = (kept.status == BAD).astype(kept.value.dtype)
    return jnp.stack([kept.weight * kept.value, kept.weight, bad], axis=1)


def at_own_place(kept: Kept, index: Index, clients: int) -> tuple[Array, Array]:
    """A client's numbers in a table of all clients', which the maximum of the replies puts together.

    Who does not answer has status NONE there.
    """
    least = float(jnp.finfo(kept.value.dtype).min)
    values = jnp.full((clients, *kept.value.shape), least, kept.value.dtype).at[index].set(kept.value)
    return values, jnp.zeros((clients, *kept.status.shape), kept.status.dtype).at[index].set(kept.status)

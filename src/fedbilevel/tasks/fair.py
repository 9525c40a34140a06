"""Group weights against a gap in true-positive rates, which is a difference of ratios over all rows.

x (2, 2): a logit for the rows of each group and label. y: logistic regression, weight (columns,) and
bias (). A training row of group g and label l, which p of all training rows are, has the weight
exp(x) / sum exp(x) p, so that rows' mean weight is one whatever x is, and one at the start, x = 0.

    inner:  a row's weight times its cross-entropy, plus PENALTY/2 |y|^2
    outer:  the mean cross-entropy of the validation rows + GAP (t_0 - t_1)^2,

    t_g = (mean of [g, l = 1] sigmoid(logit / SOFT)) / (mean of [g, l = 1]) over all clients

the share of group g's positives that are found, softened so that it has a derivative. It is F of
five means (`Problem.outer_means`): a client may have no positive of a group at all. Clients count by
their rows at both levels. A group with fewer than LEAST positives in validation is refused.

The table is made by default: 20,000 rows at 10 banks, which have 2 to 38 % of the second group and
1,000 to 3,000 rows. Columns are normal with deviation 1 around a place of each group and label
(`PLACES`), so that the gap of any y on new rows is known (`known_gap`): positives of the second group
lie elsewhere, where few rows pull. 40 % of each client's rows validate; 20,000 others are the test.

On the hospitals (`heart-disease`) the groups are men and women; in `fair_age` those up to the median
age of all, and above. Of each hospital's rows of a group and label 30 % are for the test, 45 %
validate: of 50 women who are ill 21 do, and 16 are in the test. Columns are prepared by each
hospital for itself, with an indicator of it behind them. `seed` decides the split.

Metrics: test_accuracy, test_gap (t_0 - t_1 with every row found or not, on the test rows) and
validation_loss (F).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax.tree
from jaxtyping import Array, Float

from ..arrays import held, on_device
from ..data import FederatedData
from ..datasets.heart import COLUMNS, HOSPITALS, find_heart, prepared, tables
from ..errors import InputError, check
from ..keys import generator
from ..metrics import Metric
from ..oracles import around_all
from ..problem import Problem
from ..rows.values import shown
from . import logistic
from .base import Kind, Options, Row, Task
from .closed_form import check_own_clients
from .network import Layer

PENALTY, GAP, SOFT, LEAST = 0.01, 10.0, 0.5, 20
ROWS, CLIENTS, SHARES, POSITIVES, VALIDATION = 20_000, 10, (0.02, 0.38), 0.4, 0.4
PLACES = np.array([[[-1.0, -0.5], [1.0, 0.0]], [[-1.0, -0.5], [0.0, 1.0]]])  # by group and label, of two columns
NOISE = 4  # columns that tell nothing
TEST, OUTER = 0.3, 0.45  # of the hospitals' rows

Table = Mapping[str, np.ndarray | Array]  # "a" (rows, columns), "label" and "group" (rows,) int32
Clients = Sequence[Table] | Mapping[str, Table]
Upper = Float[Array, "2 2"]


class InnerLoss(eqx.Module):
    """Weighted cross-entropy of one example, plus the penalty; numbers are arrays, so that others compile nothing again.

    Attributes:
        shares: (2, 2) of the training rows, by group and label.
        penalty: () of |y|^2 / 2.
    """

    shares: Float[Array, "2 2"]
    penalty: Float[Array, ""]

    def __call__(self, x: Upper, y: Layer, example: Row) -> Float[Array, ""]:
        own = (jnp.arange(2)[:, None] == example["group"]) & (jnp.arange(2)[None] == example["label"])
        raised = jnp.exp(x - jax.lax.stop_gradient(jnp.max(x)))
        weight = jnp.sum(jnp.where(own, raised, 0)) / jnp.sum(raised * self.shares.astype(x.dtype))
        loss = logistic.cross_entropy(logistic.logit(y, example["a"]), example["label"])
        return weight * loss + 0.5 * self.penalty.astype(loss.dtype) * optax.tree.norm(y, squared=True)


def outer_means(x: Upper, y: Layer, example: Row) -> dict[str, Array]:
    """Of one example: its cross-entropy, and by group (2,) whether it is a positive, and how far that is found."""
    logit = logistic.logit(y, example["a"])
    positive = ((jnp.arange(2) == example["group"]) & (example["label"] == 1)).astype(logit.dtype)
    found = jax.nn.sigmoid(logit / SOFT)
    return {
        "loss": logistic.cross_entropy(logit, example["label"]),
        "positives": positive,
        "found": positive * found,
    }


def outer_of(means: Mapping[str, Array]) -> Float[Array, ""]:
    """The mean loss, and GAP times the squared gap."""
    rates = means["found"] / means["positives"]
    return means["loss"] + GAP * (rates[0] - rates[1]) ** 2


def built(
    name: str, dataset: str, levels: tuple[Sequence[Table], Sequence[Table]], test: Table, names: Sequence[str],
    groups: tuple[str, str], options: Options,
) -> Task:  # fmt: skip
    """The task of tables at either level.

    Raises:
        InputError: a group has no rows, or too few positives in validation.
    """
    inner, outer = levels
    problem, x, y = fair_problem(inner, outer, groups)
    data = FederatedData.stack(list(inner), list(outer), weights="rows", names=list(names))
    metrics = test_metrics(test) | {"validation_loss": validation_loss(problem, data)}
    return Task(name, dataset, problem, data, x, y, metrics, options.keys()[3])


def fair_problem(
    inner: Clients, outer: Clients, groups: tuple[str, str] = ("first", "second"),
    penalty: float = PENALTY,
) -> tuple[Problem, Upper, Layer]:  # fmt: skip
    """The problem of rows of one's own, and where x and y start.

    The data is `FederatedData.stack(inner, outer, weights="rows")`: clients count by their rows, at both levels.

    Args:
        inner: of each client its training rows, in a list or by its name: "a" (rows, columns) floats, and "label" and
            "group" (rows,), whole numbers that are 0 or 1.
        outer: its validation rows, alike.
        groups: what to call the two groups in messages.
        penalty: of |y|^2 / 2.

    Returns:
        (the problem; x, zeros (2, 2); y, {"weight": zeros (columns,), "bias": a zero}).

    Raises:
        InputError: rows lack a part, or have parts of unlike lengths or numbers that are not finite; a label or a group
            is neither 0 nor 1, a group has no positives or negatives, or fewer than 20 positives in validation.
    """
    check(
        isinstance(groups, (tuple, list)) and len(groups) == 2 and groups[0] != groups[1],
        f"groups= names two groups, as in ('men', 'women'); got {groups!r}.",
    )
    inner, outer = _rows(inner, "training"), _rows(outer, "validation")
    check(
        len(inner) == len(outer),
        f"there are training rows of {len(inner)} clients and validation rows of {len(outer)}.",
    )
    check_groups(inner, outer, groups)
    every = {part: np.concatenate([rows[part] for rows in inner]) for part in ("group", "label")}
    shares = [[np.mean((every["group"] == g) & (every["label"] == k)) for k in (0, 1)] for g in (0, 1)]
    inner_loss = InnerLoss(held(np.array(shares)), held(np.array(penalty)))
    problem = Problem(inner_loss, outer_means=outer_means, outer_of=outer_of)
    return problem, held(np.zeros((2, 2))), logistic.first(np.shape(inner[0]["a"])[1])


def _rows(level: Clients, what: str) -> list[Table]:
    """Each client's rows, looked at."""
    named = level if isinstance(level, Mapping) else dict(enumerate(level if isinstance(level, (list, tuple)) else []))
    check(named, f"{what} rows are a list of one dict a client, or a dict of them by name; got {shown(level)}.")
    for client, rows in named.items():
        whose, known = f"client {client}'s {what} rows", isinstance(rows, Mapping)
        missing = [part for part in ("a", "label", "group") if not known or part not in rows]
        check(not missing, f"{whose} are a dict of a, label and group; there is no {', '.join(missing)}.")
        lengths = {part: len(rows[part]) for part in ("a", "label", "group")}
        check(len(set(lengths.values())) == 1, f"{whose} have parts of unlike lengths: {lengths}.")
        columns = np.asarray(rows["a"])
        good = columns.ndim == 2 and columns.dtype.kind in "fiub" and bool(np.isfinite(columns).all())
        check(good, f"{whose}: a is (rows, columns) of finite numbers; got {columns.dtype}{list(columns.shape)}.")
    return list(named.values())


def check_groups(inner: Sequence[Table], outer: Sequence[Table], groups: tuple[str, str]) -> None:
    """Refuse groups that are too small.

    Raises:
        InputError: with the group, and how many rows it has; or a label or group that is neither 0 nor 1, with the client.
    """
    for what, level in (("training", inner), ("validation", outer)):
        for client, rows in enumerate(level):
            for part in ("label", "group"):
                odd = [value for value in np.unique(rows[part]).tolist() if value not in (0, 1)]
                if odd:
                    raise InputError(f"client {client}'s {what} rows have the {part} {odd[0]}: it is 0 or 1.")
    together = lambda level, part: np.concatenate([rows[part] for rows in level])
    for g, name in enumerate(groups):
        for what, level in (("training", inner), ("validation", outer)):
            labels = together(level, "label")[together(level, "group") == g]
            check(
                len(labels) > 0 and len(set(labels.tolist())) == 2,
                f"the group {name!r} has {np.sum(labels == 0)} negative and {np.sum(labels == 1)} positive {what} rows, and "
                "needs both: a gap in true-positive rates is between two groups that have positives and negatives.",
            )
        positives = int(np.sum(labels == 1))
        check(
            positives >= LEAST,
            f"the group {name!r} has {positives} positives in validation, and a true-positive rate over fewer than {LEAST} "
            "says too little: validate on more rows, or merge it with another group.",
        )


def test_metrics(test: Table) -> dict[str, Metric]:
    """test_accuracy, and test_gap: the true-positive rate of the first group less that of the second."""
    a, label, group = (on_device(np.asarray(test[part])) for part in ("a", "label", "group"))
    return {
        "test_accuracy": lambda x, y: _scores(y, a, label, group)[0],
        "test_gap": lambda x, y: _scores(y, a, label, group)[1],
    }


@jax.jit
def _scores(y: Layer, a: Array, label: Array, group: Array) -> tuple[Float[Array, ""], Float[Array, ""]]:
    logits = a @ y["weight"] + y["bias"]
    found = (logits > 0) == (label == 1)
    share = lambda of: jnp.sum((found & of).astype(logits.dtype)) / jnp.sum(of.astype(logits.dtype))
    rates = [share((label == 1) & (group == g)) for g in (0, 1)]
    return share(label >= 0), rates[0] - rates[1]


def validation_loss(problem: Problem, data: FederatedData) -> Metric:
    """F over all clients' validation rows."""
    value = jax.jit(lambda x, y, data: _pooled(problem, x, y, data))
    return lambda x, y: value(x, y, data)


def _pooled(problem: Problem, x: Upper, y: Layer, data: FederatedData) -> Float[Array, ""]:
    return problem.value_of(around_all(problem, data, x, y).around)


# The table that is made ---------------------------------------------------------------------------------------------------


def build(options: Options) -> Task:
    if options.dataset == "heart-disease":
        return hospitals("fair", options, "sex")
    check_own_clients("fair", options)
    place, division, _, _ = options.keys()
    clients, rng = options.clients or CLIENTS, generator(place)
    counts = np.linspace(0.5, 1.5, clients) / clients * ROWS
    shares = np.linspace(*SHARES, clients)
    made = [draw(rng, round(count), share) for count, share in zip(rng.permutation(counts), shares, strict=True)]
    split = generator(division)
    inner, outer = [], []
    for table in made:
        order = split.permutation(len(table["label"]))
        many = round(VALIDATION * len(order))
        outer.append(_taken(table, order[:many]))
        inner.append(_taken(table, order[many:]))
    test = draw(rng, ROWS, float(np.mean(SHARES)))
    names = [f"bank {i}" for i in range(clients)]
    return built("fair", "synthetic", (inner, outer), test, names, ("first", "second"), options)


def draw(rng: np.random.Generator, count: int, share: float) -> dict[str, np.ndarray]:
    """So many rows, of which about a share is of the second group."""
    group = (rng.random(count) < share).astype(np.int32)
    label = (rng.random(count) < POSITIVES).astype(np.int32)
    told = PLACES[group, label]
    a = rng.normal(size=(count, told.shape[1] + NOISE))
    a[:, : told.shape[1]] += told
    return {"a": a.astype(np.float32), "label": label, "group": group}


def known_gap(y: Layer) -> float:
    """The gap of y on new rows of the made table, exactly: the logit of a row is normal, given its group and label."""
    w, b = np.asarray(y["weight"], float), float(y["bias"])
    length = float(np.linalg.norm(w))
    rate = lambda place: 0.5 * (1 + math.erf((place @ w[:2] + b) / (math.sqrt(2) * length)))
    return rate(PLACES[0, 1]) - rate(PLACES[1, 1])


def _taken(table: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    return {part: values[rows] for part, values in table.items()}


# The hospitals ------------------------------------------------------------------------------------------------------------


def hospitals(name: str, options: Options, by: str) -> Task:
    """The task on the hospitals' rows, with groups by "sex" or by "age"."""
    check(
        options.partition == "iid" and options.alpha is None and options.clients in (None, len(HOSPITALS)),
        f"{name} has {len(HOSPITALS)} hospitals with their own rows: leave --partition, --alpha and --clients out.",
    )
    every, place = tables(find_heart(options.data_dir)), COLUMNS.index(by)
    middle = np.median(np.concatenate([table[:, place] for table in every]))
    of = (lambda column: column == 0) if by == "sex" else (lambda column: column > middle)
    groups = ("men", "women") if by == "sex" else (f"up to {middle:g} years", f"above {middle:g} years")
    rng, parts = generator(options.keys()[1]), ([], [], [])
    for site, table in enumerate(every):
        label, group = (table[:, -1] > 0).astype(np.int32), of(table[:, place]).astype(np.int32)
        chosen = thirds(rng, 2 * group + label)
        known = np.concatenate(chosen[:2])
        a, a_test = prepared(table[known], table[chosen[2]])
        columns = (a[: len(chosen[0])], a[len(chosen[0]) :], a_test)
        one = np.zeros((1, len(HOSPITALS)), np.float32)
        one[0, site] = 1
        for part, rows, own in zip(parts, chosen, columns, strict=True):
            wide = np.concatenate([own, np.repeat(one, len(rows), 0)], axis=1)
            part.append({"a": wide, "label": label[rows], "group": group[rows]})
    inner, outer, test = parts
    pooled = {part: np.concatenate([rows[part] for rows in test]) for part in ("a", "label", "group")}
    return built(name, "heart-disease", (inner, outer), pooled, HOSPITALS, groups, options)


def thirds(rng: np.random.Generator, cell: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows for training, validation and test: of each cell about the same share."""
    parts: tuple[list, list, list] = ([], [], [])
    for each in np.unique(cell):
        rows = rng.permutation(np.flatnonzero(cell == each))
        test, outer = round(TEST * len(rows)), round(OUTER * len(rows))
        cut = np.split(rows, [len(rows) - test - outer, len(rows) - test])
        for part, own in zip(parts, cut, strict=True):
            part.append(own)
    return tuple(np.sort(np.concatenate(part)) for part in parts)  # pyright: ignore[reportReturnType]


fair = Kind(
    "fair",
    "x: a weight for each group and label, y: logistic regression; against a gap in true-positive rates",
    ("synthetic", "heart-disease"),
    build,
)
fair_age = Kind(
    "fair-age",
    "fair on the hospitals, with patients above the median age as the second group",
    ("heart-disease",),
    lambda options: hospitals("fair-age", options, "age"),
)

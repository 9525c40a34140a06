"""Ways to deal the rows of one data set to clients: host-side, seeded, every row placed exactly once.

| name | a client's labels | a client's rows | source |
|---|---|---|---|
| iid | like the whole | equal | |
| shards | few: `per_client` runs of the sorted labels | equal | McMahan et al., AISTATS 2017, arXiv:1602.05629 |
| dirichlet | skewed, more so for a small `alpha` | unequal | Yurochkin et al., ICML 2019, arXiv:1905.12022 |
| quantity | like the whole | skewed, more so for a small `alpha` | Li et al., ICDE 2022, arXiv:2102.02079 |

Each returns one ascending int64 array of row indices per client. `imbalanced` comes before them: it thins out classes.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import SupportsIndex

import numpy as np
from jaxtyping import Array, Key
from numpy.typing import ArrayLike

from .errors import InputError, check, unknown_name
from .keys import generator

Parts = list[np.ndarray]


def iid(rows: int, clients: int, key: Key[Array, ""]) -> Parts:
    """Deal `rows` rows at random; the clients' sizes differ by at most one.

    Raises:
        InputError: fewer than one client, or fewer rows than clients.
    """
    rows, clients = _sizes(rows, clients)
    return _ascending(generator(key).permutation(rows), _even(rows, clients))


def shards(labels: ArrayLike, clients: int, key: Key[Array, ""], per_client: int = 2) -> Parts:
    """Sort the rows by label, cut them into shards, and deal every client `per_client` of them at random.

    Args:
        labels: (rows,) integers; rows of one label are put in random order before the cut.
        clients: how many clients.
        key: decides the order within a label, and who gets which shard.
        per_client: how many shards a client gets; shards differ by at most one row. Where no label has fewer rows
            than a shard, a shard holds at most two labels.

    Raises:
        InputError: labels that are not one-dimensional integers, clients or `per_client` below one, or fewer rows
            than shards.
    """
    labels = _labels(labels)
    per_client = _whole("per_client", per_client)
    rows, clients = _sizes(len(labels), clients, per_client, "one for each of its shards")
    rng = generator(key)
    order = rng.permutation(rows)
    order = order[np.argsort(labels[order], kind="stable")]
    pieces = clients * per_client
    owner = np.empty(pieces, np.int64)
    owner[rng.permutation(pieces)] = np.repeat(np.arange(clients), per_client)
    return _ascending(*_together(order, np.repeat(owner, _even(rows, pieces)), clients))


def dirichlet(labels: ArrayLike, clients: int, key: Key[Array, ""], alpha: float = 0.5, min_rows: int = 2) -> Parts:
    """Deal the rows of each label in proportions drawn from a symmetric Dirichlet distribution over the clients.

    Args:
        labels: (rows,) integers.
        clients: how many clients.
        key: decides the proportions, and which rows go where.
        alpha: concentration, positive: near zero each label goes to one client, infinity deals each label evenly.
        min_rows: what every client has in the end: those short are topped up with random rows of the largest clients
            (2 by default, so that each can still be split into the two levels).

    Raises:
        InputError: labels that are not one-dimensional integers, clients or `min_rows` below one, `alpha` not
            positive, or fewer than clients * min_rows rows.
    """
    labels = _labels(labels)
    _, clients = _sizes(len(labels), clients, _whole("min_rows", min_rows), "min_rows=")
    alpha, rng = _concentration(alpha), generator(key)
    orders, owners = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for label in np.unique(labels):
        orders.append(rng.permutation(np.flatnonzero(labels == label)))
        owners.append(np.repeat(np.arange(clients), _dealt(len(orders[-1]), clients, alpha, rng)))
    flat, counts = _together(np.concatenate(orders), np.concatenate(owners), clients)
    for part in _parts(flat, counts):
        rng.shuffle(part)
    return _ascending(*_top_up(flat, counts, min_rows))


def by_quantity(rows: int, clients: int, key: Key[Array, ""], alpha: float = 0.5, min_rows: int = 2) -> Parts:
    """Deal rows at random, as many to each client as one draw from a symmetric Dirichlet distribution says.

    Args:
        rows: how many rows there are.
        clients, key, alpha, min_rows: as for `dirichlet`.

    Raises:
        InputError: clients or `min_rows` below one, `alpha` not positive, or fewer than clients * min_rows rows.
    """
    rows, clients = _sizes(rows, clients, _whole("min_rows", min_rows), "min_rows=")
    alpha, rng = _concentration(alpha), generator(key)
    order = rng.permutation(rows)
    return _ascending(*_top_up(order, _dealt(rows, clients, alpha, rng), min_rows))


PARTITIONS: dict[str, Callable[..., Parts]] = {
    "iid": iid,
    "shards": shards,
    "dirichlet": dirichlet,
    "quantity": by_quantity,
}


def partition(name: str, labels: ArrayLike, clients: int, key: Key[Array, ""], **options: float) -> Parts:
    """The partition called `name` of the rows that `labels` (rows, ...) belong to, with that partition's own options.

    "iid" and "quantity" take any targets, for they only count them; the others need integer labels.

    Raises:
        InputError: an unknown name or option, or what the partition itself refuses.
    """
    if name not in PARTITIONS:
        raise unknown_name("partition", name, PARTITIONS)
    function = PARTITIONS[name]
    first, _, _, *known = inspect.signature(function).parameters
    for option in options:
        check(known, f"the partition {name!r} takes no options: drop {option}=.")
        if option not in known:
            raise unknown_name(f"option of the partition {name!r} called", option, known)
    if first == "rows":
        shape = np.shape(labels)
        check(shape, f"a partition needs one label for each row; got the single value {labels!r}.")
        return function(shape[0], clients, key, **options)
    return function(labels, clients, key, **options)


def imbalanced(labels: ArrayLike, ratio: float, key: Key[Array, ""], largest: int | None = None) -> np.ndarray:
    """The rows to keep of a data set whose classes are to shrink geometrically, from `largest` rows to `ratio` times that.

    Of the c-th of C labels, c = 0, 1, ..., in ascending order, floor(largest * ratio^(c / (C - 1))) + 1 rows are kept, or
    all where there are fewer: no label vanishes. (With 6,000 and 0.01 that leaves 14,818 rows of MNIST, as in the public
    code of FedNest.)

    Args:
        labels: (rows,) integers.
        ratio: in (0, 1].
        key: decides which rows of a label are kept.
        largest: None for the rows of the most frequent label.

    Returns:
        Ascending int64 row indices.

    Raises:
        InputError: labels that are not one-dimensional integers, `ratio` not in (0, 1], or `largest` below one.
    """
    labels = _labels(labels)
    number = isinstance(ratio, (int, float, np.floating, np.integer)) and not isinstance(ratio, bool)
    check(number and 0 < ratio <= 1, f"ratio= must be a number above 0 and at most 1; got {ratio!r}.")
    names, counts = np.unique(labels, return_counts=True)
    most = counts.max(initial=1) if largest is None else _whole("largest", largest)
    limits = most * float(ratio) ** (np.arange(len(names)) / max(len(names) - 1, 1))
    keep = np.floor(np.round(limits, 6)).astype(np.int64) + 1  # rounded: 100 * 0.29 is a little less than 29
    rng = generator(key)
    kept = [rng.permutation(np.flatnonzero(labels == name))[:count] for name, count in zip(names, keep, strict=True)]
    return np.sort(np.concatenate([np.empty(0, np.int64), *kept]))


# Clients' rows lie side by side, client after client, with the number of each one's: a million clients are no loop. --


def _even(rows: int, clients: int) -> np.ndarray:
    """(clients,) as many rows each, the first ones one more where it does not come out even."""
    return rows // clients + (np.arange(clients) < rows % clients)


def _dealt(rows: int, clients: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    """(clients,) how many rows each gets in Dirichlet proportions; the cumulative shares are rounded, so none is lost."""
    shares = np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1]
    return np.diff(np.rint(shares * rows).astype(np.int64), prepend=0, append=rows)


def _together(rows: np.ndarray, owner: np.ndarray, clients: int) -> tuple[np.ndarray, np.ndarray]:
    """(Rows client after client, in their order; how many each has), from whose each of them is."""
    return rows[np.argsort(owner, kind="stable")], np.bincount(owner, minlength=clients)


def _top_up(rows: np.ndarray, counts: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Move rows, last first, from whoever has most (the first of these) to those with fewer than `least`, in turn.

    Somebody has more while anybody has fewer, because there are at least clients * least rows.

    Args:
        rows: of the clients, in random order.
    """
    missing = np.maximum(least - counts, 0)
    givers, places = _givers(counts, least, int(missing.sum()))
    starts, owner = np.cumsum(counts) - counts, np.repeat(np.arange(len(counts)), counts)
    owner[starts[givers] + places] = np.repeat(np.arange(len(counts)), missing)
    return _together(rows, owner, len(counts))


def _givers(counts: np.ndarray, least: int, total: int) -> tuple[np.ndarray, np.ndarray]:
    """(Who gives the rows away, which of its own), in this order: all who have most one each, then all who then do."""
    order = np.argsort(-counts, kind="stable")
    sizes, ends = np.unique(-counts[order], return_counts=True)
    givers, places = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for many, size, below in zip(np.cumsum(ends), -sizes, [*-sizes[1:], least], strict=True):
        turns = min(size - max(below, least), -(-total // many)) if total else 0
        if turns <= 0:
            break
        own = np.tile(np.sort(order[:many]), turns)[:total]
        givers.append(own)
        places.append(np.repeat(size - 1 - np.arange(turns), many)[:total])
        total -= len(own)
    return np.concatenate(givers), np.concatenate(places)


def _ascending(rows: np.ndarray, counts: np.ndarray) -> Parts:
    owner = np.repeat(np.arange(len(counts)), counts)
    return _parts(rows[np.lexsort((rows, owner))].astype(np.int64), counts)


def _parts(rows: np.ndarray, counts: np.ndarray) -> Parts:
    return np.split(rows, np.cumsum(counts)[:-1])


def _labels(labels: ArrayLike) -> np.ndarray:
    try:
        labels = np.asarray(labels)
    except ValueError as error:  # numpy's words for lists of unequal lengths
        raise InputError("labels must be one integer for each row; got lists of unequal lengths.") from error
    check(
        labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer),
        f"labels must be one integer for each row; got {labels.dtype} of shape {labels.shape} "
        "(without class labels use the partition 'iid' or 'quantity').",
    )
    return labels


def _whole(name: str, value: SupportsIndex, least: int = 1) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    check(
        number is not None and number >= least and not isinstance(value, bool),
        f"{name}= must be a whole number, {least} or more; got {value!r}.",
    )
    return int(value)


def _sizes(rows: SupportsIndex, clients: SupportsIndex, least: int = 1, why: str = "") -> tuple[int, int]:
    """`rows` and `clients` as ints, once it is certain that every client can get `least` rows."""
    rows, clients = _whole("rows", rows, 0), _whole("clients", clients)
    check(
        rows >= clients * least,
        f"{rows} rows are too few for {clients} clients, each of which needs at least {least}"
        f"{f' ({why})' if why else ''}: use fewer clients or more rows.",
    )
    return rows, clients


def _concentration(alpha: float) -> float:
    number = isinstance(alpha, (int, float, np.floating, np.integer)) and not isinstance(alpha, bool)
    check(number and alpha > 0, f"alpha= must be a positive number; got {alpha!r}.")
    return min(float(alpha), 1e12)  # even to any precision that rows can show; numpy's draw overflows near 1e308

"""Which clients there are: a list of their rows, or a mapping from their names to their rows."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import overload

import jax
import numpy as np
from jaxtyping import PyTree

from ..errors import InputError, check
from ..foreign import is_data_set, library_of, native
from .one import is_table
from .values import conversion, shown

Names = Sequence[str]
NamesLike = Iterable[str | int] | None  # as they are passed
Clients = Mapping[str | int, PyTree] | Iterable[PyTree]


class Numbered(Sequence[str]):
    """client 0, client 1, ...: written out only when one is asked for."""

    def __init__(self, count: int):
        self._all = range(count)

    def __len__(self) -> int:
        return len(self._all)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [f"client {number}" for number in self._all[index]]
        return f"client {self._all[index]}"


def levels(inner: Clients, outer: Clients, names: NamesLike = None) -> tuple[list[PyTree], list[PyTree], Names]:
    """(The clients' rows at either level, what they are called).

    Raises:
        InputError: no or different clients at the levels, or names that do not tell them apart.
    """
    named = [isinstance(level, Mapping) for level in (inner, outer)]
    check(
        named[0] == named[1],
        f"{'inner' if named[0] else 'outer'}= has clients by name and {'outer' if named[0] else 'inner'}= has not: "
        "pass both as mappings {client: rows}, or both as lists.",
    )
    one, other = listed(inner, "inner"), listed(outer, "outer")
    if isinstance(inner, Mapping) and isinstance(outer, Mapping):
        for mine, theirs, here, there in ((inner, outer, "inner", "outer"), (outer, inner, "outer", "inner")):
            alone = [key for key in mine if key not in theirs]
            check(not alone, f"{there}= has no rows of {shown(alone[0] if alone else '')}, which {here}= has.")
        other = [outer[key] for key in inner]
    check(len(one) > 0, "there are no clients: pass one pytree of arrays per client.")
    check(
        len(one) == len(other),
        f"every client needs rows at both levels; got {len(one)} inner and {len(other)} outer data sets.",
    )
    return one, other, called(inner, names, len(one))


def listed(clients: Clients, what: str) -> list[PyTree]:
    """Each client's rows, in order.

    Raises:
        InputError: it is one data set, or could be.
    """
    clients = clients if is_data_set(clients) else native(clients) if library_of(clients) else clients
    check(
        not is_data_set(clients),
        lambda: f"{what}= is one {type(clients).__name__}: pass a list with one for each client, or {{name: rows}}.",
    )
    hint = conversion(clients)
    check(hint is None, f"{what}= is a {type(clients).__name__}: {hint}, one for each client in a list.")
    if isinstance(clients, Mapping):
        plain = (dict, tuple)
        bare = [key for key, rows in clients.items() if type(rows) not in plain and not _data_set(rows)]
        if bare:
            raise InputError(
                f"{what}= is a mapping with {_kind(clients[bare[0]])} at {shown(bare[0])}, which may be ONE data set or "
                f"clients by name: pass [rows] for one client with these arrays, or list(rows.values()) with "
                "names=list(rows) for a client a key."
            )
        return list(clients.values())
    if isinstance(clients, (np.ndarray, jax.Array)) and not isinstance(clients, np.ma.MaskedArray):
        array = np.asarray(clients)
        check(
            array.ndim > 1 or array.dtype == object,
            f"{what}= is one array of shape {array.shape}: pass a list of each client's rows, or an array whose first axis "
            "is the clients and whose second is their rows.",
        )
        return list(array)
    one = is_table(clients) or isinstance(clients, (str, bytes)) or not isinstance(clients, Iterable)
    check(
        not one,
        f"{what}= is {_kind(clients)}: pass a list with one pytree of arrays for each client, or {{name: rows}}.",
    )
    clients = list(clients)
    pairs = [one for one in clients if isinstance(one, tuple) and len(one) == 2 and _is_name(one[0])]
    check(not pairs, f"{what}= has pairs of a name and rows: pass them as a mapping, dict({what}).")
    return clients


def called(clients: Clients, names: NamesLike, count: int) -> Names:
    """What the clients are called: by the keys of a mapping, `names`, or their numbers.

    Raises:
        InputError: `names` are not one for each client, or occur twice.
    """
    if isinstance(clients, Mapping):
        check(names is None, "names= is for clients in a list: the mapping's keys name them already.")
        return _distinct([key if isinstance(key, str) else f"client {key}" for key in clients])
    if names is None:
        return Numbered(count)
    ordered = isinstance(names, Iterable) and not isinstance(names, (str, bytes, Mapping, Set))
    listed = list(names) if ordered else []
    good = ordered and all(isinstance(name, (str, int, np.integer)) for name in listed)
    check(good, f"names= is a list with a name for each client; got {'' if good else shown(listed or names)}.")
    check(len(listed) == count, f"names= takes a name for each of the {count} clients; got {len(listed)}.")
    return _distinct([name if isinstance(name, str) else f"client {name}" for name in listed])


def _distinct(names: list[str]) -> Names:
    twice = [name for name, times in collections.Counter(names).items() if times > 1]
    check(not twice, f"two clients are called {shown(twice[0] if twice else '')}: give each a name of its own.")
    check(all(name.strip() for name in names), "a client's name is empty: give each a name of its own.")
    return tuple(map(str, names))


def _is_name(value: PyTree) -> bool:
    return isinstance(value, (str, int, np.integer)) and not isinstance(value, bool)


def _data_set(rows: PyTree) -> bool:
    """Whether it can only be a whole data set: a mapping, tuple, table or module, no array and no list of anything."""
    if isinstance(rows, Mapping) or (is_table(rows) and rows.ndim > 1) or is_data_set(rows):
        return True
    return rows is not None and not isinstance(rows, list) and not jax.tree_util.all_leaves([rows])


def _kind(value: PyTree) -> str:
    simple = value is None or isinstance(value, (str, bytes, bool, int, float, complex))
    return shown(value) if simple else f"a {type(value).__name__}"

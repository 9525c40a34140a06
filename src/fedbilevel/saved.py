"""A folder that keeps what a run left: numbers in numpy's format, all else in JSON; nothing in it is run when it is read.

result.json     what the run was, where it ended, and of each array its place, shape and dtype
variables.npz   x, y and clients_y, one array a leaf, as `x['weight']`
best.npz        the best x and y, where they were kept
history.csv     the rows of the history
"""

from __future__ import annotations

import csv
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from .arrays import Concrete, numbers, on_device, write_named
from .errors import InputError, check
from .foreign import as_given
from .given import JSON
from .variables import trainable

HEAD, VARIABLES, BEST, HISTORY = "result.json", "variables.npz", "best.npz", "history.csv"
FORMAT = 1
_ALWAYS = {  # what every head has
    "format", "columns", "texts", "arrays", "iteration", "stopped", "compiled", "config", "protocol", "clients",
}  # fmt: skip
T = TypeVar("T")
_UNREADABLE = (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error)


class Leaf(NamedTuple):
    """One array of a variable.

    Attributes:
        name: as a user writes it, "x['weight']"; so it is called in the file.
        path: the same without the variable's name and quotes, "weight"; "" of a variable that is one array.
    """

    name: str
    path: str
    value: np.ndarray


def leaves(tree: PyTree, name: str) -> list[Leaf]:
    """The arrays of a pytree."""
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    short = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    return [
        Leaf(
            name + jax.tree_util.keystr(path),
            short(path),
            numbers(leaf) if isinstance(leaf, Concrete) else np.asarray(leaf),
        )
        for path, leaf in found
        if hasattr(leaf, "dtype") and not getattr(leaf.dtype, "hasobject", False)
    ]


def write(
    folder: str | os.PathLike[str],
    head: Mapping[str, JSON],
    variables: Mapping[str, PyTree],
    best: Mapping[str, PyTree] | None,
    rows: Sequence[Mapping[str, JSON]] | None,
    columns: Sequence[str],
) -> None:
    """Write a folder; `result.json` comes last, so that a folder that has it is whole.

    Args:
        rows: of the history, None where nothing was taken; or None, where `history.csv` is there with these columns.

    Raises:
        InputError: the folder's place is a file, or cannot be written.
    """
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        (place / HEAD).unlink(missing_ok=True)
        told: dict[str, JSON] = {}
        for file, trees in ((VARIABLES, variables), (BEST, best)):
            if trees is None:
                (place / file).unlink(missing_ok=True)
                continue
            found = [leaf for name, tree in trees.items() for leaf in leaves(tree, name)]
            _in_place(
                place / file, lambda path, found=found: write_named(path, {leaf.name: leaf.value for leaf in found})
            )
            told[file] = {leaf.name: [leaf.path, str(leaf.value.dtype), list(leaf.value.shape)] for leaf in found}
        if rows is not None:
            _in_place(place / HISTORY, lambda path: write_rows(path, rows, columns))
        text = json.dumps({"format": FORMAT, **head, "columns": list(columns), "arrays": told}, indent=2) + "\n"
        _in_place(place / HEAD, lambda path: path.write_text(text))
    except OSError as error:
        raise InputError(f"the result cannot be saved in {place}: {error}. Name another folder.") from error


def _in_place(path: Path, writing: Callable[[Path], object]) -> None:
    beside = path.with_name(path.name + ".new")
    writing(beside)
    os.replace(beside, path)


def write_rows(path: str | os.PathLike[str], rows: Sequence[Mapping[str, JSON]], columns: Sequence[str]) -> None:
    """Rows as a CSV file; a place where nothing was taken is empty."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([["" if row.get(name) is None else row[name] for name in columns] for row in rows])


class Read(NamedTuple):
    """What a folder holds: of each file its arrays by name, each with its path."""

    head: dict
    arrays: dict[str, dict[str, Leaf]]
    rows: list[dict[str, float | str | None]]


def read(folder: str | os.PathLike[str]) -> Read:
    """What a folder holds.

    Raises:
        InputError: there is no result in it, a file is missing, cut or none of ours, or it is of a later format.
    """
    named = isinstance(folder, (str, os.PathLike))
    check(named, f"load_result takes a folder that result.save(...) wrote; got {folder!r}.")
    place = Path(folder)
    check(place.is_dir(), f"there is no folder {place}: name one that result.save(...) wrote.")
    check((place / HEAD).is_file(), f"there is no {HEAD} in {place}: name a folder that result.save(...) wrote.")
    head = _readable(place / HEAD, lambda path: json.loads(path.read_text()))
    check(
        isinstance(head, dict) and head.keys() >= _ALWAYS and isinstance(head["format"], int),
        f"{place / HEAD} is no result of fedbilevel: name a folder that result.save(...) wrote.",
    )
    check(
        head["format"] <= FORMAT,
        f"{place / HEAD} is of format {head['format']}, and this version of fedbilevel reads up to {FORMAT}: update it.",
    )
    arrays = {file: _arrays(place / file, told) for file, told in head["arrays"].items()}
    rows = _readable(place / HISTORY, lambda path: _rows(path, list(head["columns"]), head["texts"]))
    return Read(head, arrays, rows)


def _readable(path: Path, reading: Callable[[Path], T]) -> T:
    check(path.is_file(), f"{path} is missing: the folder is not whole.")
    try:
        return reading(path)
    except _UNREADABLE as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}): it is cut, or none of ours.") from error


def _arrays(path: Path, told: Mapping[str, Sequence]) -> dict[str, Leaf]:
    def loaded(path: Path) -> dict[str, Leaf]:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: Leaf(name, str(told[name][0]), file[name]) for name in file.files}

    found = _readable(path, loaded)
    for name, (_, dtype, shape) in told.items():
        check(name in found, f"{path} has no array {name}, which {HEAD} says it has: the folder is not whole.")
        value = found[name].value
        check(
            [str(value.dtype), list(value.shape)] == [dtype, shape],
            f"{path}: {name} is {value.dtype}{list(value.shape)}, and {HEAD} says {dtype}{shape}: the folder is not whole.",
        )
    return found


def _rows(path: Path, columns: Sequence[str], texts: Sequence[str]) -> list[dict[str, float | str | None]]:
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    if not lines or lines[0] != list(columns):
        raise ValueError(f"its columns are {lines[0] if lines else []}")
    if any(len(line) != len(columns) for line in lines):
        raise ValueError("a row has another number of columns")
    number = lambda text: int(text) if text.lstrip("-").isdecimal() else float(text)
    value = lambda name, text: None if text == "" else text if name in texts else number(text)
    return [{name: value(name, text) for name, text in zip(columns, line, strict=True)} for line in lines[1:]]


def by_path(found: Mapping[str, Leaf], name: str) -> PyTree:
    """A variable without a template: its arrays by path, or the one array that it is; None where it has none."""
    own = _of(found, name)
    if list(own) == [name] and own[name].path == "":
        return on_device(own[name].value)
    return {leaf.path: on_device(leaf.value) for leaf in own.values()} or None


def like(found: Mapping[str, Leaf], name: str, template: PyTree, lead: tuple[int, ...] = ()) -> PyTree:
    """A variable structured like a template, with the arrays that were saved.

    Args:
        lead: the axes that each array has in front of the template's.

    Raises:
        InputError: a leaf is missing, or is of another shape or dtype than the template's.
    """
    inner, rest = trainable(template, f"like's {name}")
    paths, structure = jax.tree_util.tree_flatten_with_path(inner)
    own, values = _of(found, name), []
    for path, leaf in paths:
        where = name + jax.tree_util.keystr(path)
        check(where in own, f"the saved {name} has no {where}, and like= has one: it has {_few(own)}.")
        value, wanted = own.pop(where).value, (str(leaf.dtype), [*lead, *leaf.shape])
        got = str(value.dtype), list(value.shape)
        check(
            got == wanted,
            f"the saved {where} is {got[0]}{got[1]}, and that of like= is {wanted[0]}{wanted[1]}: pass one like the "
            "run's.",
        )
        values.append(on_device(value))
    others = {name + jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(rest)[0]}
    left = {where: leaf for where, leaf in own.items() if where not in others}
    check(not left, f"the saved {name} has {_few(left)}, and like= has none of that: pass one like the run's.")
    filled = eqx.combine(jax.tree.unflatten(structure, values), rest)
    return as_given(filled, rest)


def _of(found: Mapping[str, Leaf], name: str) -> dict[str, Leaf]:
    """The arrays of one variable, whose names begin with its own: x['a'], x.b, x[0], x."""
    return {where: leaf for where, leaf in found.items() if where == name or where.startswith((f"{name}[", f"{name}."))}


def _few(found: Mapping[str, Leaf]) -> str:
    names = list(found)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") or "nothing"

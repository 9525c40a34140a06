"""What a data set is: its rows in memory, the facts that tasks go by, and where it is read from."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..errors import check
from .shuffle import halves, stratified

Folder = str | os.PathLike[str] | None
KINDS = ("images", "classes", "numbers", "silos")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a task goes by, known before the rows are read.

    Attributes:
        kind: what a row is: "images" with a class each, features with "classes", features with "numbers" to predict, or
            "silos": features with classes that are somebody's own, and dealt to nobody else.
        clients: how many clients share it, unless the user says.
        hidden: the width of a network's hidden layer; None where a network would be too much for it.
        rarest: where classes are to be unequal, rows of the rarest class for each of the commonest.
        most: where classes are to be unequal, rows of the commonest class; None for all there are.
    """

    kind: str = "classes"
    clients: int = 10
    hidden: int | None = None
    rarest: float = 0.1
    most: int | None = None

    def __post_init__(self) -> None:
        check(self.kind in KINDS, f"a data set is of one of the kinds {', '.join(KINDS)}; got {self.kind!r}.")


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """One data set, held in memory as numpy arrays.

    Attributes:
        name: what it is called.
        x_train, x_test: (rows, features) float32, normalised as its source says; images are flattened row by row.
        y_train, y_test: (rows,) int32 labels in [0, classes), or float32 targets.
        classes: how many classes there are; None for a regression.
        facts: what tasks go by.
        sites_train, sites_test: (rows,) int32, of silos: whose each row is; None where rows are pooled.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: int | None
    facts: Facts = Facts()
    sites_train: np.ndarray | None = None
    sites_test: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set that is not read yet; calling it with a folder, or None, reads it.

    Attributes:
        name: what it is called.
        summary: its rows (training / test), features and targets, and how they are normalised.
        facts: what tasks go by.
        read: folder -> Dataset; one that comes with a package does not use the folder.
    """

    name: str
    summary: str
    facts: Facts
    read: Callable[[Folder], Dataset]

    def __call__(self, data_dir: Folder = None) -> Dataset:
        """The data set, with these facts."""
        return dataclasses.replace(self.read(data_dir), facts=self.facts)


def places(name: str, data_dir: Folder) -> list[Path]:
    """Where the files of a data set are looked for, in this order: NAME in `data_dir`, `data_dir`, the user's cache.

    FEDBILEVEL_DATA stands in for a `data_dir` that is not given; only without one does the cache count.
    """
    given = data_dir if data_dir is not None else os.environ.get("FEDBILEVEL_DATA") or None
    looked = [] if given is None else [Path(given).expanduser() / name, Path(given).expanduser()]
    if data_dir is None:
        looked.append(Path(os.path.expanduser("~/.cache/fedbilevel")) / name)
    return looked


def split(
    name: str, features: np.ndarray, targets: np.ndarray, seed: int, classes: int | None, facts: Facts,
    axis: int | None = 0,
) -> Dataset:  # fmt: skip
    """A data set of pooled rows: a quarter is for the test (of each class), and both parts are standardised.

    Args:
        features, targets: (rows, features) and (rows,).
        classes: how many there are; None where targets are numbers, which are standardised too.
        axis: 0 for columns on their own, None for all entries alike.
    """
    train, test = halves(len(targets), seed) if classes is None else stratified(targets, seed)
    y_train, y_test = targets[train], targets[test]
    x_train, x_test = _standardised(features[train], features[test], axis)
    if classes is None:
        y_train, y_test = _standardised(y_train, y_test, 0)
        return Dataset(name, x_train, y_train, x_test, y_test, None, facts)
    y_train, y_test = y_train.astype(np.int32), y_test.astype(np.int32)
    return Dataset(name, x_train, y_train, x_test, y_test, classes, facts)


def _standardised(train: np.ndarray, test: np.ndarray, axis: int | None) -> tuple[np.ndarray, np.ndarray]:
    mean, deviation = train.mean(axis), train.std(axis)  # of the training rows alone: the test rows stay unseen
    return ((train - mean) / deviation).astype(np.float32), ((test - mean) / deviation).astype(np.float32)

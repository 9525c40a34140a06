"""Heart disease in four hospitals, each a client of its own.

The UCI data of Janosi, Steinbrunn, Pfisterer and Detrano (1988, CC BY 4.0), which nobody but the user
downloads.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import InputError, check
from .base import Dataset, Facts, Folder, Source, places
from .shuffle import stratified

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
COLUMNS = (
    "age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak", "slope", "ca", "thal", "num",
)  # fmt: skip
# What a row is made of, in groups: the patient, examined at rest, under exercise, and by imaging.
# (column, code) is one for this code of a column of codes, and zero else.
PATIENT = ("age", "sex", ("cp", 2), ("cp", 3), ("cp", 4))
REST = ("trestbps", "chol", "fbs", ("restecg", 1), ("restecg", 2))
EXERCISE = ("thalach", "exang", "oldpeak", "slope")
IMAGING = ("ca", ("thal", 6), ("thal", 7))
GROUPS = (PATIENT, REST, EXERCISE, IMAGING)
NEVER_ZERO = ("trestbps", "chol")  # a blood pressure or cholesterol of zero was not measured
FACTS = Facts("silos", clients=len(HOSPITALS))


def read_hospital(path: Path) -> np.ndarray:
    """(rows, 14) float64, the numbers of one file; NaN where nothing was measured.

    Raises:
        InputError: the file cannot be read, or is not a table of 14 numbers a row.
    """
    try:
        lines = [line.split(",") for line in path.read_text().split()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): check it, or fetch it again.") from None
    wanted = f"{path} should have rows of {len(COLUMNS)} numbers (or ?) separated by commas, the diagnosis last"
    for number, line in enumerate(lines, 1):
        check(len(line) == len(COLUMNS), f"{wanted}; row {number} has {len(line)}: take the hospital's processed file.")
    try:
        table = np.array([[np.nan if word == "?" else float(word) for word in line] for line in lines])
    except ValueError as error:
        raise InputError(f"{wanted}: {error}.") from None
    check(
        len(table) > 1 and np.isfinite(table[:, -1]).all(), f"{wanted}: it has {len(table)}, or one has no diagnosis."
    )
    table[table == -9] = np.nan
    for name in NEVER_ZERO:
        column = table[:, COLUMNS.index(name)]
        column[column == 0] = np.nan
    return table


def prepared(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows, features) float32 of one hospital's rows, by what its own training rows say and nothing else.

    What is missing becomes the column's lower median, so that a code stays a code, and zero where a
    hospital never measured it. Then codes become columns, and all have mean 0 and deviation 1 in the
    training rows (one that is constant is 0).
    """
    middle = np.zeros(len(COLUMNS))
    for i, column in enumerate(train.T):
        known = column[np.isfinite(column)]
        middle[i] = np.percentile(known, 50, method="lower") if len(known) else 0
    wide, wide_test = (_features(np.where(np.isfinite(part), part, middle)) for part in (train, test))
    mean, deviation = wide.mean(0), wide.std(0)
    deviation = np.where(deviation > 0, deviation, 1)
    return tuple(((part - mean) / deviation).astype(np.float32) for part in (wide, wide_test))


def _features(table: np.ndarray) -> np.ndarray:
    of = lambda name: table[:, COLUMNS.index(name)]
    every = [each for group in GROUPS for each in group]
    return np.stack([of(each) if isinstance(each, str) else of(each[0]) == each[1] for each in every], 1).astype(float)


def tables(folder: Path) -> list[np.ndarray]:
    """The four hospitals' tables, as `read_hospital` gives them.

    Raises:
        InputError: a file is missing or unusable.
    """
    return [read_hospital(_file(folder, name)) for name in HOSPITALS]


def heart_disease(folder: Path, seed: int = 0) -> Dataset:
    """The four hospitals' rows, one after the other, with their sites; a quarter of each class of each is for the test.

    Raises:
        InputError: a file is missing or unusable.
    """
    train, test = [], []
    for site, table in enumerate(tables(folder)):
        ill = (table[:, -1] > 0).astype(np.int32)
        rows, other = stratified(ill, seed)
        features = prepared(table[rows], table[other])
        for part, x, y in zip((train, test), features, (ill[rows], ill[other]), strict=True):
            part.append((x, y, np.full(len(y), site, np.int32)))
    (x, y, sites), (x_test, y_test, sites_test) = (
        map(np.concatenate, zip(*part, strict=True)) for part in (train, test)
    )
    return Dataset("heart-disease", x, y, x_test, y_test, 2, FACTS, sites, sites_test)


def find_heart(data_dir: Folder) -> Path:
    """The folder with the hospitals' files: `data_dir`, heart-disease in it, or by default the cache.

    Raises:
        InputError: they are in none of these; it says what to download, and where to.
    """
    looked = places("heart-disease", data_dir)
    for place in looked:
        if any((place / name).is_file() for name in _names(HOSPITALS[0])):
            return place
    files = ", ".join(_names(name)[0] for name in HOSPITALS)
    raise InputError(
        f"the data set heart-disease is not in {' or '.join(map(str, looked))}: download {files} of the UCI Heart Disease "
        f"data (archive.ics.uci.edu/dataset/45) into {looked[-1]}, or pass --data-dir (data_dir=) with their folder or "
        "its parent."
    )


def _names(hospital: str) -> tuple[str, str]:
    return f"processed.{hospital}.data", f"{hospital}.data"  # the publisher's, and without a word that says nothing


def _file(folder: Path, hospital: str) -> Path:
    found = [folder / name for name in _names(hospital) if (folder / name).is_file()]
    check(found, f"there is no {_names(hospital)[0]} in {folder}: put the four hospitals' files there.")
    return found[0]


HEART_DISEASE = Source(
    "heart-disease",
    "four hospitals' 689 / 231 rows of 17 features, 2 classes; missing: the median of the hospital's own training rows, "
    "which then have mean 0 and deviation 1 in each hospital, column by column; from four files",
    FACTS,
    lambda data_dir: heart_disease(find_heart(data_dir)),
)

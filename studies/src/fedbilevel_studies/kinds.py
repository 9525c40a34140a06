"""What kinds of values studies are made of."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Array

Setting: TypeAlias = bool | int | float | str | None  # of an algorithm, as files and the command line write one
DataDir: TypeAlias = str | os.PathLike[str] | None  # the folder of data sets that are not embedded
JSON: TypeAlias = bool | int | float | str | list | tuple | dict | None  # what JSON can say
Cell: TypeAlias = str | float | np.number | None  # of a table
Text: TypeAlias = tuple[list[str], list[list[str]]]  # headings, and the cells of each row
Look: TypeAlias = dict[str, Any]  # how a curve looks, in the words of matplotlib
Row: TypeAlias = Mapping[str, Array]  # one row of a client's, its parts by name

"""What comes from outside: JSON; whole numbers as callers give them, Python's, numpy's, or an array of one."""

from __future__ import annotations

import operator
from typing import Any, SupportsIndex, TypeAlias

import numpy as np
from jaxtyping import Array, Int

from .errors import InputError
from .jaxprs import Tracer

JSON: TypeAlias = bool | int | float | str | list | tuple | dict | None  # what JSON can say
Whole: TypeAlias = int | np.integer | Int[Array | np.ndarray, " "]  # a whole number, of whatever kind
Received: TypeAlias = JSON | bytes  # what a message from elsewhere can hold


def as_whole(value: Any, least: int | None = None) -> int | None:
    """The whole number as Python's int; None if it is no whole number (a bool is none), or below `least`."""
    if isinstance(value, Tracer | bool) or getattr(value, "dtype", None) == np.bool_:
        return None
    try:
        number = operator.index(value)
    except TypeError:
        return None
    return number if least is None or number >= least else None


def whole_number(value: SupportsIndex | None, least: int, what: str) -> int:
    """As `as_whole`.

    Raises:
        InputError: it is none; `what` is the sentence, before the value.
    """
    number = as_whole(value, least)
    if number is None:
        raise InputError(f"{what}; got {value!r}.")
    return number

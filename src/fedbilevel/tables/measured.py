"""The second exchange: what a client measures of the columns that all have, and the texts of the categories that stay."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..errors import RunError
from ..rows.values import Whose, shown
from .columns import BOOLEAN, EMPTY, NUMBER, kind_of, numbers_of, texts_of
from .moments import Moments, merged
from .schema import Agreed, Common, digest, unreadable, whole
from .wanted import EXTREMES, Prepare

if TYPE_CHECKING:
    import pandas


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a client says of a column, or what is known of all clients'.

    Attributes:
        moments: of its numbers.
        extremes: the smallest and the largest of them, where clients share that and have any.
        texts: of the categories that stay and that the client has, by their digests.
    """

    moments: Moments = Moments()
    extremes: tuple[float, float] | None = None
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)


def measure(inner: pandas.DataFrame, agreed: Agreed, wanted: Prepare, client: str) -> tuple[Measured, ...]:
    """What a client says of each column, from its inner rows alone.

    Raises:
        InputError: numbers that are infinite, or so large that their squares are.
    """
    whose = Whose(client, "inner rows")
    return tuple(_measured(inner[column.name], column, wanted, whose) for column in agreed.common)


def _measured(values: pandas.Series, column: Common, wanted: Prepare, whose: Whose) -> Measured:
    texts: dict[str, str] = {}
    if column.kept:
        every = {digest(column.name, text): text for text in texts_of(values, whose, column.name).texts}
        texts = {each: every[each] for each in column.kept if each in every}
    if column.kind not in (NUMBER, BOOLEAN) or kind_of(values, whose, column.name) == EMPTY:
        return Measured(texts=texts)
    numbers = numbers_of(values, whose, column.name)
    numbers = numbers[~np.isnan(numbers)]
    with np.errstate(over="ignore", invalid="ignore"):
        own = Moments.of(numbers)
    if not (math.isfinite(own.centred) and math.isfinite(own.mean)):
        worst = float(numbers[np.argmax(np.abs(numbers))])
        raise whose.refusal(f"{worst:.3g}, whose square is infinite,", f", column {column.name!r}", "correct it")
    shared = EXTREMES in wanted.share and column.kind == NUMBER and own.count > 0
    return Measured(own, (float(numbers.min()), float(numbers.max())) if shared else None, texts)


def text_of(measured: tuple[Measured, ...]) -> str:
    """What a client says of its columns, as JSON."""
    return json.dumps([dataclasses.asdict(each) for each in measured], separators=(",", ":"))


def read(text: str, agreed: Agreed, client: str) -> tuple[Measured, ...]:
    """What `text` says of the columns that clients agreed on.

    Raises:
        RunError: it says something else.
    """
    with unreadable(client):
        return tuple(_read(told, column) for told, column in zip(json.loads(text), agreed.common, strict=True))


def _read(told: Mapping, column: Common) -> Measured:
    moments = told["moments"]
    own = Moments(whole(moments["count"]), *(_finite(moments[name]) for name in ("mean", "rest", "centred")))
    extremes = None if told["extremes"] is None else tuple(map(_finite, told["extremes"]))
    texts = {str(each): str(text) for each, text in told["texts"].items()}
    wrong = [each for each, text in texts.items() if each not in column.kept or digest(column.name, text) != each]
    if wrong or own.centred < 0 or (extremes is not None and len(extremes) != 2):
        raise ValueError(f"column {column.name!r}")
    return Measured(own, None if extremes is None else (extremes[0], extremes[1]), texts)


def _finite(number: object) -> float:
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
        raise ValueError(shown(number))
    return float(number)


def together(told: Mapping[str, tuple[Measured, ...]], agreed: Agreed) -> tuple[Measured, ...]:
    """What is known of each column of all clients, taken by their names so that their order changes nothing.

    Raises:
        RunError: nobody told the text of a category.
    """
    names = sorted(told)
    return tuple(_together([told[name][k] for name in names], column) for k, column in enumerate(agreed.common))


def _together(told: list[Measured], column: Common) -> Measured:
    extremes = [each.extremes for each in told if each.extremes is not None]
    around = (min(low for low, _ in extremes), max(high for _, high in extremes)) if extremes else None
    texts = {each: text for own in told for each, text in own.texts.items()}
    lost = [each for each in column.kept if each not in texts]
    if lost:
        raise RunError(f"no client told what a category of column {column.name!r} is that at least one has.")
    return Measured(merged(each.moments for each in told), around, {each: texts[each] for each in column.kept})

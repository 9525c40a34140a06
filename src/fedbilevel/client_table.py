"""How each client fares: a table, a row a client and a column a metric, with the mean over the clients and the worst one."""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .by_client import BAD, EMPTY, GIVEN, NONE, WORST, Found, Measure
from .given import JSON

if TYPE_CHECKING:
    import pandas

_SHOWN = 20  # clients in print
_NAMED = 3  # clients in a sentence
_WHY = {
    NONE: "did not answer",
    EMPTY: "has none: no row counts in its denominator",
    BAD: "has no finite number",
}


@dataclasses.dataclass(frozen=True)
class ClientTable:
    """How each client fares; `print` it, or take it as a table of pandas.

    Attributes:
        names: of the clients, in their order.
        rows: (clients,) how many rows the numbers stand on; None where that is not known (over a network).
        columns: by metric, (clients,) float64: each client's number, NaN where there is none.
        mean: by metric, the mean over the clients that have a number, by their weights; NaN where none has one, or
            one is not finite.
        worst: by metric, the worst client's number.
        worst_client: by metric, who that is; "" where nobody has a number.
        notes: sentences about clients that have no number, and why.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...] | None
    columns: Mapping[str, np.ndarray]
    mean: Mapping[str, float]
    worst: Mapping[str, float]
    worst_client: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def to_dataframe(self) -> pandas.DataFrame:
        """A row a client, by its name: `rows`, where that is known, and the metrics."""
        import pandas

        rows = {} if self.rows is None else {"rows": np.asarray(self.rows)}
        return pandas.DataFrame({**rows, **self.columns}, index=pandas.Index(self.names, name="client"))

    def to_dict(self) -> dict[str, JSON]:
        """Everything in it, for JSON; a number that is not finite is None."""
        plain = lambda values: [float(value) if np.isfinite(value) else None for value in values]
        return {
            "names": list(self.names),
            "rows": None if self.rows is None else list(map(int, self.rows)),
            "columns": {name: plain(column) for name, column in self.columns.items()},
            "mean": dict(zip(self.mean, plain(self.mean.values()), strict=True)),
            "worst": dict(zip(self.worst, plain(self.worst.values()), strict=True)),
            "worst_client": dict(self.worst_client),
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, told: Mapping) -> ClientTable:
        """What `to_dict` gave."""
        number = lambda value: np.nan if value is None else float(value)
        columns = {name: np.array(list(map(number, values))) for name, values in told["columns"].items()}
        mean, worst = ({name: number(value) for name, value in told[each].items()} for each in ("mean", "worst"))
        rows = None if told["rows"] is None else tuple(told["rows"])
        return cls(tuple(told["names"]), rows, columns, mean, worst, dict(told["worst_client"]), tuple(told["notes"]))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write it as a CSV file; a place without a number is empty."""
        first = ["client", *([] if self.rows is None else ["rows"])]
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*first, *self.columns])
            for k, name in enumerate(self.names):
                count = [] if self.rows is None else [self.rows[k]]
                values = (float(column[k]) for column in self.columns.values())
                writer.writerow([name, *count, *("" if np.isnan(value) else value for value in values)])

    def __str__(self) -> str:
        many = [] if self.rows is None else ["rows"]
        lines = [["client", *many, *self.columns]]
        for k, name in list(enumerate(self.names))[:_SHOWN]:
            count = [] if self.rows is None else [f"{self.rows[k]:,}"]
            lines.append([name, *count, *(_shown(column[k]) for column in self.columns.values())])
        blank = [""] * len(many)
        lines += [
            ["mean", *blank, *map(_shown, self.mean.values())],
            ["worst", *blank, *map(_shown, self.worst.values())],
        ]
        lines += [["", *blank, *self.worst_client.values()]] if any(self.worst_client.values()) else []
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(_padded(line, widths)).rstrip() for line in lines]
        rule = "-" * max(map(len, text))
        end = 1 + min(len(self.names), _SHOWN)
        more = [f"... and {len(self.names) - _SHOWN:,} more"] if len(self.names) > _SHOWN else []
        return "\n".join([text[0], rule, *text[1:end], *more, rule, *text[end:], *self.notes])


def _padded(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *others = zip(line, widths, strict=True)
    return [first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]


def _shown(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.6g}"


def table(measures: Sequence[Measure], found: Found, names: Sequence[str], rows: Sequence[int] | None) -> ClientTable:
    """A table of what an evaluation has found, where it is known of each client.

    Args:
        names: of the clients.
        rows: how many rows each one has, where that is known.
    """
    each, mean = found.each, found.mean
    assert each is not None and mean is not None
    status, names = np.asarray(each.status), tuple(names)
    values = np.where(status == GIVEN, np.asarray(each.value, float), np.nan)
    columns, worst, who = {}, {}, {}
    for k, measure in enumerate(measures):
        columns[measure.name], there = values[:, k], np.flatnonzero(status[:, k] == GIVEN)
        bad = bool((status[:, k] == BAD).any())
        worst[measure.name] = float("nan") if bad or not len(there) else float(WORST[measure.worst](values[there, k]))
        at = np.flatnonzero(values[:, k] == worst[measure.name])
        who[measure.name] = names[at[0]] if len(at) else ""
    means = {measure.name: float(mean[k]) for k, measure in enumerate(measures)}
    counts = None if rows is None else tuple(map(int, rows))
    return ClientTable(names, counts, columns, means, worst, who, tuple(_notes(measures, status, names)))


def _notes(measures: Sequence[Measure], status: np.ndarray, names: Sequence[str]) -> list[str]:
    silent = np.flatnonzero((status == NONE).all(axis=1))
    found = [f"{named(names, silent)} {_WHY[NONE]}: left out."] if len(silent) else []
    for k, measure in enumerate(measures):
        for why in (EMPTY, BAD):
            those = np.flatnonzero(status[:, k] == why)
            left = "left out" if why == EMPTY else "so there is no mean and no worst"
            found += [f"{measure.name}: {named(names, those)} {_WHY[why]}; {left}."] if len(those) else []
    return found


def named(names: Sequence[str], places: Sequence[int] | np.ndarray) -> str:
    """The first few clients, and how many more."""
    first = ", ".join(names[k] for k in places[:_NAMED])
    return first if len(places) <= _NAMED else f"{first} and {len(places) - _NAMED:,} more"

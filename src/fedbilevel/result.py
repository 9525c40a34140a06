"""What a run leaves: its rows, and its end."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import numpy as np
from jaxtyping import PyTree

from . import arrays, saved
from .best import Best
from .by_client import ClientMetrics
from .client_table import ClientTable
from .data import FederatedData
from .errors import InputError, check
from .evaluation import evaluate
from .given import JSON, Whole, whole_number
from .metrics import STOPPED
from .owned import bare, nodes, own
from .predictions import Prepared, predict
from .problem import Problem
from .protocol.table import Protocol
from .sketch import curve, line, page
from .version import __version__

if TYPE_CHECKING:
    import matplotlib.axes
    import pandas

Row: TypeAlias = dict[str, float | str]  # by column: numbers, and the reason where a run was stopped

_FIGURES = ("iteration", "rounds", "value")  # of the best
EMPTY = float("nan")  # what was not taken: this very object, so that a file can leave the place empty


class History(list[Row]):
    """The rows of a run, dicts of iteration, rounds, bytes_down, bytes_up, seconds, metrics, diagnostics.

    Row 0 is the start. rounds and bytes are cumulative; seconds leave out compilation and evaluation.
    All rows have the same columns; NaN is where one was not taken (a run that was resumed with
    other metrics, say). Where a callback stopped the run there is one more column, `stopped`: its reason, a text in the
    last row.
    """

    @property
    def columns(self) -> list[str]:
        """The columns' names, in order."""
        return list(dict.fromkeys(name for row in self for name in row))

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows; columns that are new, or that they lack, are empty where they were not taken."""
        rows, known = list(rows), dict.fromkeys(self[-1] if self else ())  # all rows have the same
        columns = list(known | dict.fromkeys(name for row in rows for name in row))
        behind = [*self, *rows] if len(columns) > len(known) else rows
        for row in behind:
            if len(row) < len(columns):
                row.update({name: EMPTY for name in columns if name not in row})
        self.extend(rows)

    def give_up(self, iteration: int) -> None:
        """Drop the rows after an iteration, to which the run went back."""
        self[:] = [row for row in self if float(row["iteration"]) <= iteration]

    @property
    def stopped(self) -> str | None:
        """Why a callback stopped the run; None where none did."""
        reason = self[-1].get(STOPPED) if self else None
        return reason if isinstance(reason, str) else None

    def stop(self, reason: str) -> None:
        """Say in the last row why the run was stopped."""
        for row in self:
            row[STOPPED] = EMPTY
        self[-1][STOPPED] = reason

    def to_dataframe(self) -> pandas.DataFrame:
        """The rows as a pandas DataFrame."""
        import pandas

        return pandas.DataFrame(list(self), columns=self.columns)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows as a CSV file; a place where nothing was taken is empty."""
        saved.write_rows(path, self._plain(), self.columns)

    def plot(self, *columns: str, by: str = "rounds", axes: matplotlib.axes.Axes | None = None) -> matplotlib.axes.Axes:
        """Draw columns against another one, with matplotlib.

        Args:
            columns: their names; none: the metric that tells most (an accuracy, else a loss, else a diagnostic).
            by: the horizontal axis: "rounds", "bytes_up", "seconds", "iteration" or another column.
            axes: where to draw; None: a new figure.

        Returns:
            The axes.

        Raises:
            InputError: there are no rows, or no such column of numbers.
        """
        return curve(self, columns, by, axes)

    def _plain(self) -> list[dict[str, JSON]]:
        return [{name: None if value is EMPTY else value for name, value in row.items()} for row in self]

    def __repr__(self) -> str:
        return f"History({len(self)} rows: {line(self)})"

    def _repr_html_(self) -> str:
        return page(f"History of {len(self)} rows", self)

    def column(self, name: str) -> np.ndarray:
        """One column as an array."""
        check(any(name in row for row in self), f"the history has no column {name!r}.")
        return np.array([row.get(name, np.nan) for row in self], object if name == STOPPED else None)


@dataclasses.dataclass
class Result:
    """What `solve` returns.

    Attributes:
        x, y: the last upper and lower variable, structured like the start. y is None where it stays with the clients (see
            `FedBiOAccLocal`). A leaf that is kept at the sites (`per_client(..., keep="site")`) has all blocks where the
            clients are in this process, and is a `KeptAtSites` where they are not.
        history: the `History`.
        protocol: the `Protocol` of one iteration.
        state: the algorithm's whole last state; of what is kept at sites elsewhere it has numbers that mean nothing.
        iteration: how many iterations were done.
        clients_y: where every client has a lower variable of its own (`FedBiOAccLocal`), all of them: like y, each array
            with a leading axis of clients, in their order; a client that was never asked has the start. y is then their
            mean, by the clients' weights. None for other algorithms, and over a network, where they stay at the sites.
        stopped: the reason for which a callback stopped the run; None where none did.
        compiled: how its program was compiled, "quick" or "full" (see `Simulation`).
        config: what ran: the algorithm and its settings, the engine, cohort, dropout, key, precision and versions, as JSON.
        clients: how each client fares at the last row of the history, by `client_metrics=`: a `ClientTable`. None without
            them, and over a network where the sites' numbers stay at the sites.
        kept: what `best` gives; None without `keep=`, or where no row had a finite value.
    """

    x: PyTree
    y: PyTree
    history: History
    protocol: Protocol
    state: PyTree
    iteration: int
    clients_y: PyTree = None
    stopped: str | None = None
    compiled: str = "full"
    kept: Best | None = None
    clients: ClientTable | None = None
    config: dict[str, JSON] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        more = f", stopped: {self.stopped}" if self.stopped else ""
        return (
            f"{type(self).__name__}({self.protocol.algorithm}, {self.iteration} iterations: {line(self.history)}{more})"
        )

    def _repr_html_(self) -> str:
        return page(f"{self.protocol.algorithm}, {self.iteration} iterations", self.history)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write x, y, the history, the protocol, the best and what ran into a folder, which `load_result` reads.

        Numbers are in `variables.npz` (and `best.npz`), which `np.load` reads, rows in `history.csv`, all else in
        `result.json`. An earlier result there is replaced. The algorithm's state is not in it: `callbacks.Checkpoint`
        keeps what a run needs to go on. Of an `App` over a network, y and blocks that stay at the sites are not in it.

        Raises:
            InputError: the folder cannot be written.
        """
        _write(self, folder, self.history._plain(), self.history.columns)

    def best(self) -> Best:
        """The best x and y, by what `solve(keep=)` named: x, y, iteration, rounds, value.

        Of rows with equal values it is the first; rows whose value is not finite do not count.

        Raises:
            InputError: there is none.
        """
        if self.kept is None:
            raise InputError(
                "there is no best: keep= was not given, as in solve(keep='test_loss:min'), or no row had a finite value."
            )
        return self.kept

    def evaluate(
        self,
        problem: Problem,
        data: FederatedData,
        metrics: ClientMetrics | None = None,
        client_batch: Whole | None = None,
    ) -> ClientTable:
        """How each client fares at the last x and y, on any rows: those of the run, or others such as test rows.

        Where every client has a lower variable of its own (`clients_y`), each is taken at its own: the data then has the
        same clients in the same order. Nothing is exchanged or counted: the rows are here.

        Args:
            problem: the run's.
            data: whose OUTER rows metrics are taken on; of test rows alone, `FederatedData.stack(test, test)`.
            metrics: as `solve(client_metrics=)`; None: the columns inner_loss and outer_loss, each on its level's rows.
            client_batch: how many clients at a time, to bound memory; None: all.

        Returns:
            A `ClientTable`: `print` it; `.mean`, `.worst`, `.to_dataframe()`.

        Raises:
            InputError: something cannot be used, a metric is not finite at a client, or y stays at the sites.
        """
        self._check_y("evaluated")
        return evaluate(problem, data, self.x, self.y, metrics, self.clients_y, client_batch)

    def predict(
        self, model: Callable[..., PyTree], rows: Any, prepared: Prepared | None = None, *, client: Whole | None = None,
        batched: bool = False, batch_size: Whole = 1024,
    ) -> PyTree:  # fmt: skip
        """What a model says of new rows at the last x and y.

        Args:
            model: (x, y, row) -> an array or a pytree of them, as the losses see x, y and a row; with `batched` a
                function of many rows, rows first in what it returns. Of a problem in PyTorch it takes all rows.
            rows: a pytree of arrays, rows first; or, with `prepared`, what that takes, such as a table.
            prepared: what makes rows of it, by its method `rows`: as the rows were made that x and y were trained on.
            client: at whose y, or with whose blocks (`per_client`), where every client has its own: its place among the
                clients. None: at `y`.
            batched: whether the model takes many rows.
            batch_size: how many rows at a time.

        Returns:
            What the model returns, arrays of JAX with one axis more in front, of rows; tensors for a problem in PyTorch.

        Raises:
            InputError: something cannot be used, the model fails, or y stays at the sites.
        """
        self._check_y("predicted with")
        blocks = nodes((self.x, self.y))
        if blocks:
            place = self._place(client, len(blocks[0]))
            x, y = (bare(own(variable, place)) for variable in (self.x, self.y))
            return predict(model, x, y, rows, prepared, batched, batch_size)
        y = self.y if client is None else self._own_y(client)
        return predict(model, self.x, y, rows, prepared, batched, batch_size)

    @staticmethod
    def _place(client: Whole | None, many: int) -> int:
        check(
            client is not None,
            f"x or y has leaves per client, and a model is told one client's: name it, client=0 to {many - 1}.",
        )
        assert client is not None
        place = whole_number(client, 0, f"client= is a client's place, from 0 to {many - 1}")
        check(place < many, f"client= is a client's place, from 0 to {many - 1}; got {place}.")
        return place

    def _check_y(self, what: str) -> None:
        check(
            self.y is not None or self.clients_y is not None,
            f"y stays at the sites, so that nothing can be {what} here: let the algorithm share it (share_lower=True).",
        )

    def _own_y(self, client: Whole) -> PyTree:
        many = len(jax.tree.leaves(self.clients_y)[0]) if self.clients_y is not None else 0
        check(
            bool(many),
            "client= is for clients that have a y of their own (clients_y), and these have none: leave it out.",
        )
        place = self._place(client, many)
        return jax.tree.map(lambda leaf: leaf[place] if hasattr(leaf, "ndim") else leaf, self.clients_y)

    @property
    def seconds(self) -> float:
        """Seconds of computation so far, without compilation and evaluation, a resumed run's with those before."""
        return float(self.history[-1]["seconds"]) if self.history else 0.0


def leave(result: Result, folder: str | os.PathLike[str], columns: Mapping[str, str | int]) -> None:
    """As `Result.save`, beside a `history.csv` that is there, which has these constant columns in front."""
    _write(result, folder, None, [*columns, *result.history.columns], list(columns))


def _write(
    result: Result, folder: str | os.PathLike[str], rows: list[dict[str, JSON]] | None, columns: Sequence[str],
    texts: Sequence[str] = (),
) -> None:  # fmt: skip
    head: dict[str, JSON] = {
        "version": __version__,
        "iteration": result.iteration,
        "stopped": result.stopped,
        "compiled": result.compiled,
        "config": result.config,
        "protocol": result.protocol.to_dict(),
        "clients": None if result.clients is None else result.clients.to_dict(),
        "texts": [STOPPED, *texts],
    }
    variables = {"x": result.x, "y": result.y, "clients_y": result.clients_y}
    saved.write(folder, head, variables, None if result.kept is None else _named(result.kept), rows, columns)


def load_result(folder: str | os.PathLike[str], like: tuple[PyTree, PyTree] | None = None) -> Result:
    """What `Result.save` wrote. Nothing in the folder is run or unpickled.

    Args:
        like: (x, y) structured like the run's start, such as the start itself: x and y come back so, whatever they are
            made of (equinox modules, tensors of PyTorch once `fedbilevel.torch` is imported). None: each is a dict of
            JAX's arrays by path, {"layers.0.weight": ...}, or the one array that it was.

    Returns:
        A `Result`, whose `state` is None.

    Raises:
        InputError: there is no result in the folder, a file is missing or cut, or x or y is of another structure,
            shape or dtype than `like`; with the file or the leaf.
    """
    check(
        like is None or (isinstance(like, tuple) and len(like) == 2),
        f"like= is a pair (x, y) structured like the run's; got {type(like).__name__}.",
    )
    found = saved.read(folder)
    head, last = found.head, found.arrays.get(saved.VARIABLES, {})

    def variable(arrays: dict[str, saved.Leaf], name: str, place: int, lead: tuple[int, ...] = ()) -> PyTree:
        known = saved.by_path(arrays, name)
        if like is None or known is None:
            return known
        return saved.like(arrays, name, like[place], lead)

    many = [leaf.value.shape[0] for name, leaf in last.items() if name.startswith("clients_y")]
    own = variable(last, "clients_y", 1, (many[0],)) if many else None
    best = None
    if (kept := found.arrays.get(saved.BEST)) is not None:
        iteration, rounds, value = (kept[name].value.item() for name in _FIGURES)
        best = Best(variable(kept, "x", 0), variable(kept, "y", 1), iteration, rounds, value)
    rows = [{name: EMPTY if value is None else value for name, value in row.items()} for row in found.rows]
    x, y = variable(last, "x", 0), variable(last, "y", 1)
    clients = None if head["clients"] is None else ClientTable.from_dict(head["clients"])
    return Result(
        x, y, History(rows), Protocol.from_dict(head["protocol"]), None, head["iteration"], own, head["stopped"],
        head["compiled"], best, clients, head["config"],
    )  # fmt: skip


def save_best(best: Best, path: str | os.PathLike[str]) -> None:
    """Write the best x and y to a numpy file, and iteration, rounds and value beside them."""
    save_arrays(_named(best), path)


def _named(best: Best) -> dict[str, PyTree]:
    return {"x": best.x, "y": best.y, **{name: np.asarray(getattr(best, name)) for name in _FIGURES}}


def save_arrays(trees: dict[str, PyTree], path: str | os.PathLike[str]) -> None:
    """Write the arrays of pytrees to a numpy file, each named by its tree and its path in it."""
    found = [leaf for name, tree in trees.items() for leaf in saved.leaves(tree, name)]
    arrays.write_named(path, {leaf.name: leaf.value for leaf in found})

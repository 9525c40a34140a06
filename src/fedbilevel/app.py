"""An application: what organisations agree to run, in one file that every one of them reads.

`app.py` defines `app = fb.App(...)`: the problem, the algorithm, the start point, and how ONE site loads its own rows. The
same file is simulated on sample data, run over a network on one machine, and deployed; only `load` touches data, and each
site runs it for itself.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, KeyPath, SequenceKey
from jax.typing import ArrayLike
from jaxtyping import Array, Key, PyTree

from .algorithm import Algorithm
from .best import goal
from .bundle import Bundle, Modules, bundle, checked_patterns, declared_files
from .by_client import ClientMetrics, Share, check_names, checked, checked_share
from .callbacks.base import Callback
from .callbacks.listeners import listed
from .cohorts import check_cohort
from .data import FederatedData
from .description import Description
from .engines.base import Engine
from .engines.faults import Faults
from .errors import InputError, check
from .foreign import native
from .given import JSON, Whole, whole_number
from .metrics import checked_metrics, names_taken
from .problem import Problem
from .rows.one import as_array
from .rows.values import Columns, Whose, columns_apart, whole
from .tables.prepare import prepared_rows
from .tables.prepared import Prepared
from .tables.reading import frame_of
from .tables.wanted import Prepare
from .tasks.base import Task
from .variables import trainable

if TYPE_CHECKING:
    import pandas


@dataclasses.dataclass(frozen=True)
class App:
    """What organisations agree to run.

    Args:
        problem, algorithm: the losses, and how to solve them.
        start: () -> (x, y), where to start; the same at every site, so draw from a fixed seed. With `prepare` it may take
            one argument, what the sites agreed on: `len(prepared.columns)` is how many numbers a row has.
        load: site's name -> (inner rows, outer rows) of that site, pytrees (dicts, lists, tuples) of arrays
            or pandas tables, rows first; with `prepare` its tables.
        iterations: outer iterations; or instead
        rounds: communication rounds.
        seed: decides the cohorts and minibatches.
        cohort: how many sites an exchange asks; None for all.
        weights: None: all sites count alike; "rows": in proportion to their rows (sites then tell how many they have).
        metrics: name -> fn(x, y) -> scalar, taken at the server (on public data: it has no other).
        evaluate_every: iterations between rows of the history.
        precision: 32 or 64 bits.
        faults: what to do when sites fail.
        name: what results are filed under; letters, digits, dots, dashes and underscores.
        check: whether the problem is looked at before the first iteration, as by `solve(check=)`; over a network every site
            does it on its own rows and tells a few numbers, which the server averages.
        files: data files that the app reads, the same wherever it runs (not a site's rows): names relative to its folder, or
            patterns such as "weights/*.npy". They travel with it. It opens them as `Path(__file__).parent / name`.
        callbacks: what happens beside a run, at the server where it goes over a network: a list of callbacks; or a function,
            () -> a list, so that each run has fresh ones.
        keep: by what the best x and y are kept beside the last, as in "test_loss:min", as by `solve(keep=)`.
        prepare: `load` returns (inner table, outer table), as they are, and sites make rows of them by what they agree on
            before the run begins, in two exchanges (`Prepare` says what travels); None: `load` returns rows.
        client_metrics: name -> fn(x, y, row) -> scalar, or `ByClient`: how each site fares on its outer rows, as
            `solve` takes them. Each site writes its own numbers to metrics.csv in its folder, whatever it shares.
        share_metrics: what of them leaves a site. False: nothing. "mean": the history has the mean over the sites; a
            site's reply is its weighted number, from which the server makes the mean, and it keeps the mean alone.
            True: each site's own; the history has the worst as well, and clients.csv at the server is the table.

    Attributes:
        origin: the file that defines it and the modules that it has loaded, if `load_app` has read it.
    """

    origin: ClassVar[tuple[Path, Modules] | None] = None

    problem: Problem
    algorithm: Algorithm
    start: Callable[..., tuple[PyTree, PyTree]]
    load: Callable[[str], tuple[PyTree, PyTree]]
    iterations: Whole | None = None
    rounds: Whole | None = None
    seed: int = 0
    cohort: Whole | None = None
    weights: Literal["rows"] | None = None
    metrics: Mapping[str, Callable[[PyTree, PyTree], ArrayLike]] = dataclasses.field(default_factory=dict)
    evaluate_every: Whole = 1
    precision: int = 32
    faults: Faults = Faults()
    name: str = "app"
    files: Sequence[str] = ()
    check: bool = True
    callbacks: Sequence[Callback] | Callable[[], Sequence[Callback]] = ()
    keep: str | None = None
    prepare: Prepare | None = None
    client_metrics: ClientMetrics = dataclasses.field(default_factory=dict)
    share_metrics: Share = False

    def __post_init__(self):
        check(isinstance(self.problem, Problem), f"App(problem=...) is a fedbilevel.Problem; got {self.problem!r}.")
        kind = isinstance(self.algorithm, Algorithm)
        check(kind, f"App(algorithm=...) is an instance such as AggITD(...); got {self.algorithm!r}.")
        for name in ("start", "load"):
            value = getattr(self, name)
            check(callable(value), f"App({name}=...) is a function; got {value!r}.")
        check((self.iterations is None) != (self.rounds is None), "App takes iterations= or rounds=, one of the two.")
        check(isinstance(self.faults, Faults), f"App(faults=...) is a fedbilevel.Faults; got {self.faults!r}.")
        check(self.weights in (None, "rows"), f"App(weights=...) is None or 'rows'; got {self.weights!r}.")
        check(self.precision in (32, 64), f"App(precision=...) is 32 or 64; got {self.precision!r}.")
        good = isinstance(self.name, str) and self.name.replace("-", "").replace("_", "").replace(".", "").isalnum()
        check(good, f"App(name=...) is letters, digits, dots, dashes and underscores; got {self.name!r}.")
        check_names(checked(self.client_metrics), names_taken(checked_metrics(self.metrics)))
        checked_share(self.share_metrics)
        checked_patterns(self.files)
        if not callable(self.callbacks):
            listed(self.callbacks, "App(callbacks=...)")
        if self.keep is not None:
            goal(self.keep)
        good = self.prepare is None or isinstance(self.prepare, Prepare)
        check(good, f"App(prepare=...) is a fedbilevel.Prepare; got {self.prepare!r}.")
        check(isinstance(self.check, bool), f"App(check=...) is True or False; got {self.check!r}.")
        for name, least in (("iterations", 1), ("rounds", 1), ("seed", 0), ("cohort", 1), ("evaluate_every", 1)):
            value = getattr(self, name)
            if value is not None:
                number = whole_number(value, least, f"App({name}=...) is a whole number from {least} on")
                object.__setattr__(self, name, number)

    def begin(self, prepared: Prepared | None = None) -> tuple[PyTree, PyTree]:
        """(x, y) to start from.

        Args:
            prepared: how tables become rows, where they do: for a `start` that asks for it.

        Raises:
            InputError: `start` returned something else, or x or y cannot be optimised.
        """
        both = self.start(prepared) if prepared is not None and _takes_one(self.start) else self.start()
        good = isinstance(both, tuple) and len(both) == 2
        check(good, f"start() of the app must return (x, y); it returned {type(both).__name__}.")
        for name, variable in zip("xy", both, strict=True):
            trainable(variable, name)
        return both

    def rows(self, site: str) -> tuple[PyTree, PyTree]:
        """One site's (inner rows, outer rows), or where tables are prepared its `tables`.

        Raises:
            InputError: `load` failed, or returned something else.
        """
        both = self._loaded(site)
        return native(both[0]), native(both[1])

    def tables(self, site: str) -> tuple[pandas.DataFrame, pandas.DataFrame]:
        """One site's (inner table, outer table), before anything is made of them.

        Raises:
            InputError: `load` failed, or returned something else.
        """
        levels = zip(("inner", "outer"), self._loaded(site), strict=True)
        inner, outer = (frame_of(table, f"the {level} table of {site}") for level, table in levels)
        for level, table in (("inner", inner), ("outer", outer)):
            check(
                len(table) > 0, f"the {level} table of {site} has no rows: every site needs at least one at each level."
            )
        return inner, outer

    def _loaded(self, site: str) -> tuple[PyTree, PyTree]:
        what = "rows" if self.prepare is None else "table"
        try:
            both = self.load(site)
        except Exception as error:  # whatever the user's loader raises
            raise InputError(f"load({site!r}) of the app failed: {type(error).__name__}: {error}") from error
        good = isinstance(both, tuple) and len(both) == 2
        check(
            good,
            f"load({site!r}) of the app must return (inner {what}, outer {what}); it returned {type(both).__name__}.",
        )
        return both

    def data(self, sites: list[str]) -> FederatedData:
        """All sites' rows side by side: for a simulation, on sample data."""
        if self.prepare is not None:
            made, prepared = prepared_rows({site: self.tables(site) for site in sites}, self.prepare)
            inner, outer = ([made[site][level] for site in sites] for level in (0, 1))
            return FederatedData.stack(inner, outer, self.weights, sites).with_prepared(prepared)
        rows = [self.rows(site) for site in sites]
        return FederatedData.stack([inner for inner, _ in rows], [outer for _, outer in rows], self.weights, sites)

    def describe(self, data: FederatedData, engine: Engine) -> Description:
        """Its run on these rows, described, without the look at the problem: where sites have rows, they look."""
        return Description(
            problem=self.problem, algorithm=self.algorithm, key=self.key, iterations=self.iterations,
            data=data, start=lambda: self.begin(data.prepared), rounds=self.rounds,
            engine=engine, metrics=self.metrics, evaluate_every=self.evaluate_every, name=self.name,
            check=False, precision=self.precision, callbacks=self.callbacks, keep=self.keep,
            client_metrics=self.client_metrics, share_metrics=self.share_metrics,
        )  # fmt: skip

    def task(self, data: FederatedData, seed: int | None = None) -> Task:
        """The problem on all sites' sample data, for one seed; None: the app's own."""
        x, y = self.begin(data.prepared)
        key = self.key if seed is None else jax.random.key(seed)
        how = self.client_metrics, self.share_metrics
        return Task(self.name, "app", self.problem, data, x, y, self.metrics, key, *how)

    def check_sites(self, sites: int) -> None:
        """Refuse a cohort or a number of replies that so many sites cannot give."""
        self.faults.check_cohort(check_cohort(self.cohort, sites))

    @property
    def key(self) -> Key[Array, ""]:
        """The run's random key."""
        return jax.random.key(self.seed)

    def with_(self, **changes: int | str | None) -> App:
        """The same with other settings; None leaves one as it is, and iterations and rounds replace each other."""
        given: dict[str, int | str | None] = {name: value for name, value in changes.items() if value is not None}
        if "iterations" in given or "rounds" in given:
            given = {"iterations": None, "rounds": None} | given
        new = dataclasses.replace(self, **given)  # pyright: ignore[reportArgumentType]
        object.__setattr__(new, "origin", self.origin)
        return new

    def bundle(self) -> Bundle:
        """What has to be the same wherever it runs: modules, declared files, versions of packages.

        Raises:
            InputError: it was not read from a file, or something can be neither shipped nor compared.
        """
        check(self.origin is not None, "an app is run elsewhere by its file: read it with load_app.")
        assert self.origin is not None
        return bundle(*self.origin, self.files)


def _takes_one(function: Callable) -> bool:
    """Whether a function needs one argument."""
    try:
        taken = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(each.kind in positional and each.default is inspect.Parameter.empty for each in taken)


def load_app(path: str | os.PathLike[str]) -> App:
    """The `app` that a file defines.

    Raises:
        InputError: there is no such file, it fails, or defines no `app`.
    """
    file = Path(path)
    check(file.is_file(), f"there is no file {file}: name the Python file that defines app = fedbilevel.App(...).")
    check(file.suffix == ".py", f"{file} is not a Python file: its name must end in .py.")
    modules = Modules(file.resolve().parent)
    try:
        module = modules.load(file)
    except InputError:
        raise
    except ModuleNotFoundError as error:
        raise InputError(
            f"{file} failed: ModuleNotFoundError: {error}. Install it, as the others have it, or lay its file beside."
        ) from error
    except Exception as error:  # whatever the user's file raises
        raise InputError(f"{file} failed: {type(error).__name__}: {error}") from error
    app = getattr(module, "app", None)
    found = "it defines no app" if app is None else f"its app is {app!r}"
    check(isinstance(app, App), f"{file} must define app = fedbilevel.App(...); {found}.")
    assert isinstance(app, App)
    declared_files(modules.folder, app.files)
    object.__setattr__(app, "origin", (file.absolute(), modules))
    return app


# What a site tells of its rows: shapes, never rows -------------------------------------------------------------------


def schema(rows: PyTree, site: str = "this site", level: str = "") -> str:
    """The structure, shapes of one row, dtypes, and names of columns, as JSON.

    Raises:
        InputError: rows are in another container than a dict, list or tuple, or no numbers.
    """
    return json.dumps(_schema(rows, (), Whose(site, f"{level} rows" if level else "rows")), sort_keys=True)


def placeholder(text: str) -> PyTree:
    """One row of zeros with that schema.

    Raises:
        InputError: the text is no schema.
    """
    try:
        return _zeros(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"a site described its rows in a way that cannot be read: {error}.") from None


def _schema(rows: PyTree, path: KeyPath, whose: Whose) -> dict[str, JSON]:
    if isinstance(rows, dict):
        check(all(isinstance(k, str) for k in rows), "rows in a dict go by names: use strings as keys.")
        return {"dict": {k: _schema(rows[k], (*path, DictKey(k)), whose) for k in sorted(rows)}}
    if type(rows) in (list, tuple):
        parts = [_schema(part, (*path, SequenceKey(k)), whose) for k, part in enumerate(rows)]
        return {type(rows).__name__: parts}
    check(
        hasattr(rows, "shape") and np.ndim(rows) >= 1,
        f"rows of an app are dicts, lists and tuples of arrays, rows first; got {type(rows).__name__}.",
    )
    array, columns = as_array(rows, whose, path, [])
    named = {} if columns is None else {"columns": list(columns)}
    return {"row": list(map(int, array.shape[1:])), "dtype": str(whole(array.dtype)), **named}


def apart(one: str, other: str, me: str = "the former", them: str = "the latter") -> str:
    """What two schemas differ in, in words: the first array that does, or the first column."""
    try:
        a, b = (dict(_arrays(json.loads(text), "")) for text in (one, other))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "a description cannot be read"
    for path in sorted(set(a) | set(b)):
        if a.get(path) != b.get(path):
            mine, theirs = (rows.get(path, ("missing", None)) for rows in (a, b))
            where = path or "the array"
            if mine[1] != theirs[1]:
                return columns_apart(mine[1], theirs[1], me, them) + (f", in {path}" if path else "")
            return f"{where} is {mine[0]} against {theirs[0]}"
    return "the containers differ"


def _arrays(schema: JSON, path: str) -> Iterator[tuple[str, tuple[str, Columns]]]:
    """(path, (shape in words, columns)) of every array."""
    node = cast(dict, schema)  # or nonsense, which fails here: the caller says so
    if "row" in node:
        columns = tuple(map(str, node["columns"])) if "columns" in node else None
        yield path, (f"{node['dtype']}{['rows', *node['row']]}".replace("'", ""), columns)
    for name, part in node.get("dict", {}).items():
        yield from _arrays(part, f"{path}[{name!r}]")
    for index, part in enumerate(node.get("list", node.get("tuple", ()))):
        yield from _arrays(part, f"{path}[{index}]")


_LARGEST = 10**9  # numbers in one row


def _zeros(schema: JSON) -> PyTree:
    node = cast(dict, schema)  # or nonsense, which fails here: the caller says so
    if "dict" in node:
        return {k: _zeros(v) for k, v in node["dict"].items()}
    if "list" in node:
        return [_zeros(part) for part in node["list"]]
    if "tuple" in node:
        return tuple(_zeros(part) for part in node["tuple"])
    shape = tuple(int(n) for n in node["row"])
    if any(n < 0 for n in shape) or np.prod(shape, dtype=float) > _LARGEST:
        raise ValueError(f"a row of shape {shape}")
    dtype = jnp.dtype(node["dtype"])
    if dtype.hasobject:
        raise ValueError(f"rows of {dtype}")
    return np.zeros((1, *shape), dtype)

"""What server and sites derive alike: the protocol, from the app and what rows look like, without any rows."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple, NotRequired, cast

import jax
import numpy as np
from jaxtyping import Array, Key, PyTree

from ...algorithm import Algorithm
from ...app import App, apart, placeholder
from ...bundle import Bundle, Told
from ...by_client import Measure, checked, measures
from ...data import FederatedData
from ...errors import RunError, check
from ...given import Received
from ...pace.automatic import ready
from ...problem import Problem, bind, strong
from ...protocol import running as as_it_runs
from ...protocol import trace
from ...protocol.sites import Site
from ...protocol.table import Protocol
from ...race.heats import KEY as SCORING_KEY
from ...race.heats import candidates_of, scoring_of
from ...race.racing import Race
from ...race.scoring import TURNS
from ...sanity import check_influence, judge_all
from ...tables.prepared import Prepared
from ...tune.entrants import entrants, of_words, starting
from ...validation import KEY as VALIDATION_KEY
from ...validation import Validation
from ...variables import trainable
from ..messaging.transport import Purpose
from .messages import Described, Entry, Racing, read


def placeholder_data(
    schemas: list[str],
    sites: int,
    weights: list[float] | None,
    names: list[str] | None = None,
    prepared: Prepared | None = None,
) -> FederatedData:
    """A federation of one row of zeros a site, weighted if weights are given; `prepared` is how tables become rows."""
    inner, outer = (placeholder(text) for text in schemas)
    data = FederatedData.stack([inner] * sites, [outer] * sites, weights, names)
    return data if prepared is None else data.with_prepared(prepared)


def begin(app: App, prepared: Prepared | None = None) -> tuple[Problem, tuple[PyTree, PyTree], PyTree]:
    """(The problem over the trainable parts alone, those parts (x, y), the algorithm's first state)."""
    x, y = app.begin(prepared)
    x, x_rest = trainable(x, "x")
    y, y_rest = trainable(y, "y")
    return bind(app.problem, x_rest, y_rest), strong((x, y)), ready(app.algorithm, x).init(x, y)


def derive(app: App, data: FederatedData, cohort: int, racing: Racing | None = None) -> Protocol:
    """The protocol of the app's algorithm, or of the race."""
    agreed = Agreement(app, data, cohort, racing)
    return agreed.means(agreed.first).protocol


class Meaning(NamedTuple):
    """What exchanges of a purpose belong to.

    Attributes:
        algorithm, state: the program, and its first state: it counts for its shapes.
    """

    algorithm: Algorithm
    state: PyTree
    protocol: Protocol


class Agreement:
    """What server and sites both know of a run.

    Args:
        data: placeholders for all sites' rows.
        racing: who races; None: the app's algorithm runs.

    Attributes:
        problem, variables: over the trainable parts alone, and those, (x, y).
        first: the purpose of the run's first exchange.
    """

    def __init__(self, app: App, data: FederatedData, cohort: int, racing: Racing | None = None):
        self.problem, self.variables, _ = begin(app, data.prepared)
        self._app, self._data, self._cohort = app, data, cohort
        self._running = app.algorithm
        if racing is not None:
            named = None if racing.entries is None else list(candidates(racing.entries, app.algorithm).values())
            those = entrants(data, cohort, named, racing.many, racing.batch_size)
            self._running, _ = starting(those, self.variables[0])
        self.first = Purpose("run", tuple(range(self._running.size)) if isinstance(self._running, Race) else ())

    def running(self, left: Sequence[int]) -> Algorithm:
        """What runs with those who are left of a race; nobody: there is none.

        Raises:
            RunError: they are none of the race.
        """
        several = range(len(self.first.left))
        if not set(left) <= set(several) or len(set(left)) != len(left) or bool(left) != bool(several):
            raise RunError(f"{list(left)} are no candidates of a race of {len(several)}.")
        race = self._running
        if isinstance(race, Race) and tuple(left) != self.first.left:
            race = race.only([race.place(k) for k in left])
        return as_it_runs(race, self.problem, self._data, *self.variables, self._cohort)

    def means(self, purpose: Purpose) -> Meaning:
        """The program, its first state and its protocol.

        Raises:
            RunError: there is none of that purpose.
        """
        x, y = self.variables
        running = self._validation(purpose) if purpose.name == "validation" else self.running(purpose.left)
        state = running.init(x, y)
        if purpose.name == "scoring":
            if not isinstance(running, Race) or purpose.turns not in (0, TURNS):
                raise RunError("candidates are scored while they race.")
            running, state = (
                scoring_of(running, purpose.turns),
                candidates_of(running, state, self._data.clients, self._cohort),
            )
        return Meaning(running, state, trace(running, self.problem, self._data, state, self._cohort))

    def _validation(self, purpose: Purpose) -> Validation:
        """What is asked at a row of the history; what of it leaves a site is the app's to say."""
        metrics = self._measures if purpose.clients else ()
        if purpose.clients != bool(metrics) or not (purpose.loss or metrics):
            raise RunError("a validation asks for the outer loss, or for the client metrics that the app has.")
        return Validation(purpose.loss, metrics, self._app.share_metrics, self._data.clients)

    @functools.cached_property
    def _measures(self) -> tuple[Measure, ...]:
        """The app's client metrics."""
        x, y = self._app.begin(self._data.prepared)
        rests = trainable(x, "x")[1], trainable(y, "y")[1]
        return measures(checked(self._app.client_metrics), self.problem, self.variables, rests, self._data)


def candidates(entries: Iterable[Entry], own: Algorithm) -> dict[str, Algorithm]:
    """The candidates that are named, by their labels."""
    return {entry.label: of_words(entry.kind, entry.settings, own) for entry in entries}


def client_key(seed: int, purpose: Purpose) -> Key[Array, ""]:
    """The key from which those of clients' answers follow."""
    key, beside = jax.random.key(seed), {"validation": VALIDATION_KEY, "scoring": SCORING_KEY}
    return key if purpose.name == "run" else jax.random.fold_in(key, np.uint32(beside[purpose.name]))


def fingerprint(protocol: Protocol) -> str:
    """What tells one protocol from another: every exchange's method, shapes and dtypes of what travels.

    And where the parts of a reply are combined in several ways, how.
    """
    leaves = lambda tree: [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(tree)]
    sites = [
        [list(path), site.name, leaves(site.message), leaves(site.reply), *_parts(site)]
        for path, site in sorted(protocol.sites.items())
    ]
    text = json.dumps([protocol.algorithm, protocol.clients, protocol.cohort, sites])
    return hashlib.sha256(text.encode()).hexdigest()


def _parts(site: Site) -> list[tuple[str, ...]]:
    """How the parts of a reply are combined, where not all in one way."""
    return [site.combine] if len(set(site.combine)) > 1 else []


def shares(counts: list[list[int]]) -> tuple[list[float], list[float]]:
    """(The sites' weights p_i, and what their outer rows' weights sum to), from their numbers of rows at both levels."""
    inner, outer = np.asarray(counts, float).T
    p = inner / inner.sum()
    return p.tolist(), (outer / outer.sum() / p).tolist()


# What sites say of themselves, before a run begins ------------------------------------------------------------------------


class Hello(Told):
    """What a site says of itself.

    Attributes:
        rows: the schemas of its inner and outer rows.
        counts: how many there are, where that is asked.
        worker: its worker's process number.
        tables: what it says of its tables, where they are prepared (`tables.schema.Described`); `rows` are empty then.
    """

    rows: list[str]
    counts: list[int] | None
    worker: int
    tables: NotRequired[str | None]
    warnings: NotRequired[list[str]]


def checked_hello(name: str, said: Mapping[str, Received], counted: bool, tabled: bool = False) -> Hello:
    """A site's answer to `hello`, if it is one.

    Args:
        counted: whether it has to say how many rows it has.
        tabled: whether it has to say something of its tables.

    Raises:
        RunError: it is something else.
    """
    unread = lambda _: RunError(
        f"site {name} described itself in a way that cannot be read: has it the same fedbilevel?"
    )
    told = read(dict(said), Described, unread, "a description")
    asked = (told.counts is not None, told.tables is not None)
    if not all(map(_inside, told.files)) or asked != (counted, tabled):
        raise unread("")
    return cast(Hello, said)


def _inside(file: str) -> bool:
    parts = PurePosixPath(file).parts
    return bool(parts) and not file.startswith("/") and ".." not in parts and "\0" not in file


def warnings_in(said: Mapping[str, Received]) -> list[str]:
    """What a site warns of, as far as it can be read."""
    found = said.get("warnings")
    return (
        [str(each)[:2000] for each in found[:20] if isinstance(each, str)] if isinstance(found, (list, tuple)) else []
    )


def check_same(name: str, said: Told, mine: Bundle) -> None:
    """Refuse a site whose app is not the server's.

    Raises:
        InputError: with the files and packages that differ.
    """
    files = said["files"]
    known = {file: mine.sha(file) for file in {*mine.files, *files}}
    other = [_apart(file, files.get(file), known[file], "another") for file in sorted(known)]
    check(
        not any(other),
        f"site {name} does not run the server's app: {_some(other)}. Deploy the job anew, to all alike.",
    )
    always, within = (said["packages"], mine.packages), (said["optional"], mine.optional)
    both = {package: (always[0].get(package), always[1].get(package)) for package in {**always[0], **always[1]}}
    both |= {package: (within[0][package], within[1][package]) for package in set(within[0]) & set(within[1])}
    versions = [_apart(package, theirs, ours) for package, (theirs, ours) in sorted(both.items())]
    check(
        not any(versions),
        f"site {name} has other packages than the server: {_some(versions)}. Install the same versions at both.",
    )


def _apart(what: str, theirs: str | None, mine: str | None, word: str = "") -> str:
    """What differs, in words; empty if nothing does."""
    if theirs == mine:
        return ""
    if theirs is None or mine is None:
        has = "it lacks" if theirs is None else "only it has"
        version = "" if word else f" {theirs or mine}"
        return f"{has} {what}{version}"
    return f"it has {word} {what}" if word else f"{what} {theirs}, where the server has {mine}"


def _some(words: list[str]) -> str:
    """The first few of those that are not empty."""
    words = [each for each in words if each]
    return "; ".join(words[:3]) + (f"; and {len(words) - 3} more" if len(words) > 3 else "")


def check_rows(name: str, rows: list[str], first: str, others: list[str]) -> None:
    """Refuse a site whose rows are made up otherwise than the first site's."""
    for level, mine, theirs in zip(("inner", "outer"), rows, others, strict=True):
        check(
            mine == theirs,
            f"{name} has other {level} rows than {first}: {apart(mine, theirs, name, first)}. load() has to return "
            "rows of the same structure, columns, shapes and dtypes at every site.",
        )


def judge_sites(
    app: App, schemas: list[str], said: list[Received], weights: list[float] | None, prepared: Prepared | None = None
) -> None:
    """Refuse a problem that cannot mean what it says, or warn: from what the sites measured on their rows, averaged.

    Raises:
        InputError: a loss does not depend on what it needs, or curves downwards in every direction tried.
    """
    problem, (x, y), _ = begin(app, prepared)
    data = placeholder_data(schemas, 1, None)
    check_influence(problem, x, y, data.inner.client(0).all(), data.outer.client(0).all())
    judge_all(said, weights, y)

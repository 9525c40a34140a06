"""An application on sample data, in one process: what can be run, compared and tuned before anything is deployed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

from .algorithm import Algorithm, Setting
from .app import App
from .callbacks.base import Callback
from .compare import Plan, Source
from .data import FederatedData
from .engines.faults import Faults
from .given import JSON
from .settings import Chosen, algorithm_class, chosen, name_of, whence
from .tasks import Task

OWN = "the app's own"


@dataclasses.dataclass(frozen=True)
class Sampled(Source):
    """An application whose `load` is called for every site here.

    Attributes:
        app: the application.
        sites: their names.
    """

    app: App
    sites: tuple[str, ...]

    @property
    def name(self) -> str:
        """What its results are filed under."""
        return self.app.name

    @property
    def faults(self) -> Faults:
        """What happens when sites fail."""
        return self.app.faults

    @property
    def callbacks(self) -> Sequence[Callback] | Callable[[], Sequence[Callback]]:
        """The application's own."""
        return self.app.callbacks

    def build(self, seed: int) -> Task:
        """All sites' rows side by side, for one seed of cohorts and minibatches."""
        return self.app.task(self.rows, seed)

    @functools.cached_property
    def rows(self) -> FederatedData:
        """All sites' rows, the same for every seed."""
        return self.app.data(list(self.sites))

    def kinds(self, names: Sequence[str]) -> dict[str, type[Algorithm]]:
        """Algorithms by name; the application's own may be none of ours.

        Raises:
            InputError: there is no such algorithm.
        """
        own = type(self.app.algorithm)
        return {name: own if name == name_of(own) else algorithm_class(name) for name in names}

    def choose(self, algorithm: str, given: Mapping[str, Setting]) -> Chosen:
        """The application's own algorithm as it is; another with the same counts of work, and the best known steps."""
        own = self.app.algorithm
        if algorithm == name_of(type(own)):
            changed = dataclasses.replace(own, **given) if given else own
            return Chosen(changed, whence(type(own), OWN, given))
        return chosen(algorithm, self._where, given, _work(own, algorithm_class(algorithm)))

    def filed(self, algorithm: str) -> tuple[str, str] | None:
        """The application's name and file; None for its own algorithm, whose settings the file says."""
        return None if algorithm == name_of(type(self.app.algorithm)) else self._where

    @property
    def _where(self) -> tuple[str, str]:
        return self.name, "app" if self.app.origin is None else str(self.app.origin[0])

    def plan(
        self, engine: str, algorithms: Mapping[str, dict[str, Setting]] | None = None, seeds: int = 1,
        alone: bool = True,
    ) -> Plan:  # fmt: skip
        """What to run: these algorithms, by name with settings beside their own, as the application says.

        Args:
            algorithms: None: its own.
            seeds: how many, from its own on.
            alone: whether its one run lies in the folder itself.
        """
        app, number = self.app, lambda value: None if value is None else int(value)
        several = tuple(range(app.seed, app.seed + seeds))
        return Plan(
            self, {name_of(type(app.algorithm)): {}} if algorithms is None else dict(algorithms), several,
            number(app.iterations), number(app.rounds), number(app.cohort), engine, int(app.evaluate_every),
            app.precision, app.check, alone, keep=app.keep,
        )  # fmt: skip

    def config(self) -> dict[str, JSON]:
        """The application's name and its sites."""
        return {"app": self.name, "clients": len(self.sites)}


def _work(own: Algorithm, kind: type[Algorithm]) -> dict[str, Setting]:
    """How often things are done and how many rows are drawn, where both algorithms say it."""
    counts = lambda it: {f.name for f in dataclasses.fields(it) if f.metadata.get("role") == "count"}
    both = {name: getattr(own, name) for name in sorted(counts(own) & counts(kind))}
    return {name: value for name, value in both.items() if value is not None}

"""Paths of modules and classes of before, and where they are now: an old path still imports, with a DeprecationWarning.

An old path never replaces what its package offers under the same name: after `import fedbilevel.solve`, `fb.solve` would
still be the function if that module had moved.
"""

import importlib
import sys
import warnings
from collections.abc import Iterable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from .errors import calls_up
from .lazy import hides

MOVED = {
    "fedbilevel.exchanges": "fedbilevel.protocol.table",
    "fedbilevel.wire": "fedbilevel.protocol.wire",
    "fedbilevel.algorithms.steps": "fedbilevel.algorithms.components.steps",
    "fedbilevel.algorithms.directions": "fedbilevel.algorithms.components.directions",
    "fedbilevel.algorithms.optimizer": "fedbilevel.algorithms.components.optimizer",
    "fedbilevel.algorithms.simultaneous": "fedbilevel.algorithms.components.simultaneous",
    "fedbilevel.algorithms.curvature": "fedbilevel.pace.curvature",
    "fedbilevel.algorithms.components.curvature": "fedbilevel.pace.curvature",
    "fedbilevel.algorithms.components.keeping": "fedbilevel.pace.keeping",
    "fedbilevel.algorithms.components.lanczos": "fedbilevel.pace.lanczos",
    "fedbilevel.algorithms.tracking": "fedbilevel.algorithms.components.tracking",
    "fedbilevel.algorithms.localbsg": "fedbilevel.algorithms",
    "fedbilevel.algorithms.neumann": "fedbilevel.algorithms.components.neumann",
    "fedbilevel.experiments.cost": "fedbilevel.cost.model",
    "fedbilevel.experiments.network": "fedbilevel.cost.network",
    "fedbilevel.experiments.plan": "fedbilevel.compare",
    "fedbilevel.experiments.report": "fedbilevel.results.report",
    "fedbilevel.experiments.sweep": "fedbilevel.tune.grid",
    "fedbilevel.experiments.memory": "fedbilevel.memory",
    "fedbilevel.engines.client_side": "fedbilevel.engines.messaging.client_side",
    "fedbilevel.engines.server_side": "fedbilevel.engines.messaging.server_side",
    "fedbilevel.engines.transport": "fedbilevel.engines.messaging.transport",
}

# Studies have a package of their own, which is beside the library or is not there.
_STUDIES = ("catalogue", "study", "stages", "search", "shares", "oracles", "tables", "summary", "family", "theory")
_THEORY = ("common", "components", "estimator", "family", "problems", "rounds", "runner", "schedules", "speedup")
MOVED |= {
    f"fedbilevel.experiments.{name}": f"fedbilevel_studies.{name}"
    for name in (*_STUDIES, *(f"theory.{name}" for name in (*_THEORY, "spread", "stationarity", "unequal")))
}

# A package of which nothing is left but what has moved.
EMPTY = "fedbilevel.experiments"

# Classes that have a file of their own now, by where they were.
NAMES = {
    "fedbilevel.algorithms.fedbio.FedBiOAcc": "fedbilevel.algorithms.fedbioacc.FedBiOAcc",
    "fedbilevel.algorithms.fedbio.FedBiOAccLocal": "fedbilevel.algorithms.fedbioacc_local.FedBiOAccLocal",
    "fedbilevel.algorithms.fednest.FedNestSGD": "fedbilevel.algorithms.fednest_sgd.FedNestSGD",
    "fedbilevel.algorithms.lfednest.LFedNestSVRG": "fedbilevel.algorithms.lfednest_svrg.LFedNestSVRG",
    "fedbilevel.algorithms.simfbo.ShroFBO": "fedbilevel.algorithms.shrofbo.ShroFBO",
    "fedbilevel.algorithms.simfbo.MemFBO": "fedbilevel.algorithms.memfbo.MemFBO",
}


class _Package(ModuleType):
    """A package some of whose modules have moved, or a module with classes that have: they are still its attributes."""

    def __getattr__(self, name: str) -> ModuleType | type:
        old = f"{self.__name__}.{name}"
        if old in NAMES:
            return _class_at(old)
        if old not in MOVED:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        module = _now_at(old)
        sys.modules[old] = module
        super().__setattr__(name, module)
        return module

    def __setattr__(self, name: str, value: object) -> None:
        """The import system sets a module that it has loaded: not in the place of what is offered under that name."""
        moved = f"{self.__name__}.{name}" in MOVED
        loaded = isinstance(value, ModuleType)
        if not (moved and name in vars(self)) and not (loaded and hides(self, name)):
            super().__setattr__(name, value)
        if loaded:
            _adopt()


class _Old(MetaPathFinder, Loader):
    """Finds modules under their old paths."""

    def find_spec(
        self, fullname: str, path: Iterable[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        known = fullname in MOVED or fullname == EMPTY
        return ModuleSpec(fullname, self, is_package=fullname == EMPTY) if known else None

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == EMPTY:
            module.__class__ = _Package
        else:
            sys.modules[module.__name__] = _now_at(module.__name__)


def _now_at(old: str) -> ModuleType:
    """The module of an old path; warns the line that asks for it."""
    _warn(old, MOVED[old])
    return importlib.import_module(MOVED[old])


def _class_at(old: str) -> type:
    """The class of an old path; warns as `_now_at` does."""
    _warn(old, NAMES[old])
    module, _, name = NAMES[old].rpartition(".")
    return getattr(importlib.import_module(module), name)


def _warn(old: str, new: str) -> None:
    message = f"{old} is now {new}: import it from there."
    warnings.warn(message, DeprecationWarning, stacklevel=calls_up(sys._getframe()))


def install() -> None:
    """Have old paths imported, and found as attributes of their packages."""
    if not any(isinstance(finder, _Old) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Old())  # first: the package of an old path may be one that has moved
    _adopt()


def _adopt() -> None:
    """Have what is loaded by now find what has moved from it."""
    for old in (*MOVED, *NAMES):
        package = sys.modules.get(old.rpartition(".")[0])
        if package is not None and not isinstance(package, _Package):
            package.__class__ = _Package

"""Which installed package a module belongs to, and its version."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import re
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution
from pathlib import Path

from ..errors import check
from ..version import __version__
from .modules import LIBRARY, elsewhere


class Packages:
    """The installed distributions, as they are now."""

    def __init__(self):
        importlib.invalidate_caches()

    def version(self, name: str, importer: str) -> tuple[str, str | None] | None:
        """(Distribution, version) of a module by its full name; (name, None): it is missing; None: it is Python's, or ours.

        Raises:
            InputError: it is there, and belongs to no installed distribution.
        """
        top = name.partition(".")[0]
        if top == LIBRARY:
            return None
        spec = elsewhere(top) if top != "__main__" else ModuleSpec(top, None, origin="the program that was started")
        if spec is None:
            return top, None
        if _of_python(top, spec):
            return None
        parts = name.split(".")
        for k in range(2, len(parts) + 1):  # into a package that several distributions share
            if spec.origin is not None or spec.submodule_search_locations is None:
                break
            below = elsewhere(".".join(parts[:k]))
            if below is None:
                return None  # a folder without modules, or a name that it does not have
            spec = below
        if spec.origin is None and spec.submodule_search_locations is not None:
            return None
        found = next((each for each in _candidates(top) if self._holds(each, top, spec)), None)
        check(
            found is not None,
            f"{importer} imports {spec.name}, which is neither in the app's folder nor part of an installed package (it "
            f"comes from {spec.origin}), so it can be neither shipped nor compared: put it beside the app, or install it.",
        )
        assert found is not None
        return found.metadata["Name"], found.version

    def _holds(self, distribution: Distribution, top: str, spec: ModuleSpec) -> bool:
        """Whether a module's file is one of a distribution's, by its record."""
        root, origin = Path(str(distribution.locate_file(""))).resolve(), Path(str(spec.origin)).resolve()
        if spec.origin is None or not origin.is_relative_to(root):
            return False
        record = distribution.read_text("RECORD")
        if record is None:  # an old kind: by its modules' names
            return top in (distribution.read_text("top_level.txt") or "").split()
        return re.search(rf'^"?{re.escape(origin.relative_to(root).as_posix())}"?,', record, re.MULTILINE) is not None


def _candidates(top: str) -> Iterator[Distribution]:
    """The one that has the module's name first: to look into all of them takes longer."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        yield importlib.metadata.distribution(top)
    yield from importlib.metadata.distributions()


def library() -> str:
    """This library's version and sources."""
    return f"{__version__} (sources {_sources()})"


@functools.cache
def _sources() -> str:
    """A digest of this library's modules and settings."""
    folder, value = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted([*folder.rglob("*.py"), folder / "settings.toml"]):
        value.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return value.hexdigest()[:12]


def _of_python(top: str, spec: ModuleSpec) -> bool:
    """Whether a module comes with Python."""
    if top not in sys.stdlib_module_names:
        return False
    if spec.origin in (None, "built-in", "frozen"):
        return True
    origin = Path(str(spec.origin)).resolve()
    within = lambda kind: origin.is_relative_to(Path(sysconfig.get_path(kind)).resolve())
    return (within("stdlib") or within("platstdlib")) and not (within("purelib") or within("platlib"))

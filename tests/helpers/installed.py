"""The tests' own folders are no packages of those names."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys

from .places import TESTS


def only_what_is_installed(name: str) -> None:
    """Have `import name` find what is installed, or nothing: never the folder of tests that has the same name.

    The folder of tests is on Python's path, for `helpers`, and a folder without `__init__.py` is a package to Python. With
    PyTorch not installed, `import torch` would find tests/torch, and every library that looks for torch would take it.
    """
    if any(getattr(finder, "name", None) == name for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Installed(name))


def is_installed(name: str) -> bool:
    """Whether `import name` would find something."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


class _Installed:
    def __init__(self, name: str):
        self.name = name

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        found = importlib.machinery.PathFinder.find_spec(name, [entry for entry in sys.path if entry != str(TESTS)])
        if found is None or found.origin is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return found

"""What a package offers, loaded when it is asked for: `import fedbilevel` then costs next to nothing.

The package's `__init__.py` says what it offers by imports under `if TYPE_CHECKING:`, which type checkers read, and we.
A star there (`from .engines.shipped import *`) stands for the imports of that file.
"""

import ast
import importlib
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple


class Place(NamedTuple):
    """Where something offered is: in a module, under a name; without a name it is the module."""

    module: str
    name: str | None


def offered(package: str, file: Path) -> dict[str, Place]:
    """What the imports under `if TYPE_CHECKING:` of a package's file offer, by name."""
    blocks = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.If)]
    held = [block for block in blocks if isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"]
    return dict(found for block in held for found in _imported(block.body, package, file.parent))


def _imported(body: list[ast.stmt], package: str, folder: Path) -> Iterator[tuple[str, Place]]:
    for node in body:
        if not isinstance(node, ast.ImportFrom) or node.level != 1:
            continue
        within = f"{package}.{node.module}" if node.module else package
        for alias in node.names:
            if alias.name == "*":
                shipped = folder.joinpath(*(node.module or "").split(".")).with_suffix(".py")
                lines = ast.parse(shipped.read_text()).body
                yield from _imported(lines, within.rpartition(".")[0], shipped.parent)
            elif node.module:
                yield alias.asname or alias.name, Place(within, alias.name)
            else:
                yield alias.asname or alias.name, Place(f"{within}.{alias.name}", None)


def loading(package: str, file: str) -> tuple[dict[str, Place], Callable[[str], Any], Callable[[], list[str]]]:
    """(What a package offers, its `__getattr__`, its `__dir__`).

    A module of the package is found as its attribute too, whether it was imported before or not.
    """
    found = offered(package, Path(file))

    def get(name: str) -> Any:
        own = sys.modules[package]
        if name in found:
            module = importlib.import_module(found[name].module)
            value = module if (named := found[name].name) is None else getattr(module, named)
        elif not name.startswith("_") and PathFinder.find_spec(f"{package}.{name}", own.__path__):
            value = importlib.import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        vars(own)[name] = value
        return value

    return found, get, lambda: sorted({*vars(sys.modules[package]), *found})


def hides(package: ModuleType, name: str) -> bool:
    """Whether a package offers something else under the name of one of its modules: `fb.solve` is a function."""
    place = vars(package).get("_OFFERED", {}).get(name)
    return place is not None and place.name is not None

"""An app's own modules: those in its folder, imported under names of their own, so that two apps share none.

Code of an app that says `import helper` gets the `helper.py` beside it, also later, from within a
function, and also where the process knows another `helper`: its modules live in `sys.modules` below a
package of the app's own, and `import` in them looks there first. Neither `sys.path` nor the plain names in
`sys.modules` are touched. What runs is compiled from the file as it is, never from a cached `.pyc` (which
is told from a newer one by whole seconds and its length).
"""

from __future__ import annotations

import builtins
import hashlib
import importlib
import importlib.util
import itertools
import sys
import sysconfig
import types
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import (
    BYTECODE_SUFFIXES,
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    ModuleSpec,
    SourceFileLoader,
    SourcelessFileLoader,
)
from pathlib import Path
from typing import TypeAlias, cast

PACKAGE = "fedbilevel_app"  # of the first app of a process; the second's is fedbilevel_app_2
LIBRARY = __name__.partition(".")[0]
_Names: TypeAlias = Mapping[str, object] | None  # of a module, as `import` is given them: they may be of anything
_TAKEN = itertools.count(1)
_ALL: dict[str, Modules] = {}


class Modules:
    """The modules of one app.

    Args:
        folder: the app's.

    Attributes:
        name: of the package that holds them in `sys.modules`.
        sources: module's name in the app -> file, of those that have been loaded.
        ran: file -> sha256 of the text that was run.
        outside: names of modules from elsewhere that the app's code has imported.
    """

    def __init__(self, folder: Path):
        number = next(_TAKEN)
        self.folder, self.name = folder, PACKAGE if number == 1 else f"{PACKAGE}_{number}"
        self.sources: dict[str, Path] = {}
        self.ran: dict[Path, str] = {}
        self.outside: set[str] = set()
        self._added: list[str] = []  # folders within the app's that it has put on sys.path
        self._before: list[str] | None = None  # sys.path, while the app is loaded
        self._builtins = {**vars(builtins), "__import__": self._import}
        self._importlib = _Importlib(self)

    def load(self, file: Path) -> types.ModuleType:
        """Run the app's file."""
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
        package = types.ModuleType(self.name)
        package.__path__ = [str(self.folder)]
        sys.modules[self.name], _ALL[self.name] = package, self
        name = f"{self.name}.__app__"
        spec = importlib.util.spec_from_file_location(name, file, loader=_Source(self, name, str(file.absolute())))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        self._before = list(sys.path)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            self.forget()
            raise
        finally:
            self._added = self._own_paths()
            sys.path[:] = [entry for entry in sys.path if entry not in self._added]
            self._before = None
        return module

    def forget(self) -> None:
        """Take the modules out of `sys.modules`."""
        _ALL.pop(self.name, None)
        for name in [name for name in sys.modules if name == self.name or name.startswith(f"{self.name}.")]:
            del sys.modules[name]

    def find(self, name: str, path: Iterable[str] | None = None) -> ModuleSpec | None:
        """A module of the app by its name in it, in the folders of `path`, by default where the app's imports begin."""
        loaders = (
            (ExtensionFileLoader, EXTENSION_SUFFIXES),
            (cast(type[_Source], partial(_Source, self)), SOURCE_SUFFIXES),
            (SourcelessFileLoader, BYTECODE_SUFFIXES),
        )
        portions: list[str] = []
        full = f"{self.name}.{name}"
        for place in [str(self.folder), *self._own_paths()] if path is None else path:
            spec = FileFinder(place, *loaders).find_spec(full)  # a fresh one each time: it remembers folders
            if spec is not None and spec.loader is not None:
                return spec
            portions += [] if spec is None else spec.submodule_search_locations or []
        if not portions:
            return None
        spec = ModuleSpec(full, None, is_package=True)
        spec.submodule_search_locations = portions
        return spec

    def owns(self, name: str) -> bool:
        """Whether a module, or something in one, means one of the app's own where its code imports it.

        Raises:
            ImportError: it may as well mean one of Python's, or one that is installed and in use.
        """
        top = name.partition(".")[0]
        if top == LIBRARY or top in sys.builtin_module_names:
            return False
        spec = self.find(top)
        if spec is None:
            return False
        other = elsewhere(top)
        if spec.loader is None:  # a folder without __init__.py comes last, as always in Python
            first = ".".join(name.split(".")[:2])
            shared = other is not None and other.origin is None and first != top  # with such folders elsewhere
            return other is None or (shared and self.find(first, spec.submodule_search_locations) is not None)
        installed = _installed(other)
        if installed and other is not None and other.origin == spec.origin:
            return False
        if top in sys.stdlib_module_names or (installed and top in sys.modules):
            raise ImportError(f"{spec.origin} has the name of a module that is not the app's, {top}: rename it")
        return True

    def _own_paths(self) -> list[str]:
        """Folders within the app's that the app has put on sys.path."""
        new = [] if self._before is None else [entry for entry in sys.path if entry not in self._before]
        inside = [entry for entry in new if Path(entry).resolve().is_relative_to(self.folder)]
        return [*self._added, *inside]

    # What `import` does in the app's code -----------------------------------------------------------------------------

    def _import(
        self,
        name: str,
        globals: _Names = None,
        locals: _Names = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> types.ModuleType:
        if level:
            return builtins.__import__(name, globals, locals, fromlist, level)
        if not self.owns(name if not fromlist or fromlist[0] == "*" else f"{name}.{fromlist[0]}"):
            self._note(name, fromlist)
            module = builtins.__import__(name, globals, locals, fromlist, 0)
            return self._importlib if module is importlib else module
        top = name.partition(".")[0]
        try:
            module = builtins.__import__(f"{self.name}.{name}", globals, locals, fromlist or ("__name__",), 0)
        except ModuleNotFoundError as error:
            raise self._plain(error) from None
        return module if fromlist else sys.modules[f"{self.name}.{top}"]

    def import_module(self, name: str, package: str | None = None) -> types.ModuleType:
        """What `importlib.import_module` is in the app's code."""
        if name.startswith(".") or not self.owns(name):
            self._note(name, ())
            return importlib.import_module(name, package)
        try:
            return importlib.import_module(f"{self.name}.{name}")
        except ModuleNotFoundError as error:
            raise self._plain(error) from None

    def _note(self, name: str, fromlist: Sequence[str] | None) -> None:
        if not name.startswith((".", self.name)):
            self.outside |= {f"{name}.{part}" for part in fromlist or () if part != "*"} or {name}

    def _plain(self, error: ModuleNotFoundError) -> ModuleNotFoundError:
        """The error, of a module's name as the app has it."""
        plain = lambda text: text.replace(f"{self.name}.", "")
        return ModuleNotFoundError(plain(str(error)), name=plain(error.name or ""), path=error.path)


class _Source(SourceFileLoader):
    """Runs a module's file as it is, with the app's own `import`."""

    def __init__(self, modules: Modules, name: str, path: str):
        super().__init__(name, path)
        self._modules = modules

    def get_code(self, fullname: str) -> types.CodeType:
        path = self.get_filename(fullname)
        text = self.get_data(path)
        self._modules.sources[fullname.partition(".")[2]] = Path(path)
        self._modules.ran[Path(path)] = hashlib.sha256(text).hexdigest()
        return self.source_to_code(text, path)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__dict__["__builtins__"] = self._modules._builtins
        super().exec_module(module)


class _Finder(MetaPathFinder):
    """Finds the modules below the apps' packages."""

    def find_spec(
        self, fullname: str, path: Iterable[str] | None = None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        top, _, name = fullname.partition(".")
        if top not in _ALL:
            return None
        return _ALL[top].find(name, None if "." not in name else path)


class _Importlib(types.ModuleType):
    """importlib, whose `import_module` finds the app's modules."""

    def __init__(self, modules: Modules):
        super().__init__("importlib")
        self.import_module = modules.import_module

    def __getattr__(self, name: str):
        return getattr(importlib, name)


# Modules from elsewhere ---------------------------------------------------------------------------------------------------


def elsewhere(name: str) -> ModuleSpec | None:
    """Where Python itself would find a module, without importing it (but for the packages that it lies in)."""
    try:
        return importlib.util.find_spec(name)
    except (ImportError, AttributeError):
        return None
    except ValueError:  # it is there, and says not from where
        return ModuleSpec(name, None, origin=getattr(sys.modules.get(name), "__file__", None))


def _installed(spec: ModuleSpec | None) -> bool:
    """Whether it lies where packages are installed."""
    if spec is None or spec.origin is None:
        return False
    places = {Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib")}
    return any(Path(spec.origin).resolve().is_relative_to(place) for place in places)

"""What an app consists of: its modules and declared files, by content, and the packages it imports, by version.

Its modules are found in their text, from import to import, also within functions: so what `load` imports
is known where there are no rows to load. Added are those that were loaded by a computed name. What a
module imports at its top level has to be there everywhere, in one version, or missing everywhere. What is
imported within functions may be missing (a site's own database driver), but has one version where it is.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path, PurePosixPath
from typing import TypedDict

from ..errors import InputError, check
from .imports import imports
from .modules import LIBRARY, Modules
from .packages import Packages, library


class Told(TypedDict):
    """What others compare with theirs, by name: a `Bundle`'s `files`, `packages` and `optional`."""

    files: Mapping[str, str]
    packages: Mapping[str, str | None]
    optional: Mapping[str, str | None]


@dataclasses.dataclass(frozen=True)
class Bundle:
    """What has to be the same wherever an app runs.

    Attributes:
        folder: the app's.
        files: name, relative to the folder -> sha256 of the content.
        packages: distribution -> version, of what is imported wherever the app is; None: it is missing.
        optional: the same of what is imported within functions, where it is there.
    """

    folder: Path
    files: dict[str, str]
    packages: dict[str, str | None]
    optional: dict[str, str]

    def told(self) -> Told:
        """What others compare with theirs."""
        return {"files": self.files, "packages": self.packages, "optional": self.optional}

    def sha(self, name: str) -> str | None:
        """The digest of a file in the folder, part of the app or not; None if there is none."""
        place = self.folder / name
        return self.files.get(name) or (digest(place) if place.is_file() else None)


def digest(path: Path) -> str:
    """What tells one version of a file from another."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bundle(file: Path, modules: Modules, declared: Sequence[str]) -> Bundle:
    """What an app consists of, once it has been loaded.

    Args:
        file: the app's.
        declared: its `App(files=...)`.

    Raises:
        InputError: something can be neither shipped nor compared, or a declared file is missing.
    """
    reader, files = _Reader(modules), {}
    reader.read("__app__", file, lazily=False)
    for name, path in list(modules.sources.items()):
        reader.read(name, path, lazily=True)
    for name, path in declared_files(modules.folder, declared).items():
        files[name] = path
        if name.endswith(".py"):
            reader.reach(name.removesuffix(".py").replace("/", "."), name, lazily=True)
    for name in modules.outside:
        reader.outside.setdefault(name, (file.name, True))
    files = {**files, **{reader.name(path): path for path in reader.paths}, file.name: file}
    known, packages, optional = Packages(), {}, {}
    packages[LIBRARY] = library()
    for name, (importer, lazily) in sorted(reader.outside.items()):
        found = known.version(name, importer)
        if found is not None and (found[1] is not None or not lazily):
            (optional if lazily else packages)[found[0]] = found[1]
    digests = {name: modules.ran.get(path) or digest(path) for name, path in sorted(files.items())}
    return Bundle(modules.folder, digests, packages, {k: v for k, v in optional.items() if k not in packages})


def checked_patterns(patterns: Sequence[str]) -> tuple[str, ...]:
    """`App(files=...)`, names or patterns relative to the app's folder.

    Raises:
        InputError: it is something else, or leads out of the folder.
    """
    sequence = isinstance(patterns, (list, tuple)) and all(isinstance(each, str) and each for each in patterns)
    check(sequence, f"App(files=...) is a list of names, relative to the app's folder; got {patterns!r}.")
    for each in patterns:
        inside = not Path(each).is_absolute() and ".." not in Path(each).parts and not each.startswith("~")
        check(inside, f"App(files=...) names files within the app's folder, relative to it; got {each!r}.")
    return tuple(patterns)


def declared_files(folder: Path, patterns: Sequence[str]) -> dict[str, Path]:
    """The declared files by name.

    Raises:
        InputError: there are none of a name or pattern.
    """
    found = {}
    for each in patterns:
        here = folder / each
        try:
            paths = [here] if here.exists() else sorted(folder.glob(str(PurePosixPath(each))))
        except ValueError as error:
            raise InputError(f"App(files=...) names {each!r}, which is no pattern: {error}.") from None
        check(paths, f"App(files=...) names {each!r}, and there is no such file in {folder}.")
        files = [path for path in paths if path.is_file()]
        check(files, f"App(files=...) names {each!r}, which is a folder in {folder}: name its files, {each + '/*'!r}.")
        found |= {path.relative_to(folder).as_posix(): path for path in files}
    return found


# From import to import -----------------------------------------------------------------------------------------------------


class _Reader:
    """Follows imports through the text of an app's modules.

    Attributes:
        paths: the files of its modules.
        outside: name of a module from elsewhere -> (who imports it, whether only within functions).
    """

    def __init__(self, modules: Modules):
        self._modules = modules
        self._seen: set[tuple[Path, bool]] = set()
        self.paths: set[Path] = set()
        self.outside: dict[str, tuple[str, bool]] = {}

    def name(self, path: Path) -> str:
        """A file's name in the app."""
        folder = self._modules.folder
        inside = path if path.is_relative_to(folder) else path.parent.resolve() / path.name
        return inside.relative_to(folder).as_posix()

    def read(self, name: str, path: Path, lazily: bool) -> None:
        """Follow what a module imports."""
        if {(path, False), (path, lazily)} & self._seen:
            return
        self._seen.add((path, lazily))
        self.paths.add(path)
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        importer = path.name if name == "__app__" else self.name(path)
        try:
            tree = ast.parse(path.read_bytes(), str(path))
        except (SyntaxError, ValueError) as error:
            raise InputError(f"{importer} is no Python: {error}.") from None
        for imported, within in imports(tree, package):
            self.reach(imported, importer, lazily or within)

    def reach(self, name: str, importer: str, lazily: bool) -> None:
        """Follow a module that is imported by this name, of the app or from elsewhere."""
        try:
            own = self._modules.owns(name)
        except ImportError as error:
            raise InputError(f"{importer} imports {name}: {error}.") from None
        if not own:
            known = self.outside.get(name, (importer, True))
            self.outside[name] = known if not known[1] else (importer, lazily)
            return
        parts, path = name.split("."), None
        for k in range(1, len(parts) + 1):
            part = ".".join(parts[:k])
            spec = self._modules.find(part, path)
            if spec is None:  # not a module but something in one
                return
            if spec.loader is not None:
                check(
                    isinstance(spec.loader, SourceFileLoader),
                    f"{importer} imports {spec.origin}, which is compiled code: no other machine may be able to run it, so "
                    "it is not shipped. Install it as a package wherever the app runs.",
                )
                self.read(part, Path(str(spec.origin)), lazily)
            path = spec.submodule_search_locations
            if path is None:
                return

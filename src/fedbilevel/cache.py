"""Compiled programs on disk, in the user's cache folder: a second process does not compile them again.

JAX asks one object for what it has compiled before. From the first program of ours on that is `Disk`, for the whole
process, unless a cache of JAX's own is configured (`jax_compilation_cache_dir`, `JAX_COMPILATION_CACHE_DIR`), or the
environment variable `FEDBILEVEL_CACHE` is `off`, or `off` was called. An entry is written whole or not at all and
carries a digest of what it is and of where it was made, so that a damaged one, or one of another machine or version,
is compiled again. Entries that were not used for the longest go when there are too many bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import jax

from .errors import check, warn
from .given import Whole, whole_number
from .jaxprs import CacheInterface, compilation_cache
from .machine import machine

ENVIRONMENT = "FEDBILEVEL_CACHE"  # `off`, or a folder
MOST = 2**30  # bytes of all entries, those of other machines and versions too
_OFF = ("off", "no", "false", "0")
_ENTRY = "-cache"  # how an entry's name ends
_REFUSED = "refused"  # there, XLA does not take back what it has given here
_DIGEST = 32  # bytes at the start of an entry
_SPARE = 100 * 2**20  # bytes left free on the disk
_JAX_WAITS = 1.0  # JAX's own threshold: what compiles in less seconds it does not keep


class Disk(CacheInterface):
    """What JAX reads compiled programs from and writes them to.

    Args:
        root: where the folders of all machines and versions lie.
        most: bytes of all entries in them; those used last stay.
    """

    def __init__(self, root: Path, most: int = MOST):
        self.root, self.most, self.on = root, most, True
        self._path = root / machine().folder
        self._served: set[str] = set()
        self._unseen = most  # bytes written since all were counted
        _own_folder(self._path)
        if (self._path / _REFUSED).exists():
            self.on = False

    def get(self, key: str) -> bytes | None:
        """The entry of a key; None if there is none, or none that can be trusted."""
        if not self.on or _gave_way():
            return None
        file = self._file(key)
        with contextlib.suppress(OSError):
            digest, value = _apart(file.read_bytes())
            if digest == self._digest(key, value):
                os.utime(file)
                self._served.add(key)
                return value
            file.unlink()
        return None

    def put(self, key: str, value: bytes) -> None:
        """Keep an entry, if there is room."""
        if not self.on or _gave_way():
            return
        try:
            if key in self._served:  # XLA has not taken it back
                self._refuse()
            elif len(value) <= self.most and shutil.disk_usage(self._path).free > len(value) + _SPARE:
                self._write(self._file(key), self._digest(key, value) + value)
                self._count(len(value))
        except OSError as error:
            self.on = False
            _unkept(self._path, error)

    def _file(self, key: str) -> Path:
        return self._path / (hashlib.sha256(key.encode()).hexdigest() + _ENTRY)

    def _digest(self, key: str, value: bytes) -> bytes:
        known = hashlib.blake2b(machine().told.encode(), digest_size=_DIGEST)
        known.update(hashlib.sha256(key.encode()).digest())
        known.update(value)
        return known.digest()

    def _write(self, file: Path, entry: bytes) -> None:
        handle, name = tempfile.mkstemp(dir=self._path, suffix=".writing" + _ENTRY)
        try:
            with os.fdopen(handle, "wb") as out:
                out.write(entry)
            os.replace(name, file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise

    def _refuse(self) -> None:
        """JAX has said so, once: here nothing is kept from now on."""
        self.on = False
        (self._path / _REFUSED).touch()

    def _count(self, written: int) -> None:
        self._unseen += written
        if self._unseen > self.most // 16:
            self._unseen = 0
            prune(self.root, self.most - self.most // 16)


def prune(root: Path, most: int) -> None:
    """Remove entries, those first that were not used for the longest, until all together have at most `most` bytes."""
    found: list[tuple[float, int, Path]] = []
    for file in root.glob(f"jax-*/*{_ENTRY}"):
        with contextlib.suppress(OSError):  # another process has removed it
            seen = file.stat()
            found.append((seen.st_mtime, seen.st_size, file))
    spare = sum(size for _, size, _ in found) - most
    for _, size, file in sorted(found):
        if spare <= 0:
            break
        spare -= size
        with contextlib.suppress(OSError):
            file.unlink()


def _apart(entry: bytes) -> tuple[bytes, bytes]:
    return entry[:_DIGEST], entry[_DIGEST:]


def _own_folder(path: Path) -> None:
    """Make a folder, or see that nobody else can write there: what lies in it is run."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid"):
        found = path.stat()
        if found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise PermissionError(None, "others may write there", str(path))
    if not os.access(path, os.W_OK):
        raise PermissionError(None, "it cannot be written", str(path))


class _Standing:
    """What this process does."""

    def __init__(self):
        self.begun = False
        self.disk: Disk | None = None


_standing = _Standing()


def begin() -> None:
    """Keep what is compiled from now on, unless the user wants otherwise; once for a process."""
    if not _standing.begun:
        _standing.begun = True
        place = _place()
        if place is not None and not _jax_keeps():
            _install(place, MOST)


def use(place: str | os.PathLike[str] | None = None, most: Whole = MOST) -> None:
    """Keep compiled programs of this process in a folder of your choice, or with another bound.

    Args:
        place: a folder, None for the one in the user's cache folder.
        most: the most bytes of all entries in it, at least 1 MiB.
    """
    most = whole_number(most, 2**20, "most= is how many bytes may be kept, at least 2**20")
    check(not _jax_keeps(), "JAX keeps compiled programs already: jax_compilation_cache_dir is set.")
    _standing.begun = True
    _install(_default() if place is None else Path(place).expanduser(), most)


def off() -> None:
    """Neither read nor write compiled programs from now on, in this process."""
    _standing.begun = True
    if _standing.disk is not None:
        _standing.disk.on = False


def folder() -> Path | None:
    """Where compiled programs of this machine and version are kept; None while none are."""
    disk = _standing.disk
    return disk._path if disk is not None and disk.on else None


def _install(place: Path, most: int) -> None:
    try:
        disk = Disk(place, most)
    except OSError as error:
        _unkept(place, error)
        return
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    _standing.disk = compilation_cache._cache = disk


def _jax_keeps() -> bool:
    """Whether the user has configured JAX's own cache, or that there be none."""
    known = jax.config.values
    return bool(known["jax_compilation_cache_dir"]) or not known["jax_enable_compilation_cache"]


def _gave_way() -> bool:
    """Whether the user has configured one since: JAX then makes its own, with its own threshold."""
    if not _jax_keeps():
        return False
    off()
    compilation_cache.reset_cache()
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _JAX_WAITS)
    return True


def _place() -> Path | None:
    named = os.environ.get(ENVIRONMENT, "").strip()
    if named.lower() in _OFF:
        return None
    return Path(named).expanduser() if named else _default()


def _default() -> Path:
    """In the user's cache folder, where this system has it."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():
        base = named
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path.home() / ".cache"
    return base / "fedbilevel" / "xla"


def _unkept(path: Path, error: OSError) -> None:
    warn(
        f"compiled programs cannot be kept in {path} ({error.strerror or error}), so that every process compiles its own: "
        f"name another folder in {ENVIRONMENT}, or set it to off."
    )

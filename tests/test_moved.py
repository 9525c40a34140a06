"""Old module paths still import, with a warning that names the new place; no name of the documentation is lost."""

import importlib
import inspect
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import fedbilevel as fb
from fedbilevel.moved import MOVED, NAMES
from helpers.installed import is_installed

# What docs/api showed when modules began to move: each name, with those of modules that it showed whole.
DOCUMENTED = (Path(__file__).parent / "documented_names.txt").read_text().split()


def found(name):
    """What `from PARENT import NAME` gives, or an attribute of it."""
    parent, _, last = name.rpartition(".")
    try:
        module = importlib.import_module(parent)
    except ModuleNotFoundError:
        return getattr(found(parent), last)
    return getattr(module, last) if hasattr(module, last) else importlib.import_module(name)


@pytest.mark.parametrize("name", DOCUMENTED)
@pytest.mark.filterwarnings("ignore:fedbilevel:DeprecationWarning")
def test_documented_name(name):
    assert found(name) is not None


@pytest.mark.parametrize(
    "name", ["fedbilevel.nothing", "fedbilevel.errors.Nothing", "fedbilevel.FederatedData.nothing"]
)
def test_what_is_gone_is_missed(name):
    with pytest.raises((AttributeError, ModuleNotFoundError)):
        found(name)


def test_the_list_is_whole():
    assert len(DOCUMENTED) == len(set(DOCUMENTED)) > 200
    assert {"fedbilevel.exchanges.Protocol", "fedbilevel.protocol", "fedbilevel.solve.solve"} <= set(DOCUMENTED)


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_is_the_module_at_its_new_place(old, monkeypatch):
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"^{old} is now {MOVED[old]}: import it from there"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(MOVED[old])


@pytest.mark.parametrize("old", NAMES)
def test_a_class_is_found_where_it_was(old):
    parent, _, name = old.rpartition(".")
    new, _, renamed = NAMES[old].rpartition(".")
    with pytest.warns(DeprecationWarning, match=f"^{old} is now {NAMES[old]}: import it from there") as seen:
        kind = getattr(importlib.import_module(parent), name)
    assert kind is getattr(importlib.import_module(new), renamed)
    assert seen[0].filename == __file__


def test_the_warning_points_at_the_import(monkeypatch):
    for ask in ("import fedbilevel.exchanges", "from fedbilevel.exchanges import Protocol", "fb.engines.transport"):
        for old in ("fedbilevel.exchanges", "fedbilevel.engines.transport"):
            monkeypatch.delitem(sys.modules, old, raising=False)
        vars(fb.engines).pop("transport", None)
        with pytest.warns(DeprecationWarning, match="import it from there") as seen:
            exec(compile(ask, "theirs.py", "exec"), {"fb": fb})
        assert [warning.filename for warning in seen] == ["theirs.py"]


def test_an_old_path_replaces_no_public_name(monkeypatch):
    monkeypatch.setitem(MOVED, "fedbilevel.AggITD", "fedbilevel.algorithms.aggitd")
    with pytest.warns(DeprecationWarning, match="is now fedbilevel.algorithms.aggitd"):
        module = importlib.import_module("fedbilevel.AggITD")
    monkeypatch.delitem(sys.modules, "fedbilevel.AggITD")
    assert fb.AggITD is module.AggITD
    assert callable(fb.protocol)
    assert fb.protocol is inspect.unwrap(fb.protocol).__globals__["protocol"]


@pytest.mark.parametrize("folder", ["src", "tests", "examples", "benchmarks", "docs"])
def test_what_is_ours_takes_new_paths(folder):
    root = Path(__file__).parents[1]
    files = [file for kind in ("*.py", "*.md") for file in (root / folder).rglob(kind)]
    own = {"moved.py", Path(__file__).name}
    old = re.compile("|".join(rf"\b{re.escape(path)}\b(?!\.py)" for path in MOVED))
    found = [(file.name, old.findall(file.read_text())) for file in files if file.name not in own]
    assert files and [(name, paths) for name, paths in found if paths] == []
    assert old.findall("from fedbilevel.exchanges import Protocol")


def test_what_is_nowhere_is_not_found():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("fedbilevel.nowhere")
    with pytest.raises(AttributeError, match="module 'fedbilevel' has no attribute 'nowhere'"):
        _ = fb.nowhere


def test_the_library_asks_for_no_old_path():
    """In a fresh process, as most modules are loaded already."""
    left = ["nvflare", "__main__", *(["fedbilevel.torch"] if not is_installed("torch") else [])]
    code = "import pkgutil, importlib, fedbilevel as fb\n" + (
        "for found in pkgutil.walk_packages(fb.__path__, 'fedbilevel.'):\n"
        f"    if not any(part in found.name for part in {left!r}): importlib.import_module(found.name)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "error:fedbilevel:DeprecationWarning", "-c", code], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.import_module("fedbilevel.protocol.table")

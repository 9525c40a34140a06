"""The studies take what docs/api documents of the library, and nothing else: no private name, no private attribute."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import fedbilevel_studies
from helpers.installed import is_installed
from helpers.places import ROOT

SOURCE = Path(fedbilevel_studies.__file__).parent
PAGES = sorted((ROOT / "docs" / "api").rglob("*.md"))
REFERENCE = re.compile(r"^::: (fedbilevel[\w.]*)$", re.M)
LIBRARY = "fedbilevel"


def found(path):
    """What `from PARENT import NAME` gives, or an attribute of it; None if there is no such thing."""
    parent, _, last = path.rpartition(".")
    try:
        module = importlib.import_module(parent) if parent else None
    except ModuleNotFoundError:
        return getattr(found(parent), last, None)
    return getattr(module, last) if hasattr(module, last) else module_at(path)


def module_at(path):
    """The module of a path, even where a name of its package hides it; None if it is none."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        return None


def documented():
    """Dotted paths that docs/api shows: references, what modules shown whole define, and names of tables and examples."""
    text = "\n".join(page.read_text() for page in PAGES)
    known = lambda path: not path.startswith("fedbilevel.torch") or is_installed("torch")
    paths = set(filter(known, REFERENCE.findall(text)))
    for path in list(paths):
        module = module_at(path)
        if module is not None:
            own = [name for name, thing in vars(module).items() if getattr(thing, "__module__", None) == path]
            paths |= {f"{path}.{name}" for name in own if not name.startswith("_")}
    paths |= {f"{LIBRARY}.{name}" for name in re.findall(r"\bfb\.(\w+(?:\.[a-zA-Z]\w*)*)", text)}
    return paths


DOCUMENTED = documented()
SHOWN = [found(path) for path in DOCUMENTED]


def is_documented(path):
    """Whether the path itself is, or leads by public names to the very class or function that is."""
    if path in DOCUMENTED:
        return True
    if any(part.startswith("_") for part in path.split(".")):
        return False
    thing = found(path)
    return callable(thing) and any(thing is each for each in SHOWN)


def taken(text):
    """The paths of the library that a file imports, or reaches through its name."""
    tree, paths, names = ast.parse(text), set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == LIBRARY:
            paths |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == LIBRARY:
                    names[name.asname or LIBRARY] = name.name if name.asname else LIBRARY
                    paths |= {name.name} - {LIBRARY}
    inner = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node not in inner:
            parts, at = [], node
            while isinstance(at, ast.Attribute):
                inner.add(at)
                parts.append(at.attr)
                at = at.value
            if isinstance(at, ast.Name) and at.id in names:
                paths.add(".".join([names[at.id], *parts[::-1]]))
    return paths


def private(text):
    """Attributes with an underscore of other things than `self` and modules of one's own."""
    tree, own = ast.parse(text), {"self", "cls", "super"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            own |= {name.asname or name.name for name in node.names}
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__")
        if not (isinstance(node.value, ast.Name) and node.value.id in own)
    }


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_a_file_takes_documented_names_alone(file):
    text = file.read_text()
    assert [path for path in sorted(taken(text)) if not is_documented(path)] == []
    assert private(text) == set()


def test_together_they_take_a_good_part_of_the_library():
    assert len(FILES) > 20
    assert len(set.union(*(taken(file.read_text()) for file in FILES))) > 30


@pytest.mark.parametrize(
    "text",
    [
        "from fedbilevel.engines.simulation import _SimulatedFederation",
        "from fedbilevel.engines.base import Carry",
        "import fedbilevel as fb\nfb.engines.base.Carry",
        "import fedbilevel.problem\nfedbilevel.problem.strong(x)",
        "from fedbilevel.protocol import as_leaves, protocol",
    ],
)
def test_what_is_not_documented_is_found(text):
    assert [path for path in taken(text) if not is_documented(path)]


@pytest.mark.parametrize(
    "text",
    [
        "from fedbilevel import Problem, solve",
        "import fedbilevel as fb\nfb.FederatedData, fb.tune.sweep",
        "from fedbilevel.tasks import Options",
        "from fedbilevel.errors import check",
    ],
)
def test_what_is_documented_is_let_pass(text):
    assert taken(text) and all(map(is_documented, taken(text)))


def test_private_attributes_are_found():
    assert private("run._carry") == {"_carry"} and private("self._grid\nx.__name__") == set()
    assert private("import numpy as np\nfrom . import tables\ntables._band\nnp._core") == {"_core"}

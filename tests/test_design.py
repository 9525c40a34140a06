"""The rooms of docs/design.md, the contract in pyproject.toml and the imports in src agree; no files import in a circle."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "fedbilevel"
PAGE = (ROOT / "docs" / "design.md").read_text()
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
OPEN = "one file each"  # a room to which files are added that the page need not name


def modules(source=SOURCE):
    """Every module by its dotted name below the library ("" is the library itself), and its file."""
    found = {}
    for file in source.rglob("*.py"):
        parts = file.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def rows(page=PAGE):
    """The rows of the page's table, from the ground up: (module, what it holds)."""
    table = re.findall(r"^\| (?:\*\*[\w ]+\*\*)? *\| `([\w/]+?)(?:\.py|/)` \| (.*) \|$", page, re.MULTILINE)
    return [(name.replace("/", "."), text) for name, text in table]


def imports(module, text, known, package=False):
    """The modules of ours that a file imports, wherever in it: those named, and those whose names it takes."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[2] for name in node.names if name.name.split(".")[0] == "fedbilevel"}
        elif isinstance(node, ast.ImportFrom):
            here = ["fedbilevel", *module.split(".")] if module else ["fedbilevel"]
            up = here[: len(here) - node.level + package] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            if base.split(".")[0] == "fedbilevel":
                base = base.partition(".")[2]
                below = {f"{base}.{name.name}".lstrip(".") for name in node.names}
                found |= (below & known) | ({base} if below - known else set())
    return found - {module}


def graph():
    every = modules()
    return {
        name: imports(name, file.read_text(), set(every), file.name == "__init__.py") for name, file in every.items()
    }


GRAPH = graph()


def place(module, order):
    """Where a module stands in the order: that of the longest of the order's names that it lies in."""
    within = [name for name in order if module == name or module.startswith(f"{name}.")]
    return order.index(max(within, key=len)) if within else -1


def upward(edges, order):
    """Imports of what stands above; nothing stands above the library itself, which imports from everywhere."""
    top = lambda module: len(order) if module == "" else place(module, order)
    return {(a, b) for a, others in edges.items() for b in others if top(b) > top(a)}


def circles(edges):
    """The modules that import themselves, through others."""

    def reached(module):
        found, ahead = set(), [module]
        while ahead:
            new = edges.get(ahead.pop(), set()) - found
            found |= new
            ahead += new
        return found

    return {module for module in edges if module in reached(module)}


ORDER = [name for name, _ in rows()]


def test_every_module_has_a_place_on_the_page():
    top = {name.partition(".")[0] for name in GRAPH} - {""}
    assert len(ORDER) == len(set(ORDER)) > 40
    assert {name.partition(".")[0] for name in ORDER} == top
    assert set(ORDER) <= set(GRAPH)


def unnamed(texts, files):
    """Modules of packages that neither the page names, in the package's row, nor the package's own `__init__.py`."""
    lost = []
    for name, file in files.items():
        if not name or name in texts:
            continue
        text, package = texts[ORDER[place(name, ORDER)]], file.name == "__init__.py"
        called = f"{name.rpartition('.')[2]}{'/' if package else '.py'}"
        listed = (file.parent.parent if package else file.parent).joinpath("__init__.py").read_text()
        if not (called in text or called in listed or (OPEN in text and not package)):
            lost.append(name)
    return lost


def test_the_page_names_what_packages_hold():
    assert unnamed(dict(rows()), modules()) == []


def test_a_file_that_is_not_named_is_missed():
    texts = dict(rows())
    texts["protocol"] = texts["protocol"].replace("`wire.py`", "")
    texts["engines"] = texts["engines"].replace("`messaging/`", "")
    assert sorted(unnamed(texts, modules())) == ["engines.messaging", "protocol.wire"]


def test_the_contract_has_the_order_of_the_page():
    layers = CONTRACTS[0]["layers"]
    assert layers[::-1] == [name for name in ORDER if "." not in name]
    assert CONTRACTS[0]["exhaustive"] and CONTRACTS[0]["containers"] == ["fedbilevel"]


def test_only_the_network_engine_is_ordered_by_itself():
    """What the first contract leaves out is one package, which has a row of its own on the page, and is protected."""
    assert [name for name in ORDER if "." in name] == ["engines.nvflare"]
    assert CONTRACTS[0]["ignore_imports"] == ["fedbilevel.engines.nvflare.** -> fedbilevel.**"]
    assert {a for a, others in GRAPH.items() for b in others if b.startswith("engines.nvflare")} <= {
        name for name in GRAPH if name.startswith(("cli", "engines.nvflare"))
    }


def test_imports_point_the_way_that_the_design_page_says():
    assert upward(GRAPH, ORDER) == set()
    assert upward(GRAPH, ORDER[::-1])


def test_no_circles():
    assert circles(GRAPH) == set()


def test_an_arrow_up_and_a_circle_are_found():
    edges = {"a": {"b"}, "b.x": {"c"}, "c": {"a", "b"}, "": {"a"}}
    assert upward(edges, ["a", "b", "c"]) == {("a", "b"), ("b.x", "c")}
    assert upward({"a": {""}}, ["a"]) == {("a", "")}
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}, "e": set()}) == {"b", "c"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from ..errors import check", {"errors"}),
        ("from .. import errors, rows", {"errors", "rows"}),
        ("from .base import Engine", {"engines.base"}),
        ("from . import base", {"engines.base"}),
        ("from .. import __version__", {""}),
        ("def f():\n    from fedbilevel.rows.one import Read", {"rows.one"}),
        ("import fedbilevel.errors as e\nimport jax", {"errors"}),
        ("import fedbilevel as fb", {""}),
    ],
)
def test_imports_are_read(text, expected):
    known = {"", "errors", "rows", "rows.one", "engines", "engines.base", "engines.loopback"}
    assert imports("engines.loopback", text, known) == expected


def test_a_package_reads_its_own_files():
    assert imports("engines", "from .base import Engine", {"engines.base"}, package=True) == {"engines.base"}


def test_nothing_needs_the_whole_library():
    assert [module for module, others in GRAPH.items() if "" in others] == []


def test_what_algorithms_and_engines_must_not_know():
    """The two sentences below the table, as the contract has them."""
    assert (
        "An algorithm knows `problem` and `federation`, never an engine. An engine knows no algorithm by name." in PAGE
    )
    of = lambda room: {b.partition(".")[0] for a, others in GRAPH.items() if a.startswith(f"{room}.") for b in others}
    assert not of("algorithms") & {"engines", "protocol", "cohorts", "data", "program", "compiled"}
    engines = {b for a, others in GRAPH.items() if a.startswith("engines.") and "nvflare" not in a for b in others}
    assert not [b for b in engines if b.startswith("algorithms")]

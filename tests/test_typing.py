"""The library says what it takes: hardly an `Any`, and hardly a parameter without an annotation."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from helpers.places import ROOT

SOURCE = ROOT / "src"
FEWER_ANYS, FEWER_BARE = 100, 35
SOMETHING = ("Any", "object")  # an alias of these says nothing either


def times_any(folder: Path) -> int:
    """How often the word Any stands there, imports counted."""
    return sum(len(re.findall(r"\bAny\b", file.read_text())) for file in folder.rglob("*.py"))


def bare(source: str) -> list[str]:
    """The functions, by name, that have a parameter without an annotation, self and cls aside."""
    return [node.name for node in ast.walk(ast.parse(source)) if isinstance(node, FUNCTION) and any(unannotated(node))]


FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


def unannotated(function: FUNCTION) -> Iterator[str]:
    taken = function.args
    every = [*taken.posonlyargs, *taken.args, *taken.kwonlyargs]
    every += [each for each in (taken.vararg, taken.kwarg) if each is not None]
    first = [*taken.posonlyargs, *taken.args][:1]
    for each in every:
        if each.annotation is None and not (each in first and each.arg in ("self", "cls")):
            yield each.arg


def aliases(source: str) -> list[str]:
    """Names at the top of a file that are Any or object by another name."""
    assigned = [node for node in ast.parse(source).body if isinstance(node, ast.Assign | ast.AnnAssign)]
    return [ast.unparse(node) for node in assigned if isinstance(node.value, ast.Name) and node.value.id in SOMETHING]


def test_what_is_counted():
    source = """
def f(self, a): ...
def g(a: int, *b: int, c): ...
class C:
    def h(self, *a: int, **b: int): ...
    async def i(cls, *a): ...
"""
    assert bare(source) == ["f", "g", "i"]
    assert aliases("A = Any\nB: TypeAlias = object\nC = int\nD = object()") == ["A = Any", "B: TypeAlias = object"]


def test_few_anys():
    assert 0 < times_any(SOURCE) < FEWER_ANYS


def test_few_parameters_without_an_annotation():
    found = [f"{file}: {name}" for file in SOURCE.rglob("*.py") for name in bare(file.read_text())]
    assert len(found) < FEWER_BARE, found


def test_nothing_is_any_by_another_name():
    assert [each for file in SOURCE.rglob("*.py") for each in aliases(file.read_text())] == []

"""The tables that are kept in docs/tables are, to the letter, what the writers of tables make of their cells."""

import itertools

from fedbilevel.results import pipe_table
from fedbilevel_studies import tables
from helpers.places import ROOT

KEPT = sorted((ROOT / "docs" / "tables").rglob("*.md"))


def found(text):
    """The tables of a page: (headings, rows) of each, and its lines."""
    ruled = itertools.groupby(text.splitlines(), lambda line: line.startswith("| "))
    tables = [list(lines) for inside, lines in ruled if inside]
    split = [[line[2:-2].split(" | ") for line in lines] for lines in tables]
    return [((head, rows), lines) for (head, _, *rows), lines in zip(split, tables, strict=True)]


def test_markdown():
    both = [table for file in KEPT for table in found(file.read_text())]
    assert len(both) > 60
    for cells, lines in both:
        assert pipe_table(*cells).splitlines() == lines


def test_latex():
    both = [file for file in KEPT if file.with_suffix(".tex").exists()]
    assert len(both) > 50
    for file in both:
        [(cells, _)] = found(file.read_text())
        assert tables.latex(*cells) == file.with_suffix(".tex").read_text(), file

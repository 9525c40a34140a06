"""Whatever is written is escaped, and short."""

import math
from xml.etree import ElementTree

import pytest

from fedbilevel.page import markup


@pytest.mark.parametrize("said", ["<b>&\"'", "\x00\x08\x1b\x7f\x9b", "\ud800", "\ufffe", "a" * 5000, None, 3, ["<i>"]])
def test_text_is_text(said):
    wrapped = f'<a b="{markup.text(said)}">{markup.text(said)}</a>'
    wrapped.encode()
    read = ElementTree.fromstring(wrapped)
    assert read.text == read.get("b") and len(read.text) <= 603 and not len(read)


def test_numbers_are_short():
    assert [markup.number(v) for v in (3.0, 1234567.0, 0.123456, math.nan, math.inf, 1e300)] == [
        "3", "1,234,567", "0.1235", "-", "inf", "1e+300",
    ]  # fmt: skip
    assert [markup.size(v) for v in (0, 999, 1120, 2.5e6, 3e9)] == ["0 B", "999 B", "1.12 kB", "2.5 MB", "3 GB"]


def test_sentences_are_escaped_and_cells_are_not():
    assert "&lt;b&gt;" in markup.listed(["<b>"]) and markup.listed([]) == ""
    assert "&lt;b&gt;" in markup.dim("<b>") and "&lt;b&gt;" in markup.folded("<b>", "")
    assert markup.table(["a"], [["<b>1</b>"]], 0).count('class="n"') == 2


def test_the_style_has_both_lights():
    assert "prefers-color-scheme:dark" in markup.STYLE and len(markup.LIGHT) == len(markup.DARK)

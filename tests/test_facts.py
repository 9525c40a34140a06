"""What the pages say of algorithms, tasks, data sets, engines and callbacks is what these say of themselves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fedbilevel as fb
from fedbilevel.algorithm import About
from fedbilevel.algorithms import ALGORITHMS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


@pytest.fixture
def facts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import facts

    return facts


class Another(fb.Lockstep):
    """Lockstep under another name."""

    about = About(name="another", rounds="1", when="never", hypergradient="right", lower="at y*")


def told(page: str) -> list[str]:
    """What a page is told, line by line, and name by name where it is a list within a line."""
    regions = re.findall(r"<!-- facts/[\w-]+ -->(.*?)<!-- end -->", page, re.S)
    return [part for region in regions for part in region.split("\n" if "\n" in region else ", ") if part]


@pytest.mark.parametrize("page", [page for page in PAGES if told(page.read_text())], ids=lambda page: page.stem)
def test_a_page_says_what_the_classes_say(facts, page):
    """It may lack what was added since: mkdocs puts that in, and docs/refresh.py into the file."""
    text = page.read_text()
    now = told(facts.rewrite(text))
    assert [part for part in told(text) if part not in now] == [], "run docs/refresh.py"
    changed = text.replace("cohorts", "nobody").replace("FedNest", "FedBest").replace("digits", "letters")
    changed = changed.replace("loss-tuning", "luck").replace("Progress", "Regress").replace("Simulation", "Emulation")
    assert any(part not in now for part in told(changed))


def test_every_algorithm_is_in_the_tables_and_has_a_page(facts):
    written = facts.pages()
    for name, kind in ALGORITHMS.items():
        assert facts.page_of(kind, written) in facts.algorithms() and f"`{name}`" in facts.algorithms()
        assert f"`{kind.__name__}`" in facts.algorithm_pages() and kind.__module__ in written
        assert kind.about.rounds in facts.of_module(kind.__module__)
        built = facts.on_page_markdown(f"::: {kind.__module__}")
        assert kind.about.hypergradient in built and built.endswith(f"::: {kind.__module__}")


def test_an_algorithm_without_a_page_is_given_one_that_runs(facts, monkeypatch):
    monkeypatch.setitem(ALGORITHMS, "another", Another)
    assert "[`Another`](api/algorithms/another.md)" in facts.algorithms()
    page = facts.made_page(Another)
    assert page.startswith("# Another\n\nLockstep under another name.") and f"::: {__name__}" in page
    monkeypatch.setattr(fb, "Another", Another, raising=False)
    exec(re.search(r"```python\n(.*?)```", page, re.S)[1], {})

"""`fedbilevel reproduce` is another package's: found where that is installed, and missed in one sentence where it is not."""

import importlib.metadata

import pytest

WORDS = [("--list",), ("--help",), ("stationarity", "--quick", "--out", "x"), ()]


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_without_the_studies_it_says_how_to_get_them(words, fedbilevel, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **asked: [])
    code, out, errors = fedbilevel("reproduce", *words)
    assert (code, out, len(errors.splitlines())) == (2, "", 1), errors
    assert "`pip install ./studies`" in errors
    assert list(tmp_path.iterdir()) == []


def test_the_entry_point_is_asked_for_by_name(fedbilevel, monkeypatch):
    asked = []
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **words: asked.append(words) or [])
    fedbilevel("reproduce", "--list")
    assert asked == [{"group": "fedbilevel.commands", "name": "reproduce"}]


def test_with_the_studies_it_is_theirs(fedbilevel):
    code, out, errors = fedbilevel("reproduce", "--list")
    assert (code, errors) == (0, "") and "stationarity" in out
    code, out, errors = fedbilevel("reproduce", "--help")
    assert (code, errors) == (0, "") and "fedbilevel reproduce [OPTIONS] [name]" in out and "--checked-in" in out
    code, out, errors = fedbilevel("reproduce", "--lst")
    assert (code, out) == (2, "") and errors.startswith("fedbilevel: ") and "--lst" in errors
    assert "reproduce" in fedbilevel("--help")[1]

"""Tables by hand-made curves."""

import numpy as np
import pandas
import pytest

from fedbilevel_studies.tuning import report

COLUMNS = ["task", "contender", "length", "seed", "rounds", "bytes", "phi", "test"]


def frame():
    rows = []
    for seed, more in ((0, 0.0), (1, 0.1)):
        add = lambda *row, seed=seed, more=more: rows.append(("t", *row[:2], seed, *row[2:4], row[4] + more, 0.5))
        add("no tuning", 0, 0, 0, 4.0)
        add("no tuning", 0, 100, 50, 4.0)
        for length, last in ((10, 2.0), (30, 1.0)):
            add("random search", length, 0, 0, 4.0)
            add("random search", length, 100, 1e6, 3.0)
            add("random search", length, 300, 3e6, last)
        for rounds, phi in ((0, 4.0), (50, 0.9), (100, 2.0), (150, 0.8), (300, 0.5)):
            add("ours", 0, rounds, rounds * 1e5, phi)
        for rounds, phi in ((0, 4.0), (100, 0.7), (300, 0.6)):
            add("fb.tune", 0, rounds, rounds * 1e5, phi)
    return pandas.DataFrame(rows, columns=COLUMNS)


def test_the_best_length_counts_and_ours_is_there_when_it_stays():
    best = report.best_lengths(frame())
    assert set(best[best["contender"] == "random search"]["length"]) == {30}
    head, lines = report.raced(best)
    line, other = (dict(zip(head, each, strict=True)) for each in lines)
    assert line["best rival"] == "random search" and line["its Phi"] == "1.05 (1-1.1)"
    assert (line["whose"], line["rounds from which it is there"]) == (
        "ours",
        "150",
    )  # it was there at 50, and went away
    assert float(line["that - rival, % of Phi"]) == pytest.approx(-47.7, abs=0.1)
    assert (other["whose"], other["rounds from which it is there"]) == ("fb.tune", "100")


def test_equal_bytes_are_those_of_the_cheapest():
    head, lines = report.reached(report.best_lengths(frame()))
    found = {line[1]: dict(zip(head, line, strict=True)) for line in lines}
    assert found["random search, runs of 30"]["MB"] == "3"
    assert found["ours"]["Phi at equal bytes"] == "4.05 (4-4.1)"  # 3 MB are spent before it has moved
    curve = frame().query("contender == 'ours' and seed == 0")
    assert report.at(curve, "bytes", 3e6) == 4.0 and report.at(curve, "bytes", 6e6) == 0.9


def test_one_who_is_never_there():
    curve = frame().query("contender == 'ours' and seed == 0")
    assert report.held_from(curve, 0.4) == np.inf and report.held_from(curve, 5.0) == 0


def test_files(tmp_path):
    files = report.write(frame(), tmp_path, ("a note.",))
    assert [file.name for file in files] == ["tuning.csv", "tuning.md", "tuning-race.md", "tuning.png"]
    assert all(file.stat().st_size for file in files) and "a note." in files[1].read_text()

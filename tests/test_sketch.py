"""What a run looks like in a notebook: short, whole, and with every name escaped."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import jax
import matplotlib as mpl
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.sketch import line, number, numeric, page, spark, telling
from helpers.quadratic import quadratic

mpl.use("Agg")
EVIL = '<script>alert("1")</script>'
ROWS = fb.History(
    {
        "iteration": k,
        "rounds": 2 * k,
        "bytes_down": 8 * k,
        "bytes_up": 8 * k,
        "seconds": 0.1 * k,
        EVIL: 1 / (k + 1),
        "stopped": EVIL,
    }
    for k in range(5)
)


def test_a_result_is_short_to_print_and_a_table_in_a_notebook():
    q = quadratic(clients=3)
    metrics = {"test_loss": lambda x, y: fb.testing.distance(x, q.x), EVIL: lambda x, y: 1.0}
    result = fb.solve(
        q.problem, q.data, fb.Lockstep(inner_lr=0.02, hessian_lr=0.02, outer_lr=0.01), q.x, q.y, 6,
        key=jax.random.key(0), metrics=metrics,
    )  # fmt: skip
    assert re.fullmatch(r"Result\(Lockstep, 6 iterations: \d+ rounds, [\d,]+ bytes, test_loss \S+, .*\)", repr(result))
    assert len(repr(result)) < 300 and len(repr(result.history)) < 300
    for text in (result._repr_html_(), result.history._repr_html_()):
        ElementTree.fromstring(text)  # well formed
        assert "<script" not in text and "&lt;script" in text and text.count("<svg") >= 3


def test_every_name_is_escaped():
    text = page(EVIL, ROWS)
    ElementTree.fromstring(text)
    assert "<script" not in text
    assert "<script" not in page(EVIL, fb.History())


def test_what_tells_most_comes_first():
    rows = [{"rounds": 1, "turn": 0.1, "test_loss": 1.0, "test_accuracy": 0.5, "never": float("nan"), "stopped": "why"}]
    assert telling(rows) == ["test_accuracy", "test_loss", "turn"]
    assert numeric(rows) == ["rounds", "turn", "test_loss", "test_accuracy", "never"]
    assert line([]) == "no rows" and line([{"a": 1.0}]) == "a 1"


@pytest.mark.parametrize(
    ("value", "text"),
    [(3, "3"), (12345.0, "12,345"), (0.123456, "0.1235"), (float("nan"), "nan"), ("why", "why"), (1e300, "1e+300")],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_a_sparkline_goes_through_all_that_is_finite():
    rows = [{"a": value} for value in (1.0, float("nan"), 3.0, 2.0)]
    points = re.search(r'points="([^"]*)"', spark(rows, "a")).group(1).split()
    across, down = np.array([list(map(float, point.split(","))) for point in points]).T
    assert len(points) == 3 and (np.diff(across) > 0).all() and down[1] < down[2] < down[0]
    assert spark(rows[:2], "a") == ""
    assert spark([{"a": 1.0}, {"a": 1.0}], "a")  # a level line


def test_a_curve(tmp_path):
    axes = ROWS.plot(EVIL, by="iteration")
    assert axes.get_xlabel() == "iteration" and len(axes.lines[0].get_xdata()) == 5
    assert len(ROWS.plot("rounds", EVIL, axes=axes).lines) == 3
    assert ROWS.plot().lines[0].get_label() == EVIL
    axes.figure.savefig(tmp_path / "curve.png")
    for word, sentence in (("stopped", "stopped"), ("lost", "lost")):
        with pytest.raises(fb.InputError, match=sentence):
            ROWS.plot(word)
    with pytest.raises(fb.InputError, match="no rows"):
        fb.History().plot()


def test_rows_as_a_file(tmp_path):
    ROWS.to_csv(tmp_path / "rows.csv")
    import pandas

    frame = pandas.read_csv(tmp_path / "rows.csv")
    assert list(frame.columns) == ROWS.columns and frame["rounds"].tolist() == [0, 2, 4, 6, 8]

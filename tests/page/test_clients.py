"""How clients fare, and what they hold."""

import numpy as np
import pytest

from fedbilevel.page import found
from fedbilevel.page.clients import Held, clients, read
from helpers import folders


def page(folder, held="nobody says"):
    return folders.Page(clients(found.look(folder), held))


def fares(folder, text, place="runs/lockstep-0"):
    (folder / place / "clients.csv").write_text(text)
    return folder


@pytest.fixture
def folder(tmp_path):
    return folders.compared(tmp_path / "out", ("lockstep",), (0,))


def test_each_client_is_a_dot_and_a_row(folder):
    seen = page(fares(folder, "client,rows,accuracy\nnorth,40,0.9\neast,25,\nsouth,60,0.7\n"))
    assert "lowest 0.7 median 0.8 highest 0.9" in seen.text
    assert "north 40 0.9" in seen.text and "east 25 -" in seen.text
    assert [dot.find("title").text for dot in seen.pictures[0].iter("circle")] == ["south: 0.7", "north: 0.9"]
    assert "Labels: not told (nobody says)." in seen.text and "Rows and labels" not in seen.text


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "client\nx\n", "client,loss\nx,y\n", "\x00"])
def test_a_table_that_is_none(folder, text):
    seen = page(fares(folder, text))
    assert read(folder / "runs/lockstep-0/clients.csv") is None and "cannot be read" in seen.text


def test_a_table_without_numbers(folder):
    assert "no numbers" in page(fares(folder, "client,loss\na,\nb,nan\n")).text
    assert "median 3" in page(fares(folder, "client,loss\na,3\nb,3\n")).text


def test_of_many_clients_the_lowest_and_the_highest_are_listed(folder):
    lines = "".join(f"c{k},{k}\n" for k in range(5000))
    seen = page(fares(folder, f"client,loss\n{lines}"))
    assert "40 of 5,000 clients: lowest and highest loss" in seen.text
    assert "c0 0" in seen.text and "c4999 4,999" in seen.text and "c2500" not in seen.text.replace("c2500:", "")
    assert len(list(seen.pictures[0].iter("circle"))) <= 500


def test_without_a_table_it_is_not_told(folder):
    assert "How each fares: not told (no clients.csv). Rows and labels: not told" in page(folder).text


@pytest.mark.parametrize("count", [3, 200])
def test_rows_and_labels(folder, count):
    rows = {"inner": np.arange(count) + 1, "outer": np.full(count, 2)}
    labels = np.stack([np.arange(count), np.full(count, 3)], axis=1)
    seen = page(folder, Held([f"<{k}>" for k in range(count)], rows, labels))
    (svg,) = seen.pictures
    shown = min(count, 40)
    assert len(list(svg.iter("rect"))) == 4 * shown and "<1>, label 0: 1" in [t.text for t in svg.iter("title")]
    assert "2 + 2" in [t.text for t in svg.iter("text")] and ("160 more clients" in seen.text) == (count == 200)
    assert not page(folder, Held(["a"], {"inner": np.ones(1)}, None)).pictures[0].findall("title")

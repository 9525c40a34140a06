"""The table of how clients fare: printed, as a data frame, as a file."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np

import fedbilevel as fb
from fedbilevel.by_client import BAD, EMPTY, GIVEN, NONE, Found, Kept, Measure
from fedbilevel.client_table import table

MEASURES = (Measure("low", "min"), Measure("loss", "max"))
VALUES = np.array([[0.5, 2.0], [0.25, 7.0], [0.0, 3.0], [0.0, 0.0]])
STATUS = np.array([[GIVEN, GIVEN], [GIVEN, GIVEN], [EMPTY, GIVEN], [NONE, NONE]])
WEIGHT = np.where(STATUS == GIVEN, 1.0, 0.0)
NAMES = ("north", "east", "south", "west")


def made(status=STATUS, rows=(3, 1200, 4, 5), weights=None):
    each = Kept(VALUES, np.where(status == GIVEN, WEIGHT, 0.0), status)
    return table(MEASURES, Found.of(None, each, weights), NAMES, rows)


def test_it_is_printed_with_the_mean_the_worst_and_who_has_no_number():
    assert str(made()).splitlines() == [
        "client   rows    low  loss",
        "--------------------------",
        "north       3    0.5     2",
        "east    1,200   0.25     7",
        "south       4      -     3",
        "west        5      -     -",
        "--------------------------",
        "mean           0.375     4",
        "worst           0.25     7",
        "                east  east",
        "west did not answer: left out.",
        "low: south has none: no row counts in its denominator; left out.",
    ]


def test_means_are_by_the_weights_of_those_that_have_a_number():
    found = made(weights=np.array([0.1, 0.3, 0.5, 0.1]))
    np.testing.assert_allclose(found.mean["low"], (0.1 * 0.5 + 0.3 * 0.25) / 0.4, rtol=1e-15)
    assert found.worst_client == {"low": "east", "loss": "east"}


def test_where_one_is_not_finite_there_is_no_mean_and_no_worst():
    status = STATUS.copy()
    status[0, 0] = BAD
    found = made(status)
    assert np.isnan([found.mean["low"], found.worst["low"]]).all() and found.mean["loss"] == 4
    assert "low: north has no finite number; so there is no mean and no worst." in found.notes


def test_where_nobody_has_a_number():
    found = made(np.full_like(STATUS, EMPTY))
    assert np.isnan([*found.mean.values(), *found.worst.values()]).all() and found.worst_client["low"] == ""
    assert "worst" in str(found)


def test_it_is_a_data_frame():
    frame = made().to_dataframe()
    assert frame.columns.tolist() == ["rows", "low", "loss"] and frame.index.tolist() == list(NAMES)
    assert frame.loc["east", "loss"] == 7 and np.isnan(frame.loc["south", "low"])
    assert made(rows=None).to_dataframe().columns.tolist() == ["low", "loss"]


def test_it_is_a_file(tmp_path):
    made().write(tmp_path / "clients.csv")
    with (tmp_path / "clients.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert lines[2] == {"client": "south", "rows": "4", "low": "", "loss": "3.0"}
    made(rows=None).write(tmp_path / "clients.csv")
    assert (tmp_path / "clients.csv").read_text().startswith("client,low,loss\n")


def test_of_many_clients_some_are_printed():
    many = 1000
    each = Kept(np.arange(many * 1.0)[:, None], np.ones((many, 1)), np.full((many, 1), GIVEN))
    names = [f"client {k}" for k in range(many)]
    text = str(table(MEASURES[:1], Found.of(None, each, None), names, None)).splitlines()
    assert len(text) == 27 and text[22] == "... and 980 more"
    silent = Kept(np.zeros((many, 1)), np.zeros((many, 1)), np.full((many, 1), NONE))
    notes = table(MEASURES[:1], Found.of(None, silent, None), names, None).notes
    assert notes == ("client 0, client 1, client 2 and 997 more did not answer: left out.",)


def test_a_run_leaves_it_in_its_folder(tmp_path):
    task = fb.tasks.quadratic(clients=3)
    size = lambda x, y, row: (x**2).sum()
    described = task.describe(fb.Lockstep(inner_lr=0.1, hessian_lr=0.1, outer_lr=0.1), iterations=2)
    fb.results.keep(replace(described, client_metrics={"size": size}), tmp_path / "one", quiet=True)
    assert (tmp_path / "one" / "clients.csv").read_text().startswith("client,rows,size\nclient 0,")
    fb.results.keep(described, tmp_path / "one", quiet=True)
    assert not (tmp_path / "one" / "clients.csv").exists()

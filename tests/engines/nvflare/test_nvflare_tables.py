"""Tables of sites become rows over nvflare as they do in a simulation, and no row of them travels."""

from __future__ import annotations

import json

import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.app import load_app
from helpers import apps, tabled
from helpers.network import call, close, nothing_left, numbers, same_books

pytest.importorskip("nvflare")


def same(out, simulated):
    close(out, simulated, 1e-5)
    same_books(out, simulated)
    assert (out / "prepared.json").read_text() == (simulated / "prepared.json").read_text()


MORE = 'fill={"job": "nobody"}, min_count=8, scale="range", share=("categories", "extremes")'


@pytest.mark.network
@pytest.mark.parametrize(
    ("words", "how"),
    [({}, []), ({"more": MORE, "weights": '"rows"'}, ["--poc"])],
    ids=["simulator", "provisioned"],
)
def test_tables_over_a_network_are_those_of_its_simulation(tmp_path, words, how):
    file = apps.write(tmp_path, tabled.text(**words), "")
    out, simulated = tmp_path / "network", tmp_path / "simulated"
    printed = call("run", file, "--engine", "nvflare", "--out", out, *how)
    call("run", file, "--out", simulated)
    same(out, simulated)
    app = load_app(file)
    assert fb.load_prepared(out) == app.data([f"site-{k}" for k in (1, 2, 3)]).prepared
    took = json.loads((out / "outcome.json").read_text())["tables"]
    assert took["exchanges"] == 2 and 1000 < took["bytes_up"] < 50_000 and 1000 < took["bytes_down"] < 50_000
    assert (
        f"2 exchanges before the first round, {took['bytes_down']:,} bytes down and {took['bytes_up']:,} up" in printed
    )
    nothing_left(tmp_path)
    if not words:
        call("run", file, "--engine", "nvflare", "--out", out, "--resume", "--iterations", 10)
        call("run", file, "--out", simulated, "--resume", "--iterations", 10)
        same(out, simulated)
        kept = numbers(out)
        file.write_text(file.read_text().replace("default_rng(k), 40", "default_rng(k), 41"))
        again = call("run", file, "--engine", "nvflare", "--out", out, "--resume", "--iterations", 12, code=2)
        assert "the tables have changed since the run" in again
        assert np.array_equal(numbers(out), kept)


@pytest.mark.network
def test_sites_whose_columns_differ_are_named_before_the_run(tmp_path):
    file = apps.write(tmp_path, tabled.text().replace('"owner": draw', 'f"owner{k // 3}": draw'), "")
    said = call("run", file, "--engine", "nvflare", "--out", tmp_path / "network", code=2)
    assert "site-3 has a column 'owner1' where site-1 has 'owner0'" in said
    nothing_left(tmp_path)

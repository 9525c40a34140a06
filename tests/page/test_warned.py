"""Warnings: what the history and the checkpoint tell."""

import json

import numpy as np
import pytest

from fedbilevel.diagnosis.swing import Trail
from fedbilevel.page import found
from fedbilevel.page.warned import warned
from fedbilevel.watch import BUCKETS
from helpers import folders


def page(tmp_path, names=("lockstep",), **metrics):
    folder = folders.compared(tmp_path / "out", names, (0,), {**folders.FALLS, **metrics})
    return folder, folders.Page(warned(found.look(folder))).text


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("turn", lambda k: -0.9, "x turns back"), ("turn", lambda k: -0.4, ""), ("turn", lambda k: 0.9, ""),
        ("vector_residual", lambda k: 0.97, "v lags"), ("vector_residual", lambda k: 1 / (k + 1), ""),
        ("vector_growth", lambda k: 1.5, "v grows"), ("vector_growth", lambda k: 0.9, ""),
        ("value", lambda k: "inf" if k == 9 else 1.0, "not finite: value"), ("turn", lambda k: "" if k else -0.9, ""),
        ("halvings", lambda k: k // 10, "went back 1 time, with half"), ("halvings", lambda k: 0, ""),
    ],
)  # fmt: skip
def test_what_the_history_tells(tmp_path, column, value, said):
    _, text = page(tmp_path, **{column: value})
    assert said in text if said else not text


def test_an_x_that_swings_by_the_moves_in_its_checkpoint(tmp_path):
    folder, text = page(tmp_path)
    assert not text
    trail, steps = Trail(), np.arange(400)
    trail._fine = np.cos(2 * np.pi * steps / 20)[-256:, None] * np.ones((1, BUCKETS))
    trail._coarse = trail._fine[:200]
    head = {"format": 2, "totals": {"trail": trail.saved()}}
    file = folder / "runs" / "lockstep-0" / "checkpoint.eqx"
    file.write_bytes(json.dumps(head).encode() + b"\n\x00\x01")
    swing = trail.swing()
    assert swing is not None
    assert f"x swings at the end, with a period of about {2 * swing.half} iterations" in warned(found.look(folder))
    for broken in (b"", b"\x00", b"{}\n", b'{"totals": {"trail": {"fine": 3}}}\n', b'{"totals": 1}\n'):
        file.write_bytes(broken)
        assert not warned(found.look(folder))


def test_what_a_network_has_noted_and_whose_it_is(tmp_path):
    folder, _ = page(tmp_path, ("lockstep", "fednest"))
    told = {"status": "done", "warnings": ["site-1: values become zero."]}
    folders.told(folder / "runs" / "fednest-0", "outcome.json", told)
    assert "fednest, seed 0: site-1: values become zero." in warned(found.look(folder))

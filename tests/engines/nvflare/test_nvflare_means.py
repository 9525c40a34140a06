"""An outer loss of means over the network: the means travel, and the numbers and books are the simulation's."""

from __future__ import annotations

import pytest

from helpers import apps
from helpers.network import call, close, lines, nothing_left, same_books

pytest.importorskip("nvflare")

OF_MEANS = (
    "def outer_of(m):\n        return m['up'] / m['ups'] + (m['up'] / m['ups'] - m['down'] / (1 - m['ups'])) ** 2\n\n"
    "    def outer(x, y, e):\n        loss, up = (e['a'] @ y - e['b']) ** 2, e['b'] > 1\n"
    "        return {'up': jnp.where(up, loss, 0), 'ups': up, 'down': jnp.where(up, 0, loss)}\n\n    def load"
)


@pytest.mark.network
def test_means_travel(tmp_path):
    """With steps that are found, so that what measures knows the means too; and the loss of every row."""
    text = apps.CLOSED_FORM.replace(
        "fb.Problem(inner, outer)", "fb.Problem(inner, outer_means=outer, outer_of=outer_of)"
    )
    a = text.index("def outer(")
    text = text[:a] + OF_MEANS + text[text.index("def load(") + len("def load") :]
    settings = 'iterations=12, algorithm=fb.Lockstep(local_steps=2), weights="rows", keep="validation_loss:min"'
    file = apps.write(tmp_path, text, settings)
    call("run", file, "--out", tmp_path / "simulated", "--clients", 2)
    call("run", file, "--out", tmp_path / "network", "--engine", "nvflare", "--clients", 2)
    close(tmp_path / "network", tmp_path / "simulated", 1e-10)
    same_books(tmp_path / "network", tmp_path / "simulated")
    table = lines(tmp_path / "network" / "history.csv")
    assert float(table[-1]["validation_loss"]) < float(table[0]["validation_loss"])
    nothing_left(tmp_path)

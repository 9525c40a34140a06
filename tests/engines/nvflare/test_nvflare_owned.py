"""An app with leaves of x and y that belong to clients, over nvflare: its simulation, and nobody sees another's blocks."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from helpers import apps, tabled
from helpers.network import call, close, same_books

pytest.importorskip("nvflare")

APP = """
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import fedbilevel as fb
from fedbilevel.engines.messaging.client_side import ClientSide

answer = ClientSide.answer


def noted(side, request):
    with open(Path("FOLDER") / f"{side._name}.bin", "ab") as file:
        file.write(request.payload)
    return answer(side, request)


ClientSide.answer = noted


def inner(x, y, row):
    error = row["a"] @ y["body"] + row["a"][:2] @ y["head"] - row["b"]
    return 0.5 * error**2 + 0.5 * jnp.sum(jnp.exp(x["own"]) * y["head"] ** 2) + jnp.exp(x["all"]) * jnp.sum(y["body"] ** 2)


def outer(x, y, row):
    return 0.5 * (row["a"] @ y["body"] + row["a"][:2] @ y["head"] - row["b"]) ** 2


def start():
    draw = np.random.default_rng(7)
    x = {"own": fb.per_client(draw.normal(size=(3, 2))), "all": jnp.zeros(())}
    return x, {"head": fb.per_client(draw.normal(size=(3, 2))), "body": jnp.zeros(3)}


def load(site):
    draw = np.random.default_rng(sum(map(ord, site)))
    rows = lambda n: {"a": draw.standard_normal((n, 3)), "b": draw.standard_normal(n)}
    count = 6 + int(site[-1])
    return rows(count), rows(count + 2)


app = fb.App(
    problem=fb.Problem(inner, outer), load=load, start=start, algorithm=fb.AggITD(), iterations=4, cohort=2, precision=64,
)
"""


@pytest.mark.network
def test_blocks_over_the_network(tmp_path):
    file, seen = tmp_path / "app.py", tmp_path / "seen"
    seen.mkdir()
    file.write_text(APP.replace("FOLDER", str(seen)))
    out, simulated = tmp_path / "network", tmp_path / "simulated"
    call("run", file, "--engine", "nvflare", "--clients", 3, "--out", out)
    received = {path.stem: np.frombuffer(path.read_bytes()).tolist() for path in seen.glob("*.bin")}
    call("run", file, "--clients", 3, "--out", simulated)
    close(out, simulated, 1e-9)
    same_books(out, simulated)
    blocks = np.random.default_rng(7).normal(size=(2, 3, 2))  # x["own"] and y["head"] at the start
    assert len(received) == 3
    for site, numbers in received.items():
        client = int(site[-1]) - 1
        own, others = set(blocks[:, client].ravel()), set(np.delete(blocks, client, axis=1).ravel())
        assert own & set(numbers)
        assert not others & set(numbers)


@pytest.mark.network
def test_blocks_with_tables_and_metrics_by_client(tmp_path):
    """Each site's own penalty, tables that sites agree on, and how each site fares, in one app."""
    words = {
        "jnp.exp(x) * y": 'jnp.exp(x["own"] + x["all"]) * y',
        "jnp.full(columns, -3.0)": '{"own": fb.per_client(np.zeros(3)), "all": jnp.full(columns, -3.0)}',
        "iterations=8": 'iterations=8, client_metrics={"loss": fb.validation_loss, "right": right}, share_metrics=True',
        "    def start(": """    def right(x, y, row):
        return ((row["a"] @ y["weight"] + y["bias"] > 0) == (row["b"] == 1)) * 1.0

    def start(""",
    }
    text = tabled.text()
    for old, new in words.items():
        assert old in text
        text = text.replace(old, new)
    file = apps.write(tmp_path, text, "")
    out, simulated = tmp_path / "network", tmp_path / "simulated"
    call("run", file, "--engine", "nvflare", "--out", out, "--poc")
    call("run", file, "--out", simulated)
    close(out, simulated, 1e-5)
    same_books(out, simulated)
    assert (out / "prepared.json").read_text() == (simulated / "prepared.json").read_text()
    numbers = lambda folder: pd.read_csv(folder / "clients.csv").set_index("client")[["loss", "right"]]
    pd.testing.assert_frame_equal(numbers(out), numbers(simulated), rtol=1e-5)


@pytest.mark.network
def test_blocks_that_are_kept_at_the_sites(tmp_path):
    """No message has any of them, the rest is the simulation's, and each site has its own at the end of a resumed run."""
    file, seen = tmp_path / "app.py", tmp_path / "seen"
    seen.mkdir()
    text = APP.replace("FOLDER", str(seen)).replace("size=(3, 2)))", 'size=(3, 2)), keep="site")')
    assert text.count('keep="site"') == 2
    steps = "fb.AggITD(inner_lr=0.05, hessian_lr=0.05, outer_lr=0.05)"
    file.write_text(text.replace("fb.AggITD()", steps))
    out, simulated = tmp_path / "network", tmp_path / "simulated"
    call("run", file, "--engine", "nvflare", "--clients", 3, "--iterations", 2, "--out", out)
    call("run", file, "--engine", "nvflare", "--clients", 3, "--resume", "--out", out)
    received = {path.stem: np.frombuffer(path.read_bytes()).tolist() for path in seen.glob("*.bin")}
    call("run", file, "--clients", 3, "--out", simulated)
    with np.load(out / "variables.npz") as here, np.load(simulated / "variables.npz") as there:
        assert sorted(here.files) == ["x['all']", "y['body']"]
        for name in here.files:
            np.testing.assert_allclose(here[name], there[name], rtol=0, atol=1e-9)
        blocks = {"x['own']": there["x['own'].value"], "y['head']": there["y['head'].value"]}
    same_books(out, simulated)
    assert len(received) == 3
    known = set(np.random.default_rng(7).normal(size=(2, 3, 2)).ravel().tolist())
    ends = sorted(out.rglob("blocks.npz"))
    assert len(ends) == 3
    for client, end in enumerate(ends):
        with np.load(end) as own:
            assert sorted(own.files) == sorted(blocks)
            for name, of_all in blocks.items():
                np.testing.assert_allclose(own[name], of_all[client], rtol=0, atol=1e-9)
                known |= set(own[name].ravel().tolist())
    assert not any(known & set(numbers) for numbers in received.values())

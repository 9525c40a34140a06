"""The network engine over nvflare: its simulator here, provisioned in `make test-network`; it is the simulation."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pytest

from helpers import apps
from helpers.network import call, close, compiled_once, lines, nothing_left, same_books

pytest.importorskip("nvflare")

AGGITD = "algorithm=fb.AggITD(inner_rounds=2, inner_lr=0.02, hessian_lr=0.02, outer_lr=0.05, local_steps=2)"
FEDNEST = "algorithm=fb.FedNest(inner_rounds=2, inner_lr=0.02, hessian_lr=0.02, outer_lr=0.05, local_steps=2)"


def test_over_nvflares_simulator_it_is_the_simulation(tmp_path):
    file = apps.write(tmp_path, apps.CLOSED_FORM, f"iterations=10, {apps.LOCKSTEP}")
    keep = ("--keep", "validation_loss:max")  # a round at each row
    assert "best: validation_loss " in call("run", file, "--out", tmp_path / "simulated", *keep)
    out = tmp_path / "network"
    bystander = subprocess.Popen(["tail", "-f", "/dev/null", str(out / "rounds.csv")], stderr=subprocess.DEVNULL)
    try:
        assert "best: validation_loss " in call("run", file, "--out", out, "--engine", "nvflare", *keep)
        assert bystander.poll() is None  # it names the folder, but it is nobody's of the run
    finally:
        bystander.kill()
        bystander.wait()
    close(out, tmp_path / "simulated", 1e-12)
    with np.load(out / "best.npz") as best, np.load(tmp_path / "simulated" / "best.npz") as expected:
        assert best["iteration"] == expected["iteration"] and len(best.files) == len(expected.files) == 5
        assert all(np.allclose(best[name], expected[name], rtol=0, atol=1e-12) for name in expected)
    same_books(out, tmp_path / "simulated")
    compiled_once(out, 3)
    nothing_left(tmp_path)


@pytest.mark.network
def test_it_goes_on_in_32_bits(tmp_path):
    file = apps.write(
        tmp_path, apps.CLOSED_FORM.replace("precision=64", "precision=32"), f"iterations=12, {apps.LOCKSTEP}"
    )
    call("run", file, "--out", tmp_path / "simulated")
    out = tmp_path / "network"
    call("run", file, "--out", out, "--engine", "nvflare", "--iterations", 6)
    call("run", file, "--out", out, "--engine", "nvflare", "--resume")
    close(out, tmp_path / "simulated", 1e-5)
    same_books(out, tmp_path / "simulated")


CAREFUL = """
    import optax.tree

    class Careful(fb.Algorithm):
        def step(self, fed, state):
            both = fed.average(self.both, state.x, state.y, combine=("mean", "maximum"))
            (h, g), steepest = both
            down = lambda a, b: optax.tree.add_scale(a, -0.3 / (1 + steepest), b)
            return fb.State(down(state.x, h), down(state.y, g)), {"steepest": steepest}

        def both(self, client, x, y):
            rows = client.batch("inner", 3)
            h, _ = client.problem.outer_gradients(x, y, client.outer)
            g = client.problem.inner_gradient(x, y, rows)
            return (optax.tree.add(h, x - y), g), optax.tree.norm(g)

    app = fb.App("""


@pytest.mark.network
def test_each_part_of_a_reply_is_combined_in_its_way(tmp_path):
    text = apps.CLOSED_FORM.replace("app = fb.App(", CAREFUL.lstrip("\n "))
    file = apps.write(tmp_path, text, "algorithm=Careful(), iterations=6, weights='rows'")
    call("run", file, "--out", tmp_path / "simulated")
    out = tmp_path / "network"
    call("run", file, "--out", out, "--engine", "nvflare")
    close(out, tmp_path / "simulated", 1e-12)
    same_books(out, tmp_path / "simulated")
    assert len(lines(out / "rounds.csv")) == 6
    told = [lines(place / "history.csv")[1:] for place in (out, tmp_path / "simulated")]
    steepest = [[float(row["steepest"]) for row in rows] for rows in told]
    np.testing.assert_allclose(*steepest, rtol=1e-12)
    nothing_left(tmp_path)


@pytest.mark.network
@pytest.mark.parametrize(("share", "poc"), [("False", False), ("'mean'", False), ("True", True)])
def test_how_each_site_fares_is_the_simulations_and_stays_there_unless_it_is_shared(tmp_path, share, poc):
    how = f"iterations=6, evaluate_every=2, weights='rows', share_metrics={share}, {apps.LOCKSTEP}"
    file = apps.write(tmp_path, apps.FARES, how)
    call("run", file, "--out", tmp_path / "simulated")
    out = tmp_path / "network"
    told = call("run", file, "--out", out, "--engine", "nvflare", *(["--poc"] if poc else []))
    close(out, tmp_path / "simulated", 1e-12)
    same_books(out, tmp_path / "simulated")
    assert ("each site's numbers stay at the site" in told) == (share == "False")
    rows, expected = ([dict(line) for line in lines(place / "history.csv")] for place in (out, tmp_path / "simulated"))
    known = {"False": [], "'mean'": ["low", "rate"], "True": ["low", "low_worst", "rate", "rate_worst"]}[share]
    columns = {"low", "low_worst", "rate", "rate_worst"}
    assert [name for name in rows[0] if name in columns] == known
    for name in known:
        np.testing.assert_allclose(*([float(row[name]) for row in each] for each in (rows, expected)), rtol=1e-12)
    table = {line["client"]: line for line in lines(tmp_path / "simulated" / "clients.csv")}
    for site in ("site-1", "site-2", "site-3"):
        (own,) = out.rglob(f"{site}/metrics.csv")
        last = lines(own)[-1]
        assert (last["low"], last["rate"]) == (table[site]["low"], table[site]["rate"]) and last["iteration"] == "6"
    assert (out / "clients.csv").exists() == (share == "True")
    number = float(table["site-2"]["low"])
    server = b"".join(file.read_bytes() for file in out.iterdir() if file.is_file())
    assert (repr(number).encode() in server) == (share == "True") and np.float64(number).tobytes() not in server
    if share == "True":
        shared = {line["client"]: line for line in lines(out / "clients.csv")}
        assert shared == {
            name: {key: text for key, text in line.items() if key != "rows"} for name, line in table.items()
        }
    nothing_left(tmp_path)


@pytest.mark.network
def test_the_best_cannot_be_kept_by_what_stays_at_the_sites(tmp_path):
    file = apps.write(tmp_path, apps.FARES, f"iterations=2, share_metrics='mean', {apps.LOCKSTEP}")
    told = call("run", file, "--out", tmp_path / "out", "--engine", "nvflare", "--keep", "low_worst:max", code=2)
    assert "keep= names low_worst, and the sites' numbers stay at the sites: App(share_metrics=True)" in " ".join(
        told.split()
    )


def test_a_job_for_an_operator(fedbilevel, tmp_path):
    file = apps.write(tmp_path, apps.CLOSED_FORM, f"iterations=10, {apps.LOCKSTEP}")
    code, printed, errors = fedbilevel("deploy", file, "--out", tmp_path / "jobs", "--clients", 3)
    assert code == 0, errors
    job = tmp_path / "jobs" / "closed-form"
    assert f"nvflare job submit -j {job}" in printed
    assert json.loads((job / "meta.json").read_text())["min_clients"] == 3
    assert len(list(job.rglob("app.py"))) >= 1 and str(tmp_path) not in "".join(
        config.read_text() for config in job.rglob("config_fed_*.json")
    )


# Provisioned, with faults ------------------------------------------------------------------------------------------------


@pytest.mark.network
@pytest.mark.parametrize(
    ("algorithm", "poc"),
    [(AGGITD, True), (FEDNEST, False), (apps.LOCKSTEP, False)],
    ids=["aggitd, provisioned", "fednest, simulator", "lockstep, simulator"],
)
def test_a_network_of_five_sites_is_the_simulation(tmp_path, algorithm, poc):
    file = apps.write(tmp_path, apps.DIGITS, f"iterations=10, {algorithm}")
    call("run", file, "--clients", 5, "--out", tmp_path / "simulated")
    more = ["--poc"] if poc else []
    call("run", file, "--clients", 5, "--out", tmp_path / "network", "--engine", "nvflare", *more)
    close(tmp_path / "network", tmp_path / "simulated", 1e-5)
    same_books(tmp_path / "network", tmp_path / "simulated")
    compiled_once(tmp_path / "network", 5)
    nothing_left(tmp_path)

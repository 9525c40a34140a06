"""Sites of unequal weights that drop out over the network: control variates stay means over all sites."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.app import load_app
from helpers import apps
from helpers.network import call, lines, nothing_left

pytest.importorskip("nvflare")

ABSENT = """
    import multiprocessing
    import jax

    calls = []

    def absent(_):
        calls.append(0)
        site = multiprocessing.current_process().name.rpartition("site-")[2]
        if site.isdigit() and len(calls) % 5 == int(site):  # never all of the three
            raise ConnectionError("nobody at home")
        return np.float32(0.0)

    class Leaky(fb.Lockstep):
        def moves(self, client, x, y, v, c, lam):
            nothing = jax.pure_callback(absent, jax.ShapeDtypeStruct((), np.float32), jnp.zeros((), np.float32))
            return super().moves(client, x, y + nothing, v, c, lam)

    app = fb.App("""
BOWL = 'return 0.5 * (e["a"] @ y - e["b"]) ** 2 + 0.5 * jnp.sum(x**2)\n\n    def load'
SETTINGS = (
    "algorithm=Leaky(inner_lr=0.1, hessian_lr=0.2, outer_lr=0.1, local_steps=2), iterations=400, weights='rows', "
    "faults=fb.Faults(minimum=1, retries=0, exclude_after=None)"
)


@pytest.mark.network
def test_sites_that_drop_out_leave_the_weighted_solution_where_it_is(tmp_path):
    text = apps.CLOSED_FORM.replace("app = fb.App(", ABSENT.lstrip("\n "))
    text = text.replace('return 0.5 * (e["a"] @ y - e["b"]) ** 2\n\n    def load', BOWL)
    file = apps.write(tmp_path, text, SETTINGS)
    out = tmp_path / "network"
    call("run", file, "--out", out, "--engine", "nvflare", "--clients", 3)
    failed = [line for line in lines(out / "rounds.csv") if line["failed"]]
    assert len(failed) > 200 and {site for line in failed for site in line["failed"].split() if "site" in site}
    gradient = slope(file, 3)
    with np.load(out / "variables.npz") as kept:
        end = gradient(kept["x"])
    assert np.linalg.norm(end) < 1e-10 * np.linalg.norm(gradient(np.zeros(4)))
    nothing_left(tmp_path)


def slope(file: Path, sites: int):
    """x -> grad Phi(x), of the app's problem with sites in proportion to their rows."""
    app = load_app(file)
    rows = [app.load(f"site-{k + 1}") for k in range(sites)]
    data = fb.FederatedData.stack(*zip(*rows, strict=True), weights="rows")
    with jax.numpy_dtype_promotion("standard"):
        return lambda x: np.asarray(
            fb.reference.hypergradient(app.problem, data, jnp.asarray(x), jnp.zeros(4), method="exact")
        )

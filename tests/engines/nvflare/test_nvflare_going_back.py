"""Going back over the network: the sites take up the states that counted at the snapshot."""

from __future__ import annotations

import pytest

from helpers import apps
from helpers.network import call, close, lines, nothing_left

pytest.importorskip("nvflare")

FLAT = """
    import jax.numpy as jnp
    import numpy as np
    import fedbilevel as fb

    def inner(x, y, e):
        return jnp.sum(jnp.sqrt(1 + (y - 30 - e["c"]) ** 2)) + 0.5 * jnp.sum(jnp.exp(x) * y**2)

    def outer(x, y, e):
        return 0.5 * jnp.sum((y - 29) ** 2) + 0 * jnp.sum(e["c"])

    def load(site):
        k = int(site.split("-")[1])
        return {"c": np.array([[0.1 * k, -0.1 * k]])}, {"c": np.zeros((1, 2))}

    app = fb.App(
        name="flat", problem=fb.Problem(inner, outer), start=lambda: (jnp.full(2, -5.0), jnp.zeros(2)), load=load,
        precision=64, ALGORITHM
    )
"""
SETTINGS = "algorithm=fb.Lockstep(inner_lr=0.3, hessian_lr='auto', outer_lr=0.05, local_steps=5), iterations=45"


@pytest.mark.network
def test_a_run_over_the_network_goes_back_as_a_simulation_does(tmp_path):
    file = apps.write(tmp_path, FLAT, SETTINGS)
    call("run", file, "--clients", 3, "--out", tmp_path / "simulated")
    call("run", file, "--clients", 3, "--out", tmp_path / "network", "--engine", "nvflare")
    close(tmp_path / "network", tmp_path / "simulated", 1e-10)
    columns = ("iteration", "rounds", "bytes_down", "bytes_up", "halvings")
    books = [
        [[int(line[name]) for name in columns] for line in lines(tmp_path / place / "history.csv")]
        for place in ("network", "simulated")
    ]
    assert books[0] == books[1] and books[0][-1][-1] >= 1
    made = [line["exchange"] for line in lines(tmp_path / "network" / "rounds.csv")]
    assert "meter.curvature" in made  # beside another exchange, and no round
    assert len([name for name in made if name != "meter.curvature"]) == books[0][-1][1]  # what was given up counts
    nothing_left(tmp_path)

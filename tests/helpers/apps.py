"""Applications for the tests of the network engine, as files."""

from __future__ import annotations

import textwrap
from pathlib import Path

CLOSED_FORM = """
    import jax.numpy as jnp
    import numpy as np
    import fedbilevel as fb

    def inner(x, y, e):
        return 0.5 * (e["a"] @ y - e["b"]) ** 2 + 0.5 * jnp.sum(jnp.exp(x) * y**2)

    def outer(x, y, e):
        return 0.5 * (e["a"] @ y - e["b"]) ** 2

    def load(site):
        k = int(site.split("-")[1])
        draw = np.random.default_rng(k)
        rows = lambda n: {"a": draw.normal(size=(n, 4)), "b": draw.normal(size=n) + k}
        return rows(5 + k), rows(3 + k)

    app = fb.App(
        name="closed-form", problem=fb.Problem(inner, outer), start=lambda: (jnp.zeros(4), jnp.zeros(4)), load=load,
        precision=64, ALGORITHM
    )
"""

DIGITS = """
    import jax
    import fedbilevel as fb
    from fedbilevel.tasks import TASKS, Options

    task = TASKS["hyper-representation"].build(Options(dataset="digits", partition="shards", clients=5))

    def load(site):
        i = int(site.split("-")[1]) - 1
        alone = lambda level: jax.tree.map(lambda leaf: jax.device_get(leaf), level.alone(i).rows)
        return alone(task.data.inner), alone(task.data.outer)

    app = fb.App(name="digits", problem=task.problem, start=lambda: (task.x, task.y), load=load, ALGORITHM)
"""

FARES = CLOSED_FORM.replace(
    "    app = fb.App(",
    """
    def low(x, y, e):
        return e["a"] @ y < e["b"] - 2.0

    def rate(x, y, e):
        return low(x, y, e) & (e["b"] > 2.5), e["b"] > 2.5

    app = fb.App(
        client_metrics={"low": low, "rate": rate},""",
)  # how each site fares

LOCKSTEP = "algorithm=fb.Lockstep(inner_lr=0.02, hessian_lr=0.02, outer_lr=0.1, local_steps=2)"


def write(folder: Path, text: str, settings: str) -> Path:
    """An app.py in the folder, with these words at the end of its App(...)."""
    file = folder / "app.py"
    file.write_text(textwrap.dedent(text).replace("ALGORITHM", settings))
    return file

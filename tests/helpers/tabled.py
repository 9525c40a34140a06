"""An application whose sites have tables with text, gaps and large numbers, and what its rows are by hand."""

from __future__ import annotations

APP = """
    import jax
    import jax.numpy as jnp
    import numpy as np
    import pandas as pd
    import fedbilevel as fb

    def table(site):
        k = int(site.split("-")[1])
        draw, rows = np.random.default_rng(k), 40 + 10 * k
        frame = pd.DataFrame({
            "age": draw.normal(40 + 5 * k, 10, rows), "account": 1e9 + draw.normal(k, 1, rows),
            "job": draw.choice(["clerk", "boss", f"only {site}"], rows), "owner": draw.random(rows) < 0.5,
            "rooms": draw.integers(1, 5, rows), "default": draw.choice(["yes", "no"], rows),
        })
        frame.loc[draw.random(rows) < 0.2, "age"] = np.nan
        frame.loc[draw.random(rows) < 0.1, "job"] = None
        return frame[frame.columns[:: 1 if k % 2 else -1]]  # each in its own order

    def load(site):
        frame = table(site)
        return frame[10:], frame[:10]

    def loss(y, row):
        logit = row["a"] @ y["weight"] + y["bias"]
        return jax.nn.softplus(logit) - jnp.where(row["b"] == 1, logit, 0)

    def inner(x, y, row):
        return loss(y, row) + 0.5 * jnp.sum(jnp.exp(x) * y["weight"] ** 2)

    def start(prepared):
        columns = len(prepared.columns)
        return jnp.full(columns, -3.0), {"weight": jnp.zeros(columns), "bias": jnp.zeros(())}

    app = fb.App(
        name="tabled", problem=fb.Problem(inner, lambda x, y, row: loss(y, row)), start=start, load=load,
        prepare=fb.Prepare(label="default", categories=["rooms"], MORE), iterations=8,
        algorithm=fb.Lockstep(inner_lr=0.1, hessian_lr=0.1, outer_lr=0.5), weights=WEIGHTS,
    )
"""


def text(more: str = "", weights: str = "None") -> str:
    """The application's file."""
    return APP.replace("MORE", more).replace("WEIGHTS", weights)

"""Penalties of a common linear model, tuned by three organisations until a budget of bytes is spent."""

import jax.numpy as jnp
import numpy as np

import fedbilevel as fb


class Spent(fb.callbacks.Callback):
    """Stops a run once it has sent so many bytes, and keeps the penalties of each row."""

    def __init__(self, most):
        self.most, self.penalties = most, []

    def record(self, run, rows):
        self.penalties.append(jnp.exp(run.x))
        if (sent := run.bytes_down + run.bytes_up) >= self.most:
            run.stop(f"{sent:,} bytes are sent")


def inner(x, y, row):
    return 0.5 * (row["a"] @ y - row["b"]) ** 2 + 0.5 * jnp.sum(jnp.exp(x) * y**2)


def outer(x, y, row):
    return 0.5 * (row["a"] @ y - row["b"]) ** 2


def load(site):
    draw = np.random.default_rng(int(site.split("-")[1]))
    a, noise = draw.normal(size=(30, 4)), draw.normal(size=30)
    rows = {"a": a, "b": a @ np.array([1.0, -1.0, 0.5, 0.0]) + noise}
    return {name: part[:20] for name, part in rows.items()}, {name: part[20:] for name, part in rows.items()}


app = fb.App(
    name="stopping",
    problem=fb.Problem(inner, outer),
    algorithm=fb.Lockstep(inner_lr=0.05, hessian_lr=0.05, outer_lr=0.5),
    start=lambda: (jnp.zeros(4), jnp.zeros(4)),
    load=load,
    iterations=200,
    callbacks=lambda: [Spent(2_000)],
)

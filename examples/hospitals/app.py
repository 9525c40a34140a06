"""Hospitals tune the penalties of a common diagnosis model, each with its own patients.

    python examples/hospitals/sample.py            sample data for three sites, in examples/hospitals/data
    fedbilevel run examples/hospitals/app.py       simulated on it

Every hospital keeps a file SITE.npz with columns a (patients, 30) and label (patients,). Where it lies is its own affair:
the environment variable SITE_DATA names the folder.
"""

import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax

import fedbilevel as fb


def load(site):
    """One hospital's rows: two thirds to train on, one third to validate."""
    folder = Path(os.environ.get("SITE_DATA", Path(__file__).parent / "data"))
    with np.load(folder / f"{site}.npz") as file:
        a, label = file["a"].astype(np.float32), file["label"].astype(np.float32)
    held = np.arange(len(label)) % 3 == 0
    return {"a": a[~held], "label": label[~held]}, {"a": a[held], "label": label[held]}


def outer(x, y, patient):
    """Cross-entropy of one patient's diagnosis."""
    logit = patient["a"] @ y["weight"] + y["bias"]
    return optax.sigmoid_binary_cross_entropy(logit, patient["label"])


def inner(x, y, patient):
    """The same, and one penalty for each column: exp(x)."""
    return outer(x, y, patient) + 0.5 * jnp.sum(jnp.exp(x) * y["weight"] ** 2) + 0.005 * y["bias"] ** 2


def start():
    """Penalties of one, and a model that knows nothing."""
    return jnp.zeros(30), {"weight": jnp.zeros(30), "bias": jnp.zeros(())}


app = fb.App(
    name="hospitals",
    problem=fb.Problem(inner, outer),
    algorithm=fb.Lockstep(inner_lr=0.1, hessian_lr=0.1, outer_lr=3.0, local_steps=5, outer_steps=5),
    start=start,
    load=load,
    rounds=40,
    faults=fb.Faults(minimum=2, deadline=30.0),
)

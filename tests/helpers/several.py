"""What engines/test_several.py has one, two or four processes do, started by the launcher: `several.py OUT WHAT`.

Each process leaves `OUT/numbers-PROCESS.npz`, the numbers and the books of each run; process 0 alone the other files.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np

import fedbilevel as fb

CLIENTS = 9
WEIGHTS = [1.0, 2.0, 0.5, 1.5, 3.0, 1.0, 0.25, 2.0, 1.0]
CASES = {  # name: (algorithm, cohort)
    "aggitd": (
        fb.AggITD(inner_rounds=3, inner_lr=0.05, local_steps=2, hessian_lr=0.05, outer_lr=0.05, batch_size=2), 4,
    ),
    "lockstep": (fb.Lockstep(inner_lr=0.05, local_steps=2, outer_lr=0.05, hessian_lr="auto"), None),
    "fedmsa": (fb.FedMSA(inner_lr=0.05, hessian_lr=0.05, outer_lr=0.05, local_steps=2, batch_size=2), 4),
    "fedbioacc-local": (fb.FedBiOAccLocal(), 4),
}  # fmt: skip


def inner(x, y, row):
    a, b = row
    return 0.5 * (a @ y - b) ** 2 + 0.5 * np.e ** x["k"] * (y @ y) + x["t"] @ y


def outer(x, y, row):
    a, b = row
    return 0.5 * (a @ y - b) ** 2 + 0.05 * (x["t"] @ x["t"] + x["k"] ** 2)


def rows(client: int, level: int):
    """One client's rows, ragged: the same whoever asks for them."""
    draw = np.random.default_rng((client, level))
    count = 2 + (3 * client + level) % 7
    return draw.normal(size=(count, 3)), client / CLIENTS + draw.normal(size=count)


def start():
    return {"t": np.array([0.3, -0.2, 0.1]), "k": np.array(-0.5)}, np.array([0.1, 0.2, -0.3])


def load(client: int):
    return rows(client, 0), rows(client, 1)


def data(mesh=None):
    """All clients' rows in each process; or over a mesh, of each process its own."""
    return fb.load_clients(load, CLIENTS, mesh=mesh, weights=WEIGHTS)


def norm(x, y):
    return np.linalg.norm(y)


def run(name: str, clients: fb.FederatedData, mesh, folder: Path | None = None, iterations: int = 6, **more):
    algorithm, cohort = CASES[name]
    files = [] if folder is None else [fb.callbacks.CSV(folder / f"{name}.csv"), fb.callbacks.Checkpoint(folder, 0.0)]
    given = {"metrics": {"norm": norm}, "evaluate_every": 2, "callbacks": files} | more
    engine = fb.Simulation(cohort, mesh=mesh)
    return fb.solve(
        fb.Problem(inner, outer),
        clients,
        algorithm,
        *start(),
        iterations,
        key=jax.random.key(3),
        engine=engine,
        **given,
    )


def numbers(result: fb.Result) -> np.ndarray:
    """All that a run leaves, but for seconds."""
    columns = [name for name in result.history.columns if name not in ("seconds", "turn")]
    books = np.concatenate([np.nan_to_num(np.asarray(result.history.column(name), float)) for name in columns])
    trees = jax.tree.leaves((result.x, result.y, result.clients_y, result.state))
    return np.concatenate([books, *(np.ravel(np.asarray(leaf, float)) for leaf in trees)])


def agree(out: Path) -> None:
    """Every case, of rows that all processes hold and of rows that each holds for itself."""
    mesh = fb.processes.join()
    found = {}
    own = data(mesh)
    for name in CASES:
        found[f"{name}/own"] = numbers(run(name, own, mesh, out))
    if jax.process_count() < 3:
        found["lockstep/whole"] = numbers(run("lockstep", data(), mesh))
    np.savez(out / f"numbers-{jax.process_index()}.npz", **found)


class Dying(fb.callbacks.Callback):
    """Ends its process, in the middle of a run."""

    saves = True  # called in all processes

    def __init__(self, how: str, who: int):
        self.how, self.who = how, who

    def advance(self, run):
        if jax.process_index() == self.who and run.iteration >= 5:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "raise":
                raise ValueError("what nobody has thought of")
            sys.exit(int(self.how))


def slow(x, y):
    time.sleep(0.05)  # in process 0: iterations go on for long enough to be ended in their middle
    return np.linalg.norm(y)


def dies(out: Path, how: str, who: str) -> None:
    """A run of hours, of which a process dies."""
    mesh = fb.processes.join()
    (out / f"pid-{jax.process_index()}").write_text(str(os.getpid()))
    ends = [fb.callbacks.Checkpoint(out, 0.0), Dying(how, int(who))]
    run("lockstep", data(mesh), mesh, iterations=10**6, callbacks=ends, metrics={"norm": slow})


def resumes(out: Path, iterations: str) -> None:
    """The rest of it."""
    mesh = fb.processes.join()
    np.save(out / "resumed.npy", numbers(run("lockstep", data(mesh), mesh, iterations=int(iterations), resume=out)))


def whole(out: Path, iterations: str) -> None:
    """A run that is not interrupted."""
    np.save(out / "whole.npy", numbers(run("lockstep", data(), None, iterations=int(iterations))))


def refused(out: Path) -> None:
    """One of the last process's clients has a row that is no number; every process says so, and is done."""
    mesh = fb.processes.join()

    def load(client):
        inner, outer = rows(client, 0), rows(client, 1)
        return inner, (outer[0], outer[1] * np.nan) if client == CLIENTS - 1 else outer

    try:
        fb.load_clients(load, CLIENTS, mesh=mesh, names=[f"site {client}" for client in range(CLIENTS)])
    except fb.InputError as error:
        (out / f"said-{jax.process_index()}").write_text(str(error))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    folder, what, *words = sys.argv[1:]
    {"agree": agree, "dies": dies, "resumes": resumes, "whole": whole, "refused": refused}[what](Path(folder), *words)

"""nvflare jobs: a folder to submit, a run in nvflare's simulator, and a provisioned deployment on this machine."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from ...app import load_app
from ...errors import InputError, RunError, check
from .server import OUTCOME, Server
from .site import Site


def recipe(app: str | Path, settings: dict[str, Any], out: str, resume: bool, sites: int) -> Any:
    """The nvflare recipe of an application; `sites` is how many have to be there before it starts."""
    from nvflare.collab import CollabRecipe

    file, loaded = Path(app), load_app(app).with_(**settings)
    made = CollabRecipe(
        job_name=loaded.name,
        server=Server(app=file.name, name=loaded.name, out=out, settings=settings, resume=resume),
        client=Site(app=file.name, name=loaded.name),
        min_clients=sites,
        sync_task_timeout=600,
    )
    job = made.finalize()
    job.add_file_to_server(str(file))
    job.add_file_to_clients(str(file))
    return made


def export(
    app: str | Path, folder: str | Path, settings: dict[str, Any], resume: bool, sites: int, out: str = ""
) -> Path:
    """Write the job folder that an operator submits with nvflare's own tools; returns it.

    Args:
        sites: how many have to be connected before the job starts.
        out: where the server writes its results; "": in its workspace, under fedbilevel/NAME.
    """
    place = Path(folder)
    check(not place.exists() or place.is_dir(), f"{place} is a file: name a folder for the job.")
    made = recipe(app, settings, out, resume, sites)
    with quiet():
        made.export(str(place))
    return place / made.job_name


def simulate(app: str | Path, out: Path, clients: int, settings: dict[str, Any], resume: bool) -> None:
    """Run in nvflare's simulator: a process for the server and for each site, on this machine."""
    from nvflare.recipe import SimEnv

    made = recipe(app, settings, str(out.resolve()), resume, clients)
    log = out / "nvflare.log"
    place = str((out / "nvflare").resolve())
    # nvflare's own error says less than the outcome
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.suppress(RuntimeError):
        made.run(SimEnv(num_clients=clients, workspace_root=place, log_config="concise"))
    conclude(out)


def conclude(out: Path) -> dict[str, Any]:
    """How the run in a folder went.

    Raises:
        InputError: the app could not be used.
        RunError: the run failed.
    """
    file = out / OUTCOME
    outcome = json.loads(file.read_text()) if file.is_file() else {"status": "failed"}
    sentence = outcome.get("sentence", f"nvflare ended the run before it was done: see {out / 'nvflare.log'}.")
    if outcome["status"] == "refused":
        raise InputError(sentence)
    if outcome["status"] != "done":
        raise RunError(sentence)
    return outcome


@contextlib.contextmanager
def quiet():
    """Keep what nvflare prints to itself."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield

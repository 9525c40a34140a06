"""nvflare jobs of an application: the folder that an operator submits, and what a run on this machine makes of it."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Mapping
from pathlib import Path

from nvflare.collab import CollabRecipe

from ...app import App, load_app
from ...errors import check
from ...given import JSON
from .server import Server
from .site import Site


def _recipe(
    file: Path, loaded: App, settings: Mapping[str, int | str | None], sites: int, out: str, resume: bool,
    tuning: Mapping[str, JSON] | None,
) -> CollabRecipe:  # fmt: skip
    """The nvflare recipe of an application."""
    name = str(file.resolve()) if out else file.name
    made = CollabRecipe(
        job_name=loaded.name,
        server=Server(app=name, name=loaded.name, out=out, settings=settings, resume=resume, tuning=tuning),
        client=Site(app=name, name=loaded.name, keep=str(Path(out) / "sites") if out else ""),
        min_clients=sites,
        sync_task_timeout=600,
    )
    job = made.finalize()
    job.add_file_to_server(str(file))
    job.add_file_to_clients(str(file))
    return made


def export(
    app: str | Path,
    folder: str | Path,
    settings: Mapping[str, int | str | None],
    sites: int,
    *,
    out: str = "",
    resume: bool = False,
    tuning: Mapping[str, JSON] | None = None,
) -> Path:
    """Write the job folder that an operator submits with nvflare's own tools; returns it.

    It holds the app's modules and declared files, in folders as they lie beside the app.

    Args:
        settings: what to change of the app: iterations, rounds, cohort, seed, keep.
        sites: how many have to be connected before it starts.
        out: where the server writes its results, on this machine: the sites then read the app where it
            lies. "": in the server's workspace, under fedbilevel/NAME, and they read what the job holds.
        resume: go on from where server and sites stand.
        tuning: how to tune (`messages.Asked`); None: the app's algorithm runs.

    Raises:
        InputError: the app cannot be used, or something of it can be neither shipped nor compared.
    """
    place, file, loaded = Path(folder), Path(app), load_app(app).with_(**settings)
    check(not place.exists() or place.is_dir(), f"{place} is a file: name a folder for the job.")
    parts = loaded.bundle()
    made = _recipe(file, loaded, settings, sites, out, resume, tuning)
    shutil.rmtree(place / made.job_name, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()):
        made.export(str(place))
    for custom in (place / made.job_name).glob("*/custom"):
        shutil.rmtree(custom)  # nvflare adds our own sources: every site has fedbilevel itself
        for name in parts.files:
            source = file if name == file.name else parts.folder / name
            (custom / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, custom / name)
    return place / made.job_name

"""What a site's nvflare process lets the server do: a few methods, whose arguments are checked first."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from nvflare.collab import collab

from ...given import JSON, Received
from .messages import Answer, Finish, Header, Measure, Prepare, Restart, Setup, plain, read
from .worker import START_SECONDS, Worker, WorkerDied, WorkerSaid

_GRACE = 1.0  # seconds by which a worker has to be done before the server stops waiting


class Site:
    """A site of the federation.

    Args:
        app: the name of the application's file, in the job's folder for custom code.
        name: what states are filed under.
        keep: folder for states, on this machine; "": in the site's workspace, under fedbilevel.
    """

    def __init__(self, app: str = "app.py", name: str = "app", keep: str = ""):
        self.app, self.name, self.keep = app, name, keep
        self._lock = threading.Lock()
        self._worker: Worker | None = None
        self._setup: dict[str, JSON] | None = None

    @collab.publish
    def hello(self) -> dict[str, Received]:
        """Load this site's rows, and say what one row looks like."""
        _only_the_server()
        with self._lock:
            self._end()
            return self._said(self._start)

    @collab.publish
    def measure(self, common: Received) -> dict[str, Received]:
        """Measure the columns that all sites' tables have in common."""
        _only_the_server()
        asked = read(common, Measure, _refused, "what tables have in common")
        with self._lock:
            return self._said(lambda: self._running().ask("measure", b"", START_SECONDS, **plain(asked))[0])

    @collab.publish
    def prepare(self, setup: Received) -> dict[str, Received]:
        """Get ready: which site this is of how many, the seed, the cohort, the protocol's fingerprint."""
        _only_the_server()
        with self._lock:
            mine = self._setup = _setup(setup, collab.site_name)
            return self._said(lambda: self._running().ask("prepare", b"", START_SECONDS, **mine)[0])

    @collab.publish
    def answer(self, header: Received, payload: bytes) -> dict[str, Received]:
        """Answer a request."""
        _only_the_server()
        request, deadline = _request(header, payload, collab.site_name)
        with self._lock:

            def ask() -> dict[str, Received]:
                worker = self._ready()
                said, numbers = worker.ask("answer", payload, max(deadline - _GRACE, deadline / 2), **request)
                return {**said, "worker": worker.pid, "numbers": numbers}

            return self._said(ask)

    @collab.publish
    def alive(self) -> bool:
        """A sign of life, given even while a worker is busy."""
        return True

    @collab.publish
    def restart(self, header: Received, payload: bytes) -> dict[str, Received]:
        """Begin anew with the state that (x, y) gives."""
        _only_the_server()
        asked = read(header, Restart, _refused, "a header")
        _check(isinstance(payload, bytes), "restart takes bytes")
        with self._lock:
            return self._said(lambda: self._ready().ask("restart", payload, START_SECONDS, **plain(asked))[0])

    @collab.publish
    def finish(self, states: Received, iterations: Received) -> dict[str, Received]:
        """The run is over: write down what is this site's own; `states` has the tag of each site's state that counts."""
        _only_the_server()
        if not isinstance(states, dict) or collab.site_name not in states:
            raise _refused("states has a tag for each site")
        told = {"counted": states[collab.site_name], "iterations": iterations}
        mine = read(told, Finish, _refused, "a tag")
        with self._lock:
            return self._said(lambda: self._ready().ask("finish", b"", START_SECONDS, **plain(mine))[0])

    @collab.final
    def final(self) -> None:
        """The job is over."""
        self._end()

    # The worker -----------------------------------------------------------------------------------------------------

    def _start(self) -> dict[str, Received]:
        workspace, job = collab.workspace, collab.fl_ctx.get_job_id()
        file = Path(workspace.get_app_custom_dir(job)) / self.app
        folder = Path(self.keep or Path(workspace.get_root_dir()) / "fedbilevel") / self.name / collab.site_name
        self._worker = Worker(str(file), collab.site_name, str(folder))
        return {**self._worker.ask("load", deadline=START_SECONDS)[0], "worker": self._worker.pid}

    def _running(self) -> Worker:
        """A worker that has its rows; one that died is started again."""
        if self._worker is None or not self._worker.alive:
            self._start()
        assert self._worker is not None
        return self._worker

    def _ready(self) -> Worker:
        """A worker that can answer; one that died is prepared again, with the state that it left."""
        if self._setup is None:
            raise WorkerSaid("this site has not been told what to prepare for", "failed")
        if self._worker is not None and self._worker.alive:
            return self._worker
        try:
            self._running().ask("prepare", **{**self._setup, "resume": True, "check": False})
        except WorkerSaid:  # alive, but it could not answer: begin anew next time
            self._end()
            raise
        return self._running()

    def _said(self, ask: Callable[[], dict[str, Received]]) -> dict[str, Received]:
        try:
            return ask()
        except WorkerSaid as error:
            return {"error": str(error), "kind": error.kind}
        except WorkerDied as error:
            return {"error": str(error), "kind": "died"}

    def _end(self) -> None:
        if self._worker is not None:
            self._worker.end()
        self._worker = None


# What the server may say -----------------------------------------------------------------------------------------------


def _only_the_server() -> None:
    """Refuse other sites, whom nvflare would let call as well."""
    _check(collab.caller == "server", f"only the server may ask; this was {collab.caller}")


def _check(good: bool, what: str) -> None:
    if not good:
        raise _refused(what)


def _refused(what: str) -> ValueError:
    return ValueError(f"this site refuses the call: {what}.")


def _request(header: Received, payload: Received, site: str) -> tuple[dict[str, JSON], float]:
    """(What this site's worker is to answer, the deadline), checked."""
    asked = read(header, Header, _refused, "a header")
    _check(isinstance(payload, bytes), "a payload is bytes")
    _check(site in asked.states, "states has two tags for each site")
    counted, kept = asked.states[site]
    answer = Answer(asked.place, asked.tag, asked.sent, asked.wanted, counted, kept, asked.purpose)
    return plain(answer), asked.deadline


def _setup(setup: Received, site: str) -> dict[str, JSON]:
    """What this site's worker is to prepare for, checked."""
    asked = read(setup, Setup, _refused, "a setup")
    order, scales = asked.order, asked.scales
    _check(site in order, "the order of the sites names this one")
    _check(scales is None or len(scales) == len(order), "scales are numbers, one for each site")
    index = order.index(site)
    scale = None if scales is None else scales[index]
    how = asked.protocol, asked.resume, asked.check, asked.racing, asked.prepared
    return plain(Prepare(index, len(order), asked.cohort, asked.seed, scale, *how))

"""The server's side: gets to know the sites, runs the server program, keeps the books."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Key, PyTree
from nvflare.collab import collab

from ...algorithm import Algorithm
from ...app import App, load_app
from ...app import schema as rows_schema
from ...best import goal
from ...callbacks import Callback
from ...callbacks.base import Running
from ...cohorts import check_cohort
from ...data import FederatedData
from ...errors import InputError, RunError, noting, warn, with_notes
from ...given import JSON, Whole
from ...owned import kept
from ...problem import Problem, strong
from ...program import freeze
from ...protocol import step as iteration
from ...race.scoring import Scoring
from ...result import Result
from ...results.folder import CONFIG, ROUNDS, TABLES
from ...results.kept import ended, keep, tell, went_on
from ...sampled import Sampled
from ...tables import measured, schema
from ...tables.prepared import Prepared, settled
from ...tables.wanted import Prepare
from ...tune.entrants import lineup
from ...tune.kept import Tuning, chosen, keep_tuned
from ...tune.tuning import Tuned
from ...validation import Validation
from ..base import Carry, Engine, Execution, Program, plan
from ..faults import Faults
from ..messaging.server_side import Messaging
from ..messaging.transport import Purpose
from .agreement import (
    candidates,
    check_rows,
    check_same,
    checked_hello,
    derive,
    fingerprint,
    judge_sites,
    placeholder_data,
    shares,
    warnings_in,
)
from .calls import Results, Sites, sites
from .ledger import Ledger
from .messages import Asked, Measure, Racing, Setup, plain, read
from .transport import CollabTransport, no_answer, refusal

_START = 660.0  # seconds within which all sites have loaded their rows, or derived the protocol
_END = 120.0  # within which all sites have written down what is theirs


class Server:
    """Runs an application's server program over nvflare.

    Args:
        app: the name of the application's file, in the job's folder for custom code.
        name: what results are filed under.
        out: folder for the results; "": in the server's workspace, under fedbilevel/NAME.
        settings: what to change of the app: iterations, rounds, cohort, seed, keep.
        tuning: how to tune (`messages.Asked`); None: the app's algorithm runs.
        resume: go on from the checkpoint in that folder.
    """

    def __init__(
        self,
        app: str = "app.py",
        name: str = "app",
        out: str = "",
        settings: Mapping[str, int | str | None] | None = None,
        resume: bool = False,
        tuning: Mapping[str, JSON] | None = None,
    ):
        self.app, self.name, self.out, self.settings, self.resume = app, name, out, settings or {}, resume
        self.tuning = tuning

    @collab.main
    def run(self) -> None:
        """The whole run; what became of it is in outcome.json, and a sentence in the log."""
        workspace, job = collab.workspace, collab.fl_ctx.get_job_id()
        file = Path(workspace.get_app_custom_dir(job)) / self.app
        folder = Path(self.out or Path(workspace.get_root_dir()) / "fedbilevel" / self.name)
        folder.mkdir(parents=True, exist_ok=True)
        outcome: dict[str, JSON] = {"status": "running"}
        tell(folder, outcome)
        warned: list[str] = []
        try:
            with noting(warned):
                app = load_app(file).with_(**self.settings)
                jax.config.update("jax_enable_x64", app.precision == 64)
                result, told = federate(app, folder, self.resume, self.tuning)
            outcome = {
                **ended(result),
                **went_on(folder),
                **({"chosen": chosen(result)} if isinstance(result, Tuned) else {}),
                **told,
            }
        except InputError as error:
            outcome = {"status": "refused", "sentence": str(error)}
        except RunError as error:
            outcome = {"status": "failed", "sentence": with_notes(error)}
        except BaseException as error:
            outcome = {"status": "failed", "sentence": f"{type(error).__name__}: {error}"}
            raise
        finally:
            tell(folder, outcome | {"warnings": warned})
            for sentence in warned:
                print(f"fedbilevel: warning: {sentence}", file=sys.stderr)
            print(f"fedbilevel: {outcome['status']}: {outcome.get('sentence', folder)}", file=sys.stderr, flush=True)


def federate(
    app: App, folder: Path, resume: bool, tuning: Mapping[str, JSON] | None = None
) -> tuple[Result, dict[str, JSON]]:
    """Get to know the sites, and solve, or tune: (the result, what sites compiled and what agreeing on tables took)."""
    asked = None if tuning is None else read(dict(tuning), Asked, InputError, "tuning")
    names = sorted(proxy.name for proxy in collab.clients)
    engine = Collab(names, app.faults, folder / ROUNDS, resume, app.cohort)
    try:
        weights = engine.meet(app, asked)
        tell(folder, {"status": "running", "workers": engine.transport.workers})
        # the sites have looked at their rows
        data = placeholder_data(engine.schemas, len(names), weights, names, engine.prepared)
        if asked is None:
            _configure(folder, lambda: Sampled(app, tuple(names)).plan("nvflare").config(len(names)))
            result = keep(app.describe(data, engine), folder, resume=resume, every=0.0, callbacks=[AtTheEnd(engine)])
        else:
            tuned = _tuning(app, names, data, engine, asked)
            _configure(folder, tuned.config)
            result = keep_tuned(tuned, folder, resume=resume, quiet=True, every=0.0)
    finally:
        engine.ledger.close()
    told: dict[str, JSON] = {"compiled": engine.transport.traced, "workers": engine.transport.workers}
    return result, {"sites": told, **({TABLES: engine.tables} if engine.tables else {})}


def _configure(folder: Path, config: Callable[[], Mapping[str, JSON]]) -> None:
    """Leave config.json, where the command line that started the run has not."""
    if not (folder / CONFIG).is_file():
        (folder / CONFIG).write_text(json.dumps(config(), indent=2) + "\n")


def _tuning(app: App, names: list[str], data: FederatedData, engine: Collab, asked: Asked) -> Tuning:
    """What is tuned, and how, over these sites."""
    plan = dataclasses.replace(Sampled(app, tuple(names)).plan("nvflare"), check=False)
    named = None if asked.entries is None else candidates(asked.entries, app.algorithm)
    wanted = None if asked.metric is None else goal(asked.metric)
    return Tuning(
        plan, app.task(data), wanted, named, candidates=asked.candidates, batch_size=asked.batch_size,
        max_bytes=asked.max_bytes, network=engine,
    )  # fmt: skip


class AtTheEnd(Callback):
    """Has each site write down what is its own, if sites have something: a lower variable, or blocks that are kept there."""

    def __init__(self, engine: Collab):
        self._engine = engine

    def finish(self, run: Running, error: BaseException | None) -> None:
        own = run.lower.own or kept((run.carry.state.x, run.carry.state.y))
        if own and (error is None or isinstance(error, RunError)):
            self._engine.finish(run.carry.client_state, run.carry.iteration)


class Collab(Engine):
    """The engine: sites reached by nvflare's collab calls.

    Attributes:
        schemas: what one row looks like at either level, once the sites are known.
        prepared, tables: how tables become rows, where they do, and what agreeing on it took.
    """

    def __init__(self, names: list[str], faults: Faults, rounds: Path, resume: bool, cohort: Whole | None):
        self.names, self.faults, self.resume, self.cohort = names, faults, resume, cohort
        self.transport, self.ledger = CollabTransport(names), Ledger(rounds, names, resume)
        self.schemas: list[str] = []
        self.prepared: Prepared | None = None
        self.tables: dict[str, JSON] = {}

    def meet(self, app: App, tuning: Asked | None = None) -> list[float] | None:
        """Have all sites load their rows and derive the protocol; returns their weights, if they count unalike."""
        mine = app.bundle()  # first: what can be neither shipped nor compared is refused before anybody is asked
        told, counted = self._all(lambda all_sites: all_sites.hello()), app.weights == "rows"
        tabled = app.prepare is not None
        said = {name: checked_hello(name, answer, counted, tabled) for name, answer in told.items()}
        first = said[self.names[0]]
        for name, answer in said.items():
            check_same(name, answer, mine)
        for name, answer in said.items():
            check_rows(name, answer["rows"], self.names[0], first["rows"])
        self.schemas = first["rows"]
        if app.prepare is not None:
            self._agree(app.prepare, {name: str(answer.get("tables")) for name, answer in said.items()})
        self.transport.workers = {name: answer["worker"] for name, answer in said.items()}
        weights = scales = None
        if app.weights == "rows":
            weights, scales = shares([counts for name in self.names if (counts := said[name]["counts"])])
        cohort = check_cohort(app.cohort, len(self.names))
        data = placeholder_data(self.schemas, len(self.names), weights, prepared=self.prepared)
        racing = None if tuning is None else self._racing(app, data, tuning)
        derived = derive(app, data, cohort, racing)
        check, totals = app.check and not self.resume, None if scales is None else tuple(scales)
        setup = Setup(
            tuple(self.names), cohort, app.seed, totals, fingerprint(derived), self.resume, check, racing,
            None if self.prepared is None else self.prepared.text(),
        )  # fmt: skip
        ready = self._all(lambda all_sites: all_sites.prepare(plain(setup)))
        digest = None if self.prepared is None else self.prepared.digest
        for name in self.names if digest is not None else ():
            if ready[name].get("prepared") != digest:
                raise RunError(f"site {name} makes rows of its tables in another way than the server says.")
        if check:
            judge_sites(app, self.schemas, [ready[name].get("figures") for name in self.names], weights, self.prepared)
        return weights

    def _agree(self, wanted: Prepare, described: Mapping[str, str]) -> None:
        """Have sites agree on how their tables become rows, in two exchanges: the first was what they have said of them."""
        first = {name: schema.Described.read(text, f"site {name}") for name, text in described.items()}
        common = schema.agree(first, wanted)
        agreed = common.text()
        answers = self._all(lambda all_sites: all_sites.measure(plain(Measure(agreed))))
        texts = {name: str(answer.get("measured")) for name, answer in answers.items()}
        second = {name: measured.read(text, common, f"site {name}") for name, text in texts.items()}
        self.prepared = settled(common, measured.together(second, common), wanted)
        self.schemas = [rows_schema(self.prepared.one())] * 2
        up, down = [*described.values(), *texts.values()], [agreed, self.prepared.text()]
        size = lambda texts: sum(len(text.encode()) for text in texts)
        self.tables = {"exchanges": 2, "bytes_down": size(down) * len(self.names), "bytes_up": size(up)}

    def _racing(self, app: App, data: FederatedData, tuning: Asked) -> Racing:
        """Who races, in the words that sites are told."""
        named = None if tuning.entries is None else list(candidates(tuning.entries, app.algorithm).values())
        found, _ = lineup(
            app.problem, data, *app.begin(self.prepared), self, int(app.rounds or 0), tuning.max_bytes, algorithms=named,
            candidates=tuning.candidates, batch_size=tuning.batch_size,
        )  # fmt: skip
        entries = None if tuning.entries is None else tuning.entries[: len(found)]
        return Racing(len(found), tuning.batch_size, entries)

    def finish(self, tags: Iterable[Iterable[int | np.integer]], iterations: int) -> None:
        """Tell all sites that the run is over, and which of their states counts; warn of those that cannot be told."""
        states = {name: [int(part) for part in tag] for name, tag in zip(self.names, tags, strict=True)}
        results = sites(self.names, _END).finish(states, int(iterations))
        lost = {name: str(error) for name, error in results.failures.items()}
        lost |= {name: str(error) for name, said in results if (error := refusal(name, said)) is not None}
        for name, why in sorted(lost.items()):
            warn(f"site {name} did not write down what is its own ({why}): the other sites did.")

    def _all(self, call: Callable[[Sites], Results]) -> dict[str, dict]:
        """What all sites say; none may fail before the run has begun."""
        results = call(sites(self.names, _START))
        for name, error in results.failures.items():
            raise RunError(f"site {name} is not ready: {error}")
        said = {}
        for name, answer in results:
            error = refusal(name, answer)
            if error is not None or not isinstance(answer, dict):
                raise error or no_answer(name, answer)
            said[name] = answer
            for sentence in warnings_in(answer):
                warn(f"{name}: {sentence}")
        return said

    def bind(
        self,
        problem: Problem,
        data: FederatedData,
        algorithm: Algorithm,
        state: PyTree,
        key: Key[Array, ""],
        program: Program = iteration,
    ) -> OverNetwork:
        cohort = check_cohort(self.cohort, data.clients)
        problem = freeze(problem, state.x, state.y, data)
        protocol, write = plan(self, problem, data, algorithm, state, cohort, program), self.ledger.write
        return OverNetwork(
            self, problem, data, key, protocol, program, transport=self.transport, faults=self.faults, dropout=0.0,
            watch=write,
        )  # fmt: skip


class OverNetwork(Messaging):
    """One iteration at a time, so that a run can be gone on from the last one that was done.

    Sites run their own settings, so that a stretch cannot be repeated with others to find out what blew up.
    """

    engine: Collab
    longest = 1
    replays = False

    def race(self, left: tuple[int, ...]) -> None:
        self.purpose = Purpose("run", left)

    def another(self, algorithm: Algorithm, state: PyTree, data: FederatedData, key: Key[Array, ""]) -> Execution:
        made, write = super().another(algorithm, state, data, key), self.engine.ledger.write
        assert isinstance(made, OverNetwork)
        if isinstance(algorithm, Scoring):
            made.purpose, made.roster = Purpose("scoring", self.purpose.left, algorithm.turns), self.roster
        else:
            assert isinstance(algorithm, Validation)
            made.purpose = Purpose("validation", loss=algorithm.loss, clients=bool(algorithm.metrics))
        made.watch = lambda r: write(dataclasses.replace(r, iteration=r.iteration - 1))  # what it comes after
        return made

    def taking_over(
        self, before: Execution, carry: Carry, algorithm: Algorithm, state: PyTree, own: Callable[[PyTree], PyTree]
    ) -> Carry:
        assert isinstance(before, OverNetwork)
        self.kept, self.roster = before.kept, before.roster  # sites narrow their states when they hear who is left
        return Carry(strong(state), carry.client_state, carry.iteration)

    def begin_again(self, algorithm: Algorithm, state: PyTree) -> Carry:
        self.transport.restart(state.x, state.y, self.purpose)
        return self.start(algorithm, state)

    def compiled(self) -> float:
        return self.engine.transport.compiling

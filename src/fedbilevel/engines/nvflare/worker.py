"""A site's worker: the process that holds its rows, its compiled code and its state.

nvflare's own process at a site stays small and passes requests on: so a worker that dies, hangs or runs out of memory costs
a reply, not the run, and starts again with the state that it left on disk. The two speak over a pipe, in JSON and bytes.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ...given import JSON

if TYPE_CHECKING:  # at run time they are imported where they are needed, in the worker alone
    import pandas

    from ...app import App
    from ...protocol.at_sites import Held
    from ...tables.prepared import Prepared
    from ...tables.wanted import Prepare as Wanted
    from ..messaging.client_side import ClientSide
    from ..messaging.transport import Purpose, Request
    from .messages import Answer, Finish, Load, Measure, Prepare, Restart

METRICS = "metrics.csv"  # a site's own numbers, in its folder
LOWER = "lower.npz"  # a site's own lower variable at the end of a run, in its folder
BLOCKS = "blocks.npz"  # a site's own blocks of x and y at the end of a run, where they are kept there
START_SECONDS = 600.0  # within which a worker has loaded its site's rows


class WorkerDied(RuntimeError):
    """The worker ended, or did not answer in time and was ended."""


class WorkerSaid(RuntimeError):
    """The worker refused or failed; `kind` is "lost" where its state is gone."""

    def __init__(self, sentence: str, kind: str):
        super().__init__(sentence)
        self.kind = kind


class Worker:
    """A worker process, as nvflare's process at the site sees it.

    Args:
        app: the application's file.
        site: the site's name.
        folder: where the worker keeps its state.
    """

    def __init__(self, app: str, site: str, folder: str):
        here, there = multiprocessing.get_context("spawn").Pipe()
        self._pipe = here
        self._process = multiprocessing.get_context("spawn").Process(
            target=work, args=(there, app, site, folder), daemon=True, name=f"fedbilevel-{site}"
        )
        self._process.start()
        there.close()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid or 0

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.is_alive()

    def ask(
        self, what: str, payload: bytes = b"", deadline: float = START_SECONDS, **header: JSON
    ) -> tuple[dict, bytes]:
        """(What it says, numbers).

        Raises:
            WorkerDied: it is gone, or did not answer within `deadline` seconds (and has been ended).
            WorkerSaid: it refused or failed.
        """
        try:
            self._pipe.send_bytes(json.dumps({"what": what, **header}).encode())
            self._pipe.send_bytes(payload)
            if not self._pipe.poll(deadline):
                self.end()
                raise WorkerDied(f"the worker did not answer within {deadline:g} s, and was ended")
            said, numbers = json.loads(self._pipe.recv_bytes()), self._pipe.recv_bytes()
        except (EOFError, OSError) as error:
            self.end()
            raise WorkerDied(f"the worker died (exit code {self._process.exitcode})") from error
        if "error" in said:
            raise WorkerSaid(said["error"], said["kind"])
        return said, numbers

    def end(self) -> None:
        """End the process."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join(10)
        self._pipe.close()


# Inside the worker ------------------------------------------------------------------------------------------------------


def work(pipe: Connection, app: str, site: str, folder: str) -> None:
    """Answer until the other end closes."""
    here = _Inside(app, site, Path(folder))
    while True:
        try:
            header, payload = json.loads(pipe.recv_bytes()), pipe.recv_bytes()
        except (EOFError, OSError):
            return
        begin = time.perf_counter()
        try:
            said, numbers = here.do(header.pop("what"), payload, header)
            said = {**said, "seconds": time.perf_counter() - begin}
        except Exception as error:  # whatever the user's code raises: it is told, and the worker goes on
            said, numbers = _in_words(error), b""
        pipe.send_bytes(json.dumps(said).encode())
        pipe.send_bytes(numbers)


def _in_words(error: Exception) -> dict[str, str]:
    from ...errors import InputError, RunError
    from ..faults import StateLost

    ours = isinstance(error, (InputError, RunError))
    return {
        "error": str(error) if ours else f"{type(error).__name__}: {error}",
        "kind": "lost" if isinstance(error, StateLost) else "input" if isinstance(error, InputError) else "failed",
    }


class Notes:
    """A CSV file with a line for each row of the history; what a run has given up is replaced when it comes again."""

    def __init__(self, file: Path):
        self._file = file

    def add(self, iteration: int, names: Sequence[str], numbers: Sequence[float | str]) -> None:
        """A line; those of this iteration and later ones were given up."""
        held = self._lines()
        header, line = ["iteration", *names], [str(iteration), *map(str, numbers)]
        kept = [one for one in held[1:] if int(one[0]) < iteration]
        self._file.parent.mkdir(parents=True, exist_ok=True)
        if held and held[0] == header and len(kept) == len(held) - 1:
            with self._file.open("a", newline="") as file:
                csv.writer(file).writerow(line)
            return
        beside = self._file.with_suffix(".new")
        with beside.open("w", newline="") as file:
            csv.writer(file).writerows([header, *(kept if held and held[0] == header else []), line])
        os.replace(beside, self._file)

    def forget(self) -> None:
        """There are no lines."""
        self._file.unlink(missing_ok=True)

    def _lines(self) -> list[list[str]]:
        if not self._file.is_file():
            return []
        with self._file.open(newline="") as file:
            return list(csv.reader(file))


class _Inside:
    """What a worker holds.

    Attributes:
        app: the application, once its rows are loaded.
        tables: (inner, outer) of this site, where they are prepared;
        prepared: how.
        side: what answers requests of the run, once it is prepared; of a race with those who are left of it, `purpose`.
        sides: what answers those of other purposes, made when one comes.
    """

    app: App
    tables: tuple[pandas.DataFrame, pandas.DataFrame]
    side: ClientSide
    purpose: Purpose
    sides: dict[Purpose, ClientSide]

    def __init__(self, app: str, site: str, folder: Path):
        self.file, self.site, self.folder = app, site, folder
        self.prepared: Prepared | None = None
        self.notes = Notes(folder / METRICS)

    def do(self, what: str, payload: bytes, header: dict) -> tuple[dict, bytes]:
        from ...errors import noting
        from .messages import Answer, Finish, Load, Measure, Prepare, Restart

        known = {
            "load": (Load, self.load), "measure": (Measure, self.measure),
            "prepare": (Prepare, self.prepare), "answer": (Answer, self.answer),
            "restart": (Restart, self.restart), "finish": (Finish, self.finish),
        }  # fmt: skip
        kind, act = known[what]
        told: list[str] = []
        with noting(told):
            said, numbers = act(payload, msgspec.convert(header, kind))
        return ({**said, "warnings": told} if told else said), numbers

    def load(self, payload: bytes, message: Load) -> tuple[dict, bytes]:
        """Load the app and this site's rows.

        It says what one row looks like, how many there are where that is asked, and of what the app consists here. Where
        tables are prepared, it says of them what `Prepare` says that travels first; what a row looks like is known later.
        """
        import jax

        from ...app import load_app, schema

        self.app = load_app(self.file)
        jax.config.update("jax_enable_x64", self.app.precision == 64)
        wanted = self.app.prepare
        if wanted is None:
            self._hold(self.app.rows(self.site))
            levels = zip(self.rows, ("inner", "outer"), strict=True)
            said = {"rows": [schema(rows, self.site, level) for rows, level in levels]}
            counts = [int(self.own.count(level)[0]) for level in ("inner", "outer")]
        else:
            from ...tables.schema import describe

            self.tables = self.app.tables(self.site)
            said = {"rows": ["", ""], "tables": describe(*self.tables, wanted, self.site).text()}
            counts = [len(table) for table in self.tables]
        return {**said, "counts": counts if self.app.weights == "rows" else None, **self.app.bundle().told()}, b""

    def measure(self, payload: bytes, message: Measure) -> tuple[dict, bytes]:
        """Measure the columns that all sites' tables have in common."""
        from ...tables.measured import measure, text_of
        from ...tables.schema import Agreed

        wanted = self._wanted()
        return {"measured": text_of(measure(self.tables[0], Agreed.read(message.agreed), wanted, self.site))}, b""

    def _wanted(self) -> Wanted:
        """What is wanted of tables."""
        from ...errors import RunError

        if self.app.prepare is None:
            raise RunError(f"site {self.site} has rows, and no tables to prepare.")
        return self.app.prepare

    def _hold(self, rows: tuple) -> None:
        """Take the rows of both levels."""
        from ...data import FederatedData

        self.rows = rows
        self.own = FederatedData.stack([rows[0]], [rows[1]], names=[self.site])

    def _rows_made(self, text: str | None) -> dict[str, str]:
        """Make rows of tables, where that is to be done; says by the digest how it was done."""
        from ...errors import RunError
        from ...tables.prepare import rows_of
        from ...tables.prepared import read

        if (text is None) != (self.app.prepare is None):
            raise RunError(f"site {self.site} has {'rows' if text else 'tables'}, and was asked for the other.")
        if text is None:
            return {}
        self.prepared = read(text, "what the server sent")
        self._hold(rows_of(self.prepared, self.tables, self.site))
        return {"prepared": self.prepared.digest}

    def prepare(self, payload: bytes, message: Prepare) -> tuple[dict, bytes]:
        """Derive the protocol, and get ready to answer.

        With `check` it says what `sanity` measures on the rows here.
        """
        import equinox as eqx
        import jax.numpy as jnp

        from ...app import schema
        from ...errors import check as expect
        from ...sanity import told
        from .agreement import Agreement, fingerprint, placeholder_data

        app, scale, made = self.app, message.scale, self._rows_made(message.prepared)
        weights = None if scale is None else [1.0] * message.sites
        schemas = [schema(level) for level in self.rows]
        data = placeholder_data(schemas, message.sites, weights, prepared=self.prepared)
        self.agreed, self.asked = Agreement(app, data, message.cohort, message.racing), message
        first = self.agreed.first
        expect(
            fingerprint(self.agreed.means(first).protocol) == message.protocol,
            f"site {self.site} derives another protocol than the server: both need the same app, fedbilevel and jax.",
        )
        self.problem, self.held = self.agreed.problem.holding(self.own)
        inner, outer = self.held.inner.alone(0), self.held.outer.alone(0)
        if scale is not None:
            outer = eqx.tree_at(lambda rows: rows.scale, outer, jnp.asarray(scale, outer.scale.dtype))
        self.mine, self.sides = (inner, outer), {}
        self._take_up(first)
        self._store(message.resume)
        problem = self.agreed.problem
        figures = (
            {"figures": told(problem, self.own, *self.agreed.variables, client=message.index)} if message.check else {}
        )
        return {**figures, **made}, b""

    def _made(self, purpose: Purpose) -> ClientSide:
        """What answers requests of a purpose, with the state of a start."""
        from ...program import freeze
        from ...protocol import as_leaves
        from ..messaging.client_side import ClientSide, Methods, first_held
        from .agreement import client_key

        algorithm, state, protocol = self.agreed.means(purpose)
        problem = freeze(self.problem, *self.agreed.variables, self.held)
        index = self.asked.index
        first = None if purpose.name == "scoring" else first_held(algorithm, protocol, state, index)
        return ClientSide(
            problem, self.mine, as_leaves(algorithm), protocol, client_key(self.asked.seed, purpose),
            index, first, Methods(), self.site,
        )  # fmt: skip

    def _take_up(self, purpose: Purpose) -> None:
        """Be asked for a run with those who are left of its candidates, from the start."""
        self.purpose, self.side = purpose, self._made(purpose)

    def _narrow(self, purpose: Purpose) -> None:
        """Go on with those who are left, and let go of what was kept for the others."""
        from ...race.heats import narrowed
        from ...race.racing import Race
        from ..faults import StateLost

        before, race, states = self.purpose.left, self.agreed.running(self.purpose.left), self.side.states
        if not isinstance(race, Race) or not set(purpose.left) <= set(before):
            raise StateLost(
                f"site {self.site} has no state of candidates {list(purpose.left)}: {list(before)} race there."
            )
        own = narrowed(race, [before.index(k) for k in purpose.left])
        self._take_up(purpose)
        if self.side.keeps:
            self.side.states = {tag: own(state) for tag, state in states.items()}

    def _side(self, purpose: Purpose) -> ClientSide:
        """What answers requests of a purpose."""
        if purpose.name == "run":
            if purpose != self.purpose:
                self._narrow(purpose)
            return self.side
        if purpose not in self.sides:
            self.sides = {each: side for each, side in self.sides.items() if each.left in ((), purpose.left)}
            self.sides[purpose] = self._made(purpose)
        return self.sides[purpose]

    def answer(self, payload: bytes, message: Answer) -> tuple[dict, bytes]:
        """Answer a request."""
        from ...clock import compiling
        from ..messaging.client_side import Methods

        before, request = compiling(), message.request(payload)
        side = self._side(request.purpose)
        numbers = side.answer(request)
        if side is self.side and side.keeps:
            self._save()
        if request.purpose.clients:
            self._note(request)
        return {"traced": dict(Methods.traced), "compiling": compiling() - before}, numbers

    def restart(self, payload: bytes, message: Restart) -> tuple[dict, bytes]:
        """Begin anew with the state `client_init(x, y)`; the message has x and y."""
        from ...errors import RunError
        from ...owned import kept, own
        from ...problem import strong
        from ...protocol.wire import decode

        if kept(self.agreed.variables):
            raise RunError(f"site {self.site} keeps blocks of x or y that nobody else has, and cannot begin anew.")
        x, y = decode(own(self.agreed.variables, self.asked.index), payload, (True, True))
        if message.purpose != self.purpose:
            self._take_up(message.purpose)
        self.side.restart(strong(self.agreed.running(self.purpose.left).client_init(x, y)))
        if self.side.keeps:
            self._save()
        return {}, b""

    def finish(self, payload: bytes, message: Finish) -> tuple[dict, bytes]:
        """The run is over, and the state of this tag counts: write down what is this site's own.

        That is its lower variable, and its blocks of x and y that are kept here.
        """
        import equinox as eqx

        from ...own_lower import own_lower
        from ...protocol.at_sites import Held
        from ...result import save_arrays
        from ...variables import trainable
        from ..faults import StateLost

        tag = message.counted
        if tag not in self.side.states:
            raise StateLost(f"site {self.site} has no state of exchange {tag}.")
        state = self.side.states[tag]
        if isinstance(state, Held):
            self._save_blocks(state, message.iterations)
            state = state.own
        lower = own_lower(self.app.algorithm, state)
        if lower is not None:
            _, rest = trainable(self.app.begin(self.prepared)[1], "y")
            save_arrays({"y": eqx.combine(lower, rest)}, self.folder / LOWER)
        return {}, b""

    def _save_blocks(self, held: Held, iterations: int) -> None:
        """Write down this site's blocks of x and y that are kept here."""
        from ...owned import keeping, kept_alone, own
        from ...result import save_arrays

        index = self.asked.index
        state = own(self.agreed.means(self.purpose).state, index)
        if iterations:
            state = keeping(state, self.side.blocks(held, iterations))
        save_arrays({name: kept_alone(getattr(state, name), index) for name in ("x", "y")}, self.folder / BLOCKS)

    def _note(self, request: Request) -> None:
        """Write down how this site fares: a line for each row of the history, of which no site's number need be part."""
        from ...by_client import EMPTY, GIVEN
        from ...validation import Validation

        asked, tag = self.agreed.means(request.purpose).algorithm, request.tag
        assert isinstance(asked, Validation)
        kept = self._side(request.purpose).states[tag].kept
        pairs = zip(kept.value.tolist(), kept.status.tolist(), strict=True)
        numbers = [value if status == GIVEN else "" if status == EMPTY else "nan" for value, status in pairs]
        self.notes.add(tag[0], [each.name for each in asked.metrics], numbers)

    # What is kept on disk -------------------------------------------------------------------------------------------

    @property
    def _file(self) -> Path:
        return self.folder / "state.eqx"

    def _store(self, resume: bool) -> None:
        """Take up the states that an earlier worker left, or forget them."""
        for file in (LOWER, BLOCKS):
            (self.folder / file).unlink(missing_ok=True)
        if not resume:
            self.notes.forget()
        if not self.side.keeps:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if resume and self._file.is_file():
            self._load()
        else:
            self._save()

    def _save(self) -> None:
        from ...arrays import write_leaves

        beside, held = self._file.with_suffix(".new"), {"left": self.purpose.left, "tags": list(self.side.states)}
        with beside.open("wb") as file:
            file.write((json.dumps(held) + "\n").encode())
            write_leaves(file, list(self.side.states.values()))
        os.replace(beside, self._file)

    def _load(self) -> None:
        from ...arrays import leaves_of, read_leaves, restore
        from ...errors import InputError, RunError
        from ..messaging.transport import START, Purpose, as_tag

        first = self.purpose
        with self._file.open("rb") as file:
            held = json.loads(file.readline())
            held = held if isinstance(held, dict) else {"left": [], "tags": held}  # as it was before there were races
            try:
                if (purpose := Purpose("run", tuple(held["left"]))) != first:
                    self._take_up(purpose)
                like, tags = self.side.states[START], [as_tag(tag) for tag in held["tags"]]
                states = restore([like] * len(tags), read_leaves(file, len(leaves_of(like)) * len(tags)))
            except (RunError, InputError, ValueError):  # of another run: its states are none of this one's
                if self.purpose != first:
                    self._take_up(first)
                self._save()
                return
        self.side.states = dict(zip(tags, states, strict=True))

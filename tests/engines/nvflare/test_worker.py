"""A site's worker process, and what its nvflare process lets through to it."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import signal
import time
import types

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedbilevel as fb
from fedbilevel.app import load_app, schema
from fedbilevel.engines.messaging.transport import Purpose
from fedbilevel.engines.nvflare.agreement import Agreement, begin, derive, fingerprint, placeholder_data
from fedbilevel.engines.nvflare.messages import Racing, read
from fedbilevel.engines.nvflare.worker import Worker, WorkerDied, WorkerSaid
from fedbilevel.protocol.sites import reply_parts
from fedbilevel.protocol.wire import decode, encode, message_schema
from fedbilevel.tables import measured
from fedbilevel.tables import schema as schema_of
from helpers import apps, tabled
from helpers.users import as_users_do

pytest.importorskip("nvflare")
from fedbilevel.engines.nvflare import site as site_module
from fedbilevel.engines.nvflare.site import Site, _request, _setup

SEED = 0


class Asked:
    """A worker that is prepared, and every byte that came out of it."""

    def __init__(self, file, folder, resume=False):
        self.app, self.said = load_app(file), []
        self.worker = Worker(str(file), "site-2", str(folder))
        self.rows = self.ask("load")[0]
        data = placeholder_data(self.rows["rows"], 3, None)
        self.protocol = self.derive(data)
        self.site = next(iter(self.protocol.sites.values()))
        self.setup = {
            "index": 1, "sites": 3, "cohort": 3, "seed": SEED, "scale": None,
            "protocol": fingerprint(self.protocol), "resume": resume,
        }  # fmt: skip
        self.prepare(**self.setup)

    def derive(self, data):
        return derive(self.app, data, 3)

    def prepare(self, **setup):
        return self.ask("prepare", **setup)

    def ask(self, what, payload=b"", **header):
        said, numbers = self.worker.ask(what, payload, **header)
        self.said.append(json.dumps(said).encode() + numbers)
        return said, numbers

    def moves(self, tag, counted, kept=(-1, 0, 0), deadline=60.0):
        x, y = begin(self.app)[1]
        z = jax.tree.map(np.zeros_like, (x, y, y))
        message = tuple(jax.tree.map(np.asarray, (x, y, z[1], z)))
        fit = jax.tree.leaves(self.site.message)
        payload = b"".join(np.asarray(a, s.dtype).tobytes() for a, s in zip(jax.tree.leaves(message), fit, strict=True))
        header = {"place": 0, "tag": tag, "sent": [], "wanted": [True], "counted": counted, "kept": kept}
        return self.ask("answer", payload, deadline=deadline, **header)


@pytest.fixture
def asked(tmp_path):
    file = apps.write(tmp_path, apps.CLOSED_FORM, f"iterations=6, {apps.LOCKSTEP}")
    made = []

    def start(**options):
        made.append(Asked(file, tmp_path / "state", **options))
        return made[-1]

    yield start
    for one in made:
        one.worker.end()


def test_a_worker_answers_keeps_its_state_and_tells_no_rows(asked):
    one = asked()
    first = one.moves((0, 0, 0), (-1, 0, 0))
    again = one.moves((0, 0, 1), (-1, 0, 0))  # the first did not count
    assert first[1] == again[1]
    with pytest.raises(WorkerSaid, match="has no state"):
        one.moves((1, 0, 0), (0, 0, 0))  # forgotten when its exchange was tried again
    next_one = one.moves((1, 0, 0), (0, 0, 1))
    assert next_one[1] != first[1]  # its control variate is there now
    assert first[0]["traced"] == next_one[0]["traced"] == {"moves": 1}
    with pytest.raises(WorkerSaid, match="has no state") as lost:
        one.moves((2, 0, 0), (1, 0, 5))
    assert lost.value.kind == "lost"

    told = b"".join(one.said)
    inner, outer = one.app.rows("site-2")
    rows = [row for level in (inner, outer) for leaf in level.values() for row in leaf]
    assert len(rows) > 20 and not any(np.asarray(row).tobytes() in told for row in rows)
    assert one.rows["counts"] is None  # not even how many there are
    with_them = told + np.asarray(rows[0]).tobytes()
    assert np.asarray(rows[0]).tobytes() in with_them  # what is looked for can be found


def test_killed_it_dies_and_the_next_goes_on_with_its_state(asked):
    one = asked()
    one.moves((0, 0, 0), (-1, 0, 0))
    expected = one.moves((1, 0, 0), (0, 0, 0))[1]
    os.kill(one.worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match="died"):
        one.moves((1, 0, 0), (0, 0, 0))
    assert not one.worker.alive
    assert asked(resume=True).moves((1, 0, 0), (0, 0, 0))[1] == expected
    with pytest.raises(WorkerSaid, match="has no state"):
        asked().moves((1, 0, 0), (0, 0, 0))  # not resumed: it begins anew


def test_hanging_it_is_ended_at_the_deadline(asked):
    one = asked()
    os.kill(one.worker.pid, signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(WorkerDied, match=r"did not answer within 0\.5 s"):
        one.moves((0, 0, 0), (-1, 0, 0), deadline=0.5)
    assert time.monotonic() - begin < 10 and not one.worker.alive


def test_restarted_it_has_its_first_state(asked):
    one = asked()
    first = one.moves((0, 0, 0), (-1, 0, 0))[1]
    one.moves((1, 0, 0), (0, 0, 0))
    one.ask("restart", encode(begin(one.app)[1], (True, True)))
    with pytest.raises(WorkerSaid, match="has no state"):
        one.moves((2, 0, 0), (1, 0, 0))
    assert one.moves((0, 0, 0), (-1, 0, 0))[1] == first


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"place": 7}, "exchange 7 is not in the protocol"),
        ({"wanted": [True, True]}, "flags for other parts"),
        ({"sent": [True]}, "flags for other parts"),
    ],
)
def test_what_is_not_in_the_protocol_is_refused(asked, change, sentence):
    one = asked()
    header = {"place": 0, "tag": (0, 0, 0), "sent": [], "wanted": [True], "counted": (-1, 0, 0), "kept": (-1, 0, 0)}
    with pytest.raises(WorkerSaid, match=sentence):
        one.ask("answer", b"", **{**header, **change})
    with pytest.raises(WorkerSaid, match="bytes arrived where the protocol says"):
        one.ask("answer", b"\0" * 3, **header)
    with pytest.raises(WorkerSaid, match="KeyError"):
        one.ask("system", b"")
    with pytest.raises(WorkerSaid, match="derives another protocol"):
        one.ask("prepare", **{**one.setup, "protocol": "another"})


# A race ---------------------------------------------------------------------------------------------------------------

RACING = {"many": 3, "batch_size": None, "entries": [
    {"label": name, "kind": name, "settings": {"local_steps": 2}} for name in ("lockstep", "simfbo")
] + [{"label": "slow", "kind": "", "settings": {"outer_lr": 0.05}}]}  # fmt: skip
FIRST = (-1, 0, 0)


class Raced(Asked):
    """A worker of a race; the app's own algorithm is another Lockstep."""

    def __init__(self, file, folder, resume=False, many=3):
        self.words = {**RACING, "many": many}
        self.racing = read(self.words, Racing, ValueError, "racing")
        super().__init__(file, folder, resume)

    def derive(self, data):
        self.agreed = Agreement(self.app, data, 3, self.racing)
        return self.agreed.means(self.agreed.first).protocol

    def prepare(self, **setup):
        return self.ask("prepare", **setup, racing=self.words)

    def answers(self, tag, counted, left, name="run", turns=0, kept=FIRST):
        """Numbers of the reply to a message of ones, at the first exchange that is no measurement."""
        purpose = Purpose(name, tuple(left), turns)
        sites = [site for _, site in sorted(self.agreed.means(purpose).protocol.sites.items())]
        place, site = next((k, s) for k, s in enumerate(sites) if "meter" not in s.name)
        payload = b"".join(np.ones(leaf.shape, leaf.dtype).tobytes() for leaf in jax.tree.leaves(site.message))
        header = {
            "place": place,
            "tag": tag,
            "sent": [],
            "wanted": [True] * len(site.up),
            "counted": counted,
            "kept": kept,
        }
        told = self.ask("answer", payload, **header, purpose=plain_purpose(purpose))[1]
        return decode(reply_parts(site.reply, (True,) * len(site.up)), told, (True,) * len(site.up))


def plain_purpose(purpose):
    return {**dataclasses.asdict(purpose), "left": list(purpose.left)}


@pytest.fixture
def raced(tmp_path):
    file = apps.write(tmp_path, apps.CLOSED_FORM, f"iterations=6, {apps.LOCKSTEP}")
    made = []

    def start(**options):
        made.append(Raced(file, tmp_path / "state", **options))
        return made[-1]

    yield start
    for one in made:
        one.worker.end()


def test_candidates_that_are_left_go_on_with_their_own_states(raced):
    """Of three, then the app's own, which keeps a control variate: it answers as in the race, dead in between too."""
    one = raced()
    every = [one.agreed.first.left, (0, 2), (2,)]
    one.answers((0, 0, 0), FIRST, every[0])
    before = one.answers((1, 0, 0), (0, 0, 0), every[0])
    last = jax.tree.leaves(one.answers((1, 0, 0), (0, 0, 0), every[2]))
    both = jax.tree.leaves(before)
    # the family of the app's own algorithm is the third in the message
    assert any(leaf.shape[1:] == end.shape and np.array_equal(leaf[0], end) for leaf in both for end in last)
    assert one.worker.alive
    os.kill(one.worker.pid, signal.SIGKILL)
    again = raced(resume=True)
    found = again.answers((1, 0, 0), (0, 0, 0), every[2])
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(found), last, strict=True))
    with pytest.raises(WorkerSaid, match=r"has no state of candidates \[0, 1, 2\]: \[2\] race there") as lost:
        again.answers((2, 0, 0), (1, 0, 0), every[0])
    assert lost.value.kind == "lost"  # so that all can begin anew


def test_those_who_are_left_may_come_in_another_order(raced):
    one = raced()
    before = one.answers((0, 0, 0), FIRST, (0, 1, 2))
    after = one.answers((0, 0, 0), FIRST, (2, 0, 1))
    assert sorted(str(leaf.shape) for leaf in jax.tree.leaves(after)) == sorted(
        str(leaf.shape) for leaf in jax.tree.leaves(before)
    )


def test_one_candidate_is_no_race(raced):
    one = raced(many=1)
    assert one.agreed.first.left == ()
    assert jax.tree.leaves(one.answers((0, 0, 0), FIRST, ()))


@pytest.mark.parametrize(
    "text", ['{"left": [5], "tags": [[0, 0, 0]]}', '{"left": [], "tags": [[0, 0, 0]]}', "[[0, 0, 0]]"]
)
def test_states_of_another_run_are_none_of_this_one(raced, tmp_path, text):
    one = raced()
    one.answers((0, 0, 0), FIRST, (0, 1, 2))
    one.worker.end()
    file = tmp_path / "state" / "state.eqx"
    file.write_bytes(text.encode() + b"\n" + file.read_bytes().split(b"\n", 1)[1])
    again = raced(resume=True)
    with pytest.raises(WorkerSaid, match="has no state of exchange") as lost:
        again.answers((1, 0, 0), (0, 0, 0), (0, 1, 2))
    assert lost.value.kind == "lost"
    again.answers((0, 0, 0), FIRST, (0, 1, 2))


def test_states_of_an_earlier_version_are_read(asked, tmp_path):
    one = asked()
    one.moves((0, 0, 0), (-1, 0, 0))
    expected = one.moves((1, 0, 0), (0, 0, 0))[1]
    one.worker.end()
    file = tmp_path / "state" / "state.eqx"
    head, rest = file.read_bytes().split(b"\n", 1)
    file.write_bytes(json.dumps(json.loads(head)["tags"]).encode() + b"\n" + rest)
    assert asked(resume=True).moves((1, 0, 0), (0, 0, 0))[1] == expected


def test_who_is_scored_races(raced):
    one = raced()
    ((loss, _),) = one.answers((0, 0, 0), FIRST, (0, 1, 2), "scoring", 0)
    assert loss.shape == (3,) and np.ptp(loss) < 1e-12  # all are sent the same
    one.answers((0, 0, 0), FIRST, (0, 1, 2), "validation")
    for left, turns in (((0, 1, 7), 0), ((1, 1), 0), ((), 0), ((0, 1), 99)):
        header = {"place": 0, "tag": (0, 0, 0), "sent": [], "wanted": [True, True], "counted": FIRST, "kept": FIRST}
        with pytest.raises(WorkerSaid, match=r"no candidates of a race of 3|scored while they race"):
            one.ask("answer", b"", **header, purpose=plain_purpose(Purpose("scoring", left, turns)))


def numbers_of(rows):
    """(low, rate) at y = 0, by hand."""
    low, high = rows["b"] > 2.0, rows["b"] > 2.5
    return np.array([low.mean(), (low & high).sum() / high.sum()])


@pytest.fixture
def faring(tmp_path):
    made = []

    def start(share, **options):
        file = apps.write(tmp_path, apps.FARES, f"iterations=6, share_metrics={share}, {apps.LOCKSTEP}")
        made.append(Asked(file, tmp_path / "state", **options))
        return made[-1]

    yield start
    for one in made:
        one.worker.end()


def fares(one, iteration, attempt=0, loss=False):
    """What the server hears of a row of the history, in numbers."""
    purpose = Purpose("validation", loss=loss, clients=True)
    protocol = Agreement(one.app, placeholder_data(one.rows["rows"], 3, None), 3).means(purpose).protocol
    (site,) = protocol.sites.values()
    wanted = (True,) * len(site.up)
    header = {"place": 0, "tag": (iteration, 0, attempt), "sent": [], "counted": FIRST, "kept": FIRST}
    header["wanted"] = list(wanted)
    payload = b"".join(np.zeros(leaf.shape, leaf.dtype).tobytes() for leaf in jax.tree.leaves(site.message))
    told = one.ask("answer", payload, **header, purpose=plain_purpose(purpose))[1]
    parts = reply_parts(site.reply, wanted)
    return decode(parts, told, wanted), protocol


def test_a_sites_own_numbers_stay_there(faring, tmp_path):
    one = faring("False")
    own = numbers_of(one.app.rows("site-2")[1])
    assert ((own > 0) & (own <= 1)).all() and own[0] < 1
    for iteration in (0, 2, 4):
        fares(one, iteration)
    ((done,), _) = fares(one, 4, attempt=1)
    assert done.dtype == np.int8 and done == 1
    told = b"".join(one.said)
    forms = np.float64(own[0]).tobytes(), np.float32(own[0]).tobytes(), repr(float(own[0])).encode()
    assert not any(form in told for form in forms) and forms[2] in (tmp_path / "state" / "metrics.csv").read_bytes()
    with (tmp_path / "state" / "metrics.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["iteration"] for line in lines] == ["0", "2", "4"]  # what was tried again once
    np.testing.assert_allclose([[float(line["low"]), float(line["rate"])] for line in lines], [own] * 3, rtol=1e-12)


def test_what_the_app_says_is_shared_is(faring):
    one = faring("'mean'")
    own = numbers_of(one.app.rows("site-2")[1])
    ((sums,), _) = fares(one, 0)
    np.testing.assert_allclose(sums, [[own[0], 1, 0], [own[1], 1, 0]], rtol=1e-12)
    other = faring("True")
    ((loss, sums, values, status), protocol) = fares(other, 0, loss=True)
    np.testing.assert_allclose(values[1], own, rtol=1e-12)
    np.testing.assert_array_equal(status, [[0, 0], [1, 1], [0, 0]])
    assert values[[0, 2]].max() == np.finfo(float).min and loss > 0
    assert str(protocol).count("maximum") == 2


def test_a_site_that_goes_on_keeps_the_lines_that_stay(faring, tmp_path):
    one, file = faring("False"), tmp_path / "state" / "metrics.csv"
    for iteration in (0, 2, 4):
        fares(one, iteration)
    first = file.read_text()
    one.worker.end()
    other = faring("False", resume=True)
    assert file.read_text() == first
    fares(other, 2)
    assert [line.split(",")[0] for line in file.read_text().splitlines()] == ["iteration", "0", "2"]
    other.worker.end()
    faring("False")
    assert not file.exists()


def test_a_validation_that_the_app_does_not_have_is_refused(asked):
    one = asked()
    header = {"place": 0, "tag": (0, 0, 0), "sent": [], "wanted": [True], "counted": FIRST, "kept": FIRST}
    for loss, clients in ((True, True), (False, False)):
        purpose = plain_purpose(Purpose("validation", loss=loss, clients=clients))
        with pytest.raises(WorkerSaid, match="asks for the outer loss, or for the client metrics that the app has"):
            one.ask("answer", b"", **header, purpose=purpose)


def test_restarted_it_runs_with_who_is_left(raced):
    one = raced()
    one.answers((0, 0, 0), FIRST, (0, 1, 2))
    one.ask("restart", encode(begin(one.app)[1], (True, True)), purpose=plain_purpose(Purpose("run", (2,))))
    one.answers((1, 0, 0), FIRST, (2,))
    with pytest.raises(WorkerSaid, match="has no state"):
        one.answers((1, 0, 0), (0, 0, 0), (2,))


# What reaches the worker at all ---------------------------------------------------------------------------------------

STATES = {"a": [[0, 0, 0], [0, 0, 0]]}
HEADER = {"place": 0, "tag": [0, 0, 0], "sent": [], "wanted": [True], "states": STATES, "deadline": 1.0}
SETUP = {"order": ["a", "b"], "cohort": 2, "seed": 0, "scales": None, "protocol": "p", "resume": False}
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=3),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=3), inside, max_size=3),
    max_leaves=5,
)


def test_a_proper_request_and_setup_pass():
    fields, deadline = _request(HEADER, b"numbers", "a")
    assert fields["counted"] == [0, 0, 0] and deadline == 1.0
    assert _setup(SETUP, "b")["index"] == 1


def test_only_the_server_may_ask(monkeypatch):
    monkeypatch.setattr(site_module, "collab", types.SimpleNamespace(caller="site-3", site_name="a"))
    one = Site()
    for call in (one.hello, lambda: one.prepare(SETUP), lambda: one.answer(HEADER, b""), lambda: one.restart({}, b"")):
        with pytest.raises(ValueError, match="only the server may ask; this was site-3"):
            call()


@given(st.sampled_from(sorted(HEADER)), anything, anything)
def test_a_header_with_anything_else_in_it_is_refused_or_harmless(name, value, payload):
    with contextlib.suppress(ValueError):
        fields, deadline = _request({**HEADER, name: value}, payload, "a")
        assert isinstance(payload, bytes) and deadline > 0
        assert all(isinstance(n, int) for n in (*fields["tag"], *fields["counted"], fields["place"]))
        assert all(isinstance(flag, bool) for flag in (*fields["sent"], *fields["wanted"]))


@given(st.sampled_from(sorted(SETUP)), anything)
def test_a_setup_with_anything_else_in_it_is_refused_or_harmless(name, value):
    with contextlib.suppress(ValueError):
        assert _setup({**SETUP, name: value}, "a")["sites"] >= 1


@given(anything)
def test_what_is_no_header_is_refused(value):
    for words in ((value, b"", "a"), ({}, b"", "a"), ({**HEADER, "method": "system"}, b"", "a")):
        with pytest.raises(ValueError, match="refuses the call"):
            _request(*words)


@given(st.binary(max_size=64), st.integers(0, 2))
def test_bytes_are_numbers_of_the_protocol_or_refused(payload, number):
    schema = ({"a": jax.ShapeDtypeStruct((2, 2), np.float64)}, jax.ShapeDtypeStruct((), jax.numpy.bfloat16))
    pieces, travels = message_schema(schema, ())
    try:
        back = decode(pieces, payload, travels)
    except fb.RunError:
        assert len(payload) != 34
    else:
        assert encode(back, travels) == payload


# Tables ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tabled_worker(tmp_path):
    where = str(apps.write(tmp_path, tabled.text(), "")), "site-2", str(tmp_path / "state")
    worker = Worker(*where)
    yield worker, load_app(tmp_path / "app.py"), where
    worker.end()


def test_a_worker_tells_of_its_tables_what_is_agreed_on_and_makes_rows_of_them(tabled_worker):
    worker, app, where = tabled_worker
    told = [worker.ask("load")[0]]
    assert told[0]["rows"] == ["", ""] and told[0]["counts"] is None
    tables = {site: app.tables(site) for site in ("site-1", "site-2")}
    first = {site: schema_of.describe(*both, app.prepare, site) for site, both in tables.items()}
    assert told[0]["tables"] == first["site-2"].text()
    common = schema_of.agree(first, app.prepare)
    told.append(worker.ask("measure", agreed=common.text())[0])
    second = {site: measured.measure(both[0], common, app.prepare, site) for site, both in tables.items()}
    assert measured.read(told[1]["measured"], common, "site-2") == second["site-2"]
    assert not any("only site-2" in json.dumps(each) for each in told)  # a category of its own

    with as_users_do():
        prepared = app.data(list(tables)).prepared
        derived = derive(app, placeholder_data([schema(prepared.one())] * 2, 2, None, prepared=prepared), 2)
    setup = {
        "index": 1, "sites": 2, "cohort": 2, "seed": SEED, "scale": None, "resume": False,
        "protocol": fingerprint(derived),
    }  # fmt: skip
    with pytest.raises(WorkerSaid, match="site-2 has tables, and was asked for the other"):
        worker.ask("prepare", **setup)
    with pytest.raises(WorkerSaid, match="what the server sent is no prepared table"):
        worker.ask("prepare", **setup, prepared="{}")
    assert worker.ask("prepare", **setup, prepared=prepared.text())[0]["prepared"] == prepared.digest
    with pytest.raises(WorkerSaid, match="described its table in a way that cannot be read"):
        worker.ask("measure", agreed="nothing")
    worker.end()
    another = Worker(*where)  # in the place of one that died: it is told what came of it
    another.ask("load")
    assert (
        another.ask("prepare", **{**setup, "resume": True}, prepared=prepared.text())[0]["prepared"] == prepared.digest
    )
    another.end()


def test_rows_are_no_tables(asked):
    one = asked()
    with pytest.raises(WorkerSaid, match="site-2 has rows, and no tables to prepare"):
        one.ask("measure", agreed="[]")
    with pytest.raises(WorkerSaid, match="site-2 has rows, and was asked for the other"):
        one.prepare(**one.setup, prepared="{}")

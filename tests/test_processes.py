"""Several processes as one: what one says all hear, and one refusal is everybody's. (On their own: engines/test_several.)"""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel import processes
from fedbilevel.callbacks.listeners import Listeners
from fedbilevel.processes import ALONE, Several, everywhere, here, mine
from helpers.checks import unchecked


class Pair(Several):
    """Two processes, of which this is one; what the other sends is given."""

    def __init__(self, monkeypatch, index, sent=None):
        self.count, self.index, self.sent = 2, index, []
        other = json.dumps(sent).encode()

        def told(words):
            self.sent.append(words)
            return words if self.leads else other

        def gathered(words):
            return [words, other] if self.leads else [other, words]

        monkeypatch.setattr(processes, "_told", told)
        monkeypatch.setattr(processes, "_gathered", gathered)


def test_one_process_asks_nobody():
    assert ALONE.leads and ALONE.said(lambda: 3) == 3 and ALONE.together(lambda: "a") == ["a"]
    error = KeyboardInterrupt()
    assert ALONE.judged(error) is error and not ALONE.lost


def test_process_0_says_it_and_the_others_do_not_ask(monkeypatch):
    assert Pair(monkeypatch, 0).said(lambda: [1, None]) == [1, None]
    assert Pair(monkeypatch, 1, {"value": [1, None]}).said(lambda: 1 / 0) == [1, None]


@pytest.mark.parametrize(
    ("raised", "sent"),
    [
        (fb.InputError("no such column"), {"kind": "input", "text": "no such column"}),
        (fb.RunError("the disk is full"), {"kind": "run", "text": "the disk is full"}),
        (OSError("gone"), {"kind": "run", "text": "process 0 failed: OSError: gone"}),
    ],
)
def test_a_failure_in_process_0_is_everybodys(monkeypatch, raised, sent):
    def fail():
        raise raised

    first = Pair(monkeypatch, 0)
    with pytest.raises(type(raised)) as seen:
        first.said(fail)
    assert seen.value is raised and json.loads(first.sent[0]) == sent
    with pytest.raises(fb.InputError if sent["kind"] == "input" else fb.RunError, match=sent["text"]):
        Pair(monkeypatch, 1, sent).said(lambda: None)


def test_a_refusal_in_one_is_everybodys(monkeypatch):
    assert Pair(monkeypatch, 0, {"value": 2}).together(lambda: 1) == [1, 2]
    with pytest.raises(fb.InputError, match="client 7 has NaN"):
        Pair(monkeypatch, 0, {"kind": "input", "text": "client 7 has NaN"}).together(lambda: 1)


def test_an_error_of_jax_about_the_others_becomes_a_sentence(monkeypatch):
    monkeypatch.setattr(processes, "_left", [])
    pair = Pair(monkeypatch, 1)
    assert isinstance(pair.judged(fb.RunError("diverged")), fb.RunError) and not pair.lost
    said = pair.judged(jax.errors.JaxRuntimeError("Gloo all-reduce failed: Connection closed by peer"))
    assert pair.lost and "another process of the run has ended, so that process 1 cannot go on" in str(said)
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    assert Pair(monkeypatch, 1).judged(full) is full and processes.left()


def test_callbacks_are_called_in_process_0_and_those_that_save_in_all(monkeypatch):
    class Stopping(fb.callbacks.Callback):
        def advance(self, run):
            called.append("others")
            run.stop("enough")

    class Saving(fb.callbacks.Callback):
        saves = True

        def advance(self, run):
            called.append("saves")

    class Run:
        stopped = None

        def stop(self, reason):
            self.stopped = reason

    for index, expected in ((0, ["others", "saves"]), (1, ["saves"])):
        called, run = [], Run()
        with unchecked():
            Listeners([Saving(), Stopping()], Pair(monkeypatch, index, {"value": "enough"})).advance(run)
        assert called == expected and run.stopped == "enough"


def test_words_of_any_length_have_few_lengths():
    sizes = {len(processes._padded(b"x" * length, length)) for length in range(1, 20000, 7)}
    assert sizes == {1024, 4096, 16384, 65536}


def test_each_process_loads_a_block_of_clients(monkeypatch):
    assert list(mine(5)) == [0, 1, 2, 3, 4]
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    blocks = []
    for index in range(3):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        blocks.append(list(mine(10)))
    assert [client for block in blocks for client in block] == list(range(10)) and {len(block) for block in blocks} == {
        3,
        4,
    }
    with pytest.raises(fb.InputError, match="at least one for each process"):
        mine(2)


def test_a_process_that_was_started_alone_is_alone(monkeypatch):
    for pair in processes.RANKS:
        for name in pair:
            monkeypatch.delenv(name, raising=False)
    mesh = processes.join("hospitals")
    assert mesh.axis_names == ("hospitals",) and mesh.devices.size == len(jax.devices())
    assert processes.of(mesh) is ALONE and processes.of(None) is ALONE
    tree = {"a": np.arange(3.0), "b": jax.numpy.ones(2)}
    put = everywhere(tree, mesh)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(put)) and here(put) is not tree
    np.testing.assert_array_equal(put["a"], tree["a"])


def test_a_process_that_is_not_told_where_the_first_is_says_so(monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    monkeypatch.setenv(processes.COUNT, "2")
    monkeypatch.setenv(processes.INDEX, "1")
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: (_ for _ in ()).throw(ValueError("address")))
    with pytest.raises(fb.InputError, match="set JAX_COORDINATOR_ADDRESS=host:port in all of them"):
        processes.join()

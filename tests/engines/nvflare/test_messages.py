"""What is wrong with a message is said in a sentence; what is right comes out as it went in."""

from __future__ import annotations

import pytest

pytest.importorskip("nvflare")
from fedbilevel.engines.messaging.transport import Purpose
from fedbilevel.engines.nvflare.messages import (
    Answer,
    Described,
    Entry,
    Finish,
    Header,
    Prepare,
    Racing,
    Restart,
    Setup,
    plain,
    read,
)

HEADER = Header(3, (0, 1, 0), (True,), (), {"a": ((0, 0, 0), (-1, 0, 0))}, 2.5)
SETUP = Setup(("a", "b"), 2, 7, (0.5, 1.5), "p", False, True)
ENTRY = Entry("slow", "lockstep", {"outer_lr": 0.1, "local_steps": 2, "batch_size": None, "inner_lr": "auto"})
RACED = Setup(("a",), 1, 7, None, "p", False, True, Racing(2, 4, (ENTRY, ENTRY)))
SCORED = Purpose("scoring", (0, 2), 2)
TAG = "a tag is three whole numbers"
WRONG = {
    "a header is a dict": (Header, 3, {}),
    "a header has deadline, place, sent, states, tag, wanted": (Header, HEADER, {"method": "system"}),
    "a place is a whole number": (Header, HEADER, {"place": -1}),
    "flags are true or false": (Header, HEADER, {"wanted": [1]}),
    "states has two tags for each site": (Header, HEADER, {"states": {"a": [[0, 0, 0]]}}),
    "a deadline is a number of seconds": (Header, HEADER, {"deadline": float("nan")}),
    "a setup has cohort, order, protocol, resume, scales, seed": (Setup, SETUP, {"index": 0}),
    "the order of the sites names this one": (Setup, SETUP, {"order": "ab"}),
    "cohort and seed are whole": (Setup, SETUP, {"seed": True}),
    "check is true or false": (Setup, SETUP, {"check": None}),
    "protocol is text, resume a bool": (Setup, SETUP, {"protocol": 1}),
    "scales are numbers, one for each site": (Setup, SETUP, {"scales": ["a", "b"]}),
    "how tables become rows is text": (Setup, SETUP, {"prepared": {}}),
    "racing says how many race, and who": (Setup, SETUP, {"racing": {"many": 99}}),
    "a purpose is of the run, of validation or of scoring": (Header, HEADER, {"purpose": {"name": "mischief"}}),
}


def refused(message, kind, name):
    with pytest.raises(ValueError, match=r"^refused: .*") as failure:
        read(message, kind, lambda sentence: ValueError(f"refused: {sentence}"), name)
    return str(failure.value)


@pytest.mark.parametrize("sentence", WRONG)
def test_what_is_wrong_is_named(sentence):
    kind, whole, changes = WRONG[sentence]
    message = {**plain(whole), **changes} if changes else whole
    assert refused(message, kind, "a header" if kind is Header else "a setup") == f"refused: {sentence}"


@pytest.mark.parametrize("field", ["tag", "states"])
@pytest.mark.parametrize("tag", [[0, 0], [0, 0, 2**53], [0, 0, -2], [0, 0, True], "000"], ids=str)
def test_a_tag_is_three_whole_numbers(field, tag):
    value = tag if field == "tag" else {"a": [tag, [0, 0, 0]]}
    assert refused({**plain(HEADER), field: value}, Header, "a header") == f"refused: {TAG}"
    assert refused({"counted": tag}, Finish, "a tag") == f"refused: {TAG}"


@pytest.mark.parametrize(
    "message",
    [HEADER, SETUP, RACED, Prepare(0, 2, 2, 7, None, "p", True), Finish((1, 2, 3)), Restart(SCORED)],
    ids=repr,
)
def test_there_and_back(message):
    assert read(plain(message), type(message), ValueError, "a message") == message


def test_an_answer_is_a_request_with_its_numbers():
    request = Answer(3, (0, 1, 0), (True,), (), (0, 0, 0), (-1, 0, 0)).request(b"numbers")
    assert (request.place, request.tag, request.kept, request.payload) == (3, (0, 1, 0), (-1, 0, 0), b"numbers")


def test_a_site_may_say_more_than_is_read():
    said = {"files": {"a.py": "0"}, "packages": {"jax": None}, "optional": {}, "rows": ["a", "b"], "worker": 1}
    assert read({**said, "seconds": 1.0}, Described, ValueError, "a description").worker == 1
    for changes in ({"worker": 0}, {"rows": ["a"]}, {"counts": [1, 0]}, {"files": {"a.py": 1}}, {"packages": []}):
        refused({**said, **changes}, Described, "a description")

"""The protocol as a picture: who sends what, in which round."""

import jax.numpy as jnp
import pytest

import fedbilevel as fb
from fedbilevel.page import found
from fedbilevel.page.exchanges import exchanges, picture
from fedbilevel.protocol.table import Protocol
from helpers import folders
from helpers.quadratic import quadratic


def drawn(*lines, **more):
    """The picture of a protocol, and its words."""
    read = folders.Page(picture(Protocol.from_dict(folders.protocol(*lines, **more))))
    (svg,) = read.pictures
    return svg, [text.text for text in svg.iter("text")]


def test_an_exchange_is_two_arrows_in_a_round():
    svg, words = drawn(folders.exchange("moves", "x, y", "8 B"), folders.exchange("second", "[v]", "[16 B]"))
    assert words == [
        "server", "8 clients",
        "x, y", "100 B", "8 B", "80 B", "moves", "round 1",
        "[v]", "100 B", "[16 B]", "80 B", "second", "round 2",
    ]  # fmt: skip
    arrows = [path for path in svg.iter("path") if "arrow" in path.get("class")]
    assert ["reply" in path.get("class") for path in arrows] == [False, True] * 2


def test_loops_shared_rounds_and_other_cohorts():
    lines = [
        folders.exchange("a"), folders.exchange("b (same round)"), folders.exchange("c", times=5),
        folders.exchange("d (3 asked, same round)", times=2.5, most=4), folders.exchange("e"),
        folders.exchange("f (3 asked)"),
    ]  # fmt: skip
    _, words = drawn(*lines, cohort=4)
    assert words[1] == "4 of 8 clients"
    labels = [word for word in words if word and "round" in word]
    assert labels == ["round 1", "same round", "5 rounds", "same round, 2.5 [4]", "1 round", "1 round"]
    assert words.count("3 asked") == 2 and "250 B [400 B]" in words


def test_what_is_beside_iterations():
    _, words = drawn(
        rarely=[folders.exchange("meter.begin"), folders.exchange("meter.look (same round)")],
        each_row=[folders.exchange("validation")],
        cohort=4,
    )
    once = ("1 at the start", "now and then", "each row", "8 asked")
    assert words.count("measuring") == 2 and [words.count(word) for word in once] == [1] * 4


def test_long_lists_are_wrapped():
    many = ", ".join(f"part_{k}" for k in range(200))
    _, words = drawn(folders.exchange("m" * 80, many, "x" * 200))
    assert max(map(len, words)) <= 62 and "more lines, in the table below" in " ".join(words)


@pytest.mark.parametrize("algorithm", [fb.Lockstep(), fb.FedNest(), fb.AggITD()], ids=lambda it: type(it).__name__)
def test_real_protocols(tmp_path, algorithm):
    q = quadratic(clients=3)
    told = fb.protocol(algorithm, q.problem, q.data, q.x, q.y).to_dict()
    folder = folders.compared(tmp_path / "out", ("own",), (0,))
    folders.told(folder / "runs" / "own-0", "result.json", folders.head(protocol=told))
    read = folders.Page(exchanges(found.look(folder)))
    rounds = told["rounds"]
    assert f"one iteration: {rounds}" in read.text and jnp.isfinite(rounds)
    assert len(list(read.pictures[0].iter("rect"))) == len(told["exchanges"]) + len(told["rarely"])
    assert all(line["name"] in read.text for line in told["exchanges"])


@pytest.mark.parametrize("told", [None, 3, {}, {"exchanges": 1}, {**folders.protocol(), "rounds": None},
                                  {**folders.protocol(), "kind": "other"}])  # fmt: skip
def test_what_is_no_protocol_is_not_told(tmp_path, told):
    folder = folders.compared(tmp_path / "out", ("lockstep",), (0,))
    folders.told(folder / "runs" / "lockstep-0", "result.json", folders.head(protocol=told))
    assert "not told" in folders.Page(exchanges(found.look(folder))).text


def test_algorithms_of_a_comparison_have_one_each(tmp_path):
    folder = folders.compared(tmp_path / "out", ("a", "b", "c"))
    for seed in (0, 1):
        (folder / "runs" / f"b-{seed}" / "result.json").unlink()
    read = folders.Page(exchanges(found.look(folder)))
    assert len(read.pictures) == 2 and "not told: b (no result.json" in read.text

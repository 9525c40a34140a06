"""Pages of folders of each kind: sealed, small, complete; and folders that are none."""

import json
import re
import shutil

import pytest

from fedbilevel.errors import InputError
from fedbilevel.page import write
from helpers import folders

EVIL = "<script src='http://a.b/c.js'>alert(1)</script><img src=x onerror=\"x()\">&lt;@import url(//q)\"'\x00\x1b\ud800"
PARTS = ["Run", "End", "Curves", "Protocol", "Clients", "Networks"]


def page_of(folder, out=None):
    return folders.sealed(write(folder, out).read_text(encoding="utf-8"))


def test_a_comparison(tmp_path):
    read = page_of(folders.compared(tmp_path / "two"))
    assert re.findall("<h2>(.*?)</h2>", (tmp_path / "two" / "report.html").read_text()) == PARTS
    assert "quadratic: lockstep, fednest" in read.text and "4 runs: 4 done" in read.text
    assert "0.03 stored" in read.text and "Predicted time to value" in read.text
    assert read.pictures


def test_nothing_is_asked_of_anybody(tmp_path):
    text = write(folders.compared(tmp_path / "two")).read_text()
    assert not re.search(r"http:|https:|src=|@import|url\(|<script|<link|<iframe|//|data:", text)
    assert "default-src 'none'" in text


@pytest.mark.parametrize("where", ["page.html", "below/page.html"])
def test_the_page_goes_where_it_is_told(tmp_path, where):
    folder, file = folders.compared(tmp_path / "two"), tmp_path / where
    file.parent.mkdir(exist_ok=True)
    assert write(folder, file) == file and file.is_file() and not (folder / "report.html").exists()


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    folder = folders.compared(tmp_path / "two")
    for bad in (tmp_path, tmp_path / "no" / "such" / "place.html"):
        with pytest.raises(InputError, match="file"):
            write(folder, bad)


def test_names_are_escaped_wherever_they_stand(tmp_path):
    folder = tmp_path / "evil"
    outcome = {
        "status": EVIL,
        "sentence": EVIL,
        "stopped": EVIL,
        "warnings": [EVIL],
        "best": {"iteration": EVIL, "value": EVIL},
    }
    e = folders.exchange(EVIL, EVIL, f"{EVIL}, {EVIL}")
    head = folders.head(config={"fedbilevel": EVIL, "jax": EVIL, "algorithm": EVIL},
                        protocol=folders.protocol(e, rarely=[e], each_row=[e], name=EVIL))  # fmt: skip
    metrics = {**folders.FALLS, EVIL[:-3]: lambda k: 1 + k}
    config = folders.config((EVIL,), (0,), task=EVIL, engine=EVIL, keep=EVIL, compile=[EVIL, {EVIL: EVIL}])
    config["options"] = {EVIL: EVIL}
    config["algorithms"] = {EVIL: {EVIL: EVIL, "inner_lr": EVIL}}
    config["tune"] = {EVIL: EVIL}
    folders.told(folder, "config.json", config)
    place = folder / "runs" / "a-0"
    folders.history(place / "history.csv", metrics, {"algorithm": EVIL[:-3], "seed": 0})
    folders.told(place, "result.json", head)
    folders.told(place, "outcome.json", outcome)
    (place / "clients.csv").write_text(
        f'client,rows,"{EVIL[:-3].replace(chr(34), chr(34) * 2)}"\n"<b>x</b>",3,0.5\n<i>,4,0.7\n'
    )
    (folder / "candidates.csv").write_text(
        "name,algorithm,tempo,score,round,why\n<script>,<b>,<i>,<u>,<s>,<a href=x>\n"
    )
    read = page_of(folder)
    assert "alert(1)" in read.text and "<script>" in read.text


@pytest.mark.parametrize("name", ["config.json", "result.json", "outcome.json", "history.csv"])
@pytest.mark.parametrize("how", ["gone", "cut", "empty", "other", "list"])
def test_whatever_is_missing_or_broken_is_no_reason_to_stop(tmp_path, name, how):
    folder = folders.compared(tmp_path / "two")
    files = [folder / name] if name == "config.json" else [*folder.rglob(name)]
    for file in files:
        text = file.read_text()
        broken = {"cut": text[: len(text) // 2], "empty": "", "other": "\x00\xff", "list": "[1]"}
        file.unlink() if how == "gone" else file.write_text(broken[how])
    read = page_of(folder)
    assert name == "outcome.json" or name in read.text
    if name == "outcome.json":
        assert "4 not ended" in read.text


def test_every_file_alone_and_broken_by_a_cut_anywhere(tmp_path):
    whole = folders.compared(tmp_path / "whole", ("lockstep",), (0,))
    place = "runs/lockstep-0/history.csv"
    text = (whole / place).read_text()
    for end in range(0, len(text), 37):
        (whole / place).write_text(text[:end])
        page_of(whole)


def test_a_run_that_was_killed(tmp_path):
    folder = folders.compared(tmp_path / "two", seeds=(0, 1, 2))
    shutil.rmtree(folder / "runs" / "fednest-2")
    place = folder / "runs" / "fednest-1"
    for name in ("result.json", "outcome.json"):
        (place / name).unlink()
    (place / "history.csv").write_text((place / "history.csv").read_text()[:-7])
    read = page_of(folder)
    assert "not ended no outcome.json: killed, or it still runs" in read.text
    assert "its last row is cut, and left out" in read.text and "not begun: fednest, seed 2." in read.text


def test_a_run_that_diverged_and_one_that_was_resumed(tmp_path):
    folder = folders.compared(tmp_path / "two")
    sentence = "Lockstep blew up in iteration 7: x left the finite range; lower outer_lr (now 3)."
    folders.told(folder / "runs" / "lockstep-0", "outcome.json", {"status": "failed", "sentence": sentence})
    folders.told(folder / "runs" / "lockstep-1", "outcome.json", {"status": "done", "iterations": 19, "resumed_at": 12})
    huge = {
        "value": lambda k: 10.0 ** min(20 * k, 300),
        "gap": lambda k: ["1.0", "inf", "nan", "-1e308", "1e308"][k % 5],
    }
    folders.history(folder / "runs" / "lockstep-0" / "history.csv", huge, {"algorithm": "lockstep", "seed": 0})
    read = page_of(folder)
    assert "diverged" in read.text and sentence in read.text and "resumed at iteration 12" in read.text
    assert "values that are not finite" in read.text


def test_a_history_alone(tmp_path):
    """What a comparison of before has left: no folders of runs, no config.json."""
    folder = tmp_path / "old"
    folders.history(folder / "history.csv", folders.FALLS, {"algorithm": "lockstep", "seed": 3})
    read = page_of(folder)
    assert "lockstep 3 19 38 not told" in read.text and "config.json: settings are not told" in read.text


def test_the_one_run_of_an_application(tmp_path):
    folder = tmp_path / "app"
    config = folders.config(engine="nvflare", app="hospitals")
    for word in ("task", "options"):
        del config[word]
    folders.told(folder, "config.json", config)
    folders.history(folder / "history.csv", folders.FALLS)
    folders.told(folder, "result.json", folders.head())
    folders.told(folder, "outcome.json", {"status": "running", "workers": {}})
    read = page_of(folder)
    assert "application hospitals" in read.text and "rows never leave the sites" in read.text
    assert "1 run: 1 running" in read.text


@pytest.mark.parametrize("there", [{}, {"config.json": '{"model_type": "bert"}'}, {"history.csv": "a,b\n1,2\n"},
                                   {"outcome.json": '{"ok": true}'}, {"config.json": "[1"}])  # fmt: skip
def test_a_folder_of_somebody_else_is_refused(fedbilevel, tmp_path, there):
    folder = tmp_path / "other"
    folder.mkdir()
    for name, text in there.items():
        (folder / name).write_text(text)
    before = sorted(folder.iterdir())
    code, _, errors = fedbilevel("report", folder)
    assert code == 2 and len(errors.splitlines()) == 1 and "holds no results of ours" in errors
    assert sorted(folder.iterdir()) == before
    code, _, errors = fedbilevel("report", tmp_path / "nowhere")
    assert code == 2 and "there is no folder" in errors


def test_the_command(fedbilevel, tmp_path):
    folder = folders.compared(tmp_path / "two")
    code, text, _ = fedbilevel("report", folder)
    assert code == 0 and text.strip() == f"Written to {folder / 'report.html'}"
    code, _, errors = fedbilevel("report", folder, "--out", tmp_path)
    assert code == 2 and "name a file" in errors


def test_the_largest_folders_make_small_pages(tmp_path):
    folder, names = tmp_path / "large", [f"algorithm-{k}" for k in range(12)]
    metrics = {f"metric_{k}": lambda i, k=k: 1 + (i * (k + 7)) % 13 for k in range(30)}
    folders.told(folder, "config.json", folders.config(names, range(4)))
    for name in names:
        for seed in range(4):
            place = folder / "runs" / f"{name}-{seed}"
            folders.history(place / "history.csv", metrics, {"algorithm": name, "seed": seed}, n=150)
            folders.told(place, "result.json", folders.head())
    clients = "".join(f"client {k},{k % 97}\n" for k in range(20_000))
    (folder / "runs" / "algorithm-0-0" / "clients.csv").write_text(f"client,loss\n{clients}")
    file = write(folder)
    assert file.stat().st_size < 3e6
    assert "6 more columns are in history.csv" in file.read_text()


@pytest.mark.parametrize("verb", [
    ("run", "--algorithm", "lockstep", "--iterations", 12),
    pytest.param(("compare", "--algorithms", "lockstep,fednest", "--seeds", 2, "--rounds", 30), marks=pytest.mark.slow),
    pytest.param(("tune", "--rounds", 60, "--candidates", 2), marks=pytest.mark.slow),
])  # fmt: skip
def test_what_runs_leave(fedbilevel, tmp_path, verb):
    out = tmp_path / "out"
    code, _, errors = fedbilevel(verb[0], "quadratic", *verb[1:], "--out", out)
    assert code == 0, errors
    assert fedbilevel("report", out)[0] == 0
    read = folders.sealed((out / "report.html").read_text())
    assert "done" in read.text and "one iteration: 1 round" in read.text and "lowest" not in read.text
    assert "Rows, inner + outer" in read.text and "mobile-4g" in read.text
    if verb[0] == "run":
        code, _, errors = fedbilevel(verb[0], "quadratic", *verb[1:-1], 16, "--out", out, "--resume")
        assert code == 0, errors
        assert json.loads((out / "runs/lockstep-0/outcome.json").read_text())["resumed_at"] == 12
        assert fedbilevel("report", out)[0] == 0
        assert "resumed at iteration 12" in folders.sealed((out / "report.html").read_text()).text
    if verb[0] == "tune":
        assert "Candidates" in read.text and "chosen Lockstep" in read.text

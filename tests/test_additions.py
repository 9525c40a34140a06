"""One more algorithm, task, data set, engine and callback: each is one new file and one registry line, and nothing else.

They are added to a copy of the tree; everything that makes use of them runs in fresh processes on that copy.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.additions import LINES, add

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
TREE = ("src", "docs", "examples", "mkdocs.yml", "pyproject.toml", "README.md")
BUILT = ("__pycache__", "*.egg-info")


def files(tree: Path) -> dict[str, str]:
    """The sources of a tree, by their paths."""
    found = (path for top in TREE for path in [tree / top, *(tree / top).rglob("*")])
    kept = (path for path in found if path.is_file() and path.suffix in (".py", ".md", ".toml", ".yml"))
    return {path.relative_to(tree).as_posix(): path.read_text() for path in kept}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The tree with one more of each, as it stood after they were added."""
    place = tmp_path_factory.mktemp("added")
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, place / name, ignore=shutil.ignore_patterns(*BUILT))
        else:
            shutil.copy(source, place / name)
    add(place / "src" / "fedbilevel")
    yield place
    before, after = files(ROOT), files(place)
    new = {name for name in after if name not in before}
    changed = {name for name in after if name in before and after[name] != before[name]}
    assert {Path(name).parent.name for name in new} == set(LINES) and len(new) == len(LINES)
    assert changed == {f"src/fedbilevel/{folder}/shipped.py" for folder in LINES}
    for folder, line in LINES.items():
        name = f"src/fedbilevel/{folder}/shipped.py"
        assert after[name] == before[name] + line


def run(copy: Path, *words: str) -> str:
    """What Python says to these words, on the copy."""
    environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=copy, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def command(copy: Path, words: str) -> str:
    """What the command line says."""
    return run(copy, "-m", "fedbilevel", *words.split())


IN_PYTHON = """
import jax, numpy as np
import fedbilevel as fb
from fedbilevel.algorithms import ALGORITHMS, checked
from fedbilevel.callbacks import Counting

assert fb.__file__.startswith({root!r}), fb.__file__
assert ALGORITHMS["second-msa"] is fb.SecondMSA and checked("second-msa")[0].batch_size == 2
assert fb.engines.ENGINES["delayed"] is fb.Delayed is fb.engines.Delayed
assert fb.tasks.TASKS["second-ridge"] is fb.tasks.second_ridge
assert fb.tasks.ridge.datasets == fb.tasks.second_ridge.datasets and "flats" in fb.tasks.ridge.datasets

task, counting = fb.tasks.second_ridge(dataset="flats"), fb.callbacks.Counting()
assert task.data.clients == fb.datasets.load("flats").facts.clients == 3
def solve(algorithm, **options):
    return fb.solve(task.problem, task.data, algorithm, task.x, task.y, 3, key=task.key, **options)
second = solve(fb.SecondMSA(), engine=fb.Delayed(cohort=2), callbacks=[counting])
first = solve(fb.FedMSA(), engine=fb.Simulation(cohort=2, compile="full"))
np.testing.assert_array_equal(second.x, first.x)
assert counting.rows == len(second.history) == 4
"""


def test_they_are_there_and_run(copy):
    run(copy, "-c", IN_PYTHON.format(root=str(copy)))


def test_the_command_line_knows_them(copy, tmp_path):
    told = json.loads(command(copy, "list --json"))
    assert told["algorithms"]["second-msa"].startswith("SecondMSA (ICML 2023): x, y, v in two rounds")
    without_name = lambda name: {what: said for what, said in told["about"][name].items() if what != "summary"}
    assert without_name("second-msa") == without_name("fedmsa") != without_name("lockstep")
    assert told["tasks"]["second-ridge"] == told["tasks"]["ridge"] and "flats" in told["tasks"]["ridge"]["datasets"]
    assert "delayed" in told["engines"]
    shown = command(copy, "list")
    assert all(name in shown for name in ("second-msa", "second-ridge", "flats", "delayed"))

    task = "second-ridge --dataset flats"
    command(copy, f"run {task} --algorithm second-msa --engine delayed --iterations 3 --out {tmp_path / 'run'}")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert list(config["algorithms"]) == ["second-msa"] and config["engine"] == "delayed"
    compared = command(copy, f"compare {task} --algorithms second-msa,fedmsa --seeds 1 --iterations 2 --json")
    assert {"second-msa", "fedmsa"} <= set(re.findall(r"[\w-]+", compared))
    table = json.loads(command(copy, f"protocol {task} --algorithm second-msa --json"))
    assert "look" in json.dumps(table) and "move" in json.dumps(table)


def test_the_algorithm_conforms(copy):
    assert "FAILED" not in command(copy, "check second-msa")


def test_the_pages_are_built_with_them(copy, tmp_path):
    run(copy, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site"))
    page = lambda *place: (tmp_path / "site").joinpath(*place, "index.html").read_text()
    assert "SecondMSA (ICML 2023)" in page("api", "algorithms", "second-msa")
    assert 'href="../api/algorithms/second-msa/"' in page("choose-an-algorithm")
    assert "SecondMSA" in page("api") and "second-ridge" in page("api", "checking")
    assert "Delayed" in page("how-it-works") and "fedbilevel.engines.delayed.Delayed" in page("api", "running")
    assert "flats" in page("api", "problem") and "Counting" in page("api", "checking")


def test_their_types_are_right(copy):
    run(copy, "-m", "pyright", "--pythonpath", sys.executable, "src")

"""Several processes on this machine run as one does; where one dies all end, and another number of them goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from helpers.network import wait_for
from helpers.places import ROOT, TESTS
from helpers.several import CASES

pytestmark = pytest.mark.network

SCRIPT = str(TESTS / "helpers" / "several.py")
LIMIT = 600  # seconds for whatever is waited for
AGREE = 1e-12


def started(processes, out, *words):
    """The script as so many processes, through the launcher; a single one as users run it without."""
    out.mkdir(exist_ok=True)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT / "src")}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"  # to compile
    launcher = ["-m", "fedbilevel", "launch", "--processes", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, SCRIPT, str(out), *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process, code=0):
    """What it has said on standard error."""
    said, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == code, (said[-2000:], errors[-4000:])
    return errors


def ran(processes, out, *words, code=0):
    return ended(started(processes, out, *words), code)


def same(one, other):
    np.testing.assert_allclose(one, other, rtol=AGREE, atol=AGREE)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process computes."""
    out = tmp_path_factory.mktemp("alone")
    ran(1, out, "agree")
    return np.load(out / "numbers-0.npz")


@pytest.mark.parametrize("processes", [3])
def test_several_processes_are_one(processes, alone, tmp_path):
    ran(processes, tmp_path, "agree")
    for index in range(processes):
        found = np.load(tmp_path / f"numbers-{index}.npz")
        assert {f"{name}/own" for name in CASES} <= set(found.files)
        for name in found.files:
            same(found[name], alone[name])
    left = {"checkpoint.eqx", *(f"{name}.csv" for name in CASES), *(f"numbers-{k}.npz" for k in range(processes))}
    assert {file.name for file in tmp_path.iterdir()} == left  # process 0 alone writes


def test_a_refusal_is_told_in_every_process(tmp_path):
    ran(2, tmp_path, "refused")
    said = [(tmp_path / f"said-{index}").read_text() for index in range(2)]
    assert said[0] == said[1] and said[0].startswith("site 8 has NaN or infinite values in its outer rows, array [1]")


def nobody_left(out, processes):
    numbers = [int((out / f"pid-{index}").read_text()) for index in range(processes)]
    wait_for(lambda: not any(map(psutil.pid_exists, numbers)), 60)


def iterations(out):
    """How many the checkpoint has."""
    with (out / "checkpoint.eqx").open("rb") as file:
        return json.loads(file.readline())["iteration"]


def one_sentence(errors, out, who, told):
    sentence = (
        f"fedbilevel: process {who} of 2 {told}; all others are ended: go on with resume='{out}', whose checkpoint is of "
        f"iteration {iterations(out)}."
    )
    assert [line for line in errors.splitlines() if "go on with resume" in line] == [sentence]
    nobody_left(out, 2)


@pytest.mark.parametrize(
    ("how", "who", "told"), [("kill", 0, "was ended by SIGKILL"), ("raise", 1, "has ended with exit code 1")]
)
def test_where_one_dies_all_end_and_one_sentence_says_which(how, who, told, tmp_path):
    one_sentence(ran(2, tmp_path, "dies", how, str(who), code=1), tmp_path, who, told)


def test_another_number_of_processes_goes_on_and_ends_where_the_uninterrupted_run_does(tmp_path):
    one_sentence(ran(2, tmp_path, "dies", "kill", "1", code=1), tmp_path, 1, "was ended by SIGKILL")
    goal = iterations(tmp_path) + 5
    assert goal >= 9
    ran(1, tmp_path, "whole", str(goal))
    whole = np.load(tmp_path / "whole.npy")
    for processes in (1, 3):
        ran(processes, tmp_path, "resumes", str(goal))
        same(np.load(tmp_path / "resumed.npy"), whole)


def test_where_the_launcher_is_killed_nobody_is_left(tmp_path):
    process = started(2, tmp_path, "dies", "never", "9")
    wait_for(lambda: process.poll() is not None or (tmp_path / "checkpoint.eqx").is_file(), LIMIT)
    process.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    ended(process, -signal.SIGKILL)
    nobody_left(tmp_path, 2)
    assert time.monotonic() - killed < 60

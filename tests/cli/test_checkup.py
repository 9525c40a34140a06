"""`fedbilevel doctor` prints what is there and exits with 1 where a test fails."""

from __future__ import annotations

import json

from fedbilevel import doctor


def done(*passed):
    return lambda: iter([doctor.Tested(f"test {k}", each, "off by 1e-9", 0.1) for k, each in enumerate(passed)])


def test_it_prints_facts_and_tests(fedbilevel, monkeypatch):
    monkeypatch.setattr(doctor, "tests", done(True, True))
    code, out, _ = fedbilevel("doctor")
    assert code == 0 and "fedbilevel" in out and "passed  test 1: off by 1e-9 (0.1 s)" in out and "FAILED" not in out


def test_a_test_that_fails_is_the_exit_code(fedbilevel, monkeypatch):
    monkeypatch.setattr(doctor, "tests", done(True, False))
    code, out, _ = fedbilevel("doctor")
    assert code == 1 and "FAILED  test 1" in out and "send all of the above" in out
    code, out, _ = fedbilevel("doctor", "--json")
    told = json.loads(out)
    assert code == 1 and [each["passed"] for each in told["tests"]] == [True, False]
    assert ["versions", "jaxlib"] in [[each["section"], each["name"]] for each in told["facts"]]

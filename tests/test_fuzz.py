"""Files and prompts made to harm: a short version of fuzz.py."""

from __future__ import annotations

from fuzz import MUCH, SLOW, Fuzzer


def test_nothing_harms(host, tmp_path):
    fuzzer = Fuzzer(host, tmp_path, 1)
    fuzzer.run(100)
    assert not fuzzer.harms, fuzzer.harms[0]
    assert fuzzer.slowest < SLOW and fuzzer.memory() < MUCH
    assert fuzzer.answers["read a patch"]["answered"] > 10 and fuzzer.answers["stack"]["answered"] > 5

"""Files and prompts made to harm: a short version of fuzz.py."""

from __future__ import annotations

import gc

import pytest
from fuzz import MUCH, SLOW, Fuzzer
from hostile import Hostile, peak_of


def test_nothing_harms(host, tmp_path):
    fuzzer = Fuzzer(host, tmp_path, 1)
    fuzzer.run(100)
    assert not fuzzer.harms, fuzzer.harms[0]
    assert fuzzer.slowest < SLOW and fuzzer.memory() < MUCH
    assert fuzzer.answers["read a patch"]["answered"] > 10 and fuzzer.answers["stack"]["answered"] > 5


@pytest.fixture
def hostile(host, tmp_path):
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has no others
    yield Hostile(host, tmp_path, 1)
    torch.set_num_threads(threads)
    gc.unfreeze()


def test_a_small_file_takes_little_time_and_memory(hostile):
    hostile.run(6)
    assert not hostile.harms, "\n".join(hostile.harms)
    read = {outcome.kind for outcome in hostile.outcomes if outcome.read}
    refused = {outcome.kind for outcome in hostile.outcomes if not outcome.read}
    assert {"rank", "sides", "concepts", "parts", "modules"} <= read & refused  # the largest that may be, and beyond


def test_the_measure_sees_what_a_process_takes_and_how_it_ends(hostile):
    taken = 200 << 20
    _, _, before = peak_of(lambda: [])
    said, status, after = peak_of(lambda: [len(b"x" * taken)])
    assert said == [taken] and not status and taken * 0.95 < after - before < taken * 1.3
    said, status, _ = peak_of(lambda: [len(b"x" * (1 << 40))])
    assert said == [] and status

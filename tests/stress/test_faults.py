"""What is left after interrupts, errors, full disks and killed processes: a short version of faults.py."""

from __future__ import annotations

import pytest
import torch
from bench import Bench
from faults import one_fault
from kills import one_full_disk, one_kill


@pytest.fixture(scope="module")
def bench(comfy, loaded, tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has no others
    bench = Bench(comfy, loaded, tmp_path_factory.mktemp("faults"))
    with bench.stack:
        yield bench
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("kind", "name", "call", "number", "came"),
    [
        ("exception", "paper", "show_progress", 4, "stopped, steps kept"),
        ("interrupt", "inversion", "show_progress", 5, "stopped, steps kept"),
        ("out of memory", "paper", "training", 2, "stopped"),
        ("model unloaded", "paper", "show_progress", 4, "refused with a sentence, steps kept"),
        ("NaN in a batch", "inversion", "predict", 9, "went through"),
    ],
)
def test_a_fault_leaves_the_host_as_it_was_and_the_same_inputs_the_same_file(bench, kind, name, call, number, came):
    assert one_fault(bench, kind, name, call, number) == came


@pytest.mark.parametrize("name", ["paper", "inversion"])
def test_a_killed_training_goes_on_where_it_was(bench, name):
    bench.reference(name)
    assert one_kill(bench, name, 5, 0.0).startswith("resumed after step")


@pytest.mark.parametrize(("how", "at"), [("limit", 1000), ("fsync", 2), ("link", 1)])
def test_a_full_disk_costs_no_training_and_leaves_no_half_file(bench, how, at):
    one_full_disk(bench, "inversion", how, at)

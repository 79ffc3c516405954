"""Time and memory of work, on a GPU where there is one, else on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.live_tensors import LiveTensors


def waited() -> float:
    """The time in seconds when all that was asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_of(work: Callable[[], object], held=()) -> int:
    """Bytes that tensors take at most while `work` runs: on a GPU all that are there, else `held` and those it makes."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated()
    with LiveTensors(held) as live:
        work()
    return live.peak


def peak_beside(work: Callable[[], object], held=()) -> int:
    """As peak_of, without what was there before: `held`, of which `work` makes views."""
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else LiveTensors(held).now
    return peak_of(work, held) - before

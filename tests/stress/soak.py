"""Forgets, applies, records and unloads over and over in one server process, and looks at its memory.

python tests/stress/soak.py [--cycles N]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from graphs import Graphs  # noqa: E402

from demo.host import comfyui_folder  # noqa: E402
from demo.server import ComfyServer  # noqa: E402

CONCEPTS = ("cat", "dog", "rose", "house", "car", "lion", "rabbit")
TRAINED = {"preset": "paper", "steps": 2, "num_images": 1, "num_inference_steps": 1, "resolution": 64}
ANEW = 25  # every so many cycles the cache goes too, and the checkpoint is read anew
FLAT = 0.2  # MB a cycle


def resident(pid: int) -> float:
    """MB of memory that a process holds."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def soak(graphs: Graphs, cycles: int) -> list[float]:
    """MB of the server's process after each cycle."""
    sizes = []
    for cycle in range(cycles):
        settings = TRAINED if cycle % 5 == 4 else {}
        graph = graphs.forget(CONCEPTS[cycle % len(CONCEPTS)], cycle, record=True, **settings)
        graphs.wait(graphs.queue(graph, "soak"))
        graphs.post("free", {"unload_models": True, "free_memory": cycle % ANEW == ANEW - 1})
        time.sleep(0.3)  # the server frees between jobs
        sizes.append(resident(graphs.server.process.pid))
    return sizes


def slope(sizes: list[float]) -> float:
    """MB a cycle, by least squares over what comes after the first third, in which pools fill."""
    later = sizes[len(sizes) // 3 :]
    return float(np.polyfit(np.arange(len(later)), later, 1)[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cycles", type=int, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work, ComfyServer(comfyui_folder(), Path(work)) as server:
        start = time.monotonic()
        sizes = soak(Graphs(server), options.cycles)
    marks = " ".join(f"{size:.0f}" for size in sizes[:: max(len(sizes) // 12, 1)])
    print(
        f"{len(sizes)} cycles of forget, apply, record, unload: {slope(sizes):+.3f} MB a cycle after the first third "
        f"(flat: below {FLAT}); MB on the way: {marks}; {time.monotonic() - start:.0f} s"
    )
    return int(slope(sizes) > FLAT)


if __name__ == "__main__":
    sys.exit(main())

"""Two clients queue jobs at one real server at once: all are answered, and none gets another's answer.

python tests/stress/clients.py [--jobs N] [--seed S]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from graphs import Graphs  # noqa: E402

from demo.host import comfyui_folder  # noqa: E402
from demo.server import ComfyServer  # noqa: E402

TRAINED = {"preset": "paper", "steps": 2, "num_images": 1, "num_inference_steps": 1, "resolution": 64}
KINDS = [
    ("cat", 1, {}), ("dog", 2, {}), ("rose", 3, {}), ("house", 4, {"mode": "replace", "target": "car"}),
    ("cat", 5, TRAINED), ("car", 6, {}), ("lion", 7, TRAINED), ("dog", 8, {"preserve": "wolf"}),
]  # fmt: skip


def two_clients(graphs: Graphs, jobs: int, seed: int, kinds: list[tuple]) -> tuple[int, int]:
    """How many of `jobs` were answered, and how many of the answers were another job's."""
    alone = [graphs.seen(graphs.wait(graphs.queue(graphs.forget(c, s, **more), "alone"))) for c, s, more in kinds]
    if len({picture for _, picture in alone}) != len(kinds):
        raise AssertionError("the jobs cannot be told apart by their pictures")
    answered, mixed, lock, failed = [0], [0], threading.Lock(), []

    def client(name: str, count: int, rng: random.Random) -> None:
        try:
            queued = []
            for _ in range(count):
                kind = rng.randrange(len(kinds))
                concept, seed, more = kinds[kind]
                queued.append((kind, graphs.queue(graphs.forget(concept, seed, **more), name)))
            for kind, id in queued:
                said, picture = graphs.seen(graphs.wait(id))
                # What the cache answers says nothing again.
                wrong = picture != alone[kind][1] or said not in ("", alone[kind][0])
                with lock:
                    answered[0] += 1
                    mixed[0] += wrong
        except BaseException as error:
            failed.append(error)

    threads = [
        threading.Thread(target=client, args=(f"client-{n}", (jobs + n) // 2, random.Random(seed + n))) for n in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return answered[0], mixed[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work, ComfyServer(comfyui_folder(), Path(work)) as server:
        start = time.monotonic()
        answered, mixed = two_clients(Graphs(server), options.jobs, options.seed, KINDS)
    print(
        f"{options.jobs} jobs of two clients at one server, seed {options.seed}: {answered} answered, {mixed} mixed up, "
        f"{time.monotonic() - start:.0f} s"
    )
    return int(answered != options.jobs or mixed > 0)


if __name__ == "__main__":
    sys.exit(main())

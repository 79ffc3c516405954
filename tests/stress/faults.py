"""Faults put into every preset and the inversion, in ComfyUI's own modules, and what is left after each of them.

    python tests/stress/faults.py [--runs N] [--seed S]

After each fault the model's next picture is the same to the bit, nothing is hooked onto it, every file is whole, and the
same inputs queued again give the same file as an undisturbed run. A run that is killed is a process of its own.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench import CALLS, Bench, watched  # noqa: E402
from kills import one_full_disk, one_kill, one_server_kill  # noqa: E402
from presets import JOBS  # noqa: E402

from demo.host import CHECKPOINT, import_comfyui  # noqa: E402
from fmn_core.errors import ForgetError  # noqa: E402

ALLOCATES = ("encode", "encode_prefix", "encode_with_embeddings", "predict", "decode", "training")


class Fault(Exception):
    """What nobody expects."""


def calls_of(bench: Bench, name: str) -> Counter:
    """How often an undisturbed job makes each call."""
    host = watched(bench.host(JOBS[name]), lambda call, number: None)
    out = Path(tempfile.mkdtemp(dir=bench.folder))
    bench.run(name, out, host)
    shutil.rmtree(out)
    return host.count


def nan(answer):
    return answer * float("nan")


FAULTS = {
    "exception": (CALLS, lambda comfy: (_ for _ in ()).throw(Fault())),
    "out of memory": (ALLOCATES, lambda comfy: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("Allocation failed."))),
    "interrupt": (("show_progress", "check_interrupt"), lambda comfy: comfy.model_management.interrupt_current_processing()),
    "NaN in a batch": (("predict",), lambda comfy: nan),
    "model unloaded": (("check_interrupt", "show_progress"), lambda comfy: comfy.model_management.unload_all_models()),
}


def one_fault(bench: Bench, kind: str, name: str, call: str, number: int) -> str:
    """Puts one fault into one call of one job; returns what came of it, after checking what is left."""
    mm, make = bench.comfy.model_management, FAULTS[kind][1]
    out = Path(tempfile.mkdtemp(dir=bench.folder))
    host = watched(bench.host(JOBS[name]), lambda c, n: make(bench.comfy) if (c, n) == (call, number) else None)
    state = torch.get_rng_state()
    came = "went through"
    try:
        bench.run(name, out, host)
    except (Fault, torch.cuda.OutOfMemoryError, mm.InterruptProcessingException) as error:
        came = "stopped"
        if kind == "out of memory":
            assert "lower `batch_size`" in str(error)
    except ForgetError:
        came = "refused with a sentence"
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    mm.interrupt_current_processing(False)
    rescued = bool(list(out.glob("unfinished*")))
    bench.check(out)
    if kind != "NaN in a batch":  # which changes what is trained
        bench.again(name, out)
    shutil.rmtree(out)
    return came + (", steps kept" if rescued else "")


def draw_faults(bench: Bench, rng: random.Random, runs: int, names: list[str]) -> list[tuple[str, str, str, int]]:
    """`runs` faults: first every kind of fault in every kind of call that each job makes, in its first, last and a random
    one, then at random."""
    counts = {name: calls_of(bench, name) for name in names}
    plan = []
    for kind, (calls, _) in FAULTS.items():
        for name, count in counts.items():
            for call in calls:
                if count[call]:
                    plan += [(kind, name, call, n) for n in {1, count[call], rng.randint(1, count[call])}]
    rng.shuffle(plan)
    while len(plan) < runs:
        kind, name = rng.choice([*FAULTS]), rng.choice(names)
        call = rng.choice([call for call in FAULTS[kind][0] if counts[name][call]])
        plan.append((kind, name, call, rng.randint(1, counts[name][call])))
    return plan[:runs]


def table(results: dict[str, Counter]) -> str:
    """What came of each kind of fault, as Markdown."""
    lines = ["| fault | runs | what came of it |", "|---|---|---|"]
    for kind, came in results.items():
        lines.append(f"| {kind} | {came.total()} | {', '.join(f'{text}: {n}' for text, n in sorted(came.items()))} |")
    return "\n".join(lines)


def suite(bench: Bench, runs: int, seed: int, names: list[str]) -> dict[str, Counter]:
    """A share of `runs` for each kind of fault, of which half are killed processes; raises AssertionError at the first
    that leaves harm, after printing which it was."""
    rng, results, doing = random.Random(seed), {}, ""
    try:
        steps = {}
        for name in names:
            doing = f"undisturbed {name}"
            bench.reference(name)
            steps[name] = calls_of(bench, name)["show_progress"]
        for number in range(runs // 2):
            name = rng.choice(names)
            after, seconds = rng.randint(0, steps[name]), rng.uniform(0, 0.2)
            doing = f"kill -9, run {number}: {name}, {seconds:.3f} s after step {after} of {steps[name]}"
            results.setdefault("kill -9", Counter())[one_kill(bench, name, after, seconds)] += 1
        full = [("limit", n) for n in (0, 1, 1 << 10, 1 << 14, 1 << 16, 1 << 20)]
        full += [(how, n) for how in ("fsync", "replace", "link") for n in (1, 2, 5, 8)]
        for number in range(max(runs // 10, 3)):
            name, (how, at) = rng.choice(names), full[number] if number < len(full) else rng.choice(full)
            doing = f"full disk, run {number}: {name}, {how} {at}"
            results.setdefault("disk full", Counter())[one_full_disk(bench, name, how, at)] += 1
        for number, fault in enumerate(draw_faults(bench, rng, runs - runs // 2 - max(runs // 10, 3), names)):
            doing = f"run {number}: {fault}"
            results.setdefault(fault[0], Counter())[one_fault(bench, *fault)] += 1
    except BaseException:
        print(f"FAILED at seed {seed}: {doing}", file=sys.stderr)
        raise
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="how many faults; half of them are killed processes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    comfy, start = import_comfyui(), time.monotonic()
    with torch.inference_mode():
        loaded = comfy.sd.load_checkpoint_guess_config(str(CHECKPOINT))[:3]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(comfy, loaded, Path(folder))
        with bench.stack:
            results = suite(bench, options.runs, options.seed, [*JOBS])
        print(table(results), flush=True)
        print("A whole server, killed:", one_server_kill(Path(folder)))
    print(f"\n{sum(c.total() for c in results.values())} runs, seed {options.seed}, {time.monotonic() - start:.0f} s: ")
    print("each time the next picture was the same, no file torn, and the same inputs gave the undisturbed file.")


if __name__ == "__main__":
    main()

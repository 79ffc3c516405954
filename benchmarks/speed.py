"""Time and memory at real sizes, against the original's step: `python -m benchmarks.speed [--quick] [--json FILE]`.

diffusers' SD1.5 (and SDXL) with random weights, in fp32; a step's time is the median of a few in this one run, and each
ratio is to the original's step of the same run (below 1: quicker, smaller). Memory is what tensors take at most, weights of
UNet, text encoder and VAE included, as torch's own dispatcher sees them; at sizes that the machine cannot hold, steps run on
shapes alone, which counts the same bytes, and on a GPU besides for real. The floor: a step's arithmetic, or the weights that
it has to read, over what a large product and a copy reach on this machine (on a GPU in TF32 where its convolutions are, as
torch's default is); of `fast` the text encoder's arithmetic, and its look at unrelated prompts.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import recording
from benchmarks.cost_table import PARTS, Machine, row, tensors_of
from benchmarks.measuring import peak_beside, peak_of, waited
from benchmarks.methods import replaced
from benchmarks.originals import forget_me_not_step, leco_step
from benchmarks.pipelines import TimedHost, make_pipeline
from benchmarks.step_memory import ONCE, ORIGINAL, PRESETS, imagined_rows, real_rows, step_peak
from fmn_core.erasure.config import make_config
from fmn_core.erasure.forget import forget
from fmn_core.erasure.unrelated import latents_shape, unrelated_drift, unrelated_prompts
from fmn_core.patch.file import serialize
from fmn_core.text import features
from fmn_core.text.vocabulary import NOUNS

PARTS_OF_IT = ("steps", "cost", "jobs", "fast", "memory", "recorder")


def timed_steps(pipeline, side: int, steps: int, **settings) -> float:
    """Seconds of a preset's step: the median of `steps`, from when one is told to when the next is."""
    host = TimedHost(pipeline)
    once = {"num_images": 1, "num_inference_steps": 1, "resolution": side}
    with replaced(ONCE):
        forget(host, "cat", make_config(steps=steps + 1, **once, **settings))
    done = host.done[-steps - 1 :]
    return statistics.median(b - a for a, b in zip(done, done[1:], strict=False))


def steps_rows(pipeline, side: int, turns: int, machine: Machine, with_leco: bool) -> list[dict]:
    """A step of the original, of LECO and of each preset."""
    weights = tensors_of(pipeline)
    read = sum(p.numel() * p.element_size() for p in pipeline.unet.parameters())
    rows = []

    def measure(what, step, original=None):
        step()  # the optimiser's state
        taken = []
        for _ in range(turns):
            start = waited()
            step()
            taken.append(waited() - start)
        with FlopCounterMode(display=False) as counter:
            step()
        peak = peak_of(lambda: (step(), step()), weights)  # gradients and the optimiser's state are there in the second
        floor = machine.floor(counter.get_total_flops(), 3 * read)
        rows.append(row(what, statistics.median(taken), peak, original, floor=floor, side=side))

    for name, make in ((ORIGINAL, forget_me_not_step), ("LECO's step", leco_step)):
        if name == ORIGINAL or with_leco:
            step = make(pipeline, TimedHost(pipeline), side)
            measure(name, step, rows[0] if rows else None)
            pipeline.unet.requires_grad_(False)
            pipeline.unet.zero_grad(set_to_none=True)
            del step
            gc.collect()
    for name, settings in PRESETS.items():
        seconds = timed_steps(pipeline, side, turns + 1, **settings)
        rows.append(row(f"{name}: a step", seconds, step_peak(pipeline, side, settings), rows[0], side=side))
    return rows


def cost_rows(pipeline, side: int, turns: int, quick: bool) -> list[dict]:
    """The step of `paper` by resolution, rank, pictures at once and length of the prompt, and its job by steps."""
    long = "a photo of {}" + ", and a long list of other words" * 20
    costs = {
        "side": [128, 192, 256, 384] if not quick else [64, 128],
        "rank": [1, 4, 16, 64] if not quick else [],
        "batch_size": [1, 2, 4] if not quick else [],
        "template": ["a photo of {}", long] if not quick else [],
    }
    rows, host = [], TimedHost(pipeline)
    once = {"num_images": 1, "num_inference_steps": 1, "resolution": side}
    with replaced(ONCE):
        forget(host, "cat", make_config(preset="paper", steps=6 if quick else 36, **once))
    first, *done = host.done[1:]  # the first picture's sampling, and the first step, which allocates
    for steps in range(5, len(done) + 1, 5):
        rows.append(row(f"paper: {steps} steps", done[steps - 1] - first, None, steps=steps))
    for name, values in costs.items():
        for value in values:
            settings = {"preset": "paper"} | ({} if name == "side" else {name: value})
            if name == "template":
                settings |= {"concept_type": "custom"}
            seconds = timed_steps(pipeline, value if name == "side" else side, turns, **settings)
            label = f"{len(value)} characters" if name == "template" else value
            rows.append(row(f"paper: a step, {name} {label}", seconds, None, **{name: value}))
    return rows


def job_rows(pipeline, side: int, original: dict, presets: list[str]) -> list[dict]:
    """Whole jobs from the loaded model to the file's bytes, beside 35 of the original's steps."""
    base = row("original: 35 steps, by the step", 35 * original["seconds"], original["peak_bytes"], side=side)
    rows = [base]
    for name in presets:
        host, start = TimedHost(pipeline), waited()
        patch, losses = forget(host, "cat", make_config(**PRESETS[name]))
        serialize(patch, "patch")
        rows.append(row(f"{name}: whole job", waited() - start, None, base, side=side, steps=len(losses)))
    return rows


def fast_rows(family: str, counts: list[int], machine: Machine, device: str) -> list[dict]:
    """`fast` from names to file, for so many concepts at once; the first also reads the common words."""
    pipeline = make_pipeline(family, device=device)
    host, read = TimedHost(pipeline), [0]
    encode_prefix = host.encode_prefix

    def counted(texts, length):
        read[0] += len(texts) * length
        return encode_prefix(texts, length)

    host.encode_prefix = counted
    look = unrelated_floor(host, machine)  # which warms threads and buffers too
    encoders = [getattr(pipeline, name) for name in PARTS[2:] if hasattr(pipeline, name)]
    operations = 2 * sum(
        p.numel() for e in encoders for name, p in e.named_parameters() if ".layers." in name and p.ndim > 1
    )
    held, rows = sum(p.numel() * p.element_size() for p in tensors_of(pipeline)), []
    features._cache.clear()
    for index, count in enumerate(counts):
        names = "\n".join(NOUNS[index :: len(NOUNS) // count][:count])
        read[0], made = 0, []

        def work(names=names, made=made):
            patch, _ = forget(host, names, make_config(preset="fast"))
            made[:] = [len(serialize(patch, "patch")), patch.rank]

        start = waited()
        work()
        seconds = waited() - start
        floor = operations * read[0] / machine.operations + look
        what = f"{family} fast, {count} concept{'s' * (count > 1)}{'' if index else ', first of all'}"
        rows.append(row(what, seconds, None, concepts=count, floor=floor, bytes=made[0], rank=made[1]))
    peak = peak_beside(work, tensors_of(pipeline))  # with the common words read
    rows.append(row(f"{family} fast, {counts[-1]}, beside the model", None, peak, concepts=counts[-1], model=held))
    return rows


def unrelated_floor(host, machine: Machine) -> float:
    """Seconds that a look at unrelated prompts takes at least: their encoding, and three forwards of the UNet."""
    with FlopCounterMode(display=False) as counter, host.training(latents_shape(host)):
        unrelated_drift(host, unrelated_prompts(host, ["cat"]))
    read = sum(p.numel() * p.element_size() for p in host.unet.parameters())
    return machine.floor(counter.get_total_flops(), 3 * read)


def tf32_use() -> str:
    """Where torch computes fp32 in TF32 on this GPU."""
    where = {"products": torch.backends.cuda.matmul.allow_tf32, "convolutions": torch.backends.cudnn.allow_tf32}
    return f"in {' and '.join(name for name, on in where.items() if on) or 'nothing'}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="smaller pictures, fewer turns; no LECO, SDXL, whole jobs or recorder"
    )
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--side", type=int, help="pixels of the pictures trained on (default: 256, quick 128, on a GPU 512)")
    parser.add_argument("--turns", type=int, help="steps of each kind (default: 3, quick 1)")
    parser.add_argument("--parts", nargs="+", choices=PARTS_OF_IT, default=list(PARTS_OF_IT), help="only these tables")
    options = parser.parse_args()
    quick, device = options.quick, "cuda" if torch.cuda.is_available() else "cpu"
    side = options.side or (512 if device == "cuda" else 128 if quick else 256)
    turns, machine, rows = options.turns or (1 if quick else 3), Machine(device), []
    where = "cpu" if device == "cpu" else f"{torch.cuda.get_device_name()}, TF32 {tf32_use()}"
    reached = f"{machine.operations / 1e9:.0f} Gflop/s, {machine.bytes / 1e9:.1f} GB/s"
    print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}: {reached}\n")
    print(f"{'':46}{'time':>11}{'memory':>11}{'ratio':>8}{'ratio':>8}")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if {"steps", "cost", "jobs"} & {*options.parts}:
        pipeline = make_pipeline("sd1", vae=True, device=device)
        steps = steps_rows(pipeline, side, turns, machine, not quick) if "steps" in options.parts else []
        rows += steps
        rows += cost_rows(pipeline, side, turns, quick) if "cost" in options.parts else []
        if "jobs" in options.parts and steps and not quick:
            rows += job_rows(pipeline, side, steps[0], list(PRESETS))
        del pipeline
        gc.collect()
    if "fast" in options.parts:
        rows += fast_rows("sd1", [1, 1, 10] if quick else [1, 1, 10, 25, 50, 100], machine, device)
        rows += [] if quick else fast_rows("sdxl", [1, 1, 10], machine, device)
    if "memory" in options.parts:
        sizes = [("sd1", 512, torch.float32), ("sd1", 512, torch.float16), ("sdxl", 1024, torch.float16)]
        rows += imagined_rows(sizes[:1] if quick else sizes)
        rows += real_rows(sizes[:1] if quick else sizes) if device == "cuda" else []
    if "recorder" in options.parts and not quick:
        rows += [
            row(
                f"{r['what']}, recorded, {r['granularity']}", r["recorded_seconds"], r["extra_bytes"], overhead=r["overhead"]
            )
            for r in recording.measure_all(3, small=False)
        ]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

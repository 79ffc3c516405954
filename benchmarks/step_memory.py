"""What a step of each preset takes of memory: for real, and on shapes alone at sizes that this machine may not hold."""

from __future__ import annotations

import gc

import torch

from benchmarks.cost_table import PARTS, row, tensors_of
from benchmarks.imagined_steps import IMAGINED, imagined_step
from benchmarks.live_tensors import Imagined, imagine
from benchmarks.measuring import peak_of
from benchmarks.methods import replaced
from benchmarks.originals import forget_me_not_step
from benchmarks.pipelines import TimedHost, make_pipeline
from fmn_core.erasure.config import make_config
from fmn_core.erasure.forget import forget

ORIGINAL = "original's step"
PRESETS = {
    "paper": {"preset": "paper"},
    "paper, skip connections": {"preset": "paper", "backprop": "skip_connections"},
    "balanced": {"preset": "balanced"},
}
# Measuring beside the training is not a part of a step: done once each, where a step alone is timed.
ONCE = {
    "fmn_core.erasure.resteering.PROBES": 1,
    "fmn_core.erasure.hybrid.PROBES": 1,
    "fmn_core.erasure.refined.STRENGTHS": (1.0,),
}


def real_rows(jobs: list[tuple[str, int, torch.dtype]]) -> list[dict]:
    """What steps take of a GPU's memory at those sizes, UNet and text encoders included."""
    rows = []
    for family, side, dtype in jobs:
        pipeline = make_pipeline(family, device="cuda")
        for name in PARTS:
            if getattr(pipeline, name, None) is not None:
                getattr(pipeline, name).to(dtype)
        for name, settings in PRESETS.items():
            peak = step_peak(pipeline, side, settings)
            rows.append(row(f"{family} {side} px {str(dtype).split('.')[1]}, real: {name}", None, peak, side=side))
        del pipeline
        gc.collect()
    return rows


def step_peak(pipeline, side: int, settings: dict) -> int:
    """Bytes at most of a step of a preset, with all the weights."""
    quick = make_config(steps=1, num_images=1, num_inference_steps=1, resolution=side, **settings)
    with replaced(ONCE):
        return peak_of(lambda: forget(TimedHost(pipeline), "cat", quick), tensors_of(pipeline))


def imagined_rows(jobs: list[tuple[str, int, torch.dtype]]) -> list[dict]:
    """The memory of steps at sizes that this machine may not hold, on shapes alone."""
    rows = []
    for family, side, dtype in jobs:
        label = f"{family} {side} px {str(dtype).split('.')[1]}"
        original = None
        if dtype == torch.float32 and family == "sd1":
            with imagine():
                pipeline = make_pipeline(family, vae=True)
                step = forget_me_not_step(pipeline, TimedHost(pipeline), side)
                with Imagined(tensors_of(pipeline)) as live:
                    step()
                    step()
            original = row(f"{label}: {ORIGINAL}", None, live.peak, side=side)
            rows.append(original)
            gc.collect()
        for name, work in IMAGINED.items():
            with imagine():
                peak, held = imagined_step(family, side, dtype, work)
            estimate = f"{label}: {name}"
            rows.append(row(estimate, None, peak, original, side=side, weights=held))
    return rows

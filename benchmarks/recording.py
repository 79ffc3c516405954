"""What recording token attention costs a sampling: `python -m benchmarks.recording [--json FILE]`.

The same sampling with and without recording, in turns, in seconds of one core's work, or of a GPU's where there is one; and
the most memory that tensors take in each. In ComfyUI, with guidance 3: 20 steps of a picture of 128 pixels by the embedded
model, and a picture of 512 pixels by an SD1.5 UNet of real size with random weights (one step; on a GPU 20, in fp16).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from benchmarks.measuring import peak_of, waited
from demo.host import CHECKPOINT, comfyui_folder, import_comfyui

PROMPT = "a neon drawing of a cat beside a house"


def sampler(comfy, positive, negative, side: int, steps: int):
    """sample(model): the host's own sampling of one picture."""

    def sample(model):
        latent = torch.zeros(1, 4, side, side)
        noise = comfy.sample.prepare_noise(latent, 1)
        options = {"seed": 1, "disable_pbar": True}
        return comfy.sample.sample(model, noise, steps, 3.0, "euler", "normal", positive, negative, latent, **options)

    return sample


def measure(sample, plain, watched, turns: int) -> dict:
    """Seconds of work without and with recording, their ratio turn by turn, and the extra memory in bytes."""
    seconds: dict[str, list[float]] = {"plain": [], "recorded": []}
    now = waited if torch.cuda.is_available() else time.process_time
    for turn in range(turns + 1):
        for name, model in (("plain", plain), ("recorded", watched)):
            start = now()
            sample(model)
            if turn:  # the first loads and warms
                seconds[name].append(now() - start)
    peaks = [peak_of(lambda model=model: sample(model)) for model in (plain, watched)]
    ratios = [b / a for a, b in zip(seconds["plain"], seconds["recorded"], strict=True)]
    return {
        "plain_seconds": statistics.median(seconds["plain"]),
        "recorded_seconds": statistics.median(seconds["recorded"]),
        "overhead": statistics.median(ratios) - 1,
        "extra_bytes": peaks[1] - peaks[0],
    }


def measure_all(turns: int, small: bool) -> list[dict]:
    """A row for each way of keeping, on the demo model and, unless `small`, on SD1.5's size; told as they come."""
    gpu = torch.cuda.is_available()
    if not gpu:
        torch.set_num_threads(1)  # so that the work is that of one core, whatever else the machine does
    comfy = import_comfyui(comfyui_folder(), cpu=not gpu)
    from benchmarks.architectures import CONTEXT, make_model
    from fmn_core.attention.recorder import RecordingConfig
    from fmn_core.hosts.comfy.attention import record_attention

    rows = []
    with torch.inference_mode():
        demo, clip, _ = comfy.sd.load_checkpoint_guess_config(str(CHECKPOINT))[:3]
        asked, empty = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (PROMPT, ""))
        jobs = [("demo model, 128 px", demo, asked, sampler(comfy, asked, empty, 16, 20))]
        if not small:
            generator = torch.Generator().manual_seed(0)
            wide = [[[torch.randn(1, 77, CONTEXT["sd1"], generator=generator), {}]] for _ in range(2)]
            model = make_model("sd1", dtype=torch.float16 if gpu else torch.float32)
            jobs.append(("SD1.5, 512 px", model, wide[0], sampler(comfy, *wide, 64, 20 if gpu else 1)))
        for what, model, positive, sample in jobs:
            for granularity in ("heads", "steps", "mean"):
                watched, recording = record_attention(
                    model, clip, PROMPT, RecordingConfig(granularity=granularity), positive
                )
                row = {"what": what, "granularity": granularity, **measure(sample, model, watched, turns)}
                row["kept_bytes"] = recording.bytes()
                rows.append(row)
                print(
                    f"{what:18} {granularity:6}: {row['plain_seconds']:6.2f} s, recorded {row['recorded_seconds']:6.2f} s, "
                    f"{row['overhead']:+.1%}; {row['extra_bytes'] / 2**20:.1f} MB more at most, "
                    f"{row['kept_bytes'] / 2**20:.1f} MB of it kept",
                    flush=True,
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recording", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--turns", type=int, default=5, help="samplings of each kind (default: 5)")
    parser.add_argument("--small", action="store_true", help="the demo model alone")
    options = parser.parse_args()
    rows = measure_all(options.turns, options.small)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

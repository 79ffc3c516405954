"""The core in ComfyUI's own modules on a device that is not the CPU: `python tests/device/comfyui_device.py directml`.

In a process of its own, since ComfyUI chooses its device when it is imported. Each job prints a line of JSON: its name, what
went wrong, if anything did, and why it was skipped, if it was.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

from demo.host import CHECKPOINT, comfyui_folder  # noqa: E402
from demo.launch_comfyui import name_missing_operators  # noqa: E402

name_missing_operators()
sys.path.insert(0, str(comfyui_folder()))

from comfy.cli_args import args  # noqa: E402

if sys.argv[1] == "directml":
    args.directml = -1

import comfy.model_management  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
from check_device import IMAGES, MASK, PATCH, QUICK, require_whole  # noqa: E402
from presets import config_for, probe_little  # noqa: E402
from quantized import FP8, scaled  # noqa: E402

from fmn_core.attention.visualize import ViewConfig, visualize  # noqa: E402
from fmn_core.erasure.config import make_config  # noqa: E402
from fmn_core.erasure.forget import forget  # noqa: E402
from fmn_core.evaluation.config import EvaluationConfig  # noqa: E402
from fmn_core.evaluation.evaluate import evaluate  # noqa: E402
from fmn_core.hosts.comfy import demo_models  # noqa: E402
from fmn_core.hosts.comfy.apply import apply_patch  # noqa: E402
from fmn_core.hosts.comfy.attention import record_attention  # noqa: E402
from fmn_core.hosts.comfy.hooks import gated  # noqa: E402
from fmn_core.hosts.comfy.model import ComfyHost  # noqa: E402
from fmn_core.inversion.config import InversionConfig  # noqa: E402
from fmn_core.inversion.textual_inversion import invert_pictures  # noqa: E402
from fmn_core.patch.file import read_patch  # noqa: E402

CAT = "a photo of a cat"


def load(kind: str = "whole") -> tuple:
    """MODEL, CLIP, VAE of the demo's checkpoint as a graph loads them: whole, or in one of the forms of fp8."""
    with torch.inference_mode():
        if kind in ("whole", "cast"):
            options = {"dtype": FP8} if kind == "cast" else {}
            return comfy.sd.load_checkpoint_guess_config(str(CHECKPOINT), model_options=options)[:3]
        weights, metadata = scaled({"scaled": "scale_weight", "mixed": "weight_scale"}[kind])
        return comfy.sd.load_state_dict_guess_config(weights, metadata=metadata)[:3]


def encode(clip, text: str):
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def sample(model, clip, positive) -> torch.Tensor:
    """Latents by the host's own sampler."""
    with torch.inference_mode():
        latent = torch.zeros(2, 4, 8, 8, device=comfy.model_management.intermediate_device())
        noise = comfy.sample.prepare_noise(latent, 1)
        negative = encode(clip, "")
        latents = comfy.sample.sample(
            model, noise, 1, 3.0, "euler", "normal", positive, negative, latent, seed=1, disable_pbar=True
        )
    return latents.cpu()


class HostFails(Exception):
    """ComfyUI cannot draw with a checkpoint, whether the pack is there or not."""


def require_sampled(kind: str, model, clip) -> None:
    """Raises HostFails where the device multiplies in fp8 and the host's own sampler fails with what it made for that of a
    mixed checkpoint: ComfyUI 0.3.75 gives layers in fp16 an input in fp32 then. Nothing of the pack is on the model."""
    try:
        sample(model, clip, encode(clip, CAT))
    except RuntimeError as error:
        if kind == "mixed" and comfy.model_management.supports_fp8_compute(model.load_device):
            raise HostFails(
                f"ComfyUI itself cannot sample this checkpoint in mixed fp8 on {model.load_device}: {error}"
            ) from error
        raise


def patched(loaded: tuple) -> None:
    """A patch on the model and the same on the prompt alone: they do much the same, and the model is as it was."""
    model, clip, _ = loaded
    before, prompt = sample(model, clip, encode(clip, CAT)), encode(clip, CAT)
    patch = read_patch(PATCH)
    with torch.inference_mode():
        conditioning, _, on = gated(prompt, patch, (1.0, 1.0), (0.0, 1.0), 0.1)
    on_model, on_prompt = sample(apply_patch(model, patch, 1.0), clip, prompt), sample(model, clip, conditioning)
    assert on == [True] and not torch.equal(on_model, before)
    assert 0 < (on_prompt - before).norm() and (on_prompt - on_model).norm() < (on_model - before).norm()
    assert torch.equal(sample(model, clip, prompt), before)


def recorded(loaded: tuple) -> None:
    """A recording while the sampler runs: the picture is the same, and the maps are on the CPU."""
    model, clip, _ = loaded
    watched, recording = record_attention(model, clip, CAT)
    assert torch.equal(sample(watched, clip, encode(clip, CAT)), sample(model, clip, encode(clip, CAT)))
    assert recording.pictures == 2 and recording.mass().device.type == "cpu"
    assert torch.allclose(recording.mass().sum(1), torch.ones(2), atol=1e-3)
    pictures = IMAGES.repeat(2, 1, 1, 1).to(comfy.model_management.intermediate_device())
    visualize(recording, pictures, ViewConfig(words="cat"))


def quantized(kind: str) -> None:
    """A model in fp8 that is forgotten from, moved off its device and back for others, patched and trained."""
    require_sampled(kind, *load(kind)[:2])
    loaded = load(kind)
    host = ComfyHost(*loaded)
    host.resolution = 64
    sample(*loaded[:2], encode(loaded[1], CAT))
    require_whole(forget(host, "cat", make_config())[0])
    patched(loaded)
    require_whole(forget(host, "cat", config_for("paper", **QUICK))[0])


def main() -> None:
    demo_models.register(ROOT / "demo")
    comfy.utils.PROGRESS_BAR_ENABLED = False
    probe_little(setattr)
    loaded = load()
    host = ComfyHost(*loaded)
    host.resolution = 64
    there = comfy.model_management.intermediate_device()
    images, mask = IMAGES.to(there), MASK.to(there)
    patch = read_patch(PATCH)
    jobs = {preset: lambda preset=preset: forgotten(preset) for preset in ("fast", "paper", "balanced", "robust")}

    def forgotten(preset: str) -> None:
        given = {"images": images, "mask": mask} if preset == "paper" else {}
        require_whole(forget(host, "cat", config_for(preset, **QUICK), **given)[0])

    jobs |= {
        "inversion": lambda: invert_pictures(host, InversionConfig(steps=1, batch_size=1), images=images, mask=mask),
        "evaluation": lambda: evaluate(
            host, patch, EvaluationConfig(prompts=1, num_inference_steps=1, resolution=64, inversion=True, inversion_steps=1)
        ),
        "patched": lambda: patched(loaded),
        "recorded": lambda: recorded(loaded),
        **{kind: lambda kind=kind: quantized(kind) for kind in ("cast", "scaled", "mixed")},
    }
    for name, job in jobs.items():
        told = {"job": name, "error": "", "skipped": "", "device": str(host.device)}
        try:
            job()
        except HostFails as error:
            told["skipped"] = str(error)
        except Exception:
            told["error"] = traceback.format_exc()
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()

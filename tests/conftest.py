"""Fixtures: the real ComfyUI, imported into this process and as a server of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "demo/checkpoints/emoji-sd-128.safetensors"


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The folder of the ComfyUI that `python install.py test` set up, or FMN_COMFYUI."""
    folder = Path(os.environ.get("FMN_COMFYUI", ROOT / ".venv/ComfyUI"))
    if not (folder / "main.py").exists():
        pytest.skip(f"no ComfyUI in {folder}: run `python install.py test`, or set FMN_COMFYUI to an installed one")
    return folder


@pytest.fixture(scope="session")
def comfy(comfyui):
    """ComfyUI's own modules in this process, on the CPU, with the embedded model known to them."""
    from demo.launch_comfyui import name_missing_operators

    name_missing_operators()
    sys.path.insert(0, str(comfyui))
    from comfy.cli_args import args

    args.cpu = True
    import comfy.sample
    import comfy.sd
    import comfy.utils

    from fmn_core.hosts import comfy_embedded

    comfy.utils.PROGRESS_BAR_ENABLED = False
    comfy_embedded.register(ROOT / "demo")
    return comfy


@pytest.fixture(scope="session")
def loaded(comfy):
    """MODEL, CLIP, VAE of the embedded model, loaded as a graph loads them: in inference mode."""
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(CHECKPOINT))[:3]


@pytest.fixture(scope="session")
def sample(comfy, loaded):
    """sample(model, prompt, ...) -> latents [B, 4, h, w], by the host's own sampler in inference mode."""
    _, clip, _ = loaded

    def sample(model, prompt, *, negative="", seed=1, steps=4, cfg=3.0, batch=2, size=(8, 8)):
        with torch.inference_mode():
            positive, empty = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, negative))
            latent = torch.zeros(batch, 4, *size)
            noise = comfy.sample.prepare_noise(latent, seed)
            return comfy.sample.sample(
                model, noise, steps, cfg, "euler", "normal", positive, empty, latent, seed=seed, disable_pbar=True
            )

    return sample


@pytest.fixture(scope="session")
def server(comfyui, tmp_path_factory):
    """A running ComfyUI server with the pack in it."""
    from demo.server import ComfyServer

    with ComfyServer(comfyui, tmp_path_factory.mktemp("comfyui")) as server:
        yield server

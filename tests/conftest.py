"""Fixtures: the real ComfyUI, imported into this process and as a server of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from demo.host import CHECKPOINT, comfyui_folder, import_comfyui

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The folder of the ComfyUI that `python install.py test` set up, or FMN_COMFYUI."""
    try:
        return comfyui_folder()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def run_python(comfyui):
    """run_python(word, ...) runs the interpreter in the project's folder and fails, with what it printed, where it fails."""

    def run_python(*words):
        environment = {**os.environ, "FMN_COMFYUI": str(comfyui)}
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    return run_python


@pytest.fixture(scope="session")
def comfy(comfyui):
    """ComfyUI's own modules in this process, on the CPU, with the embedded model known to them."""
    return import_comfyui(comfyui)


@pytest.fixture(scope="session")
def loaded(comfy):
    """MODEL, CLIP, VAE of the embedded model, loaded as a graph loads them: in inference mode."""
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(CHECKPOINT))[:3]


@pytest.fixture
def host(loaded):
    """The embedded model as a DiffusionHost."""
    from fmn_core.hosts.comfy import ComfyHost

    return ComfyHost(*loaded)


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

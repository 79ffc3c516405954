"""The demo's models and patches in ComfyUI's lists: on request alone."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import comfy.supported_models
import folder_paths
from safetensors import SafetensorError, safe_open

from .demo_flux import EmojiFlux
from .demo_sd import EmojiSD

SWITCH = "FMN_DEMO"  # an environment variable: 1 asks for the demo


def wanted() -> bool:
    """Whether whoever started this host asked for the demo."""
    return os.environ.get(SWITCH) == "1"


def register(demo: Path) -> None:
    """Lists the demo's checkpoints and patches in the host's loaders and lets the host recognise its models."""
    known = comfy.supported_models.models
    for model in (EmojiSD, EmojiFlux):
        if not any(other.__name__ == model.__name__ for other in known):
            known.insert(0, model)  # before the host's own Flux, which the second one is too
    for kind in ("checkpoints", "loras"):
        folder_paths.add_model_folder_path(kind, str(demo / kind))
        for file in (demo / kind).glob("*.safetensors"):
            if not is_complete(file):
                logging.warning("Forget-Me-Not: %s is damaged or cut short: restore it from the repository.", file)


def is_complete(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    try:
        with safe_open(file, "pt"):
            return True
    except SafetensorError:
        return False

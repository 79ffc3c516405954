"""The demo model in ComfyUI, in this process: for commands that need its pictures by the hundred."""

import os
import sys
from pathlib import Path

from .launch_comfyui import name_missing_operators

DEMO = Path(__file__).parent
CHECKPOINT = DEMO / "checkpoints" / "emoji-sd-128.safetensors"


def comfyui_folder(folder: Path | None = None) -> Path:
    """`folder`, or FMN_COMFYUI, or the one that install.py made; raises FileNotFoundError where there is no ComfyUI."""
    folder = Path(folder or os.environ.get("FMN_COMFYUI") or DEMO.parent / ".venv/ComfyUI")
    if not (folder / "main.py").exists():
        raise FileNotFoundError(f"There is no ComfyUI in {folder}: run `python install.py demo` first, or set FMN_COMFYUI.")
    return folder


def import_comfyui(folder: Path | None = None, cpu: bool = True):
    """Imports ComfyUI's modules into this process, on the CPU or on the device that it chooses."""
    folder = comfyui_folder(folder)
    name_missing_operators()
    sys.path.insert(0, str(folder))
    from comfy.cli_args import args

    args.cpu = cpu
    import comfy.sample
    import comfy.sd
    import comfy.utils

    from fmn_core.hosts.comfy import demo_models

    comfy.utils.PROGRESS_BAR_ENABLED = False
    demo_models.register(DEMO)
    return comfy


def load_demo_model(comfyui: Path | None = None, checkpoint: Path = CHECKPOINT):
    """The demo model as a DiffusionHost; raises ValueError where the checkpoint is another model."""
    comfy = import_comfyui(comfyui)
    from fmn_core.hosts.comfy.demo_sd import EmojiSD
    from fmn_core.hosts.comfy.model import ComfyHost

    model, clip, vae = comfy.sd.load_checkpoint_guess_config(str(checkpoint))[:3]
    if not isinstance(model.model.model_config, EmojiSD):
        kind = type(model.model.model_config).__name__
        raise ValueError(f"{checkpoint} is not the demo model, ComfyUI takes it for {kind}: restore it from the repository.")
    return ComfyHost(model, clip, vae)

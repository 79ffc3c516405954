"""The embedded model in ComfyUI: its checkpoint in the loader's list, its architecture among the host's models."""

from __future__ import annotations

import logging
from pathlib import Path

import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import folder_paths
from safetensors import SafetensorError, safe_open

from ...errors import ForgetError

TEXT_MODEL = {
    "hidden_act": "quick_gelu",
    "hidden_size": 112,
    "intermediate_size": 448,
    "max_position_embeddings": 77,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 49408,
    "eos_token_id": 49407,
    "layer_norm_eps": 1e-5,
}
TENSORS = {"UNet": 404, "text encoder": 36, "autoencoder": 136}


def require_whole(part: str, weights: dict) -> dict:
    """The weights of one part of the checkpoint, as they are; raises ForgetError where some are missing or not finite.

    Of a part that is not there at all the host says so itself.
    """
    if not weights:
        return weights
    broken = sum(not weight.float().isfinite().all() for weight in weights.values())
    if len(weights) < TENSORS[part] or broken:  # a quantised copy has more: its scales
        raise ForgetError(
            f"The checkpoint has the widths of the embedded model, but its {part} is damaged: {len(weights)} tensors where "
            f"there should be {TENSORS[part]}, {broken} of them with values that are not finite. Restore the files in "
            "demo/checkpoints from the repository."
        )
    return weights


class EmojiTextModel(comfy.sd1_clip.SDClipModel):
    """SD1's text encoder at the embedded model's widths."""

    def __init__(self, device="cpu", dtype=None, model_options={}):  # noqa: B006 (the host's own signature)
        super().__init__(
            device=device,
            dtype=dtype,
            textmodel_json_config=dict(TEXT_MODEL),
            return_projected_pooled=False,
            model_options=model_options,
        )


class EmojiClipModel(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}):  # noqa: B006
        super().__init__(device=device, dtype=dtype, model_options=model_options, clip_model=EmojiTextModel)


class EmojiSD(comfy.supported_models.SD15):
    """The embedded emoji model: SD1's architecture in smaller widths."""

    unet_config = {**comfy.supported_models.SD15.unet_config, "context_dim": 112, "model_channels": 64}
    unet_extra_config = {**comfy.supported_models.SD15.unet_extra_config, "num_heads": 4}
    native_size = 128

    def process_unet_state_dict(self, state_dict):
        return require_whole("UNet", super().process_unet_state_dict(state_dict))

    def process_clip_state_dict(self, state_dict):
        return require_whole("text encoder", super().process_clip_state_dict(state_dict))

    def process_vae_state_dict(self, state_dict):
        return require_whole("autoencoder", super().process_vae_state_dict(state_dict))

    def clip_target(self, state_dict={}):  # noqa: B006
        return comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, EmojiClipModel)


def is_complete(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    try:
        with safe_open(file, "pt"):
            return True
    except SafetensorError:
        return False


def register(demo: Path) -> None:
    """Lists the demo's checkpoints and patches in the host's loaders and lets the host recognise the model."""
    if not any(known.__name__ == EmojiSD.__name__ for known in comfy.supported_models.models):
        comfy.supported_models.models.append(EmojiSD)
    for kind in ("checkpoints", "loras"):
        folder_paths.add_model_folder_path(kind, str(demo / kind))
        for file in (demo / kind).glob("*.safetensors"):
            if not is_complete(file):
                logging.warning("Forget-Me-Not: %s is damaged or cut short: restore it from the repository.", file)

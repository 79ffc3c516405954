"""The embedded model in ComfyUI: its checkpoint in the loader's list, its architecture among the host's models."""

from __future__ import annotations

from pathlib import Path

import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import folder_paths

TEXT_MODEL = {
    "hidden_act": "quick_gelu",
    "hidden_size": 96,
    "intermediate_size": 384,
    "max_position_embeddings": 77,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 49408,
    "eos_token_id": 49407,
    "layer_norm_eps": 1e-5,
}


class EmojiTextModel(comfy.sd1_clip.SDClipModel):
    """SD1's text encoder at the embedded model's widths."""

    def __init__(self, device="cpu", dtype=None, model_options={}):  # noqa: B006 (the host's own signature)
        super().__init__(
            device=device, dtype=dtype, textmodel_json_config=dict(TEXT_MODEL), return_projected_pooled=False,
            model_options=model_options,
        )  # fmt: skip


class EmojiClipModel(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}):  # noqa: B006
        super().__init__(device=device, dtype=dtype, model_options=model_options, clip_model=EmojiTextModel)


class EmojiSD(comfy.supported_models.SD15):
    """The embedded emoji model: SD1's architecture in smaller widths."""

    unet_config = {**comfy.supported_models.SD15.unet_config, "context_dim": 96, "model_channels": 64}
    native_size = 64

    def clip_target(self, state_dict={}):  # noqa: B006
        return comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, EmojiClipModel)


def register(demo: Path) -> None:
    """Lists the demo's checkpoints and patches in the host's loaders and lets the host recognise the model."""
    if not any(known.__name__ == EmojiSD.__name__ for known in comfy.supported_models.models):
        comfy.supported_models.models.append(EmojiSD)
    for kind in ("checkpoints", "loras"):
        folder_paths.add_model_folder_path(kind, str(demo / kind))

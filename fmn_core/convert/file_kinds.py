"""Files of weights that change no UNet's cross-attention, and what they are instead."""

from __future__ import annotations

import re
from collections.abc import Iterable

UNET_PREFIX = (
    r"^(?:base_model\.model\.|transformer\.|unet\.|lora_transformer_|lora_unet_+|lycoris_|(?:model\.)?diffusion_model\.)*"
)
# What a tensor's name tells of its file. The first are no LoRA and no model, whatever else they hold ...
EXTENSIONS = {
    "a Control-LoRA": r"^lora_controlnet$",
    "a ControlNet-LLLite": r"^lllite_",
    "a ControlNet": r"^(?:control_model|controlnet_\w+|input_hint_block|zero_convs)\.",
    "an IP-Adapter": r"^(?:ip_adapter|image_proj)\.",
    "a T2I-Adapter": r"^(?:adapter\.)?body\.\d+\.(?:in_conv|block[12]|skep|resnets)\b",
    "a GLIGEN": r"(?:^|[._])(?:fuser[._]|position_net[._])",
    "a motion module or its LoRA": r"(?:^|[._])(?:motion_modules|temporal_transformer)[._]",
    "for a transformer such as Flux or SD3 and for no UNet": UNET_PREFIX
    + r"(?:(?:single_|joint_|double_)?(?:transformer_)?blocks|layers)[._]\d",
}
# ... the others may be part of a model.
PARTS = {
    "a hypernetwork": r"^\d{3,4}\.[01]\.",
    "an embedding": r"^(?:emb_params|clip_[lgh]|t5xxl|string_to_param.*|<.*>)$",
    "a text encoder or its LoRA": r"^(?:base_model\.model\.)?(?:lora_te|text_encoder|text_model\.|cond_stage_model\.|"
    r"conditioner\.|transformer\.(?:text_model|resblocks)\.|encoder\.block\.\d|token_embedding\.)",
    "an image encoder": r"^(?:vision_model|visual)\.",
    "a VAE": r"^(?:first_stage_model\.|vae\.)?(?:taesd_)?(?:(?:en|de)coder\.(?:down|up|mid|conv|\d)|(?:post_)?quant_conv\.)",
}


def extension(keys: Iterable[str]) -> str | None:
    """What a file is that goes beside a model, or changes no UNet; None for all others."""
    return first_of(EXTENSIONS, keys)


def part_of_model(keys: Iterable[str]) -> str | None:
    """What a file without a UNet's layers is; None where it is nothing known."""
    return first_of(PARTS, keys)


def first_of(kinds: dict[str, str], keys: Iterable[str]) -> str | None:
    keys = [*keys]
    return next((kind for kind, pattern in kinds.items() if any(map(re.compile(pattern).search, keys))), None)

"""What tools call one and the same layer of a UNet in their files, and the one name behind it."""

from __future__ import annotations

import re
from collections.abc import Iterable

# What follows the layer's name in a file -> what the tensor is. kohya; PEFT; diffusers, the newest last; full weights.
PARTS = {
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha",
    ".lora_A.weight": "down", ".lora_B.weight": "up",
    ".lora_A.default.weight": "down", ".lora_B.default.weight": "up",
    "_lora.down.weight": "down", "_lora.up.weight": "up",
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    ".diff": "diff", ".diff_b": "diff_b",
    ".weight": "weight", ".bias": "bias",
}  # fmt: skip
PART = re.compile("^(.+?)(" + "|".join(map(re.escape, sorted(PARTS, key=len, reverse=True))) + ")$", re.DOTALL)
PREFIX = re.compile(r"^(base_model\.model\.|unet\.|lora_unet_|lycoris_|model\.diffusion_model\.|diffusion_model\.)+")
TEXT = re.compile(r"^(base_model\.model\.)?(lora_te\d?_|text_encoders?[._\d]|text_model\.|cond_stage_model\.|conditioner\.)")
LDM = re.compile(r"^(?:(input|output)_blocks_(\d{1,4})|middle_block)_(\d{1,4})_(.*)$", re.DOTALL)
RESIDUAL_BLOCK = {  # ldm: diffusers
    "in_layers_2": "conv1", "emb_layers_1": "time_emb_proj", "out_layers_3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
WORDS = re.compile(
    r"\d+|(?:down|up|transformer)_blocks|mid_block|attentions|resnets|(?:down|up)samplers|attn[12]|to_(?:q|k|v|out)|"
    r"proj_in|proj_out|proj|ff|net|conv_shortcut|conv[12]?|time_emb_proj"
)


def split_key(key: str) -> tuple[str, str]:
    """A tensor's layer and what of it the tensor is: a value of PARTS, or what stands after the last dot."""
    found = PART.match(key)
    if found:
        return found[1], PARTS[found[2]]
    layer, _, part = key.rpartition(".")
    return layer, part


def of_text_encoder(key: str) -> bool:
    """Whether a tensor belongs to a text encoder."""
    return bool(TEXT.match(key))


def blocks_per_level(names: Iterable[str]) -> int:
    """How many of the ldm's input blocks a UNet has at each resolution, by the names of its layers: 3 in SD1, SD2, SDXL."""
    flat = [flatten(name) for name in names]
    downsamplers = [int(n) for name in flat for n in re.findall(r"^input_blocks_(\d{1,4})_0_op", name)]
    residual = [int(n) + 2 for name in flat for n in re.findall(r"^down_blocks_\d+_resnets_(\d{1,4})_", name)]
    return min(filter(None, downsamplers), default=max(residual, default=3))


def flatten(name: str) -> str:
    """A layer's name without what tools put before it, with `_` for the dots."""
    flat = PREFIX.sub("", name).replace(".", "_").replace("_processor_", "_").removesuffix("_lora")
    return f"{flat}_0" if flat.endswith("_to_out") else flat


def one_name(name: str, per_level: int) -> str:
    """The layer's name in diffusers with `_` for the dots, from any spelling; a name of no known form stays as it is.

    The ldm's input block n is diffusers' down block (n - 1) // per_level, its output block n the up block n //
    per_level (diffusers' convert_ldm_unet_checkpoint).
    """
    flat = flatten(name)
    found = LDM.match(flat)
    if not found:
        return flat
    place, number, part, tail = found[1], int(found[2] or 0), int(found[3]), found[4]
    if place is None:
        start, index = "mid_block", part // 2
    elif place == "input":
        level, index = divmod(number - 1, per_level)
        start = f"down_blocks_{level}"
    else:
        level, index = divmod(number, per_level)
        start = f"up_blocks_{level}"
    if tail == "op":
        return f"{start}_downsamplers_0_conv"
    if tail == "conv":
        return f"{start}_upsamplers_0_conv"
    residual = part != 1 if place is None else part == 0
    return f"{start}_resnets_{index}_{RESIDUAL_BLOCK.get(tail, tail)}" if residual else f"{start}_attentions_{index}_{tail}"


def dotted(name: str) -> str:
    """diffusers' own name of a layer from that of `one_name`; raises KeyError for what is no layer of a UNet's blocks."""
    words = WORDS.findall(name)
    if "_".join(words) != name:
        raise KeyError(name)
    return ".".join(words)

"""What tools call one and the same layer of a UNet in their files, and the one name behind it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

# What follows the layer's name in a file, by what the tensor is. PEFT may put its adapter's name in, which holds no dot.
ADAPTER = r"(?:\.[^.]+)?"
KEY_ENDINGS = {
    # kohya; PEFT; diffusers, old and new
    "down": rf"\.lora_down\.weight|\.lora_A(?:{ADAPTER}\.weight)?|[._]lora(?:_linear_layer)?\.down\.weight",
    "up": rf"\.lora_up\.weight|\.lora_B(?:{ADAPTER}\.weight)?|[._]lora(?:_linear_layer)?\.up\.weight",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"(?:[._]lora)?\.alpha",
    "up_b": rf"\.lora_B{ADAPTER}\.bias",
    "lycoris": rf"\.(?P<factor>(?:hada|lokr)_[wt][12](?:_[ab])?){ADAPTER}",
    "diff_b": r"\.diff_b",
    "diff": r"\.diff",
    "weight": r"\.weight",
    "bias": r"\.bias",
}
KEY_ENDING = re.compile("|".join(f"(?P<{part}>{ending})" for part, ending in KEY_ENDINGS.items()))
DOTS = 6  # as many parts as stand behind a layer's name at most
PREFIX = re.compile(
    r"^(base_model\.model\.|unet\.|lora_unet_|lycoris_|oft_unet_|model\.diffusion_model\.|diffusion_model\.)+"
)
TEXT = re.compile(r"^(base_model\.model\.)?(lora_te\d?_|text_encoders?[._\d]|text_model\.|cond_stage_model\.|conditioner\.)")
OUTSIDE_BLOCKS = {  # ldm: diffusers, of layers in no block
    "input_blocks_0_0": "conv_in", "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1", "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1", "label_emb_0_2": "add_embedding_linear_2",
}  # fmt: skip
LDM = re.compile(r"^(?:(input|output)_blocks_(\d{1,4})|middle_block)_(\d{1,4})_(.*)$", re.DOTALL)
RESIDUAL_BLOCK = {  # ldm: diffusers
    "in_layers_2": "conv1", "emb_layers_1": "time_emb_proj", "out_layers_3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
PATH_PARTS = re.compile(
    r"\d+|(?:down|up|transformer)_blocks|mid_block|attentions|resnets|(?:down|up)samplers|attn[12]|to_(?:q|k|v|out)|"
    r"conv_in|conv_out|(?:time|add)_embedding|linear_[12]|"
    r"proj_in|proj_out|proj|ff|net|conv_shortcut|conv[12]?|time_emb_proj"
)


def split_key(key: str, is_layer: Callable[[str], bool] = lambda name: False) -> tuple[str, str]:
    """A tensor's layer and what of it the tensor is: a name in ENDINGS, one of LyCORIS' factors, or, where no tool is
    known to write it, the ending with what it begins with.

    The layer is the longest start that `is_layer`; where none is, what stands before the longest known ending.
    """
    cuts = [found.start() for found in re.finditer(r"_lora\.|\.", key)][-DOTS:]
    for cut in reversed(cuts):
        if is_layer(key[:cut]):
            return key[:cut], known_part(key[cut:]) or key[cut:]
    return next(((key[:cut], part) for cut in cuts if (part := known_part(key[cut:]))), (key, ""))


def known_part(ending: str) -> str | None:
    """What the tensors of an ending are."""
    found = KEY_ENDING.fullmatch(ending)
    return found and (found["factor"] or found.lastgroup)


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
    flat = PREFIX.sub("", name).replace(".", "_").replace("_processor_", "_")
    return f"{flat}_0" if flat.endswith("_to_out") else flat


def one_name(name: str, per_level: int) -> str:
    """The layer's name in diffusers with `_` for the dots, from any spelling; a name of no known form stays as it is.

    The ldm's input block n is diffusers' down block (n - 1) // per_level, its output block n the up block n //
    per_level (diffusers' convert_ldm_unet_checkpoint).
    """
    flat = flatten(name)
    found = LDM.match(flat)
    if flat in OUTSIDE_BLOCKS or not found:
        return OUTSIDE_BLOCKS.get(flat, flat)
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
    """diffusers' own name of a layer from that of `one_name`; raises KeyError for what is no layer of a UNet."""
    words = PATH_PARTS.findall(name)
    if "_".join(words) != name:
        raise KeyError(name)
    return ".".join(words)

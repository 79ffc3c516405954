"""The names of diffusers' layers in sgm, which are kohya's for SDXL."""

from __future__ import annotations

import re

ATTENTION_PATH = re.compile(r"^(?:(down|up)_blocks\.(\d+)|mid_block)\.attentions\.(\d+)\.")


def sgm_name(layer: str, layers_per_block: int) -> str:
    """A cross-attention layer's name in sgm's UNet."""
    place = ATTENTION_PATH.match(layer)
    assert place is not None
    direction, block, index = place.groups()
    per_block = layers_per_block + 1
    if direction == "down":
        sgm = f"input_blocks.{1 + per_block * int(block) + int(index)}.1."
    elif direction == "up":
        sgm = f"output_blocks.{per_block * int(block) + int(index)}.1."
    else:
        sgm = f"middle_block.{2 * int(index) + 1}."
    return ATTENTION_PATH.sub(sgm, layer)

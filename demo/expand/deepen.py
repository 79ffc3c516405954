"""A second residual block and transformer at every level of the UNet, which give back what they are given.

A residual block is x -> s(x) + F(x), a transformer x -> x + P(...). With the last convolution of F and P at zero, and s
(where the block also takes a skip connection in) the matrix that picks x out of [x, skip], what comes out is
1 * x + 0 * skip + 0: x to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..recipe.unet import WIDTHS

LEVELS = len(WIDTHS)


def deepened(unet: dict[str, Tensor]) -> dict[str, Tensor]:
    """The UNet (SD1's names) with two residual blocks a level on the way down and three on the way up, from one and two.

    New blocks hold a copy of their neighbour's weights, so that nothing in them has a size or a scale of its own.
    """
    blocks = {"input_blocks.0": block(unet, "input_blocks.0")}
    for level in range(LEVELS):
        down, up, width = 3 * level, 3 * level, WIDTHS[level]
        blocks[f"input_blocks.{down + 1}"] = block(unet, f"input_blocks.{2 * level + 1}")
        blocks[f"input_blocks.{down + 2}"] = idle(blocks[f"input_blocks.{down + 1}"], width)
        if level < LEVELS - 1:
            blocks[f"input_blocks.{down + 3}"] = block(unet, f"input_blocks.{2 * level + 2}")
        # The way up begins at the narrowest level. Its middle block meets the skip of the level's first block down.
        blocks[f"output_blocks.{up}"] = block(unet, f"output_blocks.{2 * level}")
        blocks[f"output_blocks.{up + 1}"] = idle(blocks[f"output_blocks.{up}"], 2 * WIDTHS[LEVELS - 1 - level])
        blocks[f"output_blocks.{up + 2}"] = block(unet, f"output_blocks.{2 * level + 1}")
    rest = {key: weight for key, weight in unet.items() if not key.startswith(("input_blocks", "output_blocks"))}
    return rest | {f"{name}.{key}": weight for name, weights in blocks.items() for key, weight in weights.items()}


def block(unet: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The weights of one block, under the names that they have in it."""
    return {key.removeprefix(f"{name}."): weight for key, weight in unet.items() if key.startswith(f"{name}.")}


def idle(neighbour: dict[str, Tensor], channels: int) -> dict[str, Tensor]:
    """A residual block and transformer like another that give back the first of their `channels`, as many as go out.

    The first convolution, whose size depends on what comes in, is the neighbour's second one.
    """
    width = len(neighbour["0.out_layers.3.bias"])
    times = channels // width
    # without what resizes the picture, which stays with the neighbour
    weights = {key: weight.clone() for key, weight in neighbour.items() if not key.startswith(("0.skip_connection.", "2."))}
    for kind in ("weight", "bias"):
        weights[f"0.in_layers.0.{kind}"] = neighbour[f"0.out_layers.0.{kind}"].repeat(times)
    weights["0.in_layers.2.weight"] = neighbour["0.out_layers.3.weight"].repeat(1, times, 1, 1)
    weights["0.in_layers.2.bias"] = neighbour["0.out_layers.3.bias"].clone()
    for key in ("0.out_layers.3.weight", "0.out_layers.3.bias", "1.proj_out.weight", "1.proj_out.bias"):
        weights[key] = torch.zeros_like(neighbour[key])
    if times > 1:
        weights["0.skip_connection.weight"] = torch.eye(width, channels)[:, :, None, None]
        weights["0.skip_connection.bias"] = torch.zeros(width)
    return weights

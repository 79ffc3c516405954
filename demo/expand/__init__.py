"""The demo model in the sizes that other hosts insist on, computing what it computed.

`deep`: SD1's two residual blocks a level, in the model's own widths. The new blocks give back what they are given, to the
bit, and so do the pictures. The webui's LoRA loader finds its layers by counting on those blocks.

`wide`: SD1's widths, heads and text encoder as well, and its autoencoder's layout, for hosts that take nothing else. Every
channel stands there five times, and rounding is all that differs; the autoencoder is a linear one, and its pictures blurred.
"""

from __future__ import annotations

from torch import Tensor

from ..recipe.checkpoint import UNET, VAE
from .autoencoder import linear_autoencoder
from .deepen import deepened
from .text_encoder import widened_text_encoder
from .widen import widened

TEXT = "cond_stage_model.transformer."


def part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights of one part of a checkpoint, in fp32, under the names that they have in it."""
    return {key.removeprefix(prefix): weight.float() for key, weight in weights.items() if key.startswith(prefix)}


def joined(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """A checkpoint in fp16 of its parts by their prefixes."""
    named = {prefix + key: weight for prefix, weights in parts.items() for key, weight in weights.items()}
    return {key: weight.half().contiguous() for key, weight in named.items()}


def deep(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The demo model's checkpoint with two residual blocks a level; text encoder and autoencoder as they are."""
    others = {key: weight for key, weight in weights.items() if not key.startswith(UNET)}
    return joined({UNET: deepened(part(weights, UNET)), "": others})


def wide(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The demo model's checkpoint in the sizes of SD1.5: UNet, text encoder and KL autoencoder."""
    return joined({
        UNET: widened(deepened(part(weights, UNET))),
        TEXT: widened_text_encoder(part(weights, TEXT)),
        VAE: linear_autoencoder(part(weights, VAE)),
    })  # fmt: skip

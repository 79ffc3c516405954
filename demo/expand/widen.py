"""The UNet in SD1's widths: every channel five times, side by side.

With R copies of each channel, a layer that sums over its inputs computes what it did once its weights are divided by R,
and gives R copies of its output where each of its rows stands R times. What acts on each channel alone (SiLU, GELU, the
sums of residuals) gives copies of copies. Mean and variance over a group or a layer of copies are those without them, so
the norms stay too: 32 groups of R times as many neighbours are the same groups. Only where other sizes than the channels'
are fixed is there more to do:

- The time embedding of dimension d has the frequencies 10000^(-2i/d), i < d/2. Those of d are, R apart, among those of
  R d: the first layer reads these columns and no others.
- SD1 has 8 heads of 5C/8 channels, the model 4 of C/4. Each head is there twice, its channels padded with zeros, and the
  queries make up for the softmax's scale: q.k / sqrt(d) is (sqrt(D/d) q).k / sqrt(D). Of the two halves of the output
  each counts half.
- The prompt's columns are padded with zeros (see text_encoder.py); keys and values multiply these by zero.
"""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from ..recipe.unet import HEADS, WIDTHS

COPIES = 320 // WIDTHS[0]
WIDE_HEADS, CONTEXT = 8, 768
ATTENTION = re.compile(r"attn([12])\.to_(q|k|v|out\.0)\.weight$")


def widened(unet: dict[str, Tensor]) -> dict[str, Tensor]:
    """The UNet (SD1's names, two residual blocks a level) with 320, 640 and 960 channels, 8 heads and 768 columns."""
    return {key: widened_weight(key, weight) for key, weight in unet.items()}


def widened_weight(key: str, weight: Tensor) -> Tensor:
    """One weight or bias of it."""
    attention = ATTENTION.search(key)
    if attention:
        return attention_weight(weight, attention[1] == "2", attention[2])
    if key == "time_embed.0.weight":
        return written(on_wide_frequencies(weight))
    if key == "input_blocks.0.0.weight":
        return written(weight)  # of latents, which have no copies
    if key.startswith("out.2."):
        return read(weight) if weight.ndim > 1 else weight
    return written(read(weight) if weight.ndim > 1 else weight)


def written(weight: Tensor) -> Tensor:
    """Every output R times."""
    return weight.repeat_interleave(COPIES, 0)


def read(weight: Tensor) -> Tensor:
    """Every input from its R copies."""
    return weight.repeat_interleave(COPIES, 1) / COPIES


def on_wide_frequencies(weight: Tensor) -> Tensor:
    """Weights [out, d] of a time embedding, d/2 cosines before d/2 sines, on one of dimension R d."""
    cosines, sines = weight.chunk(2, 1)
    wide = [torch.zeros(len(weight), COPIES * half.shape[1]) for half in (cosines, sines)]
    for half, target in zip((cosines, sines), wide, strict=True):
        target[:, ::COPIES] = half
    return torch.cat(wide, 1)


def attention_weight(weight: Tensor, cross: bool, matrix: str) -> Tensor:
    """A weight of an attention: to_q, to_k or to_v, from the input to all heads' channels, or to_out.0, from these."""
    twice = WIDE_HEADS // HEADS
    if matrix == "out.0":
        size = weight.shape[1] // HEADS
        heads = rearrange(weight, "out (head channel) -> out head channel", head=HEADS) / twice
        heads = F.pad(heads, (0, wide_size(size) - size))
        return written(repeat(heads, "out head channel -> out (head twice channel)", twice=twice))
    size = len(weight) // HEADS
    heads = rearrange(weight, "(head channel) input -> head channel input", head=HEADS)
    heads = F.pad(heads, (0, 0, 0, wide_size(size) - size))
    if matrix == "q":
        heads = heads * math.sqrt(wide_size(size) / size)
    weight = repeat(heads, "head channel input -> (head twice channel) input", twice=twice)
    from_prompt = cross and matrix in ("k", "v")
    return F.pad(weight, (0, CONTEXT - weight.shape[1])) if from_prompt else read(weight)


def wide_size(size: int) -> int:
    """Channels of a wide head, by those of a narrow one."""
    return size * COPIES * HEADS // WIDE_HEADS

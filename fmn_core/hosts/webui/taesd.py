"""TAESD's layout as a first stage of the webui, which ships only its decoder: for the demo model.

Layers and the two scalars as in the tiny autoencoder for Stable Diffusion (Ollin Boer Bohan, MIT).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 64
LATENT_CHANNELS = 4


def conv(inputs: int, outputs: int, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    """Three convolutions and what came in."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(conv(width, width), nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


def blocks(width: int, count: int) -> list[Block]:
    return [Block(width) for _ in range(count)]


def make_encoder(widths: Sequence[int]) -> nn.Sequential:
    """Pictures [B, 3, H, W] in 0..1 to latents [B, 4, H/8, W/8]; `widths` at 1, 1/2, 1/4 and 1/8 of the size."""
    a, b, c, d = widths
    return nn.Sequential(
        conv(3, a), *blocks(a, 1),
        conv(a, b, stride=2, bias=False), *blocks(b, 3),
        conv(b, c, stride=2, bias=False), *blocks(c, 3),
        conv(c, d, stride=2, bias=False), *blocks(d, 3),
        conv(d, LATENT_CHANNELS),
    )  # fmt: skip


def make_decoder(widths: Sequence[int]) -> nn.Sequential:
    """Latents [B, 4, h, w] to pictures [B, 3, 8h, 8w] in 0..1 and a little beyond; `widths` as of the encoder."""
    a, b, c, d = widths
    up = nn.Upsample(scale_factor=2)
    return nn.Sequential(
        Clamp(), conv(LATENT_CHANNELS, d), nn.ReLU(),
        *blocks(d, 3), up, conv(d, c, bias=False),
        *blocks(c, 3), up, conv(c, b, bias=False),
        *blocks(b, 3), up, conv(b, a, bias=False),
        *blocks(a, 1), conv(a, 3),
    )  # fmt: skip


class TAESD(nn.Module):
    """Pictures [B, 3, H, W] in -1..1 to latents [B, 4, H/8, W/8] before the model's scale factor, and back.

    `ddconfig` is what the webui looks for in every first stage's settings; there is nothing to set here.
    """

    def __init__(self, ddconfig: object = None):
        super().__init__()
        self.taesd_encoder, self.taesd_decoder = make_encoder((WIDTH,) * 4), make_decoder((WIDTH,) * 4)
        self.vae_scale, self.vae_shift = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(0.0))

    @property
    def dtype(self) -> torch.dtype:
        """What the webui gives latents in."""
        return self.vae_scale.dtype

    def encode(self, pictures: Tensor) -> Tensor:
        return self.taesd_encoder(pictures / 2 + 0.5) / self.vae_scale + self.vae_shift

    def decode(self, latents: Tensor) -> Tensor:
        return self.taesd_decoder((latents - self.vae_shift) * self.vae_scale) * 2 - 1

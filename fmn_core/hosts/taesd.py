"""TAESD's layout as a first stage of the webui, which ships only its decoder: for the embedded model.

Layers and the two scalars as in the tiny autoencoder for Stable Diffusion (Ollin Boer Bohan, MIT).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 64


def conv(inputs: int, outputs: int, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    """Three convolutions and what came in."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.conv = nn.Sequential(conv(width, width), nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


def blocks(count: int) -> list[Block]:
    return [Block() for _ in range(count)]


class TAESD(nn.Module):
    """Pictures [B, 3, H, W] in -1..1 to latents [B, 4, H/8, W/8] before the model's scale factor, and back."""

    def __init__(self, latent_channels: int = 4):
        super().__init__()
        down = lambda: conv(WIDTH, WIDTH, stride=2, bias=False)  # noqa: E731
        up = lambda: (nn.Upsample(scale_factor=2), conv(WIDTH, WIDTH, bias=False))  # noqa: E731
        self.taesd_encoder = nn.Sequential(
            conv(3, WIDTH), *blocks(1), down(), *blocks(3), down(), *blocks(3), down(), *blocks(3),
            conv(WIDTH, latent_channels),
        )  # fmt: skip
        self.taesd_decoder = nn.Sequential(
            Clamp(), conv(latent_channels, WIDTH), nn.ReLU(),
            *blocks(3), *up(), *blocks(3), *up(), *blocks(3), *up(), *blocks(1), conv(WIDTH, 3),
        )  # fmt: skip
        self.vae_scale, self.vae_shift = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(0.0))

    def encode(self, pictures: Tensor) -> Tensor:
        return self.taesd_encoder(pictures / 2 + 0.5) / self.vae_scale + self.vae_shift

    def decode(self, latents: Tensor) -> Tensor:
        return self.taesd_decoder((latents - self.vae_shift) * self.vae_scale) * 2 - 1

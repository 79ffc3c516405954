"""Noise: put on latents, and how far estimates of it drift."""

from __future__ import annotations

import torch
from torch import Tensor

from ..host import DiffusionHost


def draw(total: int, count: int, generator: torch.Generator) -> list[int]:
    """`count` random numbers below `total`."""
    return torch.randint(total, (count,), generator=generator).tolist()


def add_noise(host: DiffusionHost, x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x0 [B, C, h, w] noised to timesteps drawn uniformly, one for each (Ho et al., 2020, eq. 4): x_t and t."""
    return diffuse(host, x0, generator)[:2]


def diffuse(host: DiffusionHost, x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """As add_noise, and the noise itself: x_t, t and epsilon."""
    t = torch.randint(len(host.alphas_cumprod), (len(x0),), generator=generator).to(x0.device)
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    a = host.alphas_cumprod.to(x0)[t][:, None, None, None]
    return a.sqrt() * x0 + (1 - a).sqrt() * noise, t, noise


def noise_drift(after: Tensor, before: Tensor) -> Tensor:
    """Noise-prediction drift |eps - eps0|^2 / |eps0|^2 of each row, [B, ...] -> [B]: what the keep terms of the trained
    erasers hold down (SPM's latent anchoring, Lyu et al., arXiv 2312.16145), here relative."""
    return energy(after - before) / energy(before)


def energy(x: Tensor) -> Tensor:
    """The squared norm of each row, [B, ...] -> [B]."""
    return x.square().flatten(1).sum(1)

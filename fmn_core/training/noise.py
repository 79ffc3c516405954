"""Noise: put on latents, and how far estimates of it drift."""

from __future__ import annotations

import torch
from torch import Tensor

from ..host import DiffusionHost


def draw(total: int, count: int, generator: torch.Generator) -> list[int]:
    """`count` random numbers below `total`."""
    return torch.randint(total, (count,), generator=generator).tolist()


def noised(x0: Tensor, alpha_bar: Tensor, noise: Tensor) -> Tensor:
    """sqrt(a) x0 + sqrt(1 - a) noise, a = alpha_bar [] or [B] (Ho et al., 2020, eq. 4)."""
    a = alpha_bar[:, None, None, None] if alpha_bar.ndim else alpha_bar
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


def add_noise(host: DiffusionHost, x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x0 [B, C, h, w] noised to timesteps drawn uniformly, one for each: x_t, t and the noise."""
    t = torch.randint(len(host.alphas_cumprod), (len(x0),), generator=generator).to(x0.device)
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    return noised(x0, host.alphas_cumprod.to(x0)[t], noise), t, noise


def noise_drift(after: Tensor, before: Tensor) -> Tensor:
    """Noise-prediction drift |eps - eps0|^2 / |eps0|^2 of each row, [B, ...] -> [B]: what the keep terms of the trained
    erasers hold down (SPM's latent anchoring, Lyu et al., arXiv 2312.16145), here relative."""
    return energy(after - before) / energy(before)


def energy(x: Tensor) -> Tensor:
    """The squared norm of each row, [B, ...] -> [B]."""
    return x.square().flatten(1).sum(1)

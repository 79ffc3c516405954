"""A sampler that asks nothing of the host but its noise estimate."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor

from ..attention.capture import attention_set_to_zero
from ..host import DiffusionHost, Prompts
from .losses import predicted_x0

AT_ONCE = 4  # pictures in a batch: what a consumer GPU holds at SDXL's size


class SamplingSettings(Protocol):
    """Settings that say how the model makes pictures for itself."""

    @property
    def sampling_steps(self) -> int: ...

    @property
    def guidance(self) -> float: ...


@torch.no_grad()
def sample_ddim(
    host: DiffusionHost,
    noise: Tensor,
    prompts: Prompts,
    empty: Prompts,
    steps: int,
    guidance: float,
    ignored: Tensor | None = None,
) -> Tensor:
    """Deterministic DDIM (Song et al., arXiv 2010.02502, eq. 12, sigma = 0) with classifier-free guidance.

    noise [B, C, h, w], prompts and empty of B rows -> latents [B, C, h, w]. Nothing attends to the columns of the
    prompts that are in `ignored` [B, T].
    """
    layers = host.cross_attentions()
    alphas = host.alphas_cumprod.to(noise)
    x = noise
    timesteps = torch.linspace(len(alphas) - 1, 0, steps, device=noise.device).round().long()
    for i, t in enumerate(timesteps):
        host.check_interrupt()
        ts = t.repeat(len(x))
        with nullcontext() if ignored is None else attention_set_to_zero(layers, ignored):
            epsilon = host.predict(x, ts, prompts)
        if guidance != 1:
            without = host.predict(x, ts, empty)
            epsilon = without + guidance * (epsilon - without)
        x0 = predicted_x0(x, epsilon, alphas[ts])
        a = alphas[timesteps[i + 1]] if i + 1 < steps else torch.ones_like(alphas[0])
        x = a.sqrt() * x0 + (1 - a).sqrt() * epsilon
        host.progress(i + 1, steps, None)
    return x


def sample_pictures(
    host: DiffusionHost,
    noise: Tensor,
    prompts: Prompts,
    empty: Prompts,
    steps: int,
    guidance: float,
    ignored: Tensor | None = None,
) -> Tensor:
    """Latents [B, C, h, w] by DDIM from the noise, AT_ONCE pictures at a time; arguments as for sample_ddim."""
    parts = []
    for rows in torch.arange(len(noise)).split(AT_ONCE):
        asked, nothing = prompts.take(rows.tolist()), empty.take([0] * len(rows))
        without = None if ignored is None else ignored[rows]
        parts.append(sample_ddim(host, noise[rows], asked, nothing, steps, guidance, without))
    return torch.cat(parts)


def sampling_calls(pictures: int, steps: int) -> int:
    """How many steps `sample_pictures` tells the host of."""
    return -(-pictures // AT_ONCE) * steps


def sample_pairs(
    host: DiffusionHost,
    asked: Prompts,
    empty: Prompts,
    ignored: Tensor | None,
    settings: SamplingSettings,
    generator: torch.Generator,
    shape: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Latents [B, C, h, w] of pictures that the model makes of each prompt and, where `ignored` [B, T] names columns, of
    those it makes of the same noise with the attention to them set to zero; `shape` [C, h, w] if not the model's own."""
    noise = torch.randn(len(asked), *(shape or host.latent_shape()), generator=generator).to(host.device)

    def sample(ignored: Tensor | None = None) -> Tensor:
        return sample_pictures(host, noise, asked, empty, settings.sampling_steps, settings.guidance, ignored)

    return sample(), None if ignored is None else sample(ignored)

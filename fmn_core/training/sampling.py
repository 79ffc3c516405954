"""A sampler that asks nothing of the host but its noise estimate."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor

from ..attention.capture import attention_set_to_zero
from ..host import IMAGES_AT_ONCE as AT_ONCE
from ..host import DiffusionHost, Prompts
from .losses import predicted_x0


class SamplingConfig(Protocol):
    """Settings that say how the model makes pictures for itself."""

    @property
    def num_inference_steps(self) -> int: ...

    @property
    def guidance_scale(self) -> float: ...


@torch.no_grad()
def sample_ddim(
    host: DiffusionHost,
    noise: Tensor,
    prompts: Prompts,
    empty: Prompts,
    *,
    steps: int,
    guidance: float,
    ignored: Tensor | None = None,
) -> Tensor:
    """Deterministic DDIM (Song et al., arXiv 2010.02502, eq. 12, sigma = 0) with classifier-free guidance.

    noise [B, C, h, w], prompts and empty of B rows -> latents [B, C, h, w]. Nothing attends to the tokens of the
    prompts that are in `ignored` [B, T].
    """
    layers = host.cross_attentions()
    alphas = host.alphas_cumprod.to(noise)
    x = noise
    timesteps = torch.linspace(len(alphas) - 1, 0, steps, device=noise.device).round().long()
    with host.progress(steps) as bar:
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
            bar.update()
    return x


def sample_pictures(
    host: DiffusionHost,
    noise: Tensor,
    prompts: Prompts,
    empty: Prompts,
    *,
    steps: int,
    guidance: float,
    ignored: Tensor | None = None,
) -> Tensor:
    """Latents [B, C, h, w] by DDIM from the noise, AT_ONCE pictures at a time; arguments as for sample_ddim."""
    parts = []
    for rows in torch.arange(len(noise)).split(AT_ONCE):
        without = None if ignored is None else ignored[rows]
        some, nothing = prompts[rows.tolist()], empty[[0] * len(rows)]
        parts.append(sample_ddim(host, noise[rows], some, nothing, steps=steps, guidance=guidance, ignored=without))
    return torch.cat(parts)


def sampling_calls(pictures: int, steps: int) -> int:
    """How many steps `sample_pictures` tells the host of."""
    return -(-pictures // AT_ONCE) * steps


def sample_pairs(
    host: DiffusionHost,
    prompts: Prompts,
    empty: Prompts,
    *,
    config: SamplingConfig,
    generator: torch.Generator,
    ignored: Tensor | None = None,
    shape: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Latents [B, C, h, w] of pictures that the model makes of each prompt and, where `ignored` [B, T] names tokens, of
    those it makes of the same noise with the attention to them set to zero; `shape` [C, h, w] if not the model's own."""
    noise = torch.randn(len(prompts), *(shape or host.latent_shape()), generator=generator).to(host.device)

    def sample(ignored: Tensor | None = None) -> Tensor:
        steps, guidance = config.num_inference_steps, config.guidance_scale
        return sample_pictures(host, noise, prompts, empty, steps=steps, guidance=guidance, ignored=ignored)

    return sample(), None if ignored is None else sample(ignored)

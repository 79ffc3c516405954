"""Token attention of a picture that is there already: noised, and passed through the UNet once for each noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import setting
from ..errors import ForgetError
from ..host import DiffusionHost
from .capture import layer_size, projections
from .recorder import AttentionRecording, RecordingConfig


@dataclass(frozen=True)
class FromImageConfig:
    """How a picture is looked at."""

    noise: float = setting(
        0.5, "How much noise to add, as a part of the model's timesteps: a little shows details, much shows the "
        "whole.", min=0.0, max=1.0, step=0.01,
    )  # fmt: skip
    num_samples: int = setting(4, "How many noise samples to average over.", min=1, max=64)
    seed: int = setting(0, "The seed of the noise.", min=0, max=0xFFFFFFFFFFFFFFFF)


def record_pictures(
    host: DiffusionHost,
    images: Tensor,
    text: str,
    settings: FromImageConfig | None = None,
    recorded: RecordingConfig | None = None,
) -> AttentionRecording:
    """The attention of a prompt's words on pictures [B, H, W, 3] in 0..1, at x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise
    (Ho et al., arXiv 2006.11239, eq. 4); each noise is a step of the recording. Raises ForgetError without a VAE."""
    settings, recorded = settings or FromImageConfig(), recorded or RecordingConfig()
    latents = host.encode_images(images)
    prompts = host.encode([text])
    recording = AttentionRecording(text, prompts.tokens[0], recorded)
    recording.begin()
    layers = recorded.chosen(host.cross_attentions())
    if not layers:
        raise ForgetError(f"The model has no layers `{recorded.layers}`: choose others.")
    a = host.alphas_cumprod.to(latents)
    t = round(settings.noise * (len(a) - 1))
    generator = torch.Generator().manual_seed(settings.seed)
    height, width = latents.shape[-2:]
    step = 0

    def take(name, q, k, context):
        recording.add(name, q, k, layers[name].heads, layer_size(height, width, q.shape[1]), step=step)

    with (
        host.training(latents.shape),
        torch.no_grad(),
        projections(layers, take),
        host.progress(settings.num_samples) as bar,
    ):
        for step in range(settings.num_samples):  # noqa: B007 -- `take` reads it
            host.check_interrupt()
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            x_t = a[t].sqrt() * latents + (1 - a[t]).sqrt() * noise
            host.predict(x_t, torch.full((len(latents),), t, device=latents.device), prompts.expand(len(latents)))
            bar.update()
    recording.end()
    return recording

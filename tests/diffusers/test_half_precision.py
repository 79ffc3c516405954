"""The gradient of a loss on the real UNet in half precision."""

from __future__ import annotations

import copy

import torch

from fmn_core.hosts.diffusers.model import DiffusersHost
from fmn_core.lora.layers import CrossAttentionLoRA
from fmn_core.training.checkpoint import State
from fmn_core.training.loop import Descent
from fmn_core.training.losses import visual_denoising_loss
from fmn_core.training.memory import AdaptiveCheckpointing


def slope(pipeline, t, scale):
    """The gradient of the visual denoising loss by a LoRA, as a step of this scale takes it."""
    host, generator = DiffusersHost(pipeline, progress_bar=False), torch.Generator().manual_seed(0)
    prompts, t = host.encode(["a photo of a cat"]), torch.tensor([t])
    x0, noise, change = torch.randn(3, 1, *host.latent_shape(), generator=generator)
    a, without = host.alphas_cumprod[t], x0 + 0.1 * change
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
    with host.training(x_t.shape):
        lora = CrossAttentionLoRA(host.cross_attentions(), ("to_k", "to_v"), 2, generator)
        for adapter in lora.values():
            torch.nn.init.normal_(adapter.up, std=0.01, generator=generator)
        parameters = [*lora.parameters()]
        state = State(parameters, torch.optim.SGD(parameters, lr=0.0), generator, most_scale=scale)

        def step(differentiate):
            with lora.attached():
                epsilon = host.predict(x_t, t, prompts)
                return differentiate(visual_denoising_loss(x_t, epsilon, a, without))

        Descent(AdaptiveCheckpointing(host), state, max_norm=None).take(step)
    return torch.cat([p.grad.flatten() for p in parameters])


def test_the_visual_losss_gradient_survives_half_precision(pipeline):
    """On the real UNet, in half as on a GPU: at a scale of 1 a part of it is lost."""
    half = copy.deepcopy(pipeline)
    half.unet.half()
    true = slope(pipeline, 20, 1.0)
    lost = {scale: ((slope(half, 20, scale) - true).norm() / true.norm()).item() for scale in (1.0, 2.0**16)}
    assert lost[2.0**16] < 0.01 and lost[1.0] > 0.03, lost

"""One training step of the published code, on a diffusers pipeline of real size: what the presets are timed against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fmn_core.attention.capture import capture_attention_maps
from fmn_core.lora.layers import LoRAs

PROMPT, COLUMNS = "a photo of a cat", [5]  # start, a, photo, of, a, cat
LECO_STEPS = 25  # denoised before a step, as a mean: LECO draws from 1 to 49
LECO_RANK = 4


def ids(pipeline, text: str) -> Tensor:
    """Token ids [1, 77]."""
    options = {"padding": "max_length", "truncation": True, "max_length": 77, "return_tensors": "pt"}
    return pipeline.tokenizer(text, **options).input_ids.to(pipeline.unet.device)


def forget_me_not_step(pipeline, host, side: int) -> Callable[[], None]:
    """Forget-Me-Not at its defaults (SHI-Labs/Forget-Me-Not, src/train_attn.py, configs/attn.yaml): the whole UNet in fp32
    under AdamW; in every step the picture of `side` pixels is encoded anew by the VAE, the prompt by the text encoder; all
    maps of the cross-attention are kept whole, and one norm of the concept's columns is the loss. Not clipped, as there
    (its parameters are a generator, used up by then). Self-attention is PyTorch's fused one, as diffusers has it today:
    with the torch 1.13 that the code names it was slower and larger."""
    unet, vae, layers = pipeline.unet, pipeline.vae, host.cross_attentions()
    unet.requires_grad_(True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-6, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(0)
    tokens = ids(pipeline, PROMPT)
    pixels = torch.randn(1, 3, side, side, generator=generator).to(unet.device)

    def step() -> None:
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
            embeddings = pipeline.text_encoder(tokens)[0]
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        t = torch.randint(1000, (1,), generator=generator).to(latents.device)
        with capture_attention_maps(layers) as maps:
            unet(pipeline.scheduler.add_noise(latents, noise, t), t, embeddings)
        torch.cat([A[..., COLUMNS].flatten() for A in maps.values()]).norm().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step


def leco_step(pipeline, host, side: int) -> Callable[[], None]:
    """A step of LECO (p1atdev/LECO, train_lora.py): a LoRA of rank 4 on every Linear of the transformer blocks; latents
    denoised part of the way with the LoRA and guidance, three estimates without it and one with it, each of the prompt and
    the empty prompt together."""
    unet = pipeline.unet
    unet.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    linear = {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear) and ".transformer_blocks." in name
    }
    lora = LoRAs(linear, LECO_RANK, generator).to(unet.device)
    optimizer = torch.optim.AdamW(lora.parameters(), lr=1e-4)
    shape = (1, *host.latent_shape()[:1], side // 8, side // 8)
    with torch.no_grad():
        both = pipeline.text_encoder(torch.cat([ids(pipeline, text) for text in ("", PROMPT)]))[0]

    def predict(x: Tensor, t: Tensor, guidance: float = 1.0) -> Tensor:
        empty, asked = unet(torch.cat([x, x]), t, both).sample.chunk(2)
        return empty + guidance * (asked - empty)

    def step() -> None:
        alphas = host.alphas_cumprod
        steps = torch.linspace(len(alphas) - 1, 0, 2 * LECO_STEPS).long()
        x = torch.randn(shape, generator=generator).to(unet.device)
        with torch.no_grad():
            with lora.attached():
                for now, then in zip(steps[:LECO_STEPS], steps[1 : LECO_STEPS + 1], strict=True):
                    epsilon = predict(x, now, 3.0)
                    x0 = (x - (1 - alphas[now]).sqrt() * epsilon) / alphas[now].sqrt()
                    x = alphas[then].sqrt() * x0 + (1 - alphas[then]).sqrt() * epsilon
            positive, neutral, unconditional = (predict(x, steps[LECO_STEPS]) for _ in range(3))
        with lora.attached():
            loss = (predict(x, steps[LECO_STEPS]) - (neutral - (positive - unconditional))).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step

"""The model in diffusers: FluxPipeline with the one text encoder that it has."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from fmn_core.hosts.webui.taesd import WIDTH as AUTOENCODER_WIDTH

from ..recipe.checkpoint import read_checkpoint
from .checkpoint import WEIGHTS, read_transformer
from .minilm import WIDTH, encode, load_minilm

TRANSFORMER = {
    "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 6, "attention_head_dim": 64,
    "num_attention_heads": 4, "joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH, "guidance_embeds": False,
    "axes_dims_rope": (16, 24, 24),
}  # fmt: skip
LATENTS = (4, 16, 16)
PIXELS, STEPS, GUIDANCE, SHIFT = 128, 20, 3.0, 1.5


class MiniLMFluxPipeline(FluxPipeline):
    """Flux with MiniLM in the places of both CLIP and T5."""

    _optional_components = [*FluxPipeline._optional_components, "text_encoder_2", "tokenizer_2"]

    def encode_prompt(self, prompt, prompt_2=None, device=None, num_images_per_prompt=1, prompt_embeds=None,
                      pooled_prompt_embeds=None, max_sequence_length=None, lora_scale=None):  # fmt: skip
        if prompt_embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            prompt_embeds, pooled_prompt_embeds = (
                embeds.repeat_interleave(num_images_per_prompt, 0)
                for embeds in encode(self.tokenizer, self.text_encoder, prompts)
            )
        dtype = self.transformer.dtype
        text_ids = torch.zeros(prompt_embeds.shape[1], 3, device=device, dtype=dtype)
        return prompt_embeds.to(device, dtype), pooled_prompt_embeds.to(device, dtype), text_ids


def make_transformer() -> FluxTransformer2DModel:
    """The transformer with random weights."""
    return FluxTransformer2DModel(**TRANSFORMER)


def make_autoencoder(mean: float, std: float) -> AutoencoderTiny:
    """The first demo model's autoencoder, scaled to latents of mean 0 and standard deviation 1."""
    widths = (AUTOENCODER_WIDTH,) * 4
    autoencoder = AutoencoderTiny(
        encoder_block_out_channels=widths, decoder_block_out_channels=widths, scaling_factor=1 / std, shift_factor=mean
    )
    autoencoder.load_state_dict(read_checkpoint()[2])
    return autoencoder.eval()


def make_pipeline(file: Path = WEIGHTS) -> MiniLMFluxPipeline:
    """The whole model, fp32; raises FileNotFoundError where MiniLM is not installed."""
    weights, mean, std = read_transformer(file)
    transformer = make_transformer()
    transformer.load_state_dict(weights)
    return assemble(transformer, mean, std)


def assemble(transformer: FluxTransformer2DModel, mean: float, std: float) -> MiniLMFluxPipeline:
    """The pipeline of a transformer trained on latents of this mean and standard deviation."""
    tokenizer, text_encoder = load_minilm()
    pipeline = MiniLMFluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT), vae=make_autoencoder(mean, std), tokenizer=tokenizer,
        text_encoder=text_encoder, text_encoder_2=None, tokenizer_2=None, transformer=transformer.eval(),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_noise(seeds) -> Tensor:
    """Noise [B, 4, 16, 16], each from its own seed."""
    return torch.stack([torch.randn(LATENTS, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds])


def pack(latents: Tensor) -> Tensor:
    """Latents [B, 4, h, w] in patches of 2 x 2: [B, h/2 * w/2, 16]."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


@torch.no_grad()
def sample(
    pipeline: MiniLMFluxPipeline, prompts: list[str], noise: Tensor, steps: int = STEPS, output: str = "pt"
) -> Tensor:
    """Pictures [B, H, W, 3] in 0..1 from noise [B, 4, 16, 16], or with `output="latent"` packed latents [B, 64, 16]."""
    made = pipeline(
        prompts, negative_prompt=[""] * len(prompts), true_cfg_scale=GUIDANCE, num_inference_steps=steps, height=PIXELS,
        width=PIXELS, latents=pack(noise).to(pipeline.device), output_type=output,
    ).images  # fmt: skip
    return made if output == "latent" else made.movedim(1, -1).float().cpu()

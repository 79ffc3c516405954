"""ComfyUI as a DiffusionHost: its model patcher, text encoder and VAE."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path

import comfy.latent_formats
import comfy.ldm.modules.attention
import comfy.lora
import comfy.model_base
import comfy.model_management
import comfy.supported_models
import comfy.utils
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ...errors import ForgetError
from ...host import MATRICES, CrossAttention, DiffusionHost, Prompts, Token, TokenEmbeddings, weight_of
from ...log import Tell
from ...text.templates import placeholder_texts
from ..ldm import (
    NATIVE_SIZE,
    TRAINING_MEMORY_FACTOR,
    cross_attentions,
    norms_of_copies,
    ordinary_parameters,
    other_layers,
    weight_key,
)
from . import text as comfy_words
from .beside import attached_throughout
from .identity import identity
from .previews import previews_seen
from .text import ShortClip, require_clip, tokenize
from .training import as_host, attention_with_backward, require_loaded
from .weights import differentiable_products, read_weight, require_differentiable, require_readable, settle_dtypes


class ComfyHost(DiffusionHost):
    """MODEL, CLIP and VAE as they come out of ComfyUI's loaders; LoRAs that the user put on the model stay on it."""

    family: str

    def __init__(self, model, clip, vae=None):
        self.patcher = model.clone()
        self.clip, self.vae = clip, vae
        self.base = model.model
        self.bar = None
        self.trained_on = []  # the model patchers that have to stay loaded
        self.family = require_family(model.model)
        require_readable(self.patcher, (weight_key(layer, m) for layer in self.cross_attentions() for m in MATRICES))

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device

    @property
    def unet(self) -> nn.Module:
        return self.base.diffusion_model

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        return 1 / (1 + self.sigmas.square())

    @cached_property
    def sigmas(self) -> Tensor:
        with torch.inference_mode(False):
            return self.patcher.get_model_object("model_sampling").sigmas.float().cpu().clone()

    def cache_folder(self) -> Path:
        from .folders import cache_folder

        return cache_folder()

    def model_name(self) -> str:
        return type(self.base.model_config).__name__

    def cross_attentions(self) -> dict[str, CrossAttention]:
        return cross_attentions(self.unet)

    def other_layers(self) -> dict[str, nn.Module]:
        layers = other_layers(self.unet)
        return {self.kohya_names[f"diffusion_model.{name}.weight"]: module for name, module in layers.items()}

    def native_shape(self) -> tuple[int, int, int]:
        side = getattr(type(self.base.model_config), "native_size", NATIVE_SIZE[self.family]) // 8
        return self.base.latent_format.latent_channels, side, side

    def tokenize(self, text: str) -> tuple[Token, ...]:
        return tokenize(self.clip, text)

    def missing_embeddings(self, text: str) -> dict[str, str]:
        return comfy_words.missing_embeddings(self.clip, text)

    def encode(self, texts: list[str]) -> Prompts:
        tokens, embeddings = [], []
        pooled: list[Tensor] = []  # or none, of a text encoder that makes none
        with torch.inference_mode(False), torch.no_grad():
            for text in texts:
                self.check_interrupt()
                tokens.append(self.tokenize(text))
                cond, pool = as_host(self.clip.encode_from_tokens, self.clip.tokenize(text), return_pooled=True)
                self.require_width(cond)
                embeddings.append(cond[0].clone().to(self.device, torch.float32))
                if pool is not None:
                    pooled.append(pool[0].clone().to(self.device, torch.float32))
            # Prompts of unequal length become one batch as in the host's own sampler: tiled to a common one.
            length = int(np.lcm.reduce([len(e) for e in embeddings]))
            return Prompts(
                tuple(texts),
                torch.stack([e.repeat(length // len(e), 1) for e in embeddings]),
                torch.stack(pooled) if pooled else None,
                tuple(row * (length // len(row)) for row in tokens),
            )

    @cached_property
    def context_width(self) -> int:
        return weight_of(next(iter(self.cross_attentions().values())).linear("to_k")).shape[1]

    def require_width(self, embeddings: Tensor) -> None:
        """Raises ForgetError unless embeddings [..., D] are as wide as the cross-attention takes them."""
        if embeddings.shape[-1] != self.context_width:
            raise ForgetError(
                f"The CLIP makes embeddings of width {embeddings.shape[-1]} and {self.model_name()} takes "
                f"{self.context_width}: connect the CLIP that belongs to the model."
            )

    def encode_prefix(self, texts: list[str], columns: int) -> Tensor:
        parts = []
        with torch.inference_mode(False), torch.no_grad():
            as_host(self.clip.load_model)
            encoder = ShortClip(self.clip)
            positions = encoder.positions(columns)
            for some in self.at_once(texts):
                tokens = [self.clip.tokenize(text) for text in some]
                # The host encodes a long prompt as a batch of chunks: here every chunk is a prompt of its own.
                chunks = {name: [several[name][0][:columns] for several in tokens] for name in tokens[0]}
                context, _ = torch.func.functional_call(encoder, positions, (chunks,))
                self.require_width(context)
                parts.append(context.reshape(len(tokens), -1, context.shape[-1]).clone().to(self.device, torch.float32))
        return torch.cat(parts)

    def token_embeddings(self, text: str) -> TokenEmbeddings:
        require_clip(self.clip)
        return comfy_words.token_embeddings(self.clip, text)

    def encode_with_embeddings(self, template: str, vectors: TokenEmbeddings) -> Prompts:
        texts = placeholder_texts(template, len(next(iter(vectors.values()))))
        context, pooled = ShortClip(self.clip)(comfy_words.with_vectors(self.clip, texts, vectors))
        self.require_width(context)
        pooled = None if pooled is None else pooled.to(self.device, torch.float32)
        return Prompts((template,), context.to(self.device, torch.float32), pooled, (self.tokenize(texts[0]),))

    def predict(self, x_t: Tensor, t: Tensor, prompts: Prompts) -> Tensor:
        sigma = self.sigmas.to(x_t)[t]
        scale = sigma[:, None, None, None]
        x = x_t * (1 + scale.square()).sqrt()  # the host's x is x0 + sigma * noise
        conditions = self.base.extra_conds(
            noise=x,
            latent_image=torch.zeros_like(x),  # what an inpainting model is to keep: nothing
            device=x.device,
            cross_attn=prompts.prompt_embeds,
            pooled_output=prompts.pooled_prompt_embeds,
            width=x.shape[-1] * 8,
            height=x.shape[-2] * 8,
            prompt_type="positive",
        )
        conditions = {
            key: c.process_cond(batch_size=len(x), device=x.device, area=None).cond for key, c in conditions.items()
        }
        options = {
            **self.patcher.model_options["transformer_options"],
            "cond_or_uncond": [0],
            "sigmas": sigma,
            "optimized_attention_override": attention_with_backward,
        }
        x0 = self.base.apply_model(x, sigma, transformer_options=options, **conditions)
        return (x - x0) / scale

    def encode_images(self, images: Tensor) -> Tensor:
        if self.vae is None:
            raise ForgetError("Pictures need a VAE to train on: connect the checkpoint's VAE, or take the pictures off.")
        with torch.inference_mode(False), torch.no_grad():
            latents = as_host(self.vae.encode, images).clone()
            channels = self.base.latent_format.latent_channels
            if latents.ndim != 4 or latents.shape[1] != channels:
                raise ForgetError(
                    f"The VAE makes latents of shape {tuple(latents.shape)} and {self.model_name()} takes {channels} "
                    "channels: connect the VAE that belongs to the model."
                )
            return self.base.process_latent_in(latents).to(self.device, torch.float32)

    def decode_few(self, latents: Tensor) -> Tensor | None:
        if self.vae is None:
            return None
        with torch.inference_mode(False), torch.no_grad():
            return as_host(self.vae.decode, self.base.process_latent_out(latents)).clone()

    def lora_key(self, layer: str, matrix: str) -> str:
        return self.kohya_names[weight_key(layer, matrix)]

    def weight(self, layer: str, matrix: str) -> Tensor:
        return read_weight(self.patcher, weight_key(layer, matrix))

    def identity(self) -> object:
        return identity(self.patcher, self.clip, self.vae)

    @cached_property
    def kohya_names(self) -> dict[str, str]:
        """Weight -> kohya name: sgm's block names for SDXL, diffusers' for the others, as sd-scripts writes them."""
        names = comfy.lora.model_lora_keys_unet(self.base, {})
        blocks = ("lora_unet_input_", "lora_unet_middle_", "lora_unet_output_")
        sgm = self.family == "sdxl"
        return {w: n for n, w in names.items() if n.startswith("lora_unet_") and n.startswith(blocks) == sgm}

    @contextmanager
    def training(self, shape: Sequence[int], text: bool = False) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            memory = self.patcher.memory_required(list(shape)) * TRAINING_MEMORY_FACTOR
            models = [self.patcher, self.clip.patcher] if text else [self.patcher]
            as_host(comfy.model_management.load_models_gpu, models, memory_required=memory)
            stack.enter_context(ordinary_parameters(self.unet))
            settle_dtypes(self.base)
            stack.enter_context(differentiable_products(self.unet))
            require_differentiable(self.unet)
            stack.enter_context(attached_throughout(self.patcher))
            if text:
                stack.enter_context(ordinary_parameters(self.clip.cond_stage_model))
                stack.enter_context(norms_of_copies(self.clip.cond_stage_model))
            outer, self.trained_on = self.trained_on, models
            try:
                yield
            finally:
                self.trained_on = outer

    def free_memory(self) -> float:
        return math.inf if self.device.type == "cpu" else comfy.model_management.get_free_memory(self.device)

    def shows_previews(self) -> bool:
        return previews_seen()

    def show_progress(self, step: int, total: int, preview: Tensor | None) -> None:
        if self.bar is None:
            self.bar = comfy.utils.ProgressBar(total)
        picture = None
        if preview is not None:
            picture = ("JPEG", Image.fromarray((preview.clamp(0, 1) * 255).byte().cpu().numpy()), 512)
        self.bar.update_absolute(step, total, picture)

    def check_interrupt(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        require_loaded(self.trained_on)


def require_family(base) -> str:
    """The key of FAMILIES that a loaded model belongs to; raises ForgetError for any other architecture."""
    config = base.model_config
    if not isinstance(getattr(base, "diffusion_model", base), nn.Module):  # TensorRT's engines
        raise ForgetError(
            "This model is compiled to an engine whose weights cannot be read or changed: load the checkpoint that it was "
            "made of, and compile the patched model."
        )
    if isinstance(base, comfy.model_base.SDXL):
        return "sdxl"
    if isinstance(config, comfy.supported_models.SD20):
        return "sd2_v" if base.model_type == comfy.model_base.ModelType.V_PREDICTION else "sd2"
    if isinstance(config, comfy.supported_models.SD15):
        return "sd1"
    raise ForgetError(
        f"Forget-Me-Not works on the text cross-attention of SD1.x, SD2.x and SDXL, and this model is "
        f"{type(config).__name__} (Flux, SD3 and their kind have no such layers): load a checkpoint of one of these."
    )


def progress_bar() -> Tell:
    """Shows how far a long work of the node that executes is; raises the host's own exception if the user asked to stop."""
    bar = None

    def tell(done: int, total: int) -> None:
        nonlocal bar
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar = bar or comfy.utils.ProgressBar(total)
        bar.update_absolute(done, total)

    return tell

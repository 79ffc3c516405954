"""What the webui and Forge have in common: the job's state, prompts in chunks, a UNet with the ldm's names."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ...errors import ForgetError
from ...host import (
    CANNOT_INVERT,
    EMBEDDING_CALL,
    CrossAttention,
    DiffusionHost,
    Prompts,
    Token,
    TokenEmbeddings,
    linear_name,
    sampled,
)
from ...lora.keys import blocks_per_level
from ...text.templates import placeholder_texts
from ..ldm import NATIVE_SIZE, cross_attentions, kohya_name, other_layers
from . import text as webui_text

LATENT, INPAINTING = 4, 9  # channels that a UNet takes: a latent; that, a mask and what is to be kept


class WebuiBase(DiffusionHost):
    """The model that a webui has loaded, without the LoRAs that its last picture was made with.

    Raises ForgetError for a model without the cross-attention that forgetting works on.
    """

    def __init__(self, sd_model):
        self.sd_model = sd_model
        self.kept: dict[tuple[int, int], Tensor] = {}  # what `kept_of_nothing` has made, by size
        if not (sd_model.is_sd1 or sd_model.is_sd2 or sd_model.is_sdxl) or not self.cross_attentions():
            raise ForgetError(
                f"Forget-Me-Not works on the text cross-attention of SD1.x, SD2.x and SDXL, and {self.model_name()} has no "
                "such layers (Flux, SD3 and their kind): choose a checkpoint of one of these."
            )

    def cache_folder(self) -> Path:
        from modules import paths

        return Path(paths.models_path, "forget-me-not", "cache")

    def require_trainable(self) -> None:
        """Raises ForgetError for a model that can draw but not forget."""
        if self.unet.in_channels not in (LATENT, INPAINTING):
            raise ForgetError(
                f"{self.model_name()} takes a picture beside the prompt, and nothing here gives it one: choose a checkpoint "
                "that draws from the prompt alone, or an inpainting one."
            )

    def identity(self) -> object:
        from modules import shared

        with self.without_loras(unet=True, text=True):
            modules = [self.unet, *(encoder for _, encoder in self.encoders)]
            weights = [{name: sampled(weight) for name, weight in module.state_dict().items()} for module in modules]
        skipped = shared.opts.CLIP_stop_at_last_layers
        return [weights, skipped, self.predicts_v, sampled(self.alphas_cumprod), self.model_name()]

    @property
    def quantised(self) -> bool:
        """Whether its weights' shapes say nothing."""
        return False

    @property
    def scaled(self) -> bool:
        """Whether its weights are in scaled fp8, and are read without the scale."""
        return False

    @property
    def hides_loras(self) -> bool:
        """Whether it adds LoRAs to such weights before the scale, which makes them nothing."""
        return False

    @property
    @abstractmethod
    def vae_dtype(self) -> torch.dtype:
        """What the VAE takes pictures in."""

    @property
    def device(self) -> torch.device:
        from modules import devices

        return devices.device

    @cached_property
    def family(self) -> str:
        if self.sd_model.is_sdxl:
            return "sdxl"
        if self.sd_model.is_sd1:
            return "sd1"
        return "sd2_v" if self.predicts_v else "sd2"

    @property
    @abstractmethod
    def predicts_v(self) -> bool:
        """Whether the UNet estimates velocity."""

    @property
    @abstractmethod
    def engines(self) -> list:
        """What encodes prompts: one, or SDXL's two (see webui_text)."""

    @property
    def encoders(self) -> list[tuple]:
        """(engine, text encoder) pairs."""
        return [(engine, webui_text.text_model(engine)) for engine in self.engines]

    @abstractmethod
    def without_loras(self, unet: bool, text: bool) -> AbstractContextManager[None]:
        """Context in which the UNet or the text encoders or both compute without the host's LoRAs."""

    def model_name(self) -> str:
        return self.sd_model.sd_checkpoint_info.model_name

    def cross_attentions(self) -> dict[str, CrossAttention]:
        return cross_attentions(self.unet)

    def other_layers(self) -> dict[str, nn.Module]:
        return {kohya_name(name, self.family, self.per_level): m for name, m in other_layers(self.unet).items()}

    @cached_property
    def per_level(self) -> int:
        return blocks_per_level(name for name, _ in self.unet.named_modules())

    def lora_key(self, layer: str, matrix: str) -> str:
        return kohya_name(f"{layer}.{linear_name(matrix)}", self.family, self.per_level)

    def native_shape(self) -> tuple[int, int, int]:
        side = self.native_size() // 8
        return LATENT, side, side

    def native_size(self) -> int:
        """The side of the pictures that the model was made for."""
        return NATIVE_SIZE[self.family]

    def tokenize(self, text: str) -> tuple[Token, ...]:
        return webui_text.tokens_of(self.engines[0], text)

    def missing_embeddings(self, text: str) -> dict[str, str]:
        missing = {}
        for found in EMBEDDING_CALL.finditer(text):
            there = found[1] in webui_text.embedding_names(self.engines[0])
            remedy = f": type `{found[1]}`." if there else ", and has none of this name in its folder embeddings."
            missing[found[0]] = f"The webui calls an embedding by its name alone{remedy}"
        return missing

    def conditioning(self, text: str) -> tuple[Tensor, Tensor | None]:
        """One prompt as the host itself encodes it: context [T, D] and SDXL's vector [P], which tells sizes too, fp32."""
        from modules.prompt_parser import SdConditioning

        _, height, width = (8 * side for side in self.latent_shape())
        cond = self.sd_model.get_learned_conditioning(SdConditioning([text], width=width, height=height))
        context, vector = (cond["crossattn"], cond["vector"]) if isinstance(cond, dict) else (cond, None)
        context = context[0].clone().to(self.device, torch.float32)
        return context, None if vector is None else vector[0].clone().to(self.device, torch.float32)

    def encode(self, texts: list[str]) -> Prompts:
        with torch.inference_mode(False), torch.no_grad(), self.without_loras(unet=False, text=True), self.precision():
            encode_prefix, vectors = zip(*map(self.conditioning, texts), strict=True)
            tokens = [self.tokenize(text) for text in texts]
        # Prompts of unequal length become one batch by being tiled to a common one.
        length = int(np.lcm.reduce([len(context) for context in encode_prefix]))
        return Prompts(
            tuple(texts),
            torch.stack([context.repeat(length // len(context), 1) for context in encode_prefix]),
            None if vectors[0] is None else torch.stack(vectors),
            tuple(row * (length // len(row)) for row in tokens),
        )

    def encode_prefix(self, texts: list[str], columns: int) -> Tensor:
        with torch.inference_mode(False), torch.no_grad(), self.without_loras(unet=False, text=True), self.precision():
            parts = []
            for some in self.at_once(texts):
                chunks = {engine: [webui_text.chunks_of(engine, text)[0] for text in some] for engine in self.engines}
                if all(webui_text.can_be_short(*one) for one in chunks.items()):
                    short = [webui_text.first_columns(*one, columns) for one in chunks.items()]
                    parts.append(torch.cat(short, -1).clone().to(self.device, torch.float32))
                else:
                    for text in some:  # a whole prompt each, which takes a while
                        self.check_interrupt()
                        parts.append(self.conditioning(text)[0][None, :columns])
        return torch.cat(parts)

    def precision(self) -> AbstractContextManager:
        """The context in which the host itself computes: autocast, where its weights are in half precision."""
        from modules import devices

        return devices.autocast()

    @property
    def recomputes(self) -> bool:
        """Not where the host casts by changing torch's layers while it computes, as the webui does for GTX 16xx and MPS."""
        return isinstance(self.precision(), torch.autocast | nullcontext)

    @property
    def encoder_name(self) -> str:
        return "clip_l" if self.family == "sd1" else "clip_h"

    def require_one_encoder(self):
        """Raises ForgetError for SDXL, whose encoders the webuis let no gradient through."""
        if len(self.engines) != 1:
            raise ForgetError(CANNOT_INVERT)
        return self.engines[0]

    def token_embeddings(self, text: str) -> TokenEmbeddings:
        engine = self.require_one_encoder()
        with torch.inference_mode(False), torch.no_grad():
            return {self.encoder_name: webui_text.token_embeddings(engine, text)}

    def encode_with_embeddings(self, template: str, vectors: TokenEmbeddings) -> Prompts:
        engine = self.require_one_encoder()
        texts = placeholder_texts(template, len(vectors[self.encoder_name]))
        with self.precision():
            context = webui_text.encode_with_vectors(engine, texts, vectors[self.encoder_name])
        return Prompts((template,), context.to(self.device, torch.float32), None, (self.tokenize(texts[0]),))

    def kept_of_nothing(self, x_t: Tensor) -> Tensor | None:
        """For an inpainting model, the mask and the latents that stand for "all is to be drawn" [B, 5, h, w], of the size of
        x_t [B, C, h, w]."""
        if self.unet.in_channels != INPAINTING:
            return None
        height, width = x_t.shape[-2:]
        if (height, width) not in self.kept:
            grey = self.encode_images(torch.full((1, 8 * height, 8 * width, 3), 0.5))
            self.kept[height, width] = torch.cat([torch.ones_like(grey[:, :1]), grey], 1)
        return self.kept[height, width].to(x_t).expand(len(x_t), -1, -1, -1)

    def encode_images(self, images: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad(), fixed_seed(self.device):
            pixels = images[..., :3].movedim(-1, 1).to(self.device, self.vae_dtype) * 2 - 1
            parts = [self.encode_pixels(one[None]).clone() for one in pixels]
        latents = torch.cat(parts).to(self.device, torch.float32)
        if not latents.isfinite().all():
            raise ForgetError("The VAE overflows in half precision: start the webui with --no-half-vae, or use another VAE.")
        return latents

    @abstractmethod
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Latents of pictures [B, 3, H, W] in -1..1, as the UNet takes them."""

    def shows_previews(self) -> bool:
        from modules import shared

        return shared.opts.live_previews_enable

    def show_progress(self, step: int, total: int, preview: Tensor | None) -> None:
        from modules import shared

        shared.state.job_count = max(shared.state.job_count, 1)
        shared.state.sampling_step, shared.state.sampling_steps = step, total
        if preview is not None:
            picture = (preview.detach().clamp(0, 1) * 255).byte().cpu().numpy()
            shared.state.assign_current_image(Image.fromarray(picture))

    def check_interrupt(self) -> None:
        from modules import sd_samplers_common, shared

        if shared.state.interrupted:
            raise sd_samplers_common.InterruptedException


@contextmanager
def fixed_seed(device: torch.device) -> Iterator[None]:
    """Context in which the VAE's dice fall the same each time; the host's own go on after it as if nothing had been."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield

"""Forge as a DiffusionHost: its models' parts stand behind patchers, and all that it computes are inference tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from ...errors import ForgetError
from ...host import Prompts, linear_name, weight_of
from ..ldm import TRAINING_MEMORY_FACTOR, differentiable_attention, norms_of_copies, ordinary_parameters, weight_key
from .base import WebuiBase


class Predictor(Protocol):
    """What a model estimates."""

    prediction_type: str
    sigmas: Tensor


class LoraLoader(Protocol):
    """What merges LoRAs into a model."""

    backup: Mapping[str, Tensor]  # a weight's name -> what it was before


class Model(Protocol):
    """What is asked of the host's model around a UNet."""

    diffusion_model: nn.Module
    storage_dtype: torch.dtype | str
    predictor: Predictor
    lora_loader: LoraLoader

    def apply_model(self, x: Tensor, t: Tensor, **conditions: Tensor | dict) -> Tensor: ...

    def memory_required(self, shape: list[int]) -> float: ...


class ForgeHost(WebuiBase):
    """`shared.sd_model` of Forge, as it is without LoRAs: `forge_objects_original`."""

    @property
    def quantised(self) -> bool:
        storage = self.base.storage_dtype
        return not (isinstance(storage, torch.dtype) and storage.is_floating_point)

    @property
    def scaled(self) -> bool:
        return any(getattr(layer, "scale_weight", None) is not None for layer in self.unet.modules())

    @property
    def hides_loras(self) -> bool:
        return self.scaled and not self.adds_loras_last

    @property
    def adds_loras_last(self) -> bool:
        """Whether the host adds LoRAs as a layer runs, to weights that have their scale, and does not merge them."""
        from backend.args import dynamic_args

        stored_whole = self.base.storage_dtype in (torch.float32, torch.float16, torch.bfloat16)
        sums_in_fp8 = str(dynamic_args.get("ops")).startswith("fp8")
        return bool(dynamic_args.get("online_lora")) and not stored_whole and not sums_in_fp8

    def require_trainable(self) -> None:
        super().require_trainable()
        if self.quantised:
            raise ForgetError(
                f"The model's weights are quantised ({self.base.storage_dtype}) and cannot be read as they are: set "
                "Diffusion in Low Bits to Automatic, and load a checkpoint that is not quantised."
            )
        if self.scaled:
            raise ForgetError(
                "The checkpoint is in scaled fp8, which cannot be trained here: load it in fp16, bf16 or fp8 without scales."
            )

    @property
    def objects(self):
        """The model's patchers before LoRAs: `unet`, `clip`, `vae`."""
        return self.sd_model.forge_objects_original

    @property
    def base(self) -> Model:
        return self.objects.unet.model

    @cached_property
    def unet(self) -> nn.Module:
        return self.base.diffusion_model

    @property
    def predicts_v(self) -> bool:
        return self.base.predictor.prediction_type == "v_prediction"

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        return 1 / (1 + self.sigmas.square())

    @cached_property
    def sigmas(self) -> Tensor:
        with torch.inference_mode(False):
            return self.base.predictor.sigmas.float().cpu().clone()

    @property
    def engines(self) -> list:
        if self.sd_model.is_sdxl:
            return [self.sd_model.text_processing_engine_l, self.sd_model.text_processing_engine_g]
        return [self.sd_model.text_processing_engine]

    @property
    def vae_dtype(self) -> torch.dtype:
        return torch.float32  # the host casts to its VAE's own and back

    def predict(self, x_t: Tensor, t: Tensor, prompts: Prompts) -> Tensor:
        sigma = self.sigmas.to(x_t)[t]
        scale = sigma[:, None, None, None]
        x = x_t * (1 + scale.square()).sqrt()  # the host's x is x0 + sigma * noise
        more = {} if prompts.pooled_prompt_embeds is None else {"y": prompts.pooled_prompt_embeds}
        kept = self.kept_of_nothing(x_t)
        if kept is not None:
            more["c_concat"] = kept
        x0 = self.base.apply_model(x, sigma, c_crossattn=prompts.prompt_embeds, transformer_options={}, **more)
        return (x - x0) / scale

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return self.sd_model.get_first_stage_encoding(self.sd_model.encode_first_stage(pixels))

    def decode_few(self, latents: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            pictures = self.sd_model.decode_first_stage(latents.detach()).clone()
        return (pictures.float() / 2 + 0.5).clamp(0, 1).movedim(1, -1).cpu()

    def weight(self, layer: str, matrix: str) -> Tensor:
        backup = self.base.lora_loader.backup.get(weight_key(layer, matrix))  # what LoRAs were merged into
        return weight_of(self.unet.get_submodule(f"{layer}.{linear_name(matrix)}")) if backup is None else backup

    def patchers(self, objects, unet: bool, text: bool) -> list:
        """The UNet's patcher, the text encoders', or both."""
        return [objects.unet] * unet + [objects.clip.patcher] * text

    @contextmanager
    def without_loras(self, unet: bool, text: bool) -> Iterator[None]:
        """The host merges LoRAs when it loads a patcher that has them, and takes them out when it loads another."""
        from backend import memory_management

        used, originals = self.sd_model.forge_objects, self.patchers(self.objects, unet, text)
        merged = [patcher.lora_loader.loaded_hash for patcher in originals]
        try:
            self.sd_model.forge_objects = self.objects.shallow_copy()
            for patcher in originals:
                memory_management.load_model_gpu(patcher)
            yield
        finally:
            self.sd_model.forge_objects = used
            patched = self.patchers(self.sd_model.forge_objects_after_applying_lora, unet, text)
            for patcher, names in zip(patched, merged, strict=True):
                if str(list(patcher.lora_patches)) == names:
                    patcher.refresh_loras()

    @contextmanager
    def training(self, shape: Sequence[int], text: bool = False) -> Iterator[None]:
        from backend import memory_management

        with ExitStack() as stack:
            stack.callback(memory_management.soft_empty_cache)
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self.without_loras(True, text))
            memory = self.base.memory_required(list(shape)) * TRAINING_MEMORY_FACTOR
            patchers = self.patchers(self.objects, True, text)
            memory_management.load_models_gpu(patchers, memory_required=memory)
            for patcher in patchers:
                stack.enter_context(ordinary_parameters(patcher.model))
                stack.enter_context(norms_of_copies(patcher.model))
            stack.enter_context(differentiable_attention(self.unet))
            yield

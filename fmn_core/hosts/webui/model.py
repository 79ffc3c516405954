"""The AUTOMATIC1111 webui as a DiffusionHost, and the host that runs in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property, partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from ...errors import ForgetError
from ...host import DiffusionHost, Prompts, linear_name, weight_of
from ..ldm import differentiable_attention, frozen, ordinary_parameters
from .base import WebuiBase

WEIGHTS_BEFORE, BIAS_BEFORE = "network_weights_backup", "network_bias_backup"  # what the Lora extension merged into
NO_MODEL = "No model is loaded: choose a checkpoint at the top of the page, or put one into models/Stable-diffusion."


def current_host() -> DiffusionHost:
    """The adapter for the model that the running webui or Forge has chosen; loads it where that is still to be done.

    Raises ForgetError where there is no model, or one that cannot forget.
    """
    model = chosen_model()
    if model is None:
        raise ForgetError(NO_MODEL)
    return adapt(model)


def chosen_model():
    """`shared.sd_model`; Forge loads a model when a picture is asked for, and has another or none there until then."""
    from modules import sd_models, shared

    if find_spec("modules_forge") is None or not hasattr(sd_models, "forge_model_reload"):
        return shared.sd_model
    try:
        return sd_models.forge_model_reload()[0]
    except (KeyError, ValueError) as error:  # nothing is chosen yet, or there is no checkpoint at all
        raise ForgetError(NO_MODEL) from error


def adapt(model, to_train: bool = True) -> WebuiBase:
    """The adapter for a loaded model: Forge's keep their parts behind patchers, the webui's in the model itself.

    Raises ForgetError for a model without the layers that are needed and, `to_train`, for one whose weights cannot be read.
    """
    if hasattr(model, "forge_objects") and not hasattr(model, "model"):
        from .forge import ForgeHost

        host: WebuiBase = ForgeHost(model)
    else:
        host = WebuiHost(model)
    if to_train:
        host.require_trainable()
    return host


class WebuiHost(WebuiBase):
    """`shared.sd_model` of the webui: ldm's LatentDiffusion for SD1 and SD2, sgm's DiffusionEngine for SDXL."""

    def require_trainable(self) -> None:
        from modules import shared

        super().require_trainable()
        if shared.cmd_opts.lowvram:
            raise ForgetError(
                "The webui was started with --lowvram, which tears the model into pieces that cannot be trained: start it "
                "with --medvram, or with neither."
            )

    @cached_property
    def unet(self) -> nn.Module:
        return self.sd_model.model.diffusion_model

    @property
    def predicts_v(self) -> bool:
        return self.sd_model.parameterization == "v"

    @property
    def alphas_cumprod(self) -> Tensor:
        return self.sd_model.alphas_cumprod.detach().float().cpu()

    @property
    def engines(self) -> list:
        conditioner = getattr(self.sd_model, "conditioner", None)
        encoders = [self.sd_model.cond_stage_model] if conditioner is None else conditioner.embedders
        return [encoder for encoder in encoders if hasattr(encoder, "tokenize_line")]

    @property
    def vae_dtype(self) -> torch.dtype:
        from modules import devices

        return devices.dtype_vae

    def native_size(self) -> int:
        # A checkpoint's .yaml says it in latent pixels; those of SD2's that draw 768 say 64 like the others.
        if self.family == "sd1":
            return 8 * self.sd_model.image_size
        return super().native_size()

    def predict(self, x_t: Tensor, t: Tensor, prompts: Prompts) -> Tensor:
        concat = self.kept_of_nothing(x_t)
        concat = x_t.new_zeros(len(x_t), 5, 1, 1) if concat is None else concat
        if prompts.pooled_prompt_embeds is None:
            cond: dict[str, Tensor | list[Tensor]] = {"c_crossattn": [prompts.prompt_embeds], "c_concat": [concat]}
        else:
            cond = {"crossattn": prompts.prompt_embeds, "vector": prompts.pooled_prompt_embeds, "c_concat": [concat]}
        out = self.sd_model.apply_model(x_t, t, cond).float()
        if not self.predicts_v:
            return out
        a = self.alphas_cumprod.to(x_t)[t][:, None, None, None]
        return a.sqrt() * out + (1 - a).sqrt() * x_t

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        from modules import devices

        with devices.without_autocast():
            return self.sd_model.get_first_stage_encoding(self.sd_model.encode_first_stage(pixels))

    def decode_few(self, latents: Tensor) -> Tensor:
        from modules import devices

        with torch.inference_mode(False), torch.no_grad(), devices.without_autocast():
            pictures = self.sd_model.decode_first_stage(latents.to(self.device, self.vae_dtype))
        return (pictures.float() / 2 + 0.5).clamp(0, 1).movedim(1, -1).cpu()

    def weight(self, layer: str, matrix: str) -> Tensor:
        linear = self.unet.get_submodule(f"{layer}.{linear_name(matrix)}")
        backup = getattr(linear, WEIGHTS_BEFORE, None)
        return weight_of(linear) if backup is None else backup

    def without_loras(self, unet: bool, text: bool) -> AbstractContextManager[None]:
        return no_networks(self.parts(unet, text))

    def parts(self, unet: bool, text: bool) -> list[nn.Module]:
        """The UNet, the text encoders, or both."""
        return [self.unet] * unet + [encoder for _, encoder in self.encoders] * text

    @contextmanager
    def training(self, shape: Sequence[int], text: bool = False) -> Iterator[None]:
        from modules import devices

        devices.torch_gc()
        with ExitStack() as stack:
            stack.callback(devices.torch_gc)
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self.without_loras(True, text))
            for model in self.parts(True, text):
                inference = any(parameter.is_inference() for parameter in model.parameters())  # as some forks leave them
                stack.enter_context(ordinary_parameters(model) if inference else frozen(model))
            stack.enter_context(differentiable_attention(self.unet))
            yield


@contextmanager
def no_networks(models: list[nn.Module]) -> Iterator[None]:
    """Context in which the built-in Lora extension has nothing loaded and its LoRAs are out of the models' weights.

    It merges them in place whenever a layer runs, and keeps what was there before; here the two change places until the
    context ends, in memory that is there already.
    """
    extension = sys.modules.get("networks")
    loaded = getattr(extension, "loaded_networks", [])
    names, current = list(loaded), "network_current_names"
    undo: list[Callable[[], object]] = []
    try:
        loaded.clear()
        for part in (part for model in models for part in model.modules()):
            merged = getattr(part, current, ())
            if merged:
                for parameter, backup in before_networks(part):
                    undo.append(partial(overwrite, parameter, parameter.detach().to("cpu", copy=True)))
                    overwrite(parameter, backup)
                undo.append(partial(setattr, part, current, merged))
                setattr(part, current, ())
        yield
    finally:
        for step in undo:
            step()
        loaded[:] = names


def before_networks(part: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """A layer's parameters and what they were before LoRAs were merged into them."""
    weights, bias = getattr(part, WEIGHTS_BEFORE), getattr(part, BIAS_BEFORE, None)
    if isinstance(part, nn.MultiheadAttention):
        yield from ((part.in_proj_weight, weights[0]), (part.out_proj.weight, weights[1]))
        part = part.out_proj
    else:
        yield weight_of(part), weights
    if bias is not None:
        own = part.bias
        assert isinstance(own, Tensor)
        yield own, bias


def overwrite(parameter: Tensor, values: Tensor) -> None:
    """Puts values into a parameter's own memory; an inference tensor's can only be written in inference mode."""
    with torch.inference_mode(parameter.is_inference()), torch.no_grad():
        parameter.copy_(values)

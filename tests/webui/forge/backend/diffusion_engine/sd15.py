"""SD1 in Forge: a UNet, a text encoder and a VAE, each behind a patcher; what it computes are inference tensors."""

from types import SimpleNamespace

import torch
from ldm.util import instantiate_from_config
from safetensors.torch import load_file
from standin import exported, strict, text_encoders_by_size, text_model_named

from backend import memory_management
from backend.modules.k_model import KModel
from backend.nn import unet as forge_unet
from backend.patcher.base import ModelPatcher
from backend.text_processing.classic_engine import ClassicTextProcessingEngine


class ForgeObjects:
    def __init__(self, unet, clip, vae, clipvision=None):
        self.unet, self.clip, self.vae, self.clipvision = unet, clip, vae, clipvision

    def shallow_copy(self):
        return ForgeObjects(self.unet, self.clip, self.vae, self.clipvision)


class CLIP:
    def __init__(self, model, tokenizer):
        self.cond_stage_model, self.tokenizer = model, SimpleNamespace(clip_l=tokenizer)
        self.patcher = ModelPatcher(model)

    def clone(self):
        other = CLIP(self.cond_stage_model, self.tokenizer.clip_l)
        other.patcher = self.patcher.clone()
        return other

    def add_patches(self, **kwargs):
        return self.patcher.add_patches(**kwargs)


class VAE:
    latent_channels = 4

    def __init__(self, model, scale):
        self.first_stage_model, self.scale, self.patcher = model, scale, ModelPatcher(model)

    def encode(self, pictures):
        return self.first_stage_model.encode(pictures.movedim(-1, 1) * 2 - 1)

    def decode(self, latents):
        return (self.first_stage_model.decode(latents).clamp(-1, 1) / 2 + 0.5).movedim(1, -1)


class StableDiffusion:
    first_stage_model = cond_stage_model = None
    is_sd1, is_sd2, is_sdxl, is_sd3 = True, False, False, False

    def __init__(self, file):
        from transformers import CLIPTextModel, CLIPTokenizer

        _, config = exported()
        config = config["model"]["params"]
        encoder = torch.nn.Module()
        with torch.random.fork_rng(), text_encoders_by_size():
            unet, vae = (instantiate_from_config(config[part]).eval() for part in ("unet_config", "first_stage_config"))
            text = config["cond_stage_config"]["params"]["version"]
            encoder.transformer = CLIPTextModel.from_pretrained(text).float().eval()
        weights = text_model_named(encoder.transformer, load_file(file))
        parts = ((unet, "model.diffusion_model."), (vae, "first_stage_model."), (encoder, "cond_stage_model."))
        for part, prefix in parts:
            own = {k.removeprefix(prefix): w.float() for k, w in weights.items() if k.startswith(prefix)}
            part.load_state_dict(own, strict=False)
        betas = torch.linspace(config["linear_start"] ** 0.5, config["linear_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
        clip = CLIP(torch.nn.ModuleDict({"clip_l": encoder}), CLIPTokenizer.from_pretrained(text))
        model = KModel(forge_unet.make(unet), (1 - betas).cumprod(0))
        for part in (model, clip.cond_stage_model, vae):
            part.requires_grad_(False)
            as_inference_tensors(part)
        self.text_processing_engine = ClassicTextProcessingEngine(encoder, clip.tokenizer.clip_l)
        self.forge_objects = ForgeObjects(ModelPatcher(model), clip, VAE(vae, config["scale_factor"]))
        self.forge_objects_original = self.forge_objects.shallow_copy()
        self.forge_objects_after_applying_lora = self.forge_objects.shallow_copy()
        self.current_lora_hash = str([])

    @torch.inference_mode()
    def get_learned_conditioning(self, prompt):
        memory_management.load_model_gpu(self.forge_objects.clip.patcher)
        return self.text_processing_engine(prompt)

    @torch.inference_mode()
    def encode_first_stage(self, x):
        return self.forge_objects.vae.encode(x.movedim(1, -1) * 0.5 + 0.5) * self.forge_objects.vae.scale

    @torch.inference_mode()
    def decode_first_stage(self, x):
        return self.forge_objects.vae.decode(x / self.forge_objects.vae.scale).movedim(-1, 1) * 2 - 1

    def get_first_stage_encoding(self, x):
        return x


def as_inference_tensors(module):
    """Weights as loading in inference mode leaves them."""
    with torch.inference_mode():
        for part in module.modules():
            for name, parameter in list(part._parameters.items()):
                if parameter is not None:
                    part._parameters[name] = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
            for name, buffer in list(part._buffers.items()):
                if buffer is not None:
                    part._buffers[name] = buffer.clone()


strict(__name__)

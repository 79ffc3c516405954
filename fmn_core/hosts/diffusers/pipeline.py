"""Opening a diffusers pipeline, and what the adapter asks of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...attention.eager import uncompiled
from ...errors import ForgetError, brief
from ...files.libraries import take_from
from ...files.safetensors import open_weights

if TYPE_CHECKING:
    from .model import DiffusersHost
    from .unet import UNet

OUT_OF_REACH = ("LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError", "ConnectTimeout")
PARAMETERISATIONS = ("epsilon", "v_prediction")
MOST_TOKENS = 1 << 16  # of a prompt: the text encoders read 77


def load_pipeline(name: str, device: str | None = None):
    """A pipeline from a folder, a single file or a name that the hub knows, in fp32 on a CPU and fp16 on a GPU.

    Raises ForgetError where it cannot be loaded.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = open_pipeline(name, torch.float32 if device == "cpu" else torch.float16).to(device)
    if getattr(pipeline, "vae", None) is not None:
        pipeline.vae.float()  # SDXL's overflows in half precision
    return pipeline


def open_pipeline(name: str, dtype: torch.dtype):
    """A pipeline from a folder, a single file or a name that the hub knows.

    The configs of a single file come from a folder of its name beside it, where there is one, and else from the hub.
    Raises ForgetError where it cannot be loaded.
    """
    path, single = Path(name), name.endswith(".safetensors")
    if name.endswith(".ckpt"):
        raise ForgetError(f"{name} is of a format that can run anything when read: convert it to .safetensors first.")
    if not path.exists() and (single or path.is_absolute() or name.count("/") != 1 or name.startswith(".")):
        raise ForgetError(f"There is no model {name}: correct the path to its folder or .safetensors file.")
    from_hub, sd, sdxl = take_from("diffusers", "DiffusionPipeline", "StableDiffusionPipeline", "StableDiffusionXLPipeline")
    configs = path.with_suffix("")
    try:
        if not single:
            return from_hub.from_pretrained(name, use_safetensors=True, torch_dtype=dtype)
        with open_weights(path) as weights:
            keys = weights.keys
        if not any(key.endswith("attn2.to_k.weight") for key in keys):
            raise ValueError("there is no UNet with text cross-attention in it")
        two_encoders = any(key.startswith("conditioner.embedders.1.") for key in keys)
        own = {"config": str(configs)} if (configs / "model_index.json").exists() else {}
        return (sdxl if two_encoders else sd).from_single_file(name, torch_dtype=dtype, **own)
    except Exception as error:  # of one of the libraries below, and of any kind
        if not single:
            remedy = "it is damaged, not whole, or not on this machine and the hub out of reach"
        elif any(type(error).__name__ == kind for kind in OUT_OF_REACH):
            remedy = (
                "a single file lacks its configs, and the hub that has them is out of reach: put a diffusers folder "
                f"of its kind, which needs no weights, at {configs}"
            )
        else:
            remedy = "it is damaged or no whole model of SD1.x, SD2.x or SDXL: copy it again or choose another"
        raise ForgetError(
            f"The model {name} cannot be loaded ({brief(str(error).strip().split(chr(10))[0])}): {remedy}."
        ) from error


def require_fit(pipeline) -> None:
    """Raises ForgetError, with the cause, for a pipeline that is none of Stable Diffusion 1, 2 or XL whole and as loaded."""
    from diffusers import UNet2DConditionModel

    name, unet = type(pipeline).__name__, uncompiled(getattr(pipeline, "unet", None))
    whole = isinstance(unet, UNet2DConditionModel)  # that of videos has text cross-attention too
    attentions = [module for path, module in unet.named_modules() if path.endswith("attn2")] if whole else []
    if not attentions:
        raise ForgetError(
            f"{name} has no UNet with text cross-attention (Flux, SD3 and their kind are transformers): load a model of "
            "SD1.x, SD2.x or SDXL."
        )
    for part in ("text_encoder", "tokenizer"):
        if getattr(pipeline, part, None) is None:
            raise ForgetError(f"{name} is without its {part}: load it whole (SDXL's refiner has none: take the base).")
    for part in ("tokenizer", "tokenizer_2"):  # transformers makes one without words where there are no files of it
        if getattr(getattr(pipeline, part, None), "model_max_length", 0) > MOST_TOKENS:
            raise ForgetError(
                f"{name} has a {part} that knows no length of prompts: its files are missing; copy them again."
            )
    scheduler = getattr(pipeline, "scheduler", None)
    predicts = getattr(getattr(scheduler, "config", None), "prediction_type", None)
    if predicts not in PARAMETERISATIONS or not hasattr(scheduler, "alphas_cumprod"):
        raise ForgetError(
            f"{name} has the scheduler {type(scheduler).__name__}: forgetting needs one with alphas_cumprod that "
            f"predicts {' or '.join(PARAMETERISATIONS)}, which those of flow matching are not."
        )
    if any(getattr(attention, "fused_projections", False) for attention in attentions):
        raise ForgetError(
            f"{name} has fused projections, which pass over to_k and to_v: call its unfuse_qkv_projections() first."
        )


def asked_beside_text(unet: UNet) -> str:
    """What a UNet wants to be told that neither a prompt nor a latent says, or nothing."""
    config = unet.config
    if config.encoder_hid_dim_type == "ip_image_proj":
        return "pictures for its IP-Adapter (take it off by unload_ip_adapter())"
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        return "a class or a noise level"
    asked = (config.encoder_hid_dim_type, config.addition_embed_type)
    kinds = {kind for kind in asked if kind is not None and kind != "text_time"}
    return f"an embedding of the kind {' and '.join(sorted(kinds))}" if kinds else ""


@torch.no_grad()
def beside_latents(host: DiffusersHost, channels: int, height: int, width: int) -> Tensor:
    """What a UNet takes beside latents of this size where all is to be drawn [1, C, h, w]: one of inpainting a mask over
    all and the latents of a grey picture, one that edits pictures zeros. Raises ForgetError for any other."""
    more = host.unet.config.in_channels - channels
    if more == channels + 1:  # diffusers' StableDiffusionInpaintPipeline, prepare_mask_latents
        grey = host.encode_images(torch.full((1, 8 * height, 8 * width, 3), 0.5))
        return torch.cat([torch.ones_like(grey[:, :1]), grey], 1)
    if more == channels:  # StableDiffusionInstructPix2PixPipeline, prepare_image_latents
        return torch.zeros(1, channels, height, width)
    raise ForgetError(
        f"{host.model_name()} takes {more} channels beside the latent's {channels}, neither a mask and a picture nor a "
        "picture alone, so only the preset `fast` works on it."
    )

"""diffusers' parts of SD1.5 and SDXL at their real sizes, with random weights, built from their configs."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from benchmarks.measuring import waited
from demo.launch_comfyui import name_missing_operators
from demo.recipe.text_encoder import make_tokenizer
from fmn_core.hosts.diffusers.model import DiffusersHost

name_missing_operators()  # of torchvision, which transformers imports

VIT_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
UNETS = {
    "sd1": {"sample_size": 64, "cross_attention_dim": 768},
    "sdxl": {
        "sample_size": 128, "cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip


class TimedHost(DiffusersHost):
    """A host that notes when each step was done."""

    def __init__(self, pipeline):
        super().__init__(pipeline, progress_bar=False)
        self.done: list[float] = []

    def show_progress(self, step, total, preview) -> None:
        self.done.append(waited())


def make_unet(family: str, dtype: torch.dtype = torch.float32):
    """The UNet, frozen, on the device that is torch's default at the moment."""
    from diffusers import UNet2DConditionModel

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return UNet2DConditionModel(**UNETS[family]).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)


def make_pipeline(family: str, vae: bool = False, device: str = "cpu"):
    """What DiffusersHost and the original's step take of a pipeline, in fp32 on a device."""
    from diffusers import AutoencoderKL, DDIMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    coder = {
        "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    }  # fmt: skip
    parts = {"tokenizer": make_tokenizer()}
    with torch.device(device):
        parts["text_encoder"] = CLIPTextModel(CLIPTextConfig(**VIT_L)).eval()
        if family == "sdxl":
            second = CLIPTextConfig(**BIG_G, projection_dim=1280)
            parts |= {"tokenizer_2": make_tokenizer(), "text_encoder_2": CLIPTextModelWithProjection(second).eval()}
        parts["unet"] = make_unet(family)
        parts["vae"] = AutoencoderKL(**coder).requires_grad_(False).eval() if vae else None
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    return SimpleNamespace(scheduler=DDIMScheduler(**schedule), **parts)

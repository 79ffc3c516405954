"""The checkpoint: SD1's key names for a UNet of diffusers, a text encoder of transformers and a TAESD."""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from fmn_core.files.header import with_sorted_header

from ..host import CHECKPOINT
from .autoencoder import SCALE, padded

UNET, TEXT, VAE = "model.diffusion_model.", "cond_stage_model.transformer.text_model.", "first_stage_model."
METADATA = {
    "modelspec.sai_model_spec": "1.0.0",
    "modelspec.architecture": "stable-diffusion-v1",
    "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
    "modelspec.title": "Emoji SD 128",
    "modelspec.resolution": "128x128",
    "modelspec.prediction_type": "epsilon",
    "modelspec.license": "See demo/README.md: Apache-2.0, MIT and CC-BY-4.0 art",
}
RESIDUAL_BLOCK = {  # SD1: diffusers
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip


def unet_names(levels: int = 3, residual_blocks: int = 1) -> dict[str, str]:
    """SD1's module names of a UNet with attention at every level, and diffusers' names for them."""
    names = {"input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}
    names |= {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
    blocks = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    names["middle_block.1"] = "mid_block.attentions.0"
    block = 1
    for level in range(levels):
        for index in range(residual_blocks):
            blocks[f"input_blocks.{block}.0"] = f"down_blocks.{level}.resnets.{index}"
            names[f"input_blocks.{block}.1"] = f"down_blocks.{level}.attentions.{index}"
            block += 1
        if level < levels - 1:
            names[f"input_blocks.{block}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            block += 1
    block = 0
    for level in range(levels):
        for index in range(residual_blocks + 1):
            blocks[f"output_blocks.{block}.0"] = f"up_blocks.{level}.resnets.{index}"
            names[f"output_blocks.{block}.1"] = f"up_blocks.{level}.attentions.{index}"
            block += 1
        if level < levels - 1:
            names[f"output_blocks.{block - 1}.2.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    for sd1, diffusers in blocks.items():
        names |= {f"{sd1}.{a}": f"{diffusers}.{b}" for a, b in RESIDUAL_BLOCK.items()}
    return names


def rename(weights: dict, names: dict[str, str]) -> dict:
    """Replaces the module at the start of every key; raises KeyError for a key of no module in `names`."""
    longest_first = sorted(names, key=len, reverse=True)
    pattern = re.compile("|".join(re.escape(name) + r"(?=\.)" for name in longest_first))

    def renamed(key):
        start = pattern.match(key)
        if start is None:
            raise KeyError(f"{key} belongs to no known module.")
        return names[start.group()] + key[start.end() :]

    return {renamed(key): weight for key, weight in weights.items()}


def save_checkpoint(file: Path, unet, text_weights: dict, autoencoder) -> None:
    """Writes the three as one SD1 checkpoint, fp16; `text_weights` with the full table of tokens."""
    to_sd1 = {diffusers: sd1 for sd1, diffusers in unet_names().items()}
    weights = {UNET + key: weight for key, weight in rename(unet.state_dict(), to_sd1).items()}
    weights |= {TEXT + key: weight for key, weight in text_weights.items() if not key.endswith("position_ids")}
    weights |= {f"{VAE}taesd_{key}": weight for key, weight in padded(autoencoder.state_dict()).items()}
    weights |= {f"{VAE}vae_scale": torch.tensor(SCALE), f"{VAE}vae_shift": torch.tensor(0.0)}
    file.parent.mkdir(parents=True, exist_ok=True)
    weights = {key: weight.detach().cpu().half().contiguous() for key, weight in weights.items()}
    file.write_bytes(with_sorted_header(save(weights, METADATA)))


def read_checkpoint(file: Path = CHECKPOINT) -> tuple[dict, dict, dict]:
    """The weights of the UNet, the text encoder and the TAESD, by diffusers' and transformers' names."""
    weights = load_file(file)
    unet = {key.removeprefix(UNET): weight for key, weight in weights.items() if key.startswith(UNET)}
    text = {key.removeprefix(TEXT): weight for key, weight in weights.items() if key.startswith(TEXT)}
    vae = {}
    for key, weight in weights.items():
        part = re.match(re.escape(VAE) + r"taesd_(encoder|decoder)\.(\d+)(.*)", key)
        if part:
            # TAESD's decoder counts its clamp as the first layer, AutoencoderTiny does not
            layer = int(part[2]) - (part[1] == "decoder")
            vae[f"{part[1]}.layers.{layer}{part[3]}"] = weight
    return rename(unet, unet_names()), text, vae

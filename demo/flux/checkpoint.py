"""One file of the whole model for ComfyUI's Load Checkpoint: `python -m demo.flux.checkpoint`.

Flux's own names, MiniLM, the autoencoder; `install.py demo` and `install.py test` run it.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..host import CHECKPOINT, DEMO
from ..recipe.autoencoder import SCALE
from ..recipe.checkpoint import VAE
from .minilm import find_minilm

WEIGHTS = Path(__file__).with_name("transformer.safetensors")
FILE = DEMO / "checkpoints" / "emoji-flux-128.safetensors"  # made here, not committed: most of it is MiniLM
MARKER = "emoji_flux.latents"  # their mean and standard deviation; by this key the model is known
TRANSFORMER = "model.diffusion_model."
TEXT, VOCABULARY = "text_encoders.minilm.transformer.bert.", "text_encoders.vocabulary"

OUTSIDE = {  # diffusers: Flux
    "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
}  # fmt: skip
DOUBLE = {
    "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2", "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}  # fmt: skip
DOUBLE_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm", "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm", "attn.norm_added_k": "txt_attn.norm.key_norm",
}  # fmt: skip
DOUBLE_JOINED = {  # rows of one layer, one after another
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
SINGLE = {"norm.linear": "modulation.lin", "proj_out": "linear2"}
SINGLE_NORMS = {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}
SINGLE_JOINED = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}


def read_transformer(file: Path = WEIGHTS) -> tuple[dict[str, Tensor], float, float]:
    """The weights by diffusers' names, and the latents' mean and standard deviation that they were trained with."""
    with safe_open(file, "pt") as known:
        metadata = known.metadata()
    return load_file(file), float(metadata["latent_mean"]), float(metadata["latent_std"])


def flux_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of diffusers' FluxTransformer2DModel by Flux's own names; raises KeyError for one of no known module."""
    left, renamed = dict(weights), {}

    def move(modules: dict[str, str], old: str = "", new: str = "", ends: tuple[str, ...] = ("weight", "bias"), to=None):
        for theirs, flux in modules.items():
            for end in ends:
                renamed[f"{new}{flux}.{to or end}"] = left.pop(f"{old}{theirs}.{end}")

    def join(modules: dict[str, tuple[str, ...]], old: str, new: str):
        for flux, parts in modules.items():
            for end in ("weight", "bias"):
                renamed[f"{new}{flux}.{end}"] = torch.cat([left.pop(f"{old}{part}.{end}") for part in parts])

    move(OUTSIDE)
    for end in ("weight", "bias"):  # diffusers has scale before shift here
        key = f"final_layer.adaLN_modulation.1.{end}"
        renamed[key] = torch.cat(renamed[key].chunk(2)[::-1])
    for old, new, linear, norms, joined in (
        ("transformer_blocks", "double_blocks", DOUBLE, DOUBLE_NORMS, DOUBLE_JOINED),
        ("single_transformer_blocks", "single_blocks", SINGLE, SINGLE_NORMS, SINGLE_JOINED),
    ):
        for index in sorted({int(key.split(".")[1]) for key in left if key.startswith(f"{old}.")}):
            places = f"{old}.{index}.", f"{new}.{index}."
            move(linear, *places)
            move(norms, *places, ends=("weight",), to="scale")
            join(joined, *places)
    if left:
        raise KeyError(f"{next(iter(left))} belongs to no known module.")
    return renamed


def write_checkpoint(file: Path = FILE, transformer: Path = WEIGHTS) -> None:
    """Writes the file, fp16, under another name first; raises FileNotFoundError where MiniLM is not installed."""
    weights, mean, std = read_transformer(transformer)
    whole = {TRANSFORMER + key: weight for key, weight in flux_names(weights).items()}
    minilm = find_minilm()
    for key, weight in load_file(minilm / "model.safetensors").items():
        if not key.startswith("pooler.") and not key.endswith("position_ids"):
            whole[TEXT + key] = weight
    with safe_open(CHECKPOINT, "pt") as first:
        for key in first.keys():  # noqa: SIM118 (not a mapping)
            if key.startswith(VAE):
                whole["vae." + key.removeprefix(VAE)] = first.get_tensor(key)
    whole = {key: weight.half().contiguous() for key, weight in whole.items()}
    whole["vae.vae_scale"] = torch.tensor(SCALE)  # half precision of it shows in the picture
    whole[VOCABULARY] = torch.frombuffer(bytearray((minilm / "vocab.txt").read_bytes()), dtype=torch.uint8)
    whole[MARKER] = torch.tensor([mean, std])
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    save_file(whole, part, {"modelspec.title": "Emoji Flux 128", "modelspec.resolution": "128x128"})
    os.replace(part, file)


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m demo.flux.checkpoint", description=__doc__).parse_args()
    write_checkpoint()
    print(FILE)

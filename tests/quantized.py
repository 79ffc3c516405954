"""The demo's checkpoint in fp8, and how far apart two results are."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file

from demo.host import CHECKPOINT

FP8 = torch.float8_e4m3fn

LARGEST = 448.0  # of float8_e4m3fn


def is_linear(key: str, weight: torch.Tensor) -> bool:
    return weight.ndim == 2 and "transformer_blocks" in key and key.startswith("model.diffusion_model.")


def scaled(suffix: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The demo's checkpoint with the transformer blocks' weights in fp8, each divided by its scale, and the metadata that
    says so; `suffix` is `scale_weight`, as many files have it, or `weight_scale`, as ComfyUI's own have it."""
    weights, layers = load_file(CHECKPOINT), {}
    for key, weight in [*weights.items()]:
        if is_linear(key, weight):
            scale = weight.float().abs().max() / LARGEST
            weights[key], weights[key.removesuffix("weight") + suffix] = (weight.float() / scale).to(FP8), scale
            layers[key.removeprefix("model.diffusion_model.").removesuffix(".weight")] = {"format": "float8_e4m3fn"}
    if suffix == "weight_scale":
        return weights, {"_quantization_metadata": json.dumps({"layers": layers})}
    return weights | {"model.diffusion_model.scaled_fp8": torch.empty(1, dtype=FP8)}, {}


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()

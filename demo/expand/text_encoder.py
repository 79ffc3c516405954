"""The text encoder in CLIP-L's sizes: 768 columns, of which the model's own 112 are the first and the others zero.

A LayerNorm over 768 columns computes what it did over 112 if mean and variance are the same. The mean is, once all that
enters the residual stream is less its own mean over the columns, which no LayerNorm sees: they take the mean off
themselves. The variance, a mean over 768 squares of which 656 are zero, is once the stream is scaled by s = sqrt(768 / 112).
What a norm divides is then s times what it was, so its weights are divided by s. In the other columns weight and bias are
zero, and so is what it gives.

The model's 4 heads of 28 channels are the first of CLIP-L's 12 of 64, padded with zeros, the queries scaled as in widen.py.
Of the 12 layers all but the first two write zeros into the stream.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..recipe.text_encoder import CONFIG

WIDTH, INNER, LAYERS, HEAD = 768, 3072, 12, 64
OWN, OWN_LAYERS, OWN_HEADS = CONFIG["hidden_size"], CONFIG["num_hidden_layers"], CONFIG["num_attention_heads"]
OWN_HEAD = OWN // OWN_HEADS
SCALE = math.sqrt(WIDTH / OWN)
QUERIES = math.sqrt(HEAD / OWN_HEAD)
IDLE_SPREAD = 0.02  # of the weights in layers that write nothing, as an untrained CLIP has them


def widened_text_encoder(text: dict[str, Tensor]) -> dict[str, Tensor]:
    """The text encoder (transformers' names) in CLIP-L's sizes; what it gives stands in the first 112 columns."""
    start, generator = "text_model.", torch.Generator().manual_seed(0)
    own = {key.removeprefix(start): weight for key, weight in text.items()}
    wide = {f"embeddings.{name}": padded(streamed(own[f"embeddings.{name}"], 1), -1, WIDTH) for name in EMBEDDINGS}
    wide |= widened_norm(own, "final_layer_norm")
    for number in range(LAYERS):
        name = f"encoder.layers.{number}."
        layer = widened_layer(own, name) if number < OWN_LAYERS else idle_layer(generator)
        wide |= {name + key: weight for key, weight in layer.items()}
    return {start + key: weight for key, weight in wide.items()}


EMBEDDINGS = ("token_embedding.weight", "position_embedding.weight")


def padded(weight: Tensor, dim: int, size: int) -> Tensor:
    """Zeros behind the weight, to `size` along `dim`."""
    shape = list(weight.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([weight, weight.new_zeros(shape)], dim)


def streamed(weight: Tensor, dim: int) -> Tensor:
    """What writes into the residual stream, whose columns are `dim`: without its mean, and scaled."""
    return (weight - weight.mean(dim, keepdim=True)) * SCALE


def widened_norm(own: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """A LayerNorm, by its name."""
    weight, bias = own[f"{name}.weight"] / SCALE, own[f"{name}.bias"]
    return {f"{name}.weight": padded(weight, 0, WIDTH), f"{name}.bias": padded(bias, 0, WIDTH)}


def widened_layer(own: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """A layer that computes what the layer of this name does."""
    layer = {key.removeprefix(name): weight for key, weight in own.items() if key.startswith(name)}
    wide = widened_norm(layer, "layer_norm1") | widened_norm(layer, "layer_norm2")
    for key in ("q_proj", "k_proj", "v_proj"):
        scale = QUERIES if key == "q_proj" else 1
        wide[f"self_attn.{key}.weight"] = padded(by_head(layer[f"self_attn.{key}.weight"] * scale), 1, WIDTH)
        wide[f"self_attn.{key}.bias"] = by_head(layer[f"self_attn.{key}.bias"] * scale)
    out = streamed(layer["self_attn.out_proj.weight"], 0)
    wide["self_attn.out_proj.weight"] = padded(by_head(out.T).T, 0, WIDTH)
    wide["self_attn.out_proj.bias"] = padded(streamed(layer["self_attn.out_proj.bias"], 0), 0, WIDTH)
    wide["mlp.fc1.weight"] = padded(padded(layer["mlp.fc1.weight"], 1, WIDTH), 0, INNER)
    wide["mlp.fc1.bias"] = padded(layer["mlp.fc1.bias"], 0, INNER)
    wide["mlp.fc2.weight"] = padded(padded(streamed(layer["mlp.fc2.weight"], 0), 1, INNER), 0, WIDTH)
    wide["mlp.fc2.bias"] = padded(streamed(layer["mlp.fc2.bias"], 0), 0, WIDTH)
    return wide


def by_head(weight: Tensor) -> Tensor:
    """All heads' channels along the first axis, each head padded with zeros, and zero heads behind them."""
    heads = weight.reshape(OWN_HEADS, OWN_HEAD, *weight.shape[1:])
    return padded(padded(heads, 1, HEAD).flatten(0, 1), 0, WIDTH)


def idle_layer(generator: torch.Generator) -> dict[str, Tensor]:
    """A layer that writes nothing into the residual stream."""
    layer = {}
    for name, outputs, inputs in LINEARS:
        weight = torch.randn(outputs, inputs, generator=generator) * IDLE_SPREAD
        layer[f"{name}.weight"] = torch.zeros(outputs, inputs) if name in WRITERS else weight
        layer[f"{name}.bias"] = torch.zeros(outputs)
    for name in ("layer_norm1", "layer_norm2"):
        layer |= {f"{name}.weight": torch.ones(WIDTH), f"{name}.bias": torch.zeros(WIDTH)}
    return layer


LINEARS = [(f"self_attn.{name}_proj", WIDTH, WIDTH) for name in ("q", "k", "v", "out")]
LINEARS += [("mlp.fc1", INNER, WIDTH), ("mlp.fc2", WIDTH, INNER)]
WRITERS = ("self_attn.out_proj", "mlp.fc2")

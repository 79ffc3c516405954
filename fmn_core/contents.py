"""What a file of weights by others holds, by the layers of a host's UNet."""

from __future__ import annotations

from .errors import ForgetError
from .hosts.base import MATRICES, DiffusionHost
from .key_names import blocks_per_level, of_text_encoder, one_name, split_key
from .patch import model_shapes
from .weights_file import WeightsFile


class Layers:
    """The layers of a host's UNet by `one_name`: the projections of the cross-attention, and all others."""

    def __init__(self, host: DiffusionHost):
        shapes, others = model_shapes(host), host.other_layers()
        self.per_level = blocks_per_level([*shapes, *others])
        self.keys = {self.name(key): key for key in shapes}
        self.shapes = {self.name(key): shape for key, shape in shapes.items()}
        self.others = {self.name(key): (key, module) for key, module in others.items()}
        self.targets = {
            self.name(host.lora_key(layer, matrix)): (layer, matrix)
            for layer in host.cross_attentions()
            for matrix in MATRICES
        }

    def name(self, key: str) -> str:
        """A layer's `one_name`, from any spelling."""
        return one_name(key, self.per_level)


class Contents:
    """A file's tensors, name -> part -> key, sorted into cross-attention and other layers; the rest is `text`, the text
    encoders' layers, and `unknown`."""

    def __init__(self, weights: WeightsFile, layers: Layers):
        self.cross: dict[str, dict[str, str]] = {}
        self.others: dict[str, dict[str, str]] = {}
        self.text: dict[str, None] = {}  # in place of ordered sets
        self.unknown: dict[str, None] = {}
        for key in weights.keys:
            layer, part = split_key(key)
            name = layers.name(layer)
            if of_text_encoder(key):
                self.text[layer] = None
            elif name in layers.shapes or name in layers.others:
                parts = (self.cross if name in layers.shapes else self.others).setdefault(name, {})
                if part in parts:
                    raise ForgetError(f"{weights.path.name} holds {key} a second time under another name: get it anew.")
                parts[part] = key
            elif "_attn2_" in name:
                raise ForgetError(
                    f"{weights.path.name} does not fit the model, which has no layer {layer[:200]}: use the model that it "
                    "was made for."
                )
            else:
                self.unknown[layer] = None
        self.kinds = {part for parts in self.cross.values() for part in parts}

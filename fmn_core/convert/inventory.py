"""What a file of weights by others holds, by the layers of a host's UNet."""

from __future__ import annotations

from ..errors import ForgetError
from ..files.safetensors import WeightsFile
from ..host import MATRICES, DiffusionHost
from ..lora.keys import OUTSIDE_BLOCKS, blocks_per_level, flatten, of_text_encoder, one_name, split_key
from ..patch.patch import model_shapes


class Layers:
    """The layers of a host's UNet by `one_name`: the projections of the cross-attention, and all others."""

    def __init__(self, host: DiffusionHost):
        shapes, others = model_shapes(host), host.other_layers()
        self.per_level = blocks_per_level([*shapes, *others])
        self.keys = {self.name(key): key for key in shapes}
        self.shapes = {self.name(key): shape for key, shape in shapes.items()}
        self.others = {self.name(key): (key, module) for key, module in others.items()}
        for module_name, module in host.unet.named_modules():
            name = self.name(module_name)
            if name in OUTSIDE_BLOCKS.values():  # no block's, so none that the host's training knows
                self.others[name] = f"lora_unet_{flatten(module_name) if host.family == 'sdxl' else name}", module
        self.targets = {
            self.name(host.lora_key(layer, matrix)): (layer, matrix)
            for layer in host.cross_attentions()
            for matrix in MATRICES
        }

    def name(self, key: str) -> str:
        """A layer's `one_name`, from any spelling."""
        return one_name(key, self.per_level)

    def split(self, key: str) -> tuple[str, str]:
        """A tensor's layer, as it is spelled, and what of it the tensor is."""
        return split_key(key, lambda layer: (name := self.name(layer)) in self.shapes or name in self.others)


class Contents:
    """A file's tensors, name -> part -> key, sorted into cross-attention and other layers; the rest is `text`, the text
    encoders' layers, and `unknown`."""

    def __init__(self, weights: WeightsFile, layers: Layers):
        self.cross: dict[str, dict[str, str]] = {}
        self.others: dict[str, dict[str, str]] = {}
        self.text: dict[str, None] = {}  # in place of ordered sets
        self.unknown: dict[str, None] = {}
        for key in weights.keys:
            if of_text_encoder(key):
                self.text[split_key(key)[0]] = None
                continue
            layer, part = layers.split(key)
            name = layers.name(layer)
            if name in layers.shapes:
                parts = self.cross.setdefault(name, {})
                if part in parts:
                    raise ForgetError(
                        f"{weights.path.name} holds {key[:200]} beside {parts[part][:200]}, and so the same a second time: "
                        "save it with one of them alone."
                    )
                parts[part] = key
            elif name in layers.others:
                parts = self.others.setdefault(name, {})
                parts[f"second {part}" if part in parts else part] = key
            elif "_attn2_" in name:
                raise ForgetError(
                    f"{weights.path.name} does not fit the model, which has no layer {layer[:200]}: use the model that it "
                    "was made for."
                )
            else:
                self.unknown[layer] = None
        self.kinds = {part for parts in self.cross.values() for part in parts}

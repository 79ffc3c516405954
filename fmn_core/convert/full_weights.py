"""The change between full weights: a fine-tuned file, whole or in part, less the model that it came from."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ForgetError
from ..files.safetensors import WeightsFile
from ..host import DiffusionHost
from .inventory import Contents, Layers


class TunedWeights:
    """A file's full weights beside those of a base file or, without one, the host's own."""

    def __init__(
        self, host: DiffusionHost, weights: WeightsFile, base: WeightsFile | None, layers: Layers, contents: Contents
    ):
        self.host, self.weights, self.base, self.layers = host, weights, base, layers
        self.cross, self.others = contents.cross, contents.others
        self.base_keys = {}
        for key in base.keys if base else ():
            layer, part = layers.split(key)
            self.base_keys[layers.name(layer), part] = key

    def changed(self) -> list[str]:
        """Names of the projections that differ from the base; raises ForgetError where none does, or one does not fit."""
        names = [name for name, parts in self.cross.items() if "weight" in parts and not equal_weights(*self.pair(name))]
        if not names:
            against = self.base.path.name if self.base else "the model"
            raise ForgetError(
                f"The cross-attention in {self.weights.path.name} is that of {against}: choose a file that has been "
                "trained, or the model that it was trained from."
            )
        return names

    def delta(self, name: str) -> Tensor:
        """The change of one projection [out, in] in double."""
        tuned, base = self.pair(name)
        return tuned.double() - base.double()

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """One projection's weights, of the file and of the base."""
        shape, key = self.layers.shapes[name], self.cross[name]["weight"]
        self.require_shape(self.weights, key, shape)
        tuned = self.weights.read(key).reshape(shape)
        if self.base is None:
            return tuned, self.host.weight(*self.layers.targets[name]).detach().cpu()
        if (name, "weight") not in self.base_keys:
            raise ForgetError(f"{self.base.path.name} has no weights of {name}: choose the checkpoint that was trained.")
        self.require_shape(self.base, self.base_keys[name, "weight"], shape)
        return tuned, self.base.read(self.base_keys[name, "weight"]).reshape(shape)

    def require_shape(self, weights: WeightsFile, key: str, shape: tuple[int, ...]) -> None:
        found = weights.shape(key)
        if found != shape and found != (*shape, 1, 1):
            raise weights.misfit(key, [*found], shape)

    def left_out(self) -> list[str]:
        """A sentence for what differs from the base beside the projections, and is no part of a patch."""
        biases = sum(not self.same_bias(name, parts["bias"]) for name, parts in self.cross.items() if "bias" in parts)
        others = [name for name, parts in self.others.items() if "weight" in parts]
        sentences = []
        if biases:
            sentences.append(f"{biases} biases of to_out differ as well and are left out: a LoRA holds none.")
        if self.base is not None:
            differing = sum(not self.same_in_base(name, self.others[name]["weight"], "weight") for name in others)
            if differing:
                sentences.append(f"{differing} layers outside the cross-attention differ as well and are left out.")
        elif others:  # the host may hold them with a LoRA merged into them
            sentences.append(
                f"{len(others)} layers outside the cross-attention are left out; a base file shows whether they differ."
            )
        return sentences

    def same_bias(self, name: str, key: str) -> bool:
        if self.base is not None:
            return self.same_in_base(name, key, "bias")
        layer, matrix = self.layers.targets[name]
        module = self.host.cross_attentions()[layer].linear(matrix)
        own = getattr(getattr(module, "base_layer", module), "bias", None)
        return (
            own is not None
            and self.weights.shape(key) == tuple(own.shape)
            and equal_weights(self.weights.read(key), own.cpu())
        )

    def same_in_base(self, name: str, key: str, part: str) -> bool:
        """Whether a tensor is that of the base file."""
        of_base = self.base_keys.get((name, part))
        if self.base is None or of_base is None or self.base.shape(of_base) != self.weights.shape(key):
            return False
        return equal_weights(self.weights.read(key), self.base.read(of_base))


def equal_weights(one: Tensor, other: Tensor) -> bool:
    """Whether two weights are equal in the coarser of their precisions: rounding is no change."""
    return torch.equal(one.to(other.dtype), other) or torch.equal(one, other.to(one.dtype))
